"""Speed, as shares of what the machine can do and relative to baselines, all in one run."""

from dpt.cpu.settings import limit_spinning

limit_spinning()  # as the launchers do, before torch is loaded
