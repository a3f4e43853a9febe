"""Training: the engine, the step, the loop, and checkpoints that survive anything."""
