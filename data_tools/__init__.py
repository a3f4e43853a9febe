"""Offline jobs: readers of real data sets, synthesis, latent encoding, inspection."""
