"""Evaluation sets: shard folders with images and truths at their own size beside the condition latents, and a check of
whether a model can predict for them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpt import distributed, target_codes, tasks
from dpt.data.codec import LatentScaling, mean_latents
from dpt.data.reader import SampleError
from dpt.data.shards import ShardFolder
from dpt.errors import UserError, naming
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.protocols import Protocol, find_protocol


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image to predict for and score."""

    index: int
    """Index in the set."""
    key: str
    image: np.ndarray
    """uint8 `[H, W, 3]`."""
    truth: np.ndarray
    """depth: float32 `[H, W]` metres, 0 invalid; flow: float32 `[2, H, W]` pixels; amodal: bool `[H, W]`."""
    cond_latents: np.ndarray
    """float32 `[K, C, h, w]`, scaled posterior means."""
    target_latents: np.ndarray | None
    """float32 `[M, C, h, w]`, scaled posterior means of the encoded truth, if the set has them."""
    embedding: np.ndarray | None
    """float32 `[D]`, CLIP image embedding, if the set has it."""
    code_mask: np.ndarray | None = None
    """amodal: bool `[H, W]`, mask decoded from the true picture of the whole object, if the set has one."""

    second: np.ndarray | None = None
    """flow: uint8 `[H, W, 3]`, the second frame, if the set keeps it."""
    visible_mask: np.ndarray | None = None
    """amodal: bool `[H, W]`, mask shown to the network, if the set keeps it at the truth's size."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the truth, which predictions are resized to."""
        return self.truth.shape[-2], self.truth.shape[-1]


class EvaluationSet:
    """An evaluation shard folder, or a URL of one, with its protocol; `cache_dir` as for `ShardFolder`.

    UserError if it is not an evaluation set or has no protocol.
    """

    def __init__(self, folder: str | Path, *, protocol: str = "", max_samples: int = 0, cache_dir: str = "") -> None:
        self._shards = ShardFolder(folder, cache_dir=cache_dir)
        self.manifest = self._shards.manifest
        self.folder = str(folder)
        if not tasks.task_spec(self.manifest.task).conditions:
            raise UserError(
                f"{folder}: shards of task {self.manifest.task} have no truth to compare predictions with; generated images "
                "are scored by dpt fid."
            )
        self._scaling = LatentScaling.of(self.manifest.vae)
        for member in ("cond_latents", "image", "truth"):
            if member not in self.manifest.members:
                raise UserError(f"{folder}: the shards hold no {member}; encode the set for evaluation (--evaluation).")
        self.task = self.manifest.task
        with naming(folder):
            self.protocol: Protocol = find_protocol(self.manifest.dataset, self.task, name=protocol)
        self.code = target_codes.target_code(self.task, self.manifest.encoding, str(folder))
        self.depth_prompt = str(self.manifest.encoding.get("prompt") or tasks.DEPTH_PROMPT) if self.task == "depth" else ""
        self.name = f"{self.manifest.dataset}_{self.manifest.split}".replace("/", "_")
        self._size = min(len(self._shards), max_samples or math.inf)

    def __len__(self) -> int:
        return int(self._size)

    def __getitem__(self, index: int) -> Sample:
        try:
            raw: dict[str, Any] = self._shards[index]
        except SampleError as error:
            raise UserError(f"{error}; encode the set again.") from error
        truth = raw["truth"]
        if truth.shape[-2:] != raw["image"].shape[:2]:
            raise UserError(f"{self.folder}: image and truth of {raw['key']} differ in size; encode the set again.")
        return Sample(
            index=index,
            key=raw["key"],
            image=raw["image"],
            truth=truth > 0 if self.task == "amodal" else truth,
            cond_latents=self._means(raw["cond_latents"]),
            target_latents=self._means(raw["target_latents"]) if "target_latents" in raw else None,
            embedding=raw.get("clip"),
            code_mask=raw["code_mask"] > 0 if "code_mask" in raw else None,
            second=raw.get("second"),
            visible_mask=raw["visible_mask"] > 0 if "visible_mask" in raw else None,
        )

    def _means(self, moments: np.ndarray) -> np.ndarray:
        """`[N, 2, C, h, w]` -> scaled posterior means, float32 `[N, C, h, w]`."""
        return mean_latents(torch.from_numpy(moments.astype(np.float32)), self._scaling).numpy()

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hash this part's share of the shards that are scored; UserError if one has changed since it was written."""
        self._shards.verify(0, len(self), part, parts)


def open_sets(folders: list[str], *, protocol: str, max_samples: int, cache_dir: str = "") -> list[EvaluationSet]:
    """Open the sets in `folders`, with distinct names. UserError if there are none."""
    if not folders:
        raise UserError("dpt.evaluation.data is empty; name at least one evaluation shard folder.")
    sets = [EvaluationSet(folder, protocol=protocol, max_samples=max_samples, cache_dir=cache_dir) for folder in folders]
    seen: dict[str, int] = {}
    for one in sets:
        seen[one.name] = seen.get(one.name, 0) + 1
        if seen[one.name] > 1:
            one.name += f"_{seen[one.name]}"
    return sets


def check_set(one: EvaluationSet, predictor: Predictor) -> None:
    """Raise UserError if the model cannot predict for the set: another task, other conditions, latents of another VAE, no CLIP
    embeddings though it takes them, or depth prompts made from the truth though it was trained without.

    Differences from its training that still work are logged: the all-valid prompt, and another fit of the pictures.
    """
    predictor.check_task(one.task)
    manifest, model = one.manifest, predictor.model
    width = model.clip_embedding_size
    if width and one.task == "amodal":
        stored = manifest.members["clip"].shape[-1] if "clip" in manifest.members else 0
        if stored != width:
            have = f"CLIP embeddings of {stored} numbers" if stored else "no CLIP embeddings"
            raise UserError(
                f"{one.folder}: the shards hold {have}, the weights take {width}; encode the set again with --clip and the "
                "image tower that they were trained with."
            )
    available = manifest.members["cond_latents"].shape[0]
    if model.num_conditions > available:
        raise UserError(f"{one.folder}: {available} condition latents, but the model takes {model.num_conditions}.")
    if difference := predictor.codec.record.difference(dataclasses.asdict(manifest.vae)):
        raise UserError(
            f"{one.folder}: the latents were made by VAE {manifest.vae.name!r}, the model's is another one ({difference}); "
            "encode the set with the model's VAE."
        )
    learnt = predictor.depth_prompt
    if model.num_conditions > 1 and one.depth_prompt not in ("", learnt):
        if one.depth_prompt != tasks.DEPTH_PROMPT:
            raise UserError(
                f"{one.folder}: encoded with --prompt {one.depth_prompt}, the weights learnt with {learnt}; encode the set "
                f"with --prompt {learnt}."
            )
        distributed.log(f"{one.name}: depth is asked with the prompt {one.depth_prompt}; the weights learnt with {learnt}.")
    if (fit := manifest.fit) is not None:
        own = predictor.fits[one.task]
        if own.resolution and (fit.whole, fit.resolution) != (own.whole, own.resolution):
            distributed.log(f"{one.name}: encoded with --fit {fit}; the weights learnt with {own}, which dpt predict follows.")
