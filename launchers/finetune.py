"""Fine-tune a DiT for perception tasks, from pre-trained weights."""

from dpt.config.command import parse_command
from dpt.errors import reported
from dpt.training.run import run_stage

if __name__ == "__main__":
    with reported("finetune"):
        run_stage(parse_command("finetune", __doc__ or "", "training"), "finetune")
