"""Files copied unchanged into exported folders. They need torch, diffusers and numpy, but not dpt."""
