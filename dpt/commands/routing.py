"""Show which experts get which tokens: by layer, timestep, class and patch position, as pictures and arrays."""

import argparse
from pathlib import Path
from typing import Any

from dpt.config.numbers import COUNT, WHOLE
from dpt.errors import naming


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", help="weights of a Mixture-of-Experts: exported, public, a checkpoint, or hub:owner/name")
    add("--data", nargs="+", required=True, help="training shards of the model's task")
    add("--samples", type=COUNT, default=256, help="samples shown to the network")
    add("--batch-size", type=COUNT, default=32, help="samples per forward pass")
    add("--out", type=Path, default=Path("routing"), help="folder of the results")
    add("--seed", type=WHOLE, default=0, help="seed of order, timesteps and noise")


def run(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from dpt import distributed
    from dpt.config.recipe import DptConfig, section_from_dict
    from dpt.config.sections import DataConfig, DiffusionConfig, TrainingConfig
    from dpt.models.routing_pictures import trace_routing
    from dpt.training.data_loader import open_data_loader
    from dpt.training.export import load_weights
    from dpt.training.step import Preparation

    weights = load_weights(arguments.weights, ema=True)
    config = DptConfig(
        task=weights.sections.get("task", "class"),
        model=weights.config,
        diffusion=section_from_dict(DiffusionConfig, weights.sections.get("diffusion", {}), arguments.weights),
        data=DataConfig(shards=arguments.data, posterior="mean", vae=str((weights.sections.get("vae") or {}).get("name", ""))),
        training=TrainingConfig(seed=arguments.seed),
    )
    device, batch_size = distributed.device(), min(arguments.batch_size, arguments.samples)
    data_loader = open_data_loader(
        config, global_batch_size=batch_size, micro_batch_size=batch_size, start_sample=0, pin_memory=False
    )
    network = weights.build().to(device).eval()
    prepare = Preparation(
        config, tasks=data_loader.tasks, scaling=data_loader.scaling, device=device, dtype=next(network.parameters()).dtype
    )

    def arguments_of(batch: Any) -> dict[str, Any]:
        inputs = prepare(batch)
        return {
            "noisy_latents": inputs.network_input,
            "timesteps": inputs.timesteps,
            "labels": inputs.task_labels,
            "embeddings": inputs.embeddings,
            "task_labels": inputs.task_labels,
        }

    batches = islice(data_loader.stream, -(-arguments.samples // batch_size))
    with naming(arguments.weights):
        report = trace_routing(
            network,
            map(arguments_of, batches),
            num_train_timesteps=config.diffusion.num_train_timesteps,
            network_time=prepare.objective.network_time,
        )
    for layer, (load, token) in enumerate(zip(report.load_entropy, report.token_entropy, strict=True)):
        print(f"layer {layer}: evenness of loads {load:.3f}, uncertainty of a token {token:.3f} (1: even, 0: one expert)")
    for path in report.save(arguments.out):
        print(path)
