"""A tiny random network, a VAE that pools pixels, evaluation sets made of them, and what is seen of predictions."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpt import target_codes, tasks
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.data.codec import LatentScaling
from dpt.data.manifest import VAERecord
from dpt.evaluation.loading import LoadedModel
from dpt.models.dit import DiT
from tests.shards import write_set


class PoolingCodec:
    """A VAE stand-in: latents are 8 x 8 means of red, green, blue and their mean."""

    latent_channels, downsampling, sha256 = 4, 8, "pooling"
    record = VAERecord(name="pooling", sha256=sha256, scaling_factor=0.5, latent_channels=4)
    scaling = LatentScaling.of(record)

    def to(self, device: Any) -> "PoolingCodec":
        return self

    def encode(self, images: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(images, 8)
        mean = torch.cat((pooled, pooled.mean(1, keepdim=True)), dim=1)
        return torch.stack((mean, torch.full_like(mean, -20.0)), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(self.scaling.restore(latents[:, :3]), scale_factor=8, mode="bilinear").clamp(
            -1, 1
        )


def make_model(task: str = "depth", *, num_conditions: int = 2, prediction_type: str = "sample", **model: Any) -> LoadedModel:
    """A random DiT for `task` whose output depends on all of its inputs."""
    config = ModelConfig(
        input_size=4,
        hidden_size=32,
        depth=1,
        num_heads=2,
        num_conditions=num_conditions,
        num_classes=10 + tasks.num_task_labels(task),
        **model,
    )
    torch.manual_seed(0)
    network = DiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    diffusion = DiffusionConfig(prediction_type=prediction_type)  # type: ignore[arg-type]
    return LoadedModel(
        network=network, model=config, diffusion=diffusion, task=task, codec=PoolingCodec(), lineage={"run_id": "parent"}
    )


def make_set(
    folder: Path,
    task: str = "depth",
    *,
    count: int = 5,
    size: tuple[int, int] = (40, 56),
    with_targets: bool = True,
    code: str = target_codes.DEPTH_CODE,
) -> Path:
    """An evaluation shard folder of random smooth scenes, encoded at 32 x 32."""
    codec = PoolingCodec()
    rng = np.random.default_rng(3)

    def moments(*pictures: np.ndarray) -> np.ndarray:
        resized = np.stack([tasks.resize_smooth(p, (32, 32)) for p in pictures])
        return codec.encode(torch.from_numpy(resized)).numpy().astype(np.float16)

    def make(number: int) -> dict[str, np.ndarray]:
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        smooth = tasks.resize_smooth(rng.random((2, 4, 4)).astype(np.float32), size)
        members = {"cond_latents": moments(tasks.image_to_float(image), tasks.all_valid_prompt(*size)), "image": image}
        if task == "depth":
            truth = (1.0 + 5.0 * smooth[0]).astype(np.float32)
            truth[:2] = 0.0
            targets = [target_codes.encode_depth(truth, code=code)[0]]
        elif task == "flow":
            truth = (20 * smooth - 10).astype(np.float32)
            targets = list(target_codes.encode_flow(truth))
            members["second"] = image[:, ::-1].copy()
        else:
            truth = (smooth[0] > 0.5).astype(np.uint8)
            targets = [target_codes.encode_amodal(np.full((*size, 3), 100, np.uint8), truth > 0)]
            columns = np.arange(size[1])
            members["visible_mask"] = truth * (columns < size[1] // 2).astype(np.uint8)
            members["code_mask"] = truth * (columns > 0).astype(np.uint8)  # a threshold that loses the first column
        return members | {"truth": truth} | ({"target_latents": moments(*targets)} if with_targets else {})

    fields = {"dataset": "synthetic", "split": "val", "task": task, "vae": codec.record}
    fields["encoding"] = {} if code == target_codes.DEPTH_CODE else {"depth_code": code}
    meta = {"width": size[1], "height": size[0]}
    return write_set(folder, [count], make, key="scene_{:03d}", meta=meta, **fields)


def stop_at(monkeypatch: pytest.MonkeyPatch, module: ModuleType, number: int) -> list[str]:
    """Interrupt the `number`-th call of a module's `write_outputs`; the names of all its results, as they come."""
    write, names = module.write_outputs, []

    def write_or_stop(*arguments: Any, **more: Any) -> list[Path]:
        names.append(arguments[4])
        if len(names) == number:
            raise KeyboardInterrupt
        return write(*arguments, **more)

    monkeypatch.setattr(module, "write_outputs", write_or_stop)
    return names


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and options of the calls of `owner.name`, from now on."""
    original, calls = getattr(owner, name), []

    def noted(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)
    return calls
