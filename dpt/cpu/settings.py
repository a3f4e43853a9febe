"""Settings of a process that computes on a CPU: its threads and memory allocator. Importing this loads no torch."""

import contextlib
import ctypes
import os


def limit_spinning() -> None:
    """Let CPU threads that wait for each other spin only for microseconds before sleeping. Takes effect before torch is loaded.

    Longer spinning makes them many times slower once anything else runs on the machine; sleeping at once, a quarter slower.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def share_threads(processes: int) -> None:
    """Give this process an equal share of the machine's threads, unless the environment sets their number."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def keep_freed_memory() -> None:
    """Let the C library, if it is glibc, keep freed memory for the next step's tensors.

    By default every large array's pages go back to the system and are cleared again: a tenth of an MoE step's time on a CPU,
    and half of what scoring a depth map takes, beside a GPU too.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: bytes from which memory comes from the system directly
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free bytes from which the heap shrinks


def return_freed_memory() -> None:
    """Release, once, the memory that `keep_freed_memory` kept, if the C library is glibc: after a model no longer needed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
