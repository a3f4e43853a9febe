"""Tiny synthetic data sets in the native layout of every set that can be read, for trying commands and rehearsing studies."""
