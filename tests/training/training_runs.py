"""The runs that the tests look at. Each number of ranks is launched once: processes take longer to start than to train."""

from pathlib import Path
from typing import Any

from training_toys import MOE, ToyRun, make_recipe, make_shards, train_several

ACCUMULATED = {"train_micro_batch_size_per_gpu": 2, "training.balance_loss_weight": 0.0}
BIASES = {"model.router_bias_balancing": True}
CHECKPOINTING = {"training.activation_checkpointing": True}
BF16 = {"bf16.enabled": True}
OBJECTIVES = {
    "min_snr": {"diffusion.prediction_type": "v_prediction", "diffusion.min_snr_gamma": 5.0},
    "rectified_flow": {"diffusion.prediction_type": "rectified_flow", "diffusion.vlb_weight": 0.0},
}


def _zero(stage: int, *more: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"zero_optimization.stage": stage}
    for part in more:
        fields |= part
    return fields


def _ep(stage: int, ep_size: int, *more: dict[str, Any]) -> dict[str, Any]:
    return _zero(stage, MOE, {"training.ep_size": ep_size}, *more)


_EVERY_STAGE = {
    **{f"dense_zero{stage}": _zero(stage) for stage in range(4)},
    **{f"moe_zero{stage}": _zero(stage, MOE) for stage in range(4)},
}
SPREAD: dict[int, dict[str, dict[str, Any]]] = {  # ranks -> runs that must equal one rank's
    1: {
        **_EVERY_STAGE,
        "dense_accumulated": _zero(1, ACCUMULATED),
        "moe_accumulated": _zero(1, MOE, ACCUMULATED),
        "dense_checkpointing": _zero(2, CHECKPOINTING),
        "moe_biases": _zero(1, MOE, BIASES),
        "moe_biases_accumulated": _zero(1, MOE, BIASES, ACCUMULATED),
        **{f"dense_{name}": _zero(1, fields) for name, fields in OBJECTIVES.items()},
    },
    2: {
        **_EVERY_STAGE,
        "dense_accumulated": _zero(2, ACCUMULATED),
        "moe_accumulated": _ep(2, 2, ACCUMULATED),
        "moe_zero1_ep2": _ep(1, 2),
        "moe_zero2_ep2": _ep(2, 2),
        "moe_checkpointing_ep2": _ep(1, 2, CHECKPOINTING),
        "moe_biases": _ep(1, 2, BIASES),
        "moe_biases_accumulated": _ep(1, 2, BIASES, ACCUMULATED),
        **{f"dense_{name}": _zero(2, fields) for name, fields in OBJECTIVES.items()},
        "dense_offload": _zero(2, {"zero_optimization.offload_optimizer": {"device": "cpu"}}),
        "dense_zero0_bf16": _zero(0, BF16),
        "dense_zero1_bf16": _zero(1, BF16),
        "dense_zero3_bf16": _zero(3, BF16),
        "moe_zero2_ep2_bf16": _ep(2, 2, BF16),
        "moe_zero1_ep2_fp16": _ep(1, 2, {"fp16.enabled": True, "fp16.initial_scale_power": 12}),
    },
    4: {
        **_EVERY_STAGE,
        "dense_accumulated": _zero(3, {"train_micro_batch_size_per_gpu": 1}),
        **{f"moe_zero{stage}_ep{ep_size}": _ep(stage, ep_size) for stage in (1, 2) for ep_size in (2, 4)},
        "moe_biases": _ep(2, 4, BIASES),
    },
}
RESUMED = {  # runs that must be the same bit for bit whether they were interrupted or not
    "zero0": _zero(0),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
    "moe_ep2": _ep(1, 2, BIASES),
    "bf16": _zero(1, BF16),
    "fp16": _zero(1, {"fp16.enabled": True, "fp16.initial_scale_power": 26, "fp16.loss_scale_window": 4}),
}
ROADS = {  # runs taken from 1 to 2, 4 and 2 ranks
    "dense": [_zero(1), _zero(2), _zero(3), _zero(1)],
    "moe": [_zero(1, MOE), _ep(1, 2), _ep(2, 4), _zero(3, MOE)],
}
_CAREFUL = {"training.max_skipped_steps": 3, "training.checkpoint_every": 4}
SLOW = {  # left to `make test-all`
    *(f"1_{name}" for name in ("dense_zero1", "dense_zero2", "moe_zero1", "moe_zero2", "dense_accumulated")),
    *("1_moe_biases_accumulated", "2_moe_biases_accumulated"),
    *(f"2_{name}" for name in ("moe_zero0", "moe_zero1", "moe_zero2", "moe_checkpointing_ep2")),
    *(f"2_{name}" for name in ("dense_zero0_bf16", "dense_zero3_bf16", "moe_zero2_ep2_bf16")),
    *(f"4_{name}" for name in ("dense_zero0", "dense_zero1", "dense_accumulated")),
    *(
        f"4_{name}"
        for name in ("moe_zero0", "moe_zero1", "moe_zero2", "moe_zero3", "moe_zero1_ep2", "moe_zero2_ep4", "moe_biases")
    ),
    *("zero0", "zero2", "bf16"),
    *("poisoned_zero2", *(f"poisoned_bf16_zero{stage}" for stage in (0, 1, 3))),
}
REWOUND = _zero(1, ACCUMULATED, _CAREFUL)
"""Samples 45 to 66 are in steps 6 to 9."""
POISONED = {  # runs with numbers that are not finite in the first of a step's two micro-batches, on one rank
    **{f"zero{stage}": _zero(stage, ACCUMULATED, _CAREFUL) for stage in range(4)},
    "moe_ep2": _ep(2, 2, ACCUMULATED, _CAREFUL),
    **{f"bf16_zero{stage}": _zero(stage, BF16, ACCUMULATED, _CAREFUL) for stage in range(4)},
    "fp16": _zero(1, {"fp16.enabled": True, "fp16.initial_scale_power": 8}, ACCUMULATED, _CAREFUL),
}


class Runs:
    """`folder / NAME`: output of the run NAME; `report`: what the run "failing" said."""

    def __init__(self, folder: Path, *, slow: bool) -> None:
        """`slow`: do the runs of SLOW too."""
        self.folder = folder
        left_out = set() if slow else SLOW
        self.recipe = make_recipe(folder / "recipe.json", [make_shards(folder / "shards")])
        self.report = ""
        for leg, (launcher, ranks) in enumerate((("torchrun", 1), ("deepspeed", 2), ("torchrun", 4), ("torchrun", 2))):
            runs = [self._run(f"road_{name}", road[leg], **_until(leg)) for name, road in ROADS.items()]
            if leg < 3:
                runs += [
                    self._run(f"{ranks}_{name}", fields)
                    for name, fields in SPREAD[ranks].items()
                    if f"{ranks}_{name}" not in left_out
                ]
            if leg == 0:
                runs += [self._run(f"straight_{name}", road[0]) for name, road in ROADS.items()]
            if leg == 1:
                for name, fields in RESUMED.items():
                    if name in left_out:
                        continue
                    runs.append(self._run(f"{name}_whole", fields))
                    runs.append(self._run(f"{name}_parts", fields, sigterm_at=7, ends="stopped"))
                    runs.append(self._run(f"{name}_parts", fields))
                runs += [
                    self._run(f"poisoned_{name}", fields, poison=[4, 5])
                    for name, fields in POISONED.items()
                    if f"poisoned_{name}" not in left_out
                ]
                runs += self._stages()
                runs += self._restarts()
                runs.append(self._run("failing", POISONED["zero1"], poison=range(6, 20), ends=""))
            ended = train_several(launcher, ranks, folder / f"leg_{leg}.json", runs)
            if leg == 1:
                self.report = ended[-1]

    def _stages(self) -> list[ToyRun]:
        """Fine-tuning for each task, upcycling, and what the upcycled network must equal at its first step."""
        shards = {task: str(make_shards(self.folder / task, task)) for task in ("depth", "flow", "amodal")}
        short = {"data.posterior": "mean", "training.steps": 3, "model.class_dropout_prob": 0.0}
        depth = {**short, "task": "depth", "model.num_conditions": 1, "data.shards": [shards["depth"]]}
        tuned = {**depth, "training.weights": str(self.folder / "finetune_depth" / "weights")}
        flow = {**short, "task": "flow", "model.num_conditions": 2, "model.num_classes": 10, "data.shards": [shards["flow"]]}
        all_tasks = {"task": "generalist", "model.num_classes": 12, "model.patch_embed_tasks": 4}
        start = {"training.weights": str(self.folder / "straight_dense")}
        return [
            self._run("finetune_depth", {**depth, **start}, stage="finetune"),
            self._run("finetune_flow", {**flow, **start, **_zero(2)}, stage="finetune"),
            self._run(
                "finetune_generalist",
                {**flow, **all_tasks, **start, "data.shards": list(shards.values()), **_zero(3)},
                stage="finetune",
            ),
            self._run("finetune_again", tuned, stage="finetune"),
            self._run("upcycle", {**tuned, "upcycling.num_experts": 4, "training.ep_size": 2}, stage="upcycle"),
            self._run("untrained", {**depth, "training.steps": 0}, stage="finetune"),
        ]

    def _restarts(self) -> list[ToyRun]:
        """Runs that leave a window of samples out, whole and interrupted; begin anew at a damaged end; keep other averages."""
        runs = []
        for name, sigterms in (("rewound_whole", [-1]), ("rewound_parts", [7, 11, -1])):
            for at in sigterms:  # the first comes in the middle of the steps that are not finite
                ends = "finished" if at < 0 else "stopped"
                runs.append(self._run(name, REWOUND, poisoned_samples=range(45, 67), sigterm_at=at, ends=ends))
        saved = _zero(1, {"training.checkpoint_every": 4})
        runs += [self._run("damaged", saved), self._run("damaged", saved, damage=True)]
        runs.append(self._run("averages", _zero(1), sigterm_at=7, ends="stopped"))
        runs.append(self._run("averages", _zero(1, {"training.ema_decays": [0.5, 0.7]})))
        return runs

    def _run(self, name: str, fields: dict[str, Any], **options: Any) -> ToyRun:
        return ToyRun(output=self.folder / name, recipe=self.recipe, fields=fields, **options)

    def __call__(self, name: str) -> Path:
        return self.folder / name


def _until(leg: int) -> dict[str, Any]:
    return {"sigterm_at": 5 * (leg + 1), "ends": "stopped"} if leg < 3 else {}
