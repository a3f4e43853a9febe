"""Run a function on several gloo ranks of this machine: `run_ranks(2, fn, *args)` returns fn(rank's results) by rank. Run a
script without starting an interpreter: `run_script(log, path, *arguments)` returns its exit code."""

import gc
import importlib
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpt import distributed

RANKS_TIMEOUT_S = 300.0
"""Of exchanges between ranks that begin as launched ones do."""
_LIBRARIES = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.autoencoders.autoencoder_kl",
    "dpt.training.loop",
    "dpt.training.preflight",
    "matplotlib.figure",
    "torch._functorch.aot_autograd",
    "torch._inductor.config",
)


def load_libraries() -> None:
    """Load here what ranks that train need, before they are forked: it takes longer than most of them do."""
    with pytest.MonkeyPatch.context() as patch, distributed._unneeded("mlflow"):
        patch.setenv("DS_ACCELERATOR", "cpu")
        for module in _LIBRARIES:
            importlib.import_module(module)


def run_script(log: Path, *words: str, timeout_s: float = 600.0) -> int | None:
    """Run a script, or `-m MODULE`, in a process forked from this one, which has loaded what takes longest. Returns its exit
    code; what it says goes to `log`."""
    load_libraries()
    process = get_context("fork").Process(target=_run_script, args=(log, words))
    process.start()
    process.join(timeout_s)
    return process.exitcode


def _run_script(log: Path, words: tuple[str, ...]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        sys.argv = list(words[1:] if words[0] == "-m" else words)
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")


def _rank_main(
    rank: int, world_size: int, folder: str, port: int | None, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # what was loaded before stays: not to be looked through at every collection
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    try:
        if port is not None:
            torch.cuda.is_available = lambda: False
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
            distributed.init(timeout_s=RANKS_TIMEOUT_S)
        else:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        torch.save(fn(*args), f"{folder}/unfinished-{rank}")
        os.rename(f"{folder}/unfinished-{rank}", f"{folder}/result-{rank}.pt")
        # Without waiting, a rank that ends early can abort the others; in a barrier too, which it may leave before them.
        while len(list(Path(folder).glob("result-*.pt"))) < world_size:
            time.sleep(0.01)
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0, as_launched: bool = False
) -> list[Any]:
    """fn(*args) in `world_size` processes with torch.distributed initialised (gloo); their results in order of rank.

    The processes are forked, so fn may be a closure and nothing is imported again; results go through torch.save. An exception
    in any rank, or the time limit, ends all of them and raises AssertionError with the rank's traceback. `as_launched`: begin
    as `dpt.distributed.init` does with a launcher's variables, and so with DeepSpeed, on CPUs.
    """
    context = get_context("fork")
    if as_launched:
        load_libraries()
    port = distributed.free_port() if as_launched else None
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, port, fn, args)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            while any(p.is_alive() for p in processes) and not any(Path(folder).glob("error-*")):
                assert time.monotonic() < deadline, f"ranks are not done after {timeout_s} s"
                for process in processes:
                    process.join(0.05)
            errors = [f"rank {p.stem[6:]}: {p.read_text()}" for p in sorted(Path(folder).glob("error-*"))]
            assert not errors, "\n".join(errors)
            codes = [p.exitcode for p in processes]
            assert not any(codes), f"ranks ended with exit codes {codes}"
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(f"{folder}/result-{rank}.pt", weights_only=True) for rank in range(world_size)]
