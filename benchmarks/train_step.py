"""A whole training step (forward, backward, AdamW, EMA) beside the textbook's loop, diffusers' network, and the matrix products
that it is made of.

python -m benchmarks.train_step [--cases a1 S/2 S/2-8E2A L/2:1] [--batch 16] [--precisions fp32 bf16] [--ways ours textbook]
    [--compile] [--json FILE]

A case is a preset, with `:DEPTH` for only that many of its blocks. `ours` is what the launchers run: the posterior sample,
noise and timesteps of a batch, the network under DeepSpeed, AdamW with EMA; on one rank, so without ZeRO in fp32 (and with it
for comparison: it copies gradients and weights once more), with ZeRO 1 in bf16. `bound` is the time that this machine takes for
the step's multiply-accumulates at the speed of the network's own largest matrix products, each alone. Rows in
micro-batches make the same step from a part of the batch at a time (`--micro-batches`), for its memory. All ways that are
compared are in memory together; a large model with experts fits two of them (`--ways`) in 24 GB.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, memory, textbook
from dpt import distributed
from dpt.config.presets import preset_values
from dpt.config.recipe import DptConfig, Recipe
from dpt.config.sections import DiffusionConfig, ModelConfig
from dpt.data.codec import LatentScaling
from dpt.diffusion.objective import DiffusionObjective
from dpt.models.costs import macs
from dpt.tasks import task_spec

Step = Callable[[], object]

MICRO = "ours in micro-batches"
ZERO_1 = "ours, ZeRO 1"
WAYS = (harness.OURS, "textbook", MICRO, ZERO_1, "diffusers")
"""Ways to compare, as far as they exist for a case."""

CPU_CASES = ("a1", "S/2", "S/2-8E2A", "L/2:1")
GPU_CASES = (*CPU_CASES, "XL/2", "L/2-8E2A")


def model_config(case: str, **fields: Any) -> ModelConfig:
    """The architecture that "PRESET" or "PRESET:DEPTH" names, with further fields."""
    preset, _, depth = case.partition(":")
    values = preset_values(preset) | ({"depth": int(depth)} if depth else {})
    return ModelConfig(**values | fields)


def recipe(
    config: ModelConfig,
    batch: int,
    precision: str,
    *,
    zero_stage: int = 1,
    accumulation: int = 1,
    attention: str = "auto",
    **training: Any,
) -> Recipe:
    """A pre-training recipe, as the launchers take it."""
    deepspeed: dict[str, Any] = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    deepspeed["zero_optimization"] = {"stage": zero_stage}
    if precision == "bf16":
        deepspeed["bf16"] = {"enabled": True}
    dpt = DptConfig(model=config, attention_backend=attention)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"output_dir": ""} | training
    return Recipe(deepspeed=deepspeed, dpt=dataclasses.replace(dpt, training=dataclasses.replace(dpt.training, **settings)))


def random_batch(config: DptConfig, batch: int) -> dict[str, Any]:
    """A batch as the stream yields it for the recipe: moments, labels, positions in the stream, and what its fields ask for."""
    model = config.model

    def moments(*leading: int) -> Tensor:
        drawn = torch.randn(batch, *leading, 2, model.in_channels, model.input_size, model.input_size)
        drawn[..., 1, :, :, :] -= 5.0
        return drawn.half()

    data: dict[str, Any] = {"sample_index": torch.arange(batch), "source": torch.zeros(batch, dtype=torch.int64)}
    if (alignment := config.training.feature_alignment).weight:
        data["features"] = torch.randn(batch, alignment.channels, 5, 5).half()
    if config.task == "class":
        data |= {"latents": moments(), "label": torch.randint(0, model.num_classes, (batch,))}
        return data | ({"latents_mirrored": moments()} if config.data.horizontal_flip else {})
    targets = 2 if config.task == "generalist" else len(task_spec(config.task).targets)
    valid = torch.ones(batch, model.input_size, model.input_size, dtype=torch.uint8)
    data |= {"cond_latents": moments(model.num_conditions), "target_latents": moments(targets), "valid": valid}
    width = model.clip_embedding_size
    return data | ({"clip": torch.randn(batch, width)} if width else {})


class Training:
    """The step that the launchers run: the recipe's network under its engine, each micro-batch prepared from `data`.

    Uses the recipe's `train_batch_size` (over all ranks) and `gradient_accumulation_steps`.
    """

    def __init__(self, recipe: Recipe) -> None:
        from dpt.training.engine import Engine
        from dpt.training.stages import Stage
        from dpt.training.step import LossModule, Preparation

        distributed.init()
        self.recipe, self.accumulation = recipe, recipe.deepspeed["gradient_accumulation_steps"]
        self.network = Stage(name="pretrain", recipe=recipe).build()
        self.engine = Engine(recipe, LossModule(self.network, recipe.dpt))
        device, dtype = self.engine.device, self.engine.dtype
        scaling = LatentScaling(scale=0.18215)
        self.prepare = Preparation(recipe.dpt, tasks=[recipe.dpt.task], scaling=scaling, device=device, dtype=dtype)
        whole = recipe.deepspeed["train_batch_size"]
        self.data = random_batch(recipe.dpt, whole // distributed.world_size() // self.accumulation)

    def step(self) -> None:
        """One optimizer step."""
        for number in range(self.accumulation):
            self.engine.accumulate(*self.prepare(self.data))
            if number < self.accumulation - 1:
                self.engine.end_micro_batch()
        self.engine.step(1e-4)


def pretraining(config: ModelConfig, batch: int, precision: str, **settings: Any) -> Training:
    """Class-conditional training in steps of `batch` samples per rank; `settings` as of `recipe`."""
    distributed.init()
    return Training(recipe(config, batch * distributed.world_size(), precision, **settings))


def ours(config: ModelConfig, batch: int, precision: str, *, zero_stage: int | None = None, **settings: Any) -> Step:
    """A step of `pretraining`; zero_stage None: 0 in fp32, 1 in bf16."""
    stage = int(precision != "fp32") if zero_stage is None else zero_stage
    return pretraining(config, batch, precision, zero_stage=stage, **settings).step


def plain(config: ModelConfig, batch: int, precision: str, *, network: str = "textbook") -> Step:
    """The textbook's loop around the textbook's network or diffusers' one; bf16 by autocast."""
    model: nn.Module = textbook.DiT(config) if network == "textbook" else _diffusers_network(config)
    model = model.to(harness.device())
    objective = DiffusionObjective(DiffusionConfig())
    data = random_batch(DptConfig(model=config), batch)
    device = harness.device()

    def loss() -> Tensor:
        mean, log_variance = data["latents"].to(device).float().unbind(1)
        latents = 0.18215 * (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=device)
        labels = data["label"].to(device)
        noisy = objective.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            if network == "textbook":
                prediction, balance = model(noisy, timesteps, labels)
            else:
                prediction, balance = model(noisy, timestep=timesteps, class_labels=labels).sample, 0.0
        total: Tensor = objective.loss(prediction.float(), latents, noise, noisy, timesteps)["loss"] + 0.01 * balance
        return total

    return textbook.training_step(model, loss)


def _diffusers_network(config: ModelConfig) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    network: nn.Module = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=2 * config.in_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )
    return network.train()


def block_products(config: ModelConfig, rows: int) -> list[tuple[str, int, int, int]]:
    """The matrix products of one block on `rows` tokens, forward and backward; experts evenly loaded."""
    d, width = config.hidden_size, config.mlp_width
    layers = [(rows, d, 3 * d), (rows, d, d)]
    if config.num_experts:
        first = width * (2 if config.expert_activation == "swiglu" else 1)
        slots = max(1, rows * config.top_k // config.num_experts)
        layers += [(slots, d, first), (slots, width, d)] * config.num_experts
        if config.shared_expert_width:
            layers += [(rows, d, 2 * config.shared_expert_width), (rows, config.shared_expert_width, d)]
    else:
        layers += [(rows, d, width), (rows, width, d)]
    return [product for layer in layers for product in harness.linear_products(*layer)]


def measure(
    case: str,
    config: ModelConfig,
    *,
    batch: int,
    precision: str,
    rounds: int,
    ways: Sequence[str] = WAYS,
    micro_batches: int = 4,
    compile: bool = False,
) -> list[harness.Row]:
    """Measure these ways of one case, in turn."""
    builders: dict[str, Callable[[], Step]] = {
        harness.OURS: lambda: ours(config, batch, precision, compile=compile),
        "textbook": lambda: plain(config, batch, precision),
    }
    if batch % micro_batches == 0:
        builders[MICRO] = lambda: ours(config, batch, precision, accumulation=micro_batches, compile=compile)
    if precision == "fp32":
        builders[ZERO_1] = lambda: ours(config, batch, precision, zero_stage=1, compile=compile)
    if not config.num_experts:
        builders["diffusers"] = lambda: plain(config, batch, precision, network="diffusers")
    builders = {name: build for name, build in builders.items() if name in ways}
    peaks = {name: memory.peak_bytes(build) for name, build in builders.items()}
    tokens = batch * (config.input_size // config.patch_size) ** 2
    products = harness.MatrixProducts(block_products(config, tokens), harness.DTYPES[precision])
    flops = 2.0 * batch * macs(config).training
    actions: dict[str, Step] = {harness.BOUND: products, **{name: build() for name, build in builders.items()}}
    timings = harness.interleave(actions, rounds, warmup=3)  # until the allocator has settled for all ways together
    timings[harness.BOUND] = timings[harness.BOUND].scaled(flops / products.flops)
    results = harness.rows(f"{case} {precision}", timings, peak_bytes=peaks)
    for row in results:
        row["gflops_per_s"] = flops / row["median_s"] / 1e9
        if torch.cuda.is_available():  # against the device's best large product in bf16, as in a training run's records
            row["matrix_peak_share"] = flops / row["median_s"] / harness.matrix_rate(torch.bfloat16, 8192)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, batch=16)
    parser.add_argument("--cases", nargs="+", default=GPU_CASES if torch.cuda.is_available() else CPU_CASES)
    parser.add_argument("--precisions", nargs="+", default=list(harness.DTYPES), choices=list(harness.DTYPES))
    parser.add_argument("--input-size", type=int, default=32, help="side of the latents (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="what to compare (default: all that do not take minutes)")
    parser.add_argument("--micro-batches", type=int, default=4, help="a step is split into, where it is (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    arguments = parser.parse_args(argv)
    results: list[harness.Row] = []
    notes: list[str] = []
    for precision in arguments.precisions:
        notes += filter(None, [harness.crawls(precision)])
        ways = harness.ways_to_measure(precision, arguments.ways, WAYS, (harness.OURS, MICRO))
        for case in arguments.cases:
            config, batch = model_config(case, input_size=arguments.input_size), arguments.batch
            settings = {"ways": ways, "micro_batches": arguments.micro_batches, "compile": arguments.compile}
            results += measure(case, config, batch=batch, precision=precision, rounds=arguments.rounds, **settings)
    harness.finish("train_step", results, arguments, notes=notes)


if __name__ == "__main__":
    main()
