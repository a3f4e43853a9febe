"""Tiny synthetic data sets in the native layout of every set that can be read: to try commands and rehearse studies on."""
