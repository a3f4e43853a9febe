"""The ranks of a run: startup and shutdown, small reductions, messages from rank 0.

Works the same in one process that never started anything (rank 0 of 1), under `deepspeed`, `torchrun` and `srun`. Importing
this module loads neither torch nor DeepSpeed.
"""

import contextlib
import logging
import os
import random
import re
import resource
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dpt.cpu.settings import keep_freed_memory, limit_spinning, share_threads
from dpt.errors import UserError, file_problem

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_OPEN_FILES = 16384

# --- start and end ------------------------------------------------------------------------------------------------------


def set_environment() -> None:
    """Set what `torch.distributed` reads and a launcher did not set: from SLURM's variables, else as the only process.

    Call it before torch is loaded (see `dpt.cpu.settings.limit_spinning`).
    """
    limit_spinning()
    srun = os.environ if "SLURM_STEP_NUM_TASKS" in os.environ else {}  # not set in a batch script's own shell
    os.environ.setdefault("RANK", srun.get("SLURM_PROCID", "0"))
    os.environ.setdefault("LOCAL_RANK", srun.get("SLURM_LOCALID", "0"))
    os.environ.setdefault("WORLD_SIZE", srun.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_TASKS_PER_NODE" in srun:  # such as "8(x2)"
        os.environ.setdefault("LOCAL_WORLD_SIZE", re.match(r"\d+", srun["SLURM_STEP_TASKS_PER_NODE"])[0])  # type: ignore[index]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "29500" if int(os.environ["WORLD_SIZE"]) > 1 else str(free_port())


def free_port() -> int:
    """Find a free port below the outgoing connections' range, as one of those could take it before it is used."""
    for port in random.Random().sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("100 ports between 20000 and 32767 are all in use; set MASTER_PORT to a free one.")


def set_device() -> None:
    """Make this process's GPU the current one, if there are GPUs.

    Call it before anything else uses CUDA (`torch.cuda.is_available` does not): whatever does opens a context of
    some hundred MiB on the current GPU, which is the first one for all ranks until this is done, and for every thread anew.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())


def init(timeout_s: float = 1800.0) -> None:
    """Start `torch.distributed` through DeepSpeed, on NCCL with GPUs and gloo without. Calling it again does nothing.

    `timeout_s`: seconds after which a collective that some rank never joins becomes an error, in every group of processes.
    """
    set_environment()
    import torch

    if torch.distributed.is_initialized():
        return
    set_device()
    keep_freed_memory()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _unneeded("mlflow"):
        import deepspeed
    from deepspeed.ops import __compatible_ops__

    _quiet()
    if not torch.cuda.is_available():
        share_threads(local_world_size())
    # DeepSpeed would compile a shared-memory collective at first use: half a minute, and a crash without a compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    _set_default_timeout(timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _set_default_timeout(timeout: timedelta) -> None:
    """Set the timeout of groups made without one, such as DeepSpeed's for experts and data parallelism."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def raise_file_limit() -> int:
    """Raise the soft limit of open files as far as allowed, to at most 16,384. Returns it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < min(hard, _OPEN_FILES):
        soft = min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return soft


@contextlib.contextmanager
def _unneeded(package: str) -> Iterator[None]:
    """Make `package` appear absent: DeepSpeed's autotuner, which nobody calls, would spend seconds loading MLflow."""
    loaded = package in sys.modules
    if not loaded:
        sys.modules[package] = None  # type: ignore[assignment]
    yield
    if not loaded:
        del sys.modules[package]


def _quiet() -> None:
    """Keep DeepSpeed's remarks and its deprecated calls off the console; errors stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def shutdown() -> None:
    """Shut down together: without the barrier and explicit end, gloo processes sometimes abort at exit."""
    if not _initialized():
        return
    import deepspeed

    barrier()
    deepspeed.comm.destroy_process_group()


def _initialized() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's number among all, 0 before `init`."""
    if not _initialized():
        return 0
    import torch

    return torch.distributed.get_rank()


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this node, as reported by the launcher."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def world_size() -> int:
    """Number of processes, 1 before `init`."""
    if not _initialized():
        return 1
    import torch

    return torch.distributed.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes records."""
    return rank() == 0


def device() -> "torch.device":
    """This process's device: its GPU, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


# --- collectives --------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Sum over ranks, by name; every rank passes the same names. One collective, in float64."""
    if world_size() == 1:
        return {name: float(value) for name, value in values.items()}
    import torch

    names = sorted(values)
    total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device())
    torch.distributed.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def all_reduce_mean(values: Mapping[str, float]) -> dict[str, float]:
    """Average over ranks, by name; every rank passes the same names."""
    return {name: total / world_size() for name, total in all_reduce_sum(values).items()}


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank. For small Python objects of our own processes."""
    if world_size() == 1:
        return [value]
    import torch

    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s `value`, on every rank."""
    if world_size() == 1:
        return value
    import torch

    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=source)
    return box[0]


class _SharedError(UserError):
    """A UserError that all ranks already raise."""


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Turn a rank's UserError, or OSError about a file, into a UserError with its sentence on all ranks, so that none is
    left waiting, and rank 0 reports it. Collective; blocks may be nested: a rank may fail before the inner one."""
    problem = ""
    try:
        yield
    except _SharedError:
        raise
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if not (problem := file_problem(error)):
            raise
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        raise _SharedError(problems[0])


# --- messages -----------------------------------------------------------------------------------------------------------


def log(message: str) -> None:
    """Print one line, on rank 0 only."""
    if is_main():
        print(message, flush=True)
