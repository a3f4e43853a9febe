"""The methods beyond the paper, several at once, in shipped recipes made small: trained, resumed and exported on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from rehearsals import checkpoints, rehearse
from shrinking import RECIPES, prepare_places, rehearsed_ranks, stage_of

from dpt.config.recipe import load_recipe
from dpt.models.pretrained import read_weights

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pre-training": (
        "dense_a1",
        {
            "model.base_width": 16,
            "optimizer.type": "Muon",
            "training.ema_lengths": [0.05, 0.1],
            "training.bypass_share": 0.5,
            "training.bypass_first": 0,
            "training.bypass_last": 1,
        },
    ),
    "one step": (
        "best_depth_a4",
        {"optimizer.type": "Muon", "training.ema_lengths": [0.1], "diffusion.timesteps": "last", "pixel_loss.weight": 0.5},
    ),
    "experts": (
        "upcycle_depth_a2",
        {"upcycling.reinit_share": 0.5, "training.expert_distance_every": 2, "diffusion.timesteps": "logit_normal"},
    ),
    "fine experts": (
        "moe_s2_8e",
        {"model.router_gate": "sigmoid", "model.base_width": 16, "training.balance_loss_weight": 0.0},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_run_together(name: str, tmp_path: Path) -> None:
    stem, methods = METHODS[name]
    path = next(path for path in RECIPES if path.stem == stem)
    recipe = load_recipe(path)
    fields = prepare_places(path, tmp_path) | methods
    rehearse(recipe, stage_of(stem), rehearsed_ranks(recipe), fields, compiler="eager")
    run = tmp_path / "run"
    assert checkpoints(run) == ["step_00000002", "step_00000004"]
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 4
    assert records[-1]["train/skipped_steps"] == 0
    assert all(t.isfinite().all() for t in read_weights(run / "weights").state.values())
