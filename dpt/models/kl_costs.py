"""Costs of diffusers' `AutoencoderKL`, layer by layer. Pure Python."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpt.models.vae_layers import Layer, conv


def channels(config: Mapping[str, Any]) -> list[int]:
    """Channels of each level, from full picture size down."""
    return [int(c) for c in config.get("block_out_channels", (64,))]


def encoder(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Layers of the encoder, of which only the parameters count."""
    widths, latent = channels(config), int(config.get("latent_channels", 4))
    yield conv(3, widths[0])
    for _, layer in _levels(widths, int(config.get("layers_per_block", 1))):
        yield layer
    yield from _middle(config)
    yield Layer(params=2 * widths[-1])  # the last norm
    yield conv(widths[-1], 2 * latent)
    if config.get("use_quant_conv", True):
        yield conv(2 * latent, 2 * latent, area=1)


def decoder(config: Mapping[str, Any]) -> Iterator[tuple[int, Layer]]:
    """Layers of the decoder, each with how often the latents' sides have been doubled before it."""
    widths, latent = channels(config)[::-1], int(config.get("latent_channels", 4))
    if config.get("use_post_quant_conv", True):
        yield 0, conv(latent, latent, area=1)
    yield 0, conv(latent, widths[0], kept=2 * latent, width=2 * latent)
    for layer in _middle(config):
        yield 0, layer
    yield from _levels(widths, int(config.get("layers_per_block", 1)) + 1)
    last = widths[-1]
    yield len(widths) - 1, Layer(params=2 * last)
    yield len(widths) - 1, conv(last, 3, kept=3 * last)


def _middle(config: Mapping[str, Any]) -> Iterator[Layer]:
    top = channels(config)[-1]
    yield _resnet(top, top)
    yield _resnet(top, top)
    if config.get("mid_block_add_attention", True):
        yield Layer(params=4 * top * top + 6 * top, macs=4 * top * top, kept=5 * top, heads=1, head=top)


def _levels(channels: list[int], layers: int) -> Iterator[tuple[int, Layer]]:
    """Layers of levels with these channels, in data order: residual ones, and a resampling convolution between levels."""
    before = channels[0]
    for level, width in enumerate(channels):
        for number in range(layers):
            yield level, _resnet(width if number else before, width)
        if level < len(channels) - 1:
            yield level + 1, conv(width, width, kept=width, width=width)
        before = width


def _resnet(inside: int, outside: int) -> Layer:
    """Two norms and convolutions, and a shortcut where the width changes."""
    macs = 9 * (inside + outside) * outside + (inside * outside if inside != outside else 0)
    biases = 2 * outside + (outside if inside != outside else 0)
    return Layer(
        params=2 * (inside + outside) + macs + biases,
        macs=macs,
        kept=3 * (inside + outside),  # inputs of norm, activation and convolution, twice
        width=max(inside, outside),
    )
