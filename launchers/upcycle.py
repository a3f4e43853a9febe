"""Turn a dense DiT into a Mixture-of-Experts and train on."""

from dpt.commands.training import run_launcher

if __name__ == "__main__":
    run_launcher("upcycle", __doc__ or "")
