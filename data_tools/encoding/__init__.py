"""Latent encoding: from a reader's samples to shards, in jobs that can be stopped, repeated and shared."""
