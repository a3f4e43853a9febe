"""Runs that differ in their seed alone: one mean, its interval, a table, and bars in the figure."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import made_run

from dpt.errors import UserError
from dpt.scaling.figures import FigureSpec, draw, find
from dpt.scaling.points import Point
from dpt.scaling.repeats import as_markdown, half_width, means


def scored(size: str, seed: int, abs_rel: dict[int, float]):
    """An evaluation of a model of some size and seed, at some numbers of sampler steps."""
    metrics = {f"eval/depth/abs_rel/s{steps}_n1": value for steps, value in abs_rel.items()}
    tags = {"study.size": size, "study.seed": str(seed), "study.stage": "evaluate"}
    return made_run(f"{size}_{seed}", stage="evaluate", metrics=metrics, tags=tags)


RUNS = [
    scored(size, seed, {1: at + seed / 100, 5: at / 2 + seed / 50})
    for size, at in (("w64", 0.2), ("w96", 0.1))
    for seed in (0, 1, 2)
]
SPEC = FigureSpec(x="steps", y="eval/depth/abs_rel", group_by="study.size", over="study.seed", law=False)


def test_seeds_become_one_point_with_students_interval() -> None:
    found = find(RUNS, RUNS, SPEC).means
    assert [(m.group, m.x, len(m.runs)) for m in found] == [(size, x, 3) for size in ("w64", "w96") for x in (1, 5)]
    assert found[0].y == pytest.approx(0.21)
    assert found[0].half_width == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)


def test_what_differs_in_another_tag_stays_apart() -> None:
    points = [Point(x=1.0, y=1.0, group="", run=run) for run in RUNS]
    assert [len(mean.runs) for mean in means(points, "study.seed")] == [3, 3]
    assert [len(mean.runs) for mean in means(points, "study.size")] == [2, 2, 2]
    with pytest.raises(UserError, match=r'w64_0 has no tag "study.sed".*study.seed, study.size'):
        means(points, "study.sed")


def test_the_figure_writes_a_table_and_data(tmp_path) -> None:
    path = draw(find(RUNS, RUNS, SPEC), tmp_path / "steps.svg", watermark="TRIAL")
    table = path.with_suffix(".md").read_text().splitlines()
    assert table[0] == "TRIAL"
    assert table[2:] == [
        "| AbsRel % ↓; sampler steps | 1 | 5 |",
        "|---|---|---|",
        "| w64 | 21.00 ± 2.48 | 12.00 ± 4.97 |",
        "| w96 | 11.00 ± 2.48 | 7.00 ± 4.97 |",
    ]
    assert [mean["runs"] for mean in json.loads(path.with_suffix(".json").read_text())["means"]] == [3, 3, 3, 3]
    alone = draw(find(RUNS[:1], RUNS, SPEC), tmp_path / "alone.svg")
    assert "| w64 | 20.00 | 10.00 |" in alone.with_suffix(".md").read_text()


def test_missing_cells_are_dashes() -> None:
    found = find([*RUNS[:3], scored("w96", 0, {5: 0.1})], RUNS, SPEC).means
    assert "| w96 | – | 0.100 |" in as_markdown(found, "steps", "AbsRel")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(0.1, 10))
def test_the_interval_scales_and_does_not_move(values: list[float], factor: float) -> None:
    assert half_width([v * factor + 3 for v in values]) == pytest.approx(half_width(values) * factor, abs=1e-6)
