"""Turn a dense DiT into a Mixture-of-Experts and train on."""

from dpt.config.command import parse_command
from dpt.errors import reported
from dpt.training.run import run_stage

if __name__ == "__main__":
    with reported("upcycle"):
        run_stage(parse_command("upcycle", __doc__ or "", "training"), "upcycle")
