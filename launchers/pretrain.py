"""Train a class-conditional DiT from scratch."""

from dpt.config.command import parse_command
from dpt.errors import reported
from dpt.training.run import run_stage

if __name__ == "__main__":
    with reported("pretrain"):
        run_stage(parse_command("pretrain", __doc__ or "", "training"), "pretrain")
