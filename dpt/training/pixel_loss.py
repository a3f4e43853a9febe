"""The loss on decoded predictions, with gradients through the VAE's frozen decoder."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpt import target_codes, tasks
from dpt.config.recipe import DptConfig
from dpt.data.codec import VAECodec
from dpt.diffusion import pixel_losses as losses


class PixelLoss:
    """The loss that `dpt.pixel_loss` configures. The truth is the decoded target latents: a perfect prediction's decoding.

    Not a module: DeepSpeed must neither train nor partition the decoder's weights.
    """

    def __init__(self, config: DptConfig, codec: VAECodec, *, codes: Mapping[str, str] | None = None) -> None:
        """`codec`: the shards' VAE, on the training device; `codes`: of their targets, by task (None: the defaults)."""
        self.config, self.codec, self.codes = config.pixel_loss, codec, {**target_codes.codes_of({}, ""), **(codes or {})}
        self.checkpointing = config.training.activation_checkpointing
        names = (config.task,) if config.task != "generalist" else ("depth", "flow", "amodal")
        by_target: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "depth": self._depth,
            "whole": self._whole,
            "flow_x": lambda p, t, v: self._flow(p, t, v, axis=0),
            "flow_y": lambda p, t, v: self._flow(p, t, v, axis=1),
        }
        self._by_label = {
            tasks.label_id(target, trained_task=config.task, num_classes=config.model.num_classes): by_target[target]
            for name in names
            for target in tasks.TASKS[name].targets
        }

    def __call__(self, latents: Tensor, truth_latents: Tensor, task_labels: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over samples, a scalar. latents, truth_latents: float32 `[B, C, h, w]`, scaled; task_labels: int64 `[B]`; valid:
        `[B, h, w]`, 1 where the truth is known (None: everywhere)."""
        prediction = (
            torch.cat([self._decode(part) for part in latents.split(1)]) if self.checkpointing else self._decode(latents)
        )
        truth = self.codec.decode(truth_latents)
        known = torch.ones_like(truth[:, 0]) if valid is None else _enlarged(valid, self.codec.downsampling)
        total = torch.zeros_like(known[:, 0, 0])
        for label, loss in self._by_label.items():
            values = loss(prediction, truth, known)
            total = values if len(self._by_label) == 1 else total + torch.where(task_labels == label, values, 0.0)
        return total.mean()

    def _decode(self, latents: Tensor) -> Tensor:
        if self.checkpointing:
            return checkpoint(self.codec.decode_with_gradients, latents, use_reentrant=False)
        return self.codec.decode_with_gradients(latents)

    def _depth(self, prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Errors of depth and of edges after the fit that evaluation makes too, in units of the target's code, [-1, 1]."""
        code = self.codes["depth"]
        true = _depth_of(truth, code)
        residual = losses.affine_residual(2 * _depth_of(prediction, code) - 1, 2 * true - 1, valid)
        residual = residual * target_codes.depth_code_slope(true, code)
        error = losses.absolute_error if self.config.depth == "affine_l1" else losses.squared_error
        return error(residual, valid) + self.config.gradient_weight * losses.gradient_error(residual, valid)

    def _flow(self, prediction: Tensor, truth: Tensor, valid: Tensor, *, axis: int) -> Tensor:
        """End-point error of the sample's target component, in pixels of the training image."""
        extent = prediction.shape[-1 - axis]
        found, true = (target_codes.decode_flow(image, axis, extent, self.codes["flow"]) for image in (prediction, truth))
        return losses.absolute_error(found - true, valid)

    def _whole(self, prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Cross-entropy of the whole object's mask."""
        mask = target_codes.decode_amodal(truth).to(prediction.dtype)
        red, green, blue = ((prediction + 1.0) * 127.5).unbind(1)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        return losses.mask_cross_entropy(grey, mask, target_codes.AMODAL_GREY + 0.5, valid)


def _depth_of(image: Tensor, code: str) -> Tensor:
    """Image `[B, 3, H, W]` in a depth code -> depth `[B, H, W]`, in [0, 1] up to scale and shift.

    Beyond the code's range it continues along the tangent, so that gradients lead back.
    """
    values = (image.mean(1) + 1.0) / 2.0
    inside = values.clamp(0.0, 1.0)
    depth = target_codes.uncode_depth(inside, code)
    return depth + (values - inside) / target_codes.depth_code_slope(depth, code).detach()


def _enlarged(valid: Tensor, factor: int) -> Tensor:
    """Enlarge a mask `[B, h, w]` of latents to float32 `[B, H, W]` of pixels."""
    return valid.float().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
