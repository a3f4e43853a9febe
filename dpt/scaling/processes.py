"""A launch as a process: a new interpreter, or a fork of one that has already loaded the libraries."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpt.cpu.settings import limit_spinning

_LIBRARIES = [
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "diffusers.models.autoencoders.autoencoder_kl",
    "dpt.evaluation.runner",
    "dpt.training.run",
    "matplotlib.pyplot",
]
"""Libraries that launchers load first (engine, VAE, pictures): seconds each, longer than a short launch computes."""


@dataclass(frozen=True, kw_only=True)
class LaunchProcess:
    """A running process, however it was started."""

    exit_code: Callable[[], int | None]
    """Returns the exit code: None while it runs; negative: the signal that ended it."""
    terminate: Callable[[], None]
    """Ask it to end."""
    wait: Callable[[], object]
    """Wait until it has ended."""


def start_fresh(words: list[str], log: Path, environment: dict[str, str]) -> LaunchProcess:
    """Run a command, appending its output to `log`."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return LaunchProcess(exit_code=process.poll, terminate=process.terminate, wait=process.wait)


def start_forked(words: list[str], log: Path, environment: dict[str, str]) -> LaunchProcess:
    """Run `python SCRIPT ...` or `python -m MODULE ...` as a fork of a process that has loaded the libraries; not for GPUs.

    That process has one thread and has computed nothing, so a fork of it is as good as a new interpreter.
    """
    limit_spinning()  # in the forked process's environment, before it loads torch
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    process = context.Process(target=_run_script, args=(words[1:], log, environment))
    process.start()
    return LaunchProcess(exit_code=lambda: process.exitcode, terminate=process.terminate, wait=process.join)


def _run_script(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run the script or module as the forked process's main program, with its own arguments, environment and output."""
    import torch

    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # the library reads it only once, when loaded
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without them
