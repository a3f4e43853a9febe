"""Fine-tune a DiT for perception tasks, from pre-trained weights."""

from dpt.commands.training import run_launcher

if __name__ == "__main__":
    run_launcher("finetune", __doc__ or "")
