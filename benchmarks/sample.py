"""Evaluation with an ensemble, from images to merged depth, compared with one image and one member at a time.

python -m benchmarks.sample [--images 2] [--steps 4] [--ensemble 5] [--resolution 512] [--depth 2] [--json FILE]

`ours` is `dpt.evaluation.Predictor` in fp32. `one at a time` is what the published pipelines do: for each image and each
member, the image is encoded, the network runs on that member alone (the textbook's network, diffusers' DDIM) and its result is
decoded; scipy's BFGS then aligns the members (Marigold's procedure). The networks have XL/2's shape at small depth. Rows of
`network` are the sampler's part alone, its `bound` the network's multiply-accumulates at the speed of its own matrix products;
rows of `small WIDTH x DEPTH` the same for small networks and 128 px; rows of `alignment` only the search for scales and shifts.

python -m benchmarks.sample --weights runs/quickstart/depth/weights --shards runs/quickstart/shards/depth_val --images 12

measures a trained network on real images instead, and how far apart the two ways' AbsRel are there.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness, textbook
from benchmarks.train_step import block_products, model_config
from dpt import target_codes, tasks
from dpt.config.sections import DiffusionConfig, EvaluationConfig
from dpt.data.codec import VAECodec, load_vae
from dpt.diffusion import noise as noises
from dpt.evaluation.ensembling import align_depth, merge_depth
from dpt.evaluation.loading import LoadedModel
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.protocols import PROTOCOLS, score
from dpt.evaluation.sets import EvaluationSet
from dpt.models.costs import macs
from dpt.models.dit import DiT

TASK = "depth"
DIFFUSION = DiffusionConfig(prediction_type="v_prediction")
SMALL = ((128, 6), (64, 4))


def make_predictor(
    case: str, codec: VAECodec, *, steps: int, ensemble: int, batch_size: int, precision: str = "fp32", **fields: Any
) -> Predictor:
    """A predictor of the shape of `case` (`model_config`), with random weights whose output depends on all of its inputs."""
    config = model_config(case, **fields, num_conditions=2, num_classes=tasks.num_task_labels(TASK) + 10)
    torch.manual_seed(0)
    network = DiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loaded = LoadedModel(network=network, model=config, diffusion=DIFFUSION, task=TASK, codec=codec)
    values: dict[str, Any] = {"steps": [steps], "ensemble": [ensemble], "batch_size": batch_size, "precision": precision}
    return Predictor(loaded, config=EvaluationConfig(**values))


class OneAtATime:
    """The same predictions, one image and one member after the other."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.config = predictor, predictor.config
        self.network = textbook.DiT(predictor.model).to(predictor.device).eval()
        self.network.load_state_dict(predictor.network.state_dict())
        self.codec = copy.deepcopy(predictor.codec)
        self.codec.vae.to(memory_format=torch.contiguous_format)  # as diffusers loads it

    def conditions(self, image: np.ndarray) -> Tensor:
        """Scaled condition latents [1, K C, h, w] of one image."""
        codec, count = self.codec, self.predictor.model.num_conditions
        pictures = [tasks.image_to_float(image), tasks.all_valid_prompt(*image.shape[:2])][:count]
        latents = [codec.encode(torch.from_numpy(p)[None].to(self.predictor.device))[:, 0] for p in pictures]
        return torch.cat([codec.scaling.normalize(part) for part in latents], dim=1)

    @torch.no_grad()
    def member(self, conditions: Tensor, key: str, member: int) -> Tensor:
        """Latents [1, C, h, w] of one member."""
        from diffusers import DDIMScheduler

        diffusion = self.predictor.diffusion
        scheduler = DDIMScheduler(
            prediction_type=diffusion.prediction_type, timestep_spacing="trailing", beta_schedule=diffusion.beta_schedule,
            beta_start=diffusion.beta_start, beta_end=diffusion.beta_end, clip_sample=False,
        )  # fmt: skip
        scheduler.set_timesteps(self.config.steps[-1])
        model, device = self.predictor.model, self.predictor.device
        label = tasks.label_id(TASK, trained_task=TASK, num_classes=model.num_classes)
        seeds = noises.key_seeds(self.config.seed, [key], [member]).to(device)
        noisy = noises.normal(seeds, (model.in_channels, *conditions.shape[-2:]))
        labels = torch.tensor([label], device=device)
        for timestep in scheduler.timesteps:
            inputs = torch.cat([conditions, noisy], dim=1)
            prediction, _ = self.network(inputs, timestep.to(device)[None], labels)
            noisy = scheduler.step(prediction[:, : model.in_channels], timestep, noisy).prev_sample
        return noisy

    def members(self, image: np.ndarray, key: str) -> Tensor:
        """Depth [N, H, W] of all members."""
        decoded = []
        for number in range(self.config.ensemble[-1]):
            latents = self.member(self.conditions(image), key, number)
            decoded.append(self.codec.decode(latents))
        return target_codes.decode_depth(torch.cat(decoded), self.predictor.codes[TASK])

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [textbook.median_compilation(self.members(image, str(i)).cpu().numpy()) for i, image in enumerate(images)]


def pictures(count: int, side: int) -> list[np.ndarray]:
    """Smooth random images uint8 [side, side, 3]."""
    random = np.random.default_rng(0)
    return [tasks.resize_image(random.integers(0, 256, (16, 16, 3), np.uint8), (side, side)) for _ in range(count)]


def evaluation(
    predictor: Predictor, images: Sequence[np.ndarray], rounds: int, truths: Sequence[np.ndarray] | None = None
) -> list[harness.Row]:
    """Measure the whole pipeline, and our parts of it."""
    plain = OneAtATime(predictor)
    actions: dict[str, Callable[[], object]] = {harness.OURS: lambda: predictor(images), "one at a time": lambda: plain(images)}
    latents = predictor.predict_latents(*_inputs(predictor, images), task=TASK, steps=1)
    maps = predictor.decode(latents, TASK)
    parts: dict[str, Callable[[], object]] = {
        "encoding": lambda: _inputs(predictor, images),
        "decoding": lambda: predictor.decode(latents, TASK),
        "merging": lambda: merge_depth(maps, "compile"),
        "merging by BFGS": lambda: [textbook.median_compilation(m.numpy(force=True)) for m in maps],
    }
    results = harness.rows("evaluation", harness.interleave(actions, rounds))
    results[0] |= differences(predictor, plain, images, truths)
    return results + harness.rows("parts", harness.interleave(parts, rounds))


def _inputs(predictor: Predictor, images: Sequence[np.ndarray]) -> tuple[Tensor, list[str], range]:
    conditions = torch.stack(predictor._encode_conditions(TASK, images, None, 0))
    return conditions, [str(i) for i in range(len(images))], range(predictor.config.ensemble[-1])


def differences(
    predictor: Predictor, plain: OneAtATime, images: Sequence[np.ndarray], truths: Sequence[np.ndarray] | None
) -> dict[str, float]:
    """How far apart the two ways' AbsRel are, as shares: from the same members merged alike, and as each merges them.

    Without truths (float32 [H, W] metres) they are made up: the members' own mean, as metres, plus smooth noise.
    """
    random = np.random.default_rng(1)
    ours, members = predictor(images), [plain.members(image, str(i)) for i, image in enumerate(images)]
    errors: dict[str, list[float]] = {"ours": [], "alike": [], "each": []}
    for number, (prediction, maps) in enumerate(zip(ours, members, strict=True)):
        if truths is None:
            mean = maps.mean(0).numpy(force=True)
            noise = tasks.resize_smooth(random.normal(size=(16, 16)).astype(np.float32), mean.shape)
            truth = ((1 + 4 * mean) * np.exp(0.2 * noise)).astype(np.float32)
        else:
            truth = truths[number]
        merged = merge_depth(maps[None], "compile")[0][0].numpy(force=True)
        values = (prediction.value, merged, textbook.median_compilation(maps.numpy(force=True)))
        for name, value in zip(errors, values, strict=True):
            errors[name].append(score(PROTOCOLS["hypersim"], value, truth)["abs_rel"])
    one, alike, each = (float(np.mean(values)) for values in errors.values())
    return {"abs_rel": one, "abs_rel_apart": abs(alike / one - 1), "abs_rel_apart_merged_by_bfgs": abs(each / one - 1)}


def alignment(rounds: int, *, members: int, side: int) -> list[harness.Row]:
    """Measure the alignment of an ensemble's depth maps, which differ in scale and shift and by noise."""
    random = np.random.default_rng(0)
    truth = tasks.resize_smooth(random.normal(size=(16, 16)).astype(np.float32), (side, side))
    factors, noise = random.uniform(0.5, 1.5, (members, 1, 1)), random.normal(scale=0.05, size=(members, side, side))
    maps = (factors * truth + random.normal(size=(members, 1, 1)) + noise).astype(np.float32)
    on_device = torch.from_numpy(maps)[None].to(harness.device())
    actions: dict[str, Callable[[], object]] = {
        harness.OURS: lambda: align_depth(on_device)[0].cpu(),
        "BFGS": lambda: textbook.align(maps),
    }
    return harness.rows(f"alignment of {members}", harness.interleave(actions, rounds))


def network(case: str, predictor: Predictor, images: Sequence[np.ndarray], rounds: int) -> list[harness.Row]:
    """Measure the sampler's part."""
    plain, config = OneAtATime(predictor), predictor.config
    steps, count = config.steps[-1], config.ensemble[-1]
    conditions, keys, members = _inputs(predictor, images)
    tokens = min(config.batch_size, len(images) * count) * (conditions.shape[-1] // predictor.model.patch_size) ** 2
    forward = [p for p in block_products(predictor.model, tokens) if p[0] == "nt"]
    products = harness.MatrixProducts(forward, torch.float32)
    flops = 2.0 * macs(predictor.model, *conditions.shape[-2:]).forward * steps * count * len(images)
    actions: dict[str, Callable[[], object]] = {
        harness.BOUND: products,
        harness.OURS: lambda: predictor.predict_latents(conditions, keys, members, task=TASK, steps=steps),
        "one at a time": lambda: [plain.member(conditions[int(k)].flatten(0, 1)[None], k, m) for k in keys for m in members],
    }
    timings = harness.interleave(actions, rounds)
    timings[harness.BOUND] = timings[harness.BOUND].scaled(flops / products.flops)
    return harness.rows(case, timings)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, rounds=3, images=2, vae="embedded")
    parser.add_argument("--preset", default="XL/2", help="shape of the network (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="its blocks (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="sampler steps (default: %(default)s)")
    parser.add_argument("--ensemble", type=int, default=5, help="members (default: %(default)s)")
    parser.add_argument("--aligned", type=int, default=10, help="depth maps that are aligned (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=10, help="predictions at once (default: %(default)s)")
    parser.add_argument("--weights", help="a trained network for depth, instead of random ones")
    parser.add_argument("--shards", help="the shards of an evaluation set, for --weights")
    arguments = parser.parse_args(argv)
    if (arguments.weights is None) != (arguments.shards is None):
        parser.error("--weights and --shards go together: a trained network, and images with their true depth.")
    results = _of_random_networks(arguments) if arguments.weights is None else _of_a_trained_network(arguments)
    harness.finish("sample", results, arguments)


def _of_random_networks(arguments: argparse.Namespace) -> list[harness.Row]:
    codec = load_vae(arguments.vae)
    make = partial(make_predictor, arguments.preset, codec, steps=arguments.steps, ensemble=arguments.ensemble)
    side = arguments.resolution // codec.downsampling
    predictor = make(batch_size=arguments.batch_size, depth=arguments.depth, input_size=side)
    images = pictures(arguments.images, arguments.resolution)
    results = evaluation(predictor, images, arguments.rounds)
    results += network("network", predictor, images, arguments.rounds)
    results += alignment(arguments.rounds, members=arguments.aligned, side=arguments.resolution)
    for width, blocks in SMALL:
        small = make(batch_size=64, hidden_size=width, depth=blocks, num_heads=4, input_size=16)
        results += network(f"small {width} x {blocks}", small, pictures(4, 128), arguments.rounds)
    return results


def _of_a_trained_network(arguments: argparse.Namespace) -> list[harness.Row]:
    settings = EvaluationConfig(steps=[arguments.steps], ensemble=[arguments.ensemble], batch_size=arguments.batch_size)
    predictor, data = Predictor(arguments.weights, config=settings), EvaluationSet(arguments.shards)
    samples = [data[i] for i in range(min(arguments.images, len(data)))]
    return evaluation(predictor, [s.image for s in samples], arguments.rounds, [s.truth for s in samples])


if __name__ == "__main__":
    main()
