"""Power-function averages have the profiles that they are said to have, and others are made of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_toys import number_engine
from training_toys import make_recipe

from dpt.config.recipe import load_recipe
from dpt.config.sections import LONGEST_EMA
from dpt.errors import UserError
from dpt.training import preflight, saving
from dpt.training.averages import Profile, exponent, first_spacing, mix, new_share, spacing
from dpt.training.checkpoint import find_checkpoints, step_of
from dpt.training.optimizer import DEFAULTS, AdamWEMA
from dpt.training.saving import SnapshotWriter


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, LONGEST_EMA])
def test_a_length_is_the_standard_deviation_of_its_profile(length: float) -> None:
    g = exponent(length)
    times = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = (g + 1) * times**g
    mean = (density * times).mean()
    assert math.sqrt((density * (times - mean) ** 2).mean()) == pytest.approx(length, rel=1e-4)


def test_updates_weigh_as_the_profile_says() -> None:
    g, updates, weights = exponent(0.1), 37, np.zeros(37)
    for update in range(1, updates + 1):
        share = new_share(g, update)
        weights *= 1 - share
        weights[update - 1] = share
    edges = np.arange(updates + 1) / updates
    np.testing.assert_allclose(weights, np.diff(edges ** (g + 1)), atol=1e-12)


def test_the_optimizer_keeps_them_beside_its_other_states() -> None:
    parameter = torch.nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(1)))
    optimizer = AdamWEMA([parameter], DEFAULTS | {"lr": 1e-2}, ema_decays=[0.9], ema_lengths=[0.05, 0.1])
    assert optimizer.state_names() == ["exp_avg", "exp_avg_sq", "ema0", "power0", "power1"]
    history = []
    for _ in range(30):
        parameter.grad = torch.randn(40)
        optimizer.step()
        optimizer.updates += 1
        history.append(parameter.detach().double().clone())
    for name, length in (("power0", 0.05), ("power1", 0.1)):
        profile = np.diff((np.arange(31) / 30) ** (exponent(length) + 1))
        expected = sum(share * weights for share, weights in zip(profile, history, strict=True))
        torch.testing.assert_close(optimizer.state[parameter][name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("updates", [64, 100_000])
def test_a_mix_of_snapshots_is_near_the_length_asked_for(updates: int) -> None:
    kept = [Profile(exponent(s), updates * n // 32) for n in range(1, 33) for s in (0.05, 0.1)]
    for length, residual in ((0.05, 1e-6), (0.07, 2e-3), (0.1, 1e-6), (0.15, 4e-3), (0.03, 2e-2)):
        made = mix(kept, Profile(exponent(length), updates))
        assert made.residual < residual
        assert sum(made.shares) == pytest.approx(1.0)
    few = mix(kept[-2:], Profile(exponent(0.2), updates))
    assert few.residual > 0.1


def test_snapshots_are_bounded_whatever_the_length_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "snapshot", lambda engine, states: ({"power0/w": torch.zeros(3)}, {"w": [0, 3]}))
    monkeypatch.setattr(saving, "engine_state", lambda engine: {"updates": engine.number, "loss_scaler": {}})
    monkeypatch.setattr(saving, "parameter_shapes", lambda module: {"w": [3]})
    writer = SnapshotWriter(tmp_path / "averages", every=3, most=4)
    for step in range(1, 101):
        if not writer.is_due(step):
            continue
        writer.begin(number_engine(step), step, {})
        assert writer.finish()
        kept = sorted(step_of(path) for path in find_checkpoints(tmp_path / "averages"))
        apart = spacing(step, 3, 4)
        assert kept == list(range(apart, step + 1, apart))
        assert len(kept) <= 4
    assert kept == [24, 48, 72, 96]


def test_a_longer_run_keeps_snapshots_of_the_shorter_one() -> None:
    for steps, longer in ((240, 480), (1000, 1100), (24, 400_000), (1, 2)):
        short, long = (first_spacing(n, 12) for n in (steps, longer))
        assert steps <= 12 * short < 2 * steps + 24
        assert long % short == 0


def test_one_average_alone_is_a_mix() -> None:
    made = mix([Profile(exponent(0.1), 50)], Profile(exponent(0.1), 50))
    assert made.shares == [1.0]
    assert made.residual == 0.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"training.ema_lengths": "0.3"}, r"ema_lengths \[0.3\]: every length must be in \(0, 0.28\]"),
        ({"training.ema_lengths": "0.1,0.1"}, "without repeats"),
        ({"training.ema_snapshots": 1}, "ema_snapshots is 1; it must be at least 2"),
        ({"training.ema_snapshot_every": -1}, "ema_snapshot_every is -1; it must be at least 0"),
    ],
)
def test_refusals(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe(make_recipe(tmp_path / "run.json", []), fields)


def test_the_plan_counts_them(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "run.json", [], ema_decays=[0.9])
    plain, averaged = (
        preflight.needs(load_recipe(path, fields), "pretrain", 1)
        for fields in ({}, {"training.ema_lengths": "0.05,0.1", "training.ema_snapshots": 8})
    )
    assert averaged.memory.ema == 3 * plain.memory.ema
    assert averaged.snapshots == 8 * 2 * plain.memory.ema  # one rank: the averages of all parameters
    assert "Snapshots of averages take up to" in averaged.plan
    assert "Snapshots" not in plain.plan
