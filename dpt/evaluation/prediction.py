"""Predictions with trained weights: images of any size in, depth, flow or amodal masks out, at the images' own size."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpt import distributed, tasks
from dpt.config.sections import EvaluationConfig
from dpt.data.codec import mean_latents
from dpt.diffusion import noise as noises
from dpt.diffusion.samplers import Plan, guide, make_plan, sample
from dpt.errors import UserError, naming
from dpt.evaluation import ensembling
from dpt.evaluation.loading import LoadedModel, load_model
from dpt.models.costs import macs
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image's result at its own size."""

    value: np.ndarray
    """depth: float32 `[H, W]`, up to scale and shift; flow: float32 `[2, H, W]` pixels; amodal: bool `[H, W]`; registered
    tasks: float32 `[C, H, W]`."""
    uncertainty: np.ndarray
    """float32 `[H, W]`, 0 without an ensemble: depth and flow in the value's units, amodal as the share of dissenting votes."""
    whole: np.ndarray | None = None
    """amodal, from `Predictor.__call__`: uint8 `[H, W, 3]`, the completed object in colour, white outside `value`."""


class Predictor:
    """Predicts with `weights`: an exported folder, public weights, or a `LoadedModel`; `vae` and `read` as in `load_model`.

    Every field of `config` that concerns sampling holds. Results are float32 and depend on (seed, key, member, steps), not on
    how samples are batched. UserError for weights that cannot be used.
    """

    def __init__(
        self,
        weights: "str | Path | LoadedModel",
        *,
        config: EvaluationConfig | None = None,
        vae: str = "",
        device: "torch.device | str | None" = None,
        read: Callable[..., Weights] = read_weights,
    ) -> None:
        self.config = config or EvaluationConfig()
        self.device = open_device(device) if device is not None else distributed.device()
        if isinstance(weights, LoadedModel):
            loaded = weights
        else:
            loaded = load_model(weights, vae=vae, use_ema=self.config.use_ema, read=read)
        self.name = "these weights" if isinstance(weights, LoadedModel) else str(weights)
        """What messages call the weights."""
        self.dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        self.network = loaded.network.to(self.device, self.dtype).eval()
        self.model, self.task, self.codec, self.lineage = loaded.model, loaded.task, loaded.codec, loaded.lineage
        self.codes, self.fits, self.depth_prompt = dict(loaded.codes), dict(loaded.fits), loaded.depth_prompt
        self.codec.to(self.device)
        self.config = self.config.settled(loaded.diffusion)
        spacing = self.config.timestep_spacing or loaded.diffusion.timestep_spacing
        diffusion = dataclasses.replace(loaded.diffusion, timestep_spacing=spacing)
        self.diffusion = diffusion.with_schedule(self.config.schedule) if self.config.schedule else diffusion

    # --- whole images ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Sequence[np.ndarray],
        *,
        task: str = "",
        others: Sequence[np.ndarray] | None = None,
        embeddings: Tensor | None = None,
        keys: Sequence[str] | None = None,
        steps: int | None = None,
        ensemble: int | None = None,
        resolution: int = 0,
    ) -> list[Prediction]:
        """Predictions for images uint8 `[H, W, 3]`, each at its own size.

        task: empty, the model's own. others: for flow the second frames uint8 `[H, W, 3]`, for amodal the visible masks bool
        `[H, W]`. embeddings: CLIP image embeddings `[B, D]` of the visible objects, for models that take them. keys: names that
        seed the noise; default: positions. steps, ensemble: default: the config's last ones.
        resolution: longest side shown to the network in pixels; 0: the one it was trained at. How pictures come to it is
        what `fits` says of the task: stretched to the square, or in their proportion.
        """
        spec = self.check_task(task or self.task)
        width = self.model.clip_embedding_size
        if width and spec.name == "amodal" and (embeddings is None or tuple(embeddings.shape) != (len(images), width)):
            have = "none" if embeddings is None else f"shape {list(embeddings.shape)}"
            raise UserError(
                f"{self.name}: they take a CLIP embedding of {width} numbers for each visible object, {have} is given; "
                "name the image tower of training with --clip."
            )
        keys = keys or [str(i) for i in range(len(images))]
        asked = dataclasses.replace(
            self.config, steps=[steps or self.config.steps[-1]], ensemble=[ensemble or self.config.ensemble[-1]]
        ).settled(self.diffusion)
        members = range(asked.ensemble[0])
        conditions = self._encode_conditions(spec.name, images, others, resolution)
        results: list[Prediction | None] = [None] * len(images)
        for size in dict.fromkeys(c.shape[-2:] for c in conditions):
            group = [i for i, c in enumerate(conditions) if c.shape[-2:] == size]
            latents = self.predict_latents(
                torch.stack([conditions[i] for i in group]),
                [keys[i] for i in group],
                members,
                task=spec.name,
                steps=asked.steps[0],
                embeddings=None if embeddings is None else embeddings[group],
            )
            pictures = self.decode_pictures(latents)
            values = self.picture_values(pictures, spec.name)
            for row, i in enumerate(group):
                merged = merge_members(spec.name, values[row], images[i].shape[:2], self.config.aggregation)
                if spec.name == "amodal":
                    merged = dataclasses.replace(merged, whole=_whole_object(pictures[row, :, 0], merged.value))
                results[i] = merged
        return [r for r in results if r is not None]

    def check_task(self, task: str) -> tasks.TaskSpec:
        """The task's spec; UserError if the model was not trained for it, or takes another number of conditions."""
        if task == "generalist":
            raise UserError(f"{self.name}: a generalist predicts several tasks; name one with --task: depth, flow or amodal.")
        spec = tasks.task_spec(task)
        if not spec.conditions:
            raise UserError(f"{self.name}: class-conditional weights predict nothing of pictures; draw images with dpt sample.")
        with naming(self.name):
            for target in spec.targets:
                tasks.label_id(target, trained_task=self.task, num_classes=self.model.num_classes)
        if self.model.num_conditions > len(spec.conditions):
            raise UserError(
                f"{self.name}: the model takes {self.model.num_conditions} condition images, {task} has {len(spec.conditions)}."
            )
        return spec

    def _encode_conditions(
        self, task: str, images: Sequence[np.ndarray], others: Sequence[np.ndarray] | None, resolution: int
    ) -> list[Tensor]:
        """Scaled condition latents `[K, C, h, w]` of each image."""
        token = self.model.patch_size * self.codec.downsampling
        fit = self.fits[task]
        resolution = resolution or fit.resolution or self.model.input_size * self.codec.downsampling
        if task in ("flow", "amodal") and self.model.num_conditions > 1 and (others is None or len(others) != len(images)):
            wanted = "second frame" if task == "flow" else "visible mask"
            raise UserError(f"{task} needs one {wanted} for each image; {0 if others is None else len(others)} were given.")
        for image, other in zip(images, others or (), strict=False):
            if other.shape[:2] != image.shape[:2]:
                sizes = " and ".join(f"{a.shape[1]} x {a.shape[0]}" for a in (image, other))
                raise UserError(f"a picture and its {'second frame' if task == 'flow' else 'mask'} differ in size ({sizes}).")
        encoded = []
        for i, image in enumerate(images):
            size = fit.size(image.shape[0], image.shape[1], resolution, multiple=token)
            pictures = [tasks.image_to_float(tasks.resize_image(image, size))]
            if task == "depth":
                pictures.append(tasks.all_valid_prompt(*size))
            elif others is not None and task == "flow":
                pictures.append(tasks.image_to_float(tasks.resize_image(others[i], size)))
            elif others is not None:
                pictures.append(tasks.mask_image(tasks.resize_nearest(others[i].astype(bool), size)))
            stacked = torch.from_numpy(np.stack(pictures[: self.model.num_conditions])).to(self.device)
            encoded.append(mean_latents(self.codec.encode(stacked), self.codec.scaling))
        return encoded

    # --- latents --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_latents(
        self,
        cond_latents: Tensor,
        keys: Sequence[str],
        members: Sequence[int],
        *,
        task: str,
        steps: int,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Target latents `[S, N, M, C, h, w]` of S samples, N ensemble members and the task's M targets.

        cond_latents: scaled `[S, K, C, h, w]`, K at least the model's num_conditions; embeddings: CLIP `[S, D]`. Samples,
        members and targets are batched together, `config.batch_size` at a time; a member's targets start from the same noise.
        UserError, naming the sample, if what the network gives is not finite.
        """
        targets = tasks.task_spec(task).targets
        labels = [tasks.label_id(t, trained_task=self.task, num_classes=self.model.num_classes) for t in targets]
        samples, channels, size = len(cond_latents), self.model.in_channels, cond_latents.shape[-2:]
        conditions = cond_latents[:, : self.model.num_conditions].to(self.device).flatten(1, 2)
        pairs = [(s, m) for s in range(samples) for m in members]
        seeds = noises.key_seeds(self.config.seed, [keys[s] for s, _ in pairs], [m for _, m in pairs])
        rows = torch.arange(samples).repeat_interleave(len(members) * len(targets))
        seeds = seeds.repeat_interleave(len(targets))
        label_ids = torch.tensor(labels).repeat(len(pairs))
        results = []
        for start in range(0, len(rows), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            row = rows[part].to(self.device)
            results.append(
                self._sample(
                    conditions[row],
                    label_ids[part].to(self.device),
                    seeds[part].to(self.device),
                    (channels, *size),
                    steps,
                    None if embeddings is None else embeddings.to(self.device)[row],
                )
            )
        latents = torch.cat(results).reshape(samples, len(members), len(targets), channels, *size)
        finite = latents.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            broken = [key for key, sound in zip(keys, finite.tolist(), strict=True) if not sound]
            raise UserError(
                f"{broken[0]}: the network predicts values that are not finite (in {len(broken)} of {samples} samples here); "
                "check the weights, or predict in fp32."
            )
        return latents

    def _sample(
        self,
        conditions: Tensor,
        labels: Tensor,
        seeds: Tensor,
        shape: tuple[int, ...],
        steps: int,
        embeddings: Tensor | None = None,
        *,
        guidance_channels: int = 0,
    ) -> Tensor:
        """Latents `[B, C, h, w]` from conditions `[B, K C, h, w]`, labels and seeds `[B]`."""
        config = self.config
        plan = self._plan(steps)
        guided = config.guidance_scale != 1.0
        null = torch.full_like(labels, self.model.num_classes)
        task_labels = torch.cat((labels, labels)) if guided else labels
        labels = torch.cat((labels, null)) if guided else labels
        conditions = torch.cat((conditions, conditions)) if guided else conditions
        if embeddings is not None:
            embeddings = (torch.cat((embeddings, embeddings)) if guided else embeddings).to(self.dtype)

        if bool((labels == labels[0]).all()):  # as the timesteps are: one conditioning for all
            labels = labels[:1]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            count = len(noisy)  # the conditional half alone, where guidance does not act
            inputs = torch.cat((conditions[:count], noisy), dim=1).to(self.dtype)
            told = None if embeddings is None else embeddings[:count]
            with float32_products(self.config.precision, self.device):
                return self.network(inputs, timesteps[: len(labels)], labels[:count], told, task_labels[:count]).prediction

        channels = self.model.in_channels
        denoise = (
            guide(predict, scale=config.guidance_scale, channels=channels, guided_channels=guidance_channels)
            if guided
            else predict
        )
        return sample(
            denoise, noises.initial_noise(self.diffusion.initial_noise, seeds, shape), plan, seeds=seeds, unguided=predict
        )

    def _plan(self, steps: int) -> Plan:
        config = self.config
        return make_plan(
            self.diffusion,
            num_inference_steps=steps,
            sampler=config.sampler,
            eta=config.eta,
            step_power=config.step_power,
            guidance_interval=(config.guidance_low, config.guidance_high),
        )

    def decode(self, latents: Tensor, task: str, *, code: str = "") -> Tensor:
        """Target latents `[S, N, M, C, h, w]` -> values: depth `[S, N, H, W]` in [0, 1]; flow `[S, N, 2, H, W]` as fractions of
        the image's width and height; amodal bool `[S, N, H, W]`; registered tasks `[S, N, C, H, W]`. `code`: of the targets;
        empty: the weights' own."""
        return self.picture_values(self.decode_pictures(latents), task, code=code)

    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Target latents `[S, N, M, C, h, w]` -> the target images float32 `[S, N, M, 3, H, W]` in [-1, 1]."""
        flat = latents.flatten(0, 2)
        images = torch.cat([self.codec.decode(part).float() for part in flat.split(self.config.batch_size)])
        return images.unflatten(0, latents.shape[:3])

    def picture_values(self, images: Tensor, task: str, *, code: str = "") -> Tensor:
        """Target images `[S, N, M, 3, H, W]` -> values, as `decode` gives them."""
        if task == "amodal":
            return tasks.decode_amodal(images[:, :, 0])
        if (registered := tasks.task_spec(task).decode) is not None:
            decoded: Tensor = registered(images)
            return decoded
        code = code or self.codes[task]
        if task == "depth":
            return tasks.decode_depth(images[:, :, 0], code)
        return torch.stack([tasks.decode_flow(images[:, :, axis], axis, 1, code) for axis in (0, 1)], dim=2)

    def prediction_macs(self, task: str, height: int, width: int, *, steps: int, ensemble: int) -> float:
        """Multiply-accumulates of the network for one prediction from latents of height x width; guided steps count twice."""
        each = float(macs(self.model, height, width).forward) * self.passes(steps)
        return each * ensemble * len(tasks.task_spec(task).targets)

    def passes(self, steps: int) -> int:
        """The network's forward passes for one latent image; guided steps take two."""
        doubled = self.config.guidance_scale != 1.0
        return sum(1 + (doubled and step.guided) for step in self._plan(steps).steps)

    # --- class-conditional images ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int],
        keys: Sequence[str],
        *,
        steps: int,
        size: tuple[int, int] | None = None,
        guidance_channels: int = 0,
    ) -> list[np.ndarray]:
        """Class-conditional images uint8 `[H, W, 3]`, one a label, with `config.guidance_scale`.

        keys: names that seed the noise; size: (h, w) of the latents; guidance_channels: as in `dpt.diffusion.samplers.guide`.
        """
        if self.task != "class":
            raise UserError(f"{self.name}: trained for {self.task}; only class-conditional weights generate images.")
        side = self.model.input_size
        shape = (self.model.in_channels, *(size or (side, side)))
        seeds = noises.key_seeds(self.config.seed, keys, [0] * len(keys))
        images: list[np.ndarray] = []
        for start in range(0, len(labels), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            ids = torch.tensor(labels[part], device=self.device)
            latents = self._sample(
                torch.empty(len(ids), 0, *shape[1:], device=self.device),
                ids,
                seeds[part].to(self.device),
                shape,
                steps,
                guidance_channels=guidance_channels,
            )
            images += [tasks.image_to_uint8(image) for image in self.codec.decode(latents).cpu().numpy()]
        return images


def open_device(name: "torch.device | str") -> torch.device:
    """The device of this name, such as "cpu" or "cuda:0"; UserError if there is none."""
    try:
        device = torch.device(name)
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of names, of builds without CUDA, of devices
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise UserError(f'--device "{name}": there is no such device here; choose one of {known}.') from error
    return device


@contextlib.contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Let a GPU's float32 matrix products and convolutions be TF32 ("tf32") or not (else); a CPU's are not touched."""
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _whole_object(pictures: Tensor, mask: np.ndarray) -> np.ndarray:
    """Members' pictures `[N, 3, h, w]` in [-1, 1] -> their median uint8 `[H, W, 3]` at the size of `mask`, white outside it."""
    middle = pictures.median(dim=0).values.cpu().numpy()
    picture = tasks.resize_image(tasks.image_to_uint8(middle), (mask.shape[0], mask.shape[1]))
    return np.where(mask[..., None], picture, np.uint8(255))


def merge_members(task: str, values: Tensor, size: tuple[int, int], aggregation: str) -> Prediction:
    """Members' values `[N, ...]` of one sample, as `Predictor.decode` gives them -> their prediction at `size` (H, W), pixels.

    Members are merged at the network's resolution, then resized (of masks, the share of votes is resized and thresholded).
    """
    if (spec := tasks.task_spec(task)).registered:
        merged, deviation = ensembling.merge_values(values[None].float(), "mean" if aggregation == "mean" else "median")
        uncertainty = torch.linalg.vector_norm(deviation, dim=1)
        value = tasks.resize_smooth(merged[0].cpu().numpy(), size)
        value = value if spec.finish is None else spec.finish(value)
    elif task == "depth":
        merged, uncertainty = ensembling.merge_depth(values[None], aggregation)
        value = tasks.resize_smooth(merged[0].cpu().numpy(), size)
    elif task == "flow":
        merged, uncertainty = ensembling.merge_flow(
            values[None] * values.new_tensor([size[1], size[0]])[:, None, None], aggregation
        )
        value = tasks.resize_smooth(merged[0].cpu().numpy(), size)
    else:
        mask, uncertainty = ensembling.merge_masks(values[None])
        share = torch.where(mask, 1.0 - uncertainty, uncertainty)
        value = tasks.resize_smooth(share[0].cpu().numpy(), size) > 0.5
    return Prediction(value=value, uncertainty=tasks.resize_smooth(uncertainty[0].cpu().numpy(), size))
