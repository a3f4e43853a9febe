"""What diffusers' `AutoencoderDC` costs (Chen et al. 2024, "Deep Compression Autoencoder"). Pure Python.

Its blocks are residual ones of two 3 x 3 convolutions, or of linear attention over several scales and a gated MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CHANNELS = (128, 256, 512, 512, 1024, 1024)
_SCALES: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))


@dataclass(frozen=True, kw_only=True)
class DCShape:
    """The parts of a config that costs depend on, each by level, from the pictures' size down."""

    encoder: tuple[int, ...]
    """Channels."""
    decoder: tuple[int, ...]
    encoder_blocks: tuple["_Block", ...]
    decoder_blocks: tuple["_Block", ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    latent: int
    unshuffled: bool
    """Whether the encoder halves by rearranging pixels, rather than by strides."""
    interpolated: bool
    """Whether the decoder doubles by interpolation, rather than by rearranging channels."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "DCShape":
        """Of a config, with the class's defaults."""
        parts: dict[str, Any] = {}
        for side, layers in (("encoder", (2, 2, 2, 3, 3, 3)), ("decoder", (3,) * 6)):
            channels = tuple(config.get(f"{side}_block_out_channels", _CHANNELS))
            kinds = config.get(f"{side}_block_types", "ResBlock")
            kinds = (kinds,) * len(channels) if isinstance(kinds, str) else tuple(kinds)
            scales = [tuple(each) for each in config.get(f"{side}_qkv_multiscales", _SCALES)]
            head = int(config.get("attention_head_dim", 32))
            parts[side], parts[f"{side}_layers"] = channels, tuple(config.get(f"{side}_layers_per_block", layers))
            parts[f"{side}_blocks"] = tuple(
                _Block(channels=c, head=head if kind == "EfficientViTBlock" else 0, kernels=kernels)
                for c, kind, kernels in zip(channels, kinds, scales, strict=True)
            )
        return cls(
            **parts,
            latent=int(config.get("latent_channels", 32)),
            unshuffled=config.get("downsample_block_type", "pixel_unshuffle") == "pixel_unshuffle",
            interpolated=config.get("upsample_block_type", "pixel_shuffle") == "interpolate",
        )

    @property
    def downsampling(self) -> int:
        """Pixels to one latent, along a side."""
        return int(2 ** (len(self.encoder) - 1))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A level's blocks."""

    channels: int
    head: int
    """Width of an attention head; 0: a residual block of convolutions."""
    kernels: tuple[int, ...]
    """Of the further scales of attention."""

    @property
    def inner(self) -> int:
        return self.channels // self.head * self.head

    def params(self) -> int:
        c = self.channels
        if not self.head:
            return 18 * c * c + c + 2 * c
        qkv = 3 * self.inner
        scales = sum(qkv * k * k + qkv * self.head for k in self.kernels)
        attention = c * qkv + scales + self.inner * (1 + len(self.kernels)) * c + 2 * c
        return attention + 8 * c * c + 8 * c + 80 * c + 4 * c * c + 2 * c

    def macs(self, pixels: int) -> int:
        c = self.channels
        if not self.head:
            return 18 * c * c * pixels
        qkv, groups = 3 * self.inner, self.inner // self.head * (1 + len(self.kernels))
        linear = pixels > self.head
        scores = 2 * (self.head + 1) * self.head * pixels if linear else 2 * pixels * pixels * self.head
        scales = sum(qkv * k * k + qkv * self.head for k in self.kernels)
        each = c * qkv + scales + self.inner * (1 + len(self.kernels)) * c + 12 * c * c + 72 * c
        return each * pixels + groups * scores

    def kept(self, pixels: int) -> int:
        """Numbers that autograd keeps of one block."""
        c = self.channels
        if not self.head:
            return 4 * c * pixels  # inputs of both convolutions, of the activation and of the norm
        maps = 1 + len(self.kernels)
        attention = c + 3 * self.inner * (2 * maps - 1) + 4 * self.inner * maps + c
        gated = c + 8 * c + 8 * c + 8 * c + 4 * c + 4 * c + c
        return (attention + gated) * pixels

    @property
    def widest(self) -> int:
        return 8 * self.channels if self.head else self.channels


def num_params(shape: DCShape) -> int:
    """Of the encoder and the decoder."""

    def conv(inside: int, outside: int) -> int:
        return 9 * inside * outside + outside

    def down(inside: int, outside: int) -> int:
        return conv(inside, outside // 4 if shape.unshuffled else outside)

    def up(inside: int, outside: int) -> int:
        return conv(inside, outside if shape.interpolated else 4 * outside)

    total = conv(shape.encoder[-1], shape.latent) + conv(shape.latent, shape.decoder[-1])
    for level, (block, layers) in enumerate(zip(shape.encoder_blocks, shape.encoder_layers, strict=True)):
        total += layers * block.params()
        if layers and level < len(shape.encoder) - 1:
            total += down(block.channels, shape.encoder[level + 1])
    for level, (block, layers) in enumerate(zip(shape.decoder_blocks, shape.decoder_layers, strict=True)):
        total += layers * block.params()
        if layers and level < len(shape.decoder) - 1:
            total += up(shape.decoder[level + 1], block.channels)
    total += conv(3, shape.encoder[0]) if shape.encoder_layers[0] else down(3, shape.encoder[1])
    last = shape.decoder[0] if shape.decoder_layers[0] else shape.decoder[1]
    return total + 2 * last + (conv(last, 3) if shape.decoder_layers[0] else up(last, 3))


def decoding(shape: DCShape, height: int, width: int) -> tuple[int, int, int]:
    """Of decoding one image from latents of height x width: MACs, numbers that autograd keeps, numbers of the largest array."""
    pixels, top = height * width, shape.decoder[-1]
    macs = 9 * shape.latent * top * pixels
    kept, largest = 2 * shape.latent * pixels, top * pixels

    def double(inside: int, outside: int) -> None:
        nonlocal pixels, macs, kept, largest
        macs += 9 * inside * outside * 4 * pixels
        kept += (4 if shape.interpolated else 1) * inside * pixels
        pixels *= 4
        largest = max(largest, outside * pixels)

    for level in reversed(range(len(shape.decoder))):
        block, layers = shape.decoder_blocks[level], shape.decoder_layers[level]
        if level < len(shape.decoder) - 1 and layers:
            double(shape.decoder[level + 1], block.channels)
        macs += layers * block.macs(pixels)
        kept += layers * block.kept(pixels)
        largest = max(largest, block.widest * pixels if layers else 0)
    last = shape.decoder[0] if shape.decoder_layers[0] else shape.decoder[1]
    kept += 2 * last * pixels
    outputs = 3 if shape.decoder_layers[0] else 12  # of the last level, or at twice its size
    return macs + 9 * last * outputs * pixels, kept, largest
