"""All CPU tuning, so that the network and its training need not mention it."""
