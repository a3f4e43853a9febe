"""Which checkpoint a run resumes from, which samples it leaves out, and what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_toys import make_saver, save, state_of
from training_toys import make_recipe

from dpt.config.recipe import load_recipe
from dpt.errors import UserError
from dpt.training import loop
from dpt.training.checkpoint import checkpoint_name, kept_averages, rank_file, read_state
from dpt.training.resume import SkippedSamples, check_network, find_checkpoint, position_of, remarks, rewind_target


def test_windows_move_the_stream_on_and_are_kept_in_the_state() -> None:
    skipped = SkippedSamples().plus(32, 64).plus(96, 104)
    assert skipped.count == 40
    assert str(skipped) == "32 to 63, 96 to 103"
    assert skipped.begin_at(96)
    assert not skipped.begin_at(64)
    state = {"samples_seen": 80, "skipped_samples": [list(window) for window in skipped.windows]}
    assert SkippedSamples.of(state) == skipped
    assert position_of(state) == 120
    assert position_of({"samples_seen": 80}) == 80  # of a version that skipped nothing
    with pytest.raises(AssertionError):
        skipped.plus(100, 108)


def test_a_rewind_goes_before_the_steps_that_were_not_finite_and_once_to_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = make_saver(tmp_path, monkeypatch, keep_last=5)
    assert rewind_target(tmp_path, SkippedSamples()) is None
    for step, in_a_row in ((2, 0), (4, 0), (6, 1), (8, 3)):
        save(saver, step, samples_seen=8 * step, skipped_samples=[], skipped_in_a_row=in_a_row)
    found = rewind_target(tmp_path, SkippedSamples())
    assert found is not None
    assert found[0].name == checkpoint_name(4)
    assert rewind_target(tmp_path, SkippedSamples().plus(32, 64)) is None
    saver.forget_after(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(2), checkpoint_name(4)]
    save(saver, 8, samples_seen=64, skipped_samples=[[32, 64]], skipped_in_a_row=0)  # progress: the run may rewind to it
    found = rewind_target(tmp_path, SkippedSamples().plus(32, 64))
    assert found is not None
    assert found[0].name == checkpoint_name(8)
    (tmp_path / checkpoint_name(8) / rank_file(0)).unlink()
    (tmp_path / checkpoint_name(4) / rank_file(0)).unlink()
    found = rewind_target(tmp_path, SkippedSamples().plus(32, 64))
    assert found is not None
    assert found[0].name == checkpoint_name(2)
    assert f"falling back to {found[0]}, the newest checkpoint that is whole" in capsys.readouterr().out


def test_checkpoints_that_must_not_be_resumed_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(tmp_path, resume=False) is None
    save(make_saver(tmp_path, monkeypatch), 1)
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        find_checkpoint(tmp_path, resume=False)
    found = find_checkpoint(tmp_path, resume=True)
    assert found is not None
    assert found[1] == read_state(found[0])


@pytest.mark.parametrize(("exported", "again"), [(-1, True), (10, True), (20, False)])
def test_weights_of_an_earlier_end_are_exported_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: int, again: bool
) -> None:
    """A run to step 20, killed before it exported; it had been one to step 10 before."""
    recipe = load_recipe(make_recipe(tmp_path / "run.json", []), {})
    folder, done = tmp_path / "run", list[Path]()
    save(make_saver(folder / "checkpoints", monkeypatch), 20, **state_of(recipe))
    if exported >= 0:
        (folder / "weights").mkdir()
        (folder / "weights" / "config.json").write_text(json.dumps({"lineage": {"step": exported}}))
    monkeypatch.setattr(loop, "export", lambda checkpoint, weights: done.append(weights))
    loop.train(recipe, "pretrain")
    assert done == [folder / "weights"] * again


def test_what_differs_from_the_checkpoint_is_said(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "run.json", [])
    before, now = load_recipe(path, {}), load_recipe(path, {"training.ema_decays": [0.5, 0.7, 0.0]})
    said = remarks(tmp_path, state_of(before, step=4), before, "a")
    assert said == [f"Continuing from {tmp_path} (step 4, written on 2 ranks)."]
    state = state_of(before, step=4, averages={"ema0": 0.9, "ema1": 0.5}, skipped_samples=[[32, 64]])
    assert remarks(tmp_path, state, now, "b")[1:] == [
        "Samples 32 to 63 of the stream stay skipped: they led to losses that were not finite.",
        "It keeps no average of decay 0.7, which therefore starts again from the current weights.",
        "Changed since then: dpt.training.ema_decays [0.9, 0.5] -> [0.5, 0.7, 0.0].",
        "The shards are not the ones of that checkpoint: the order of samples starts over.",
    ]
    assert kept_averages(state_of(before)) == {0.9: "ema0", 0.5: "ema1"}  # of a version that did not name them


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model.base_width": 8}, "trained with dpt.model.base_head_size 64; with 32 "),
        ({"model.base_width": 16}, "trained with dpt.model.base_width 8; with 16 "),
        ({"model.base_width": 0}, "trained with dpt.model.base_width 8; with 0 "),
        ({"optimizer.type": "Muon"}, "holds the states of AdamW, and optimizer.type is Muon"),
    ],
)
def test_a_checkpoint_of_another_function_or_optimizer_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    path = make_recipe(tmp_path / "run.json", [])
    before = load_recipe(path, {"model.base_width": 8})
    state = state_of(before, parameters={"w": [2]})
    check_network(tmp_path, state, before, {"w": [2]})
    with pytest.raises(UserError, match=r"is of another network than dpt\.model"):
        check_network(tmp_path, state, before, {"w": [3]})
    with pytest.raises(UserError) as refusal:
        check_network(tmp_path, state, load_recipe(path, {"model.base_head_size": 32, **fields}), {"w": [2]})
    assert words in str(refusal.value)
