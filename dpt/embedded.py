"""The VAEs that come with the package, by the names that recipes and commands take."""

from pathlib import Path

_ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED_VAES = {"embedded": _ASSETS / "vae", "embedded16": _ASSETS / "vae16"}
"""Name -> folder in diffusers' layout: 4 and 16 latent channels."""
