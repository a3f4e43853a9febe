"""The sub-commands of `dpt`, one a module; imported one at a time, so they may import what they need."""
