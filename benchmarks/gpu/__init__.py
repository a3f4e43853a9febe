"""Acceptance test of a GPU machine: parity, training, sampling and the parts around them (`python -m benchmarks.gpu`)."""
