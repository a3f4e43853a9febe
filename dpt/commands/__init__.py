"""Subcommands of `dpt`, one per module; only the one in use is imported, so each may import what it needs."""
