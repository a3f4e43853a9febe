"""Weights to others: diffusers' pipeline folders, model cards, and the way to the Hugging Face Hub."""
