"""Diffusion Transformers, dense and Mixture-of-Experts, trained on DeepSpeed for images and perception."""

__version__ = "0.1.0"
