"""What each rank finds for itself on a disk that others write to, or that only its node has, they decide together."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpt import distributed
from dpt.config.recipe import load_recipe
from dpt.errors import UserError
from dpt.training import engine_state, export, failure, loop, resume, session
from dpt.training.checkpoint import rank_file, write_tensors
from tests.gloo import run_ranks
from tests.training.checkpoint_toys import make_saver, save, state_of
from tests.training.training_toys import make_recipe


def refusals(action: Any) -> list[str]:
    """What two ranks that call it are both refused with."""

    def on_rank() -> str:
        with pytest.raises(UserError) as caught:
            action()
        return str(caught.value)

    return run_ranks(2, on_rank)


def by_rank(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *results: Any) -> None:
    """Let a function return another thing on each rank."""
    monkeypatch.setattr(owner, name, lambda *arguments, **options: results[distributed.rank()])


def test_the_weights_of_a_run_that_goes_on_are_of_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = tmp_path / "step_00000001", tmp_path / "step_00000002"
    by_rank(monkeypatch, export, "find_checkpoints", [older], [newer, older])
    monkeypatch.setattr(export, "checkpoint_weights", lambda checkpoint, ema: checkpoint.name)
    assert run_ranks(2, lambda: export.load_weights(tmp_path, ema=True)) == [older.name] * 2


def test_checkpoints_that_one_rank_does_not_see_yet_are_refused_by_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_rank(monkeypatch, resume, "find_checkpoints", [tmp_path / "step_00000001"], [])
    said = refusals(lambda: resume.find_checkpoint(tmp_path, resume=False))
    assert all("holds checkpoints of an earlier run" in text for text in said)


def test_an_export_that_fails_on_rank_0_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(make_recipe(tmp_path / "run.json", []), {})
    save(make_saver(tmp_path / "run" / "checkpoints", monkeypatch), 20, **state_of(recipe))

    def fail(checkpoint: Path, weights: Path) -> None:
        raise OSError(28, "No space left on device", str(weights))

    monkeypatch.setattr(loop, "export", fail)
    assert all("no space left" in text for text in refusals(lambda: loop.train(recipe, "pretrain")))


def test_what_a_checkpoint_lacks_for_one_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_tensors(tmp_path / rank_file(0), {"master/w": torch.ones(5)})
    state = {
        "files": {rank_file(0): {**entry, "fragments": {"w": [0, 5]}}},
        "engine": {"updates": 3, "loss_scaler": {}},
        "averages": {},
    }

    def of_rank(engine: Any) -> list[Any]:
        return [SimpleNamespace(name="w", offset=5 * distributed.rank(), flat=None, master=lambda: torch.zeros(5))]

    monkeypatch.setattr(engine_state, "fragments", of_rank)
    monkeypatch.setattr(engine_state, "persistent_buffers", lambda module: {})
    optimizer = SimpleNamespace(
        ema_decays={}, ema_lengths={}, ensure_state=lambda flat: {"step": torch.zeros(())}, names_of=lambda flat: []
    )
    engine: Any = SimpleNamespace(optimizer=optimizer, deepspeed=None, module=None)
    said = refusals(lambda: engine_state.restore(engine, tmp_path, state))
    assert all("holds 0 of 5 numbers of master/w" in text for text in said)


def test_shards_that_differ_between_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    by_rank(monkeypatch, session, "open_data_loader", *(SimpleNamespace(data_sha256=text, stream=[]) for text in "ab"))
    monkeypatch.setattr(session, "batch_split", lambda recipe, world_size: (4, 2, 1))
    run: Any = SimpleNamespace(recipe=None, config=None, state=SimpleNamespace(position=0), stage=SimpleNamespace(codes={}))
    said = refusals(lambda: session.Session._open_data_loader(run))
    assert all("rank 1 finds other shards" in text for text in said)


def test_a_report_that_cannot_be_written_is_said_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "fragments", lambda engine: [])
    engine: Any = SimpleNamespace(deepspeed=None)
    for folder, written in ((tmp_path, True), (tmp_path / "none", False)):
        assert "step 7 were not finite" in failure.failure_report(engine, folder, 7, 1.0, ["a"], False)
        assert (folder / "failure.json").exists() is written
    assert json.loads((tmp_path / "failure.json").read_text())["sample_keys"] == ["a"]
