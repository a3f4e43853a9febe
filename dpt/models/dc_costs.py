"""Costs of diffusers' `AutoencoderDC` (Chen et al. 2024, "Deep Compression Autoencoder"), layer by layer. Pure Python.

Its blocks are residual ones of two 3 x 3 convolutions, or of linear attention over several scales and a gated MLP.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dpt.models.vae_layers import Layer, conv

_CHANNELS = (128, 256, 512, 512, 1024, 1024)
_SCALES: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
_LAYERS = {"encoder": (2, 2, 2, 3, 3, 3), "decoder": (3,) * 6}


def channels(config: Mapping[str, Any], side: str = "decoder") -> tuple[int, ...]:
    """Channels of each level of the "encoder" or the "decoder", from full picture size down."""
    return tuple(config.get(f"{side}_block_out_channels", _CHANNELS))


def _blocks(config: Mapping[str, Any], side: str) -> list[list[Layer]]:
    """The repeated block's layers at each level."""
    widths, head = channels(config, side), int(config.get("attention_head_dim", 32))
    kinds = config.get(f"{side}_block_types", "ResBlock")
    kinds = (kinds,) * len(widths) if isinstance(kinds, str) else kinds
    counts, scales = config.get(f"{side}_layers_per_block", _LAYERS[side]), config.get(f"{side}_qkv_multiscales", _SCALES)
    return [
        count * [_attention(width, head, kernels) if kind == "EfficientViTBlock" else _residual(width)]
        for width, kind, count, kernels in zip(widths, kinds, counts, scales, strict=True)
    ]


def _residual(c: int) -> Layer:
    """A residual block; keeps the inputs of both convolutions, of the activation and of the norm."""
    return Layer(params=18 * c * c + 3 * c, macs=18 * c * c, kept=4 * c, width=c)


def _attention(c: int, head: int, kernels: tuple[int, ...]) -> Layer:
    """Attention over one scale and those of `kernels`, then the MLP, whose inner width is 4 c, twice for its gate."""
    inner, maps = c // head * head, 1 + len(kernels)
    products = 3 * inner * c + sum(3 * inner * (k * k + head) for k in kernels) + inner * maps * c + 12 * c * c + 72 * c
    return Layer(
        params=products + 20 * c,  # norms' and biases
        macs=products,
        kept=2 * c + 3 * inner * (2 * maps - 1) + 4 * inner * maps + 34 * c,
        width=8 * c,
        heads=inner // head * maps,
        head=head,
        linear=True,
    )


def encoder(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Layers of the encoder, of which only the parameters count."""
    widths, blocks = channels(config, "encoder"), _blocks(config, "encoder")
    strided = config.get("downsample_block_type", "pixel_unshuffle") != "pixel_unshuffle"  # else pixels become channels

    def halve(inside: int, outside: int) -> Layer:
        return conv(inside, outside if strided else outside // 4)

    yield conv(3, widths[0]) if blocks[0] else halve(3, widths[1])
    for level, layers in enumerate(blocks):
        yield from layers
        if layers and level < len(blocks) - 1:
            yield halve(widths[level], widths[level + 1])
    yield conv(widths[-1], int(config.get("latent_channels", 32)))


def decoder(config: Mapping[str, Any]) -> Iterator[tuple[int, Layer]]:
    """Layers of the decoder, each with how often the latents' sides have been doubled before it."""
    widths, blocks, latent = channels(config), _blocks(config, "decoder"), int(config.get("latent_channels", 32))
    interpolated = config.get("upsample_block_type", "pixel_shuffle") == "interpolate"  # else channels become pixels
    doublings = 0
    yield 0, conv(latent, widths[-1], kept=2 * latent, width=widths[-1])
    for level in reversed(range(len(blocks))):
        if blocks[level] and level < len(blocks) - 1:
            inside, outside = widths[level + 1], widths[level] * (1 if interpolated else 4)
            yield doublings + (1 if interpolated else 0), conv(inside, outside, kept=inside, width=outside)
            doublings += 1
        for layer in blocks[level]:
            yield doublings, layer
    last = widths[0] if blocks[0] else widths[1]
    yield doublings, Layer(params=2 * last, kept=2 * last)
    if blocks[0] or not interpolated:
        yield doublings, conv(last, 3 if blocks[0] else 12)
    else:
        yield doublings + 1, conv(last, 3)
