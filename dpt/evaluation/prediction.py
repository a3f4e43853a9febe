"""Predict with trained weights: images of any size in; depth, flow or amodal masks out, at the images' own size."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpt import target_codes, tasks
from dpt.data.codec import mean_latents
from dpt.diffusion import noise as noises
from dpt.errors import UserError, naming
from dpt.evaluation.denoising import Denoiser
from dpt.evaluation.ensembling import Prediction, merge_members, whole_object


class Predictor(Denoiser):
    """Predicts with `weights`: an exported folder, public weights, or a `LoadedModel`; `vae` and `read` as in
    `dpt.evaluation.loading.load_model`, `config` and `device` as in `Denoiser`."""

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
        """Predict for images uint8 `[H, W, 3]`, each at its own size.

        task: empty: the model's own. others: for flow the second frames uint8 `[H, W, 3]`, for amodal the visible masks bool
        `[H, W]`. embeddings: CLIP image embeddings `[B, D]` of the visible objects, for models that take them. keys: names that
        seed the noise; default: positions. steps, ensemble: default: the config's last ones.
        resolution: longest side shown to the network, in pixels; 0: the one it was trained at. The task's entry in `fits`
        decides whether pictures are stretched to a square or keep their proportions.
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
        pictures = self.predict_pictures(
            self._encode_conditions(spec.name, images, others, resolution),
            keys,
            range(asked.ensemble[0]),
            task=spec.name,
            steps=asked.steps[0],
            embeddings=embeddings,
        )
        results = []
        for image, members in zip(images, pictures, strict=True):
            values = self.picture_values(members[None], spec.name)[0]
            merged = merge_members(spec.name, values, image.shape[:2], self.config.aggregation)
            if spec.name == "amodal":
                merged = dataclasses.replace(merged, whole=whole_object(members[:, 0], merged.value))
            results.append(merged)
        return results

    def check_task(self, task: str) -> tasks.TaskSpec:
        """The task's spec; UserError if the model was not trained for it or takes more conditions than the task has."""
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
        """Encode each image's scaled condition latents `[K, C, h, w]`."""
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

    def predict_pictures(
        self,
        cond_latents: Sequence[Tensor],
        keys: Sequence[str],
        members: Sequence[int],
        *,
        task: str,
        steps: int,
        embeddings: Tensor | None = None,
    ) -> list[Tensor]:
        """Predict each sample's target images `[N, M, 3, H, W]` in [-1, 1]; latents of equal size are batched together.

        cond_latents: scaled `[K, C, h, w]` each; the rest as in `predict_latents`.
        """
        pictures: dict[int, Tensor] = {}
        for size in dict.fromkeys(c.shape[-2:] for c in cond_latents):
            group = [i for i, c in enumerate(cond_latents) if c.shape[-2:] == size]
            latents = self.predict_latents(
                torch.stack([cond_latents[i] for i in group]),
                [keys[i] for i in group],
                members,
                task=task,
                steps=steps,
                embeddings=None if embeddings is None else embeddings[group],
            )
            pictures |= zip(group, self.decode_pictures(latents), strict=True)
        return [pictures[i] for i in range(len(cond_latents))]

    def decode(self, latents: Tensor, task: str, *, code: str = "") -> Tensor:
        """Target latents `[S, N, M, C, h, w]` -> values: depth `[S, N, H, W]` in [0, 1]; flow `[S, N, 2, H, W]` as fractions of
        the image's width and height; amodal bool `[S, N, H, W]`; registered tasks `[S, N, C, H, W]`. `code`: the targets' code;
        empty: the weights' own."""
        return self.picture_values(self.decode_pictures(latents), task, code=code)

    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Target latents `[S, N, M, C, h, w]` -> the target images float32 `[S, N, M, 3, H, W]` in [-1, 1]."""
        flat = latents.flatten(0, 2)
        images = torch.cat([self.codec.decode(part).float() for part in flat.split(self.config.batch_size)])
        return images.unflatten(0, latents.shape[:3])

    def picture_values(self, images: Tensor, task: str, *, code: str = "") -> Tensor:
        """Target images `[S, N, M, 3, H, W]` -> values, as `decode` returns them."""
        if task == "amodal":
            return target_codes.decode_amodal(images[:, :, 0])
        if (registered := tasks.task_spec(task).decode) is not None:
            decoded: Tensor = registered(images)
            return decoded
        code = code or self.codes[task]
        if task == "depth":
            return target_codes.decode_depth(images[:, :, 0], code)
        return torch.stack([target_codes.decode_flow(images[:, :, axis], axis, 1, code) for axis in (0, 1)], dim=2)

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
        """Generate class-conditional images uint8 `[H, W, 3]`, one per label, with `config.guidance_scale`.

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
            latents = self.sample_latents(
                torch.empty(len(ids), 0, *shape[1:], device=self.device),
                ids,
                seeds[part].to(self.device),
                shape,
                steps,
                guidance_channels=guidance_channels,
            )
            images += [tasks.image_to_uint8(image) for image in self.codec.decode(latents).cpu().numpy()]
        return images
