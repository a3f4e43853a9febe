"""A run's folder is gone on with by its own recipe alone; another one is refused, field by field."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_toys import make_saver, save, state_of
from training_toys import make_recipe, make_shards

from dpt.config.recipe import load_recipe
from dpt.data.manifest import read_manifest
from dpt.errors import UserError
from dpt.training import loop
from dpt.training.continuing import check_course, check_data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_recipe(tmp_path / "run.json", [tmp_path / "shards"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model.hidden_size": 64}, "dpt.model.hidden_size 32 -> 64"),
        ({"optimizer.params.lr": 1e-5}, "optimizer.params.lr 0.003 -> 1e-05"),
        ({"optimizer.type": "Muon"}, "optimizer.type AdamW -> Muon"),
        ({"train_batch_size": 16}, "train_batch_size 8 -> 16"),
        ({"gradient_clipping": 1.0}, "gradient_clipping 0.5 -> 1.0"),
        ({"task": "flow", "model.num_conditions": 2}, "dpt.task class -> flow"),
        ({"diffusion.prediction_type": "v_prediction"}, "dpt.diffusion.prediction_type epsilon -> v_prediction"),
        ({"training.seed": 1}, "dpt.training.seed 0 -> 1"),
        ({"training.weights": "elsewhere"}, "dpt.training.weights "),
        ({"data.shards": "elsewhere"}, "dpt.data.shards "),
    ],
)
def test_another_recipe_is_refused_and_the_fields_are_named(path: Path, fields: dict[str, Any], words: str) -> None:
    state = state_of(load_recipe(path))
    with pytest.raises(UserError) as refusal:
        check_course(Path("there"), state, load_recipe(path, fields), "pretrain")
    for word in (
        words,
        "the command line: there is of a run with another recipe",
        "dpt.training.output_dir",
        "dpt.training.resume_changed",
    ):
        assert word in str(refusal.value)
    check_course(Path("there"), state, load_recipe(path, {**fields, "training.resume_changed": True}), "pretrain")
    with pytest.raises(UserError, match="stage pretrain -> finetune"):
        check_course(Path("there"), state, load_recipe(path), "finetune")


def test_what_does_not_change_the_course_may_differ(path: Path) -> None:
    fields = {
        "training.steps": 99,
        "training.log_every": 7,
        "training.checkpoint_every": 3,
        "training.output_dir": "moved",
        "zero_optimization.stage": 2,
        "bf16.enabled": True,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer.params.eps": 1e-8,  # as where nothing is said
        "optimizer.params.weight_decay": "0.010",
        "validation.patience": 3,
        "tracking.experiment": "other",
        "upcycling.noise_std": 0.1,  # of another stage
    }
    check_course(Path("there"), state_of(load_recipe(path)), load_recipe(path, fields), "pretrain")


def test_fields_that_a_run_of_an_earlier_version_did_not_have_count_as_their_defaults(path: Path) -> None:
    state = state_of(load_recipe(path))
    del state["recipe"]["dpt"]["training"]["bypass_share"], state["recipe"]["dpt"]["pixel_loss"]
    check_course(Path("there"), state, load_recipe(path), "pretrain")
    with pytest.raises(UserError, match=r"bypass_share 0\.0 -> 0\.5"):
        check_course(Path("there"), state, load_recipe(path, {"training.bypass_share": 0.5}), "pretrain")


def test_averages_may_change_but_not_the_one_that_teaches(path: Path) -> None:
    own = {"training.self_alignment.weight": 0.2, "training.self_alignment.ema_decay": 0.0, "training.ema_decays": [0.9]}
    state = state_of(load_recipe(path, own))
    check_course(Path("there"), state, load_recipe(path, {**own, "training.ema_decays": [0.9, 0.5]}), "pretrain")
    other = {**own, "training.ema_decays": [0.5, 0.9]}
    with pytest.raises(UserError, match=r"self_alignment\.ema_decay 0\.9 -> 0\.5"):
        check_course(Path("there"), state, load_recipe(path, other), "pretrain")
    named = {**other, "training.self_alignment.ema_decay": 0.9}
    check_course(Path("there"), state, load_recipe(path, named), "pretrain")
    off = {"training.self_alignment.weight": 0.0}
    plain = state_of(load_recipe(path, own | off))
    check_course(Path("there"), plain, load_recipe(path, other | off), "pretrain")


def test_shards_are_compared_by_their_contents(path: Path, tmp_path: Path) -> None:
    sha256 = read_manifest(make_shards(tmp_path / "moved")).data_sha256
    state = state_of(load_recipe(path), sha256)
    moved = load_recipe(path, {"data.shards": str(tmp_path / "moved")})
    check_course(Path("there"), state, moved, "pretrain")
    check_data(Path("there"), state, moved, sha256)
    with pytest.raises(UserError, match=r"dpt\.data\.shards are not the ones that the run of there has seen"):
        check_data(Path("there"), state, moved, "b")
    check_data(Path("there"), state, load_recipe(path, {"training.resume_changed": True}), "b")


def test_a_finished_folder_does_not_take_another_recipe_for_its_own(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make_saver(tmp_path / "run" / "checkpoints", monkeypatch), 20, **state_of(load_recipe(path)))
    monkeypatch.setattr(loop, "export", lambda checkpoint, weights: None)
    loop.train(load_recipe(path), "pretrain")  # says that it is done
    with pytest.raises(UserError, match=r"optimizer\.params\.lr 0\.003 -> 0\.1"):
        loop.train(load_recipe(path, {"optimizer.params.lr": 0.1}), "pretrain")
