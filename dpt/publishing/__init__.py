"""Publish weights: diffusers pipeline folders, model cards, and upload to the Hugging Face Hub."""
