"""Sampling with a trained network: from condition latents to target latents, on its device, with the config's settings."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpt import distributed, tasks
from dpt.config.sections import EvaluationConfig
from dpt.diffusion import noise as noises
from dpt.diffusion.samplers import Plan, guide, make_plan, sample
from dpt.errors import UserError
from dpt.evaluation.loading import LoadedModel, float32_products, load_model, open_device
from dpt.models.costs import macs
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights


class Denoiser:
    """Samples latents with `weights`: an exported folder, public weights, or a `LoadedModel`.

    `vae` and `read` as in `load_model`; `device` defaults to this rank's. Every sampling field of `config` applies.
    Results are float32 and depend on (seed, key, member, steps), not on how samples are batched. UserError for weights that
    cannot be used.
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
        """Name of the weights in messages."""
        self.dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        self.network = loaded.network.to(self.device, self.dtype).eval()
        self.model, self.task, self.codec, self.lineage = loaded.model, loaded.task, loaded.codec, loaded.lineage
        self.codes, self.fits, self.depth_prompt = dict(loaded.codes), dict(loaded.fits), loaded.depth_prompt
        self.codec.to(self.device)
        self.config = self.config.settled(loaded.diffusion)
        spacing = self.config.timestep_spacing or loaded.diffusion.timestep_spacing
        diffusion = dataclasses.replace(loaded.diffusion, timestep_spacing=spacing)
        self.diffusion = diffusion.with_schedule(self.config.schedule) if self.config.schedule else diffusion

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
        UserError, naming the sample, if the network's output is not finite.
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
                self.sample_latents(
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

    def sample_latents(
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
        """Sample latents `[B, C, h, w]` from conditions `[B, K C, h, w]`, labels and seeds `[B]`."""
        config = self.config
        plan = self._plan(steps)
        guided = config.guidance_scale != 1.0
        copies = 2 if guided else 1
        task_labels, conditions = labels.repeat(copies), conditions.repeat(copies, 1, 1, 1)
        if guided:
            labels = torch.cat((labels, torch.full_like(labels, self.model.num_classes)))
        if embeddings is not None:
            embeddings = embeddings.repeat(copies, 1).to(self.dtype)
        if bool((labels == labels[0]).all()):  # like the timesteps: one conditioning for all
            labels = labels[:1]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            count = len(noisy)  # only the conditional half where guidance is off
            inputs = torch.cat((conditions[:count], noisy), dim=1).to(self.dtype)
            told = None if embeddings is None else embeddings[:count]
            with float32_products(self.config.precision, self.device):
                return self.network(inputs, timesteps[: len(labels)], labels[:count], told, task_labels[:count]).prediction

        channels, scale = self.model.in_channels, config.guidance_scale
        denoise = guide(predict, scale=scale, channels=channels, guided_channels=guidance_channels) if guided else predict
        noise = noises.initial_noise(self.diffusion.initial_noise, seeds, shape)
        return sample(denoise, noise, plan, seeds=seeds, unguided=predict)

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

    def prediction_macs(self, task: str, height: int, width: int, *, steps: int, ensemble: int) -> float:
        """Multiply-accumulates of the network for one prediction from latents of height x width; guided steps count twice."""
        each = float(macs(self.model, height, width).forward) * self.passes(steps)
        return each * ensemble * len(tasks.task_spec(task).targets)

    def passes(self, steps: int) -> int:
        """Number of forward passes of the network for one latent image; guided steps take two."""
        doubled = self.config.guidance_scale != 1.0
        return sum(1 + (doubled and step.guided) for step in self._plan(steps).steps)
