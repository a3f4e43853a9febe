"""Latent encoding: from a reader's samples to shards, in parts that can be stopped, repeated and shared between jobs."""
