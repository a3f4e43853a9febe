"""Files that are copied into exported folders as they are. They need torch, diffusers and numpy, and nothing of dpt."""
