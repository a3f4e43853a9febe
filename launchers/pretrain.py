"""Train a class-conditional DiT from scratch."""

from dpt.commands.training import run_launcher

if __name__ == "__main__":
    run_launcher("pretrain", __doc__ or "")
