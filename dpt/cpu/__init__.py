"""CPU tuning, all of it: the network and its training read as if it did not exist."""
