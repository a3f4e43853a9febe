"""Make ranks act together: flags agreed on at every step, and stop requests from signals."""

import os
import signal
from typing import Any

import torch

from dpt import distributed


class Control:
    """Flags summed over ranks on the CPU, and the request, by a signal to any one rank, to stop after the current step.

    It listens for signals until it is closed.
    """

    def __init__(self) -> None:
        alone = distributed.world_size() == 1
        self._group = None if alone else torch.distributed.new_group(backend="gloo")
        self.signal = ""
        """Name of the signal that asked this rank to stop; empty if none."""
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"Interrupted: the run is saved after this step and stops; a second Ctrl-C stops it at once.\n")

    def agree(self, **flags: float) -> dict[str, float]:
        """Sum the flags over ranks. Collective; every rank passes the same names."""
        if self._group is None:
            return {name: float(value) for name, value in flags.items()}
        total = torch.tensor([float(flags[name]) for name in sorted(flags)], dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self._group)
        return dict(zip(sorted(flags), total.tolist(), strict=True))
