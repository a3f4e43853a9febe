"""Costs of one layer of a VAE. Pure Python."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Costs of a layer of a VAE."""

    params: int
    macs: int = 0
    """MACs per output pixel, without attention's scores."""
    kept: int = 0
    """Numbers that autograd keeps, per pixel."""
    width: int = 0
    """Numbers per pixel in its largest array."""
    heads: int = 0
    head: int = 0
    """Width of an attention head."""
    linear: bool = False
    """Whether attention is linear, which applies where there are more pixels than numbers in a head."""

    def scores(self, pixels: int) -> int:
        """MACs of attention's scores and weighted sums."""
        if self.linear and pixels > self.head:
            return 2 * self.heads * (self.head + 1) * self.head * pixels
        return 2 * self.heads * self.head * pixels * pixels


def conv(inside: int, outside: int, *, area: int = 9, kept: int = 0, width: int = 0) -> Layer:
    """A convolution with biases; its kernels have `area` pixels."""
    products = area * inside * outside
    return Layer(params=products + outside, macs=products, kept=kept, width=width)
