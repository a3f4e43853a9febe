"""What one layer of a VAE costs. Pure Python."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer of a VAE costs."""

    params: int
    macs: int = 0
    """Of a pixel of its output, without attention's scores."""
    kept: int = 0
    """Numbers that autograd keeps, of a pixel."""
    width: int = 0
    """Numbers of a pixel in its largest array."""
    heads: int = 0
    head: int = 0
    """Width of an attention head."""
    linear: bool = False
    """Whether attention is linear, where there are more pixels than numbers in a head."""

    def scores(self, pixels: int) -> int:
        """MACs of attention's scores and weighted sums."""
        if self.linear and pixels > self.head:
            return 2 * self.heads * (self.head + 1) * self.head * pixels
        return 2 * self.heads * self.head * pixels * pixels


def conv(inside: int, outside: int, *, area: int = 9, kept: int = 0, width: int = 0) -> Layer:
    """A convolution with biases, of kernels of so many pixels."""
    products = area * inside * outside
    return Layer(params=products + outside, macs=products, kept=kept, width=width)
