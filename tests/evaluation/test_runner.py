import dataclasses
import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpt import distributed
from dpt.config.sections import EvaluationConfig
from dpt.data.manifest import read_manifest, write_manifest
from dpt.data.shards import ShardFolder
from dpt.errors import UserError
from dpt.evaluation import scoring
from dpt.evaluation.given import save_prediction
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.records import Record, RecordLog, Setting
from dpt.evaluation.runner import evaluate
from dpt.evaluation.scoring import samples_at_once
from dpt.evaluation.sets import EvaluationSet
from dpt.evaluation.summary import chosen_by_key, format_summary, pick_samples, tracked_metrics
from tests.evaluation.tiny import calls_of, make_model, make_set
from tests.gloo import run_ranks


def _config(out: Path, *sets: Path, **changes) -> EvaluationConfig:
    settings = {"steps": [1, 3], "ensemble": [1, 3], "batch_size": 4, "pictures": 0} | changes
    return EvaluationConfig(data=[str(s) for s in sets], output_dir=str(out), **settings)


def _run(config: EvaluationConfig, task: str = "depth") -> dict:
    return evaluate(config, predictor=Predictor(make_model(task), config=config, device="cpu"))


def _rows(out: Path) -> list[dict]:
    (path,) = out.glob("*/samples.parquet")
    return pq.read_table(path).to_pylist()


def _assert_same(rows: list[dict], others: list[dict]) -> None:
    assert len(rows) == len(others)
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == (pytest.approx(b[name], rel=1e-4, abs=1e-5) if isinstance(a[name], float) else b[name])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The output folder and the summary of a sweep over a set like `depth_set`."""
    folder = tmp_path_factory.mktemp("swept")
    return folder / "out", _run(_config(folder / "out", make_set(folder / "depth_val"), pictures=2))


def test_a_sweep_scores_every_sample_once_under_every_setting(swept):
    out, summary = swept
    rows = _rows(out)
    settings = [(r["kind"], r["steps"], r["ensemble"], r["index"]) for r in rows]
    swept = [("model", s, n) for s in (1, 3) for n in (1, 3)]
    assert settings == [(*s, i) for s in (("baseline", 0, 0), ("ceiling", 0, 0), *swept) for i in range(5)]
    one = summary["sets"]["synthetic_val"]
    assert json.loads((out / "summary.json").read_text())["sets"]["synthetic_val"] == one
    assert (one["num_samples"], one["protocol"], one["protocol_version"]) == (5, "synthetic_depth", 1)
    assert [(r["steps"], r["ensemble"]) for r in one["results"]] == [s[1:] for s in swept]
    last = [r["abs_rel"] for r in rows if (r["steps"], r["ensemble"]) == (3, 3)]
    assert one["results"][-1]["metrics"]["abs_rel"] == pytest.approx(np.mean(last))
    assert one["ceiling"]["abs_rel"] < 0.1 < one["baseline"]["abs_rel"]
    forward = summary["settings"]["forward_macs"]
    assert [r["macs_per_prediction"] for r in one["results"]] == [forward * s * n for _, s, n in swept]
    pictures = sorted(p.name for p in out.glob("*/pictures/*.png"))
    assert pictures == [f"synthetic_val_{which}.png" for which in ("best", "median", "same", "worst")]


def test_baseline_is_the_best_constant(swept, depth_set):
    truths = [s["truth"] for s in map(ShardFolder(depth_set).__getitem__, range(5))]
    expected = np.mean([np.mean(np.abs(t[t > 0].mean() - t[t > 0]) / t[t > 0]) for t in truths])
    assert swept[1]["sets"]["synthetic_val"]["baseline"]["abs_rel"] == pytest.approx(expected, rel=1e-5)


def test_batch_size_and_sweep_do_not_change_a_figure(swept, depth_set, tmp_path):
    rows = _rows(swept[0])
    _run(_config(tmp_path / "whole", depth_set, batch_size=64))
    _assert_same(rows, _rows(tmp_path / "whole"))
    _run(_config(tmp_path / "alone", depth_set, steps=[3], ensemble=[3], batch_size=1))
    alone = [r for r in _rows(tmp_path / "alone") if r["kind"] == "model"]
    _assert_same(alone, [r for r in rows if (r["steps"], r["ensemble"]) == (3, 3)])


def test_ranks_do_not_change_a_figure(swept, depth_set, tmp_path):
    def on_rank() -> int:
        summary = _run(_config(tmp_path / "two", depth_set, pictures=1))
        assert distributed.world_size() == 2
        return summary["sets"]["synthetic_val"]["num_samples"]

    assert run_ranks(2, on_rank) == [5, 5]
    _assert_same(_rows(swept[0]), _rows(tmp_path / "two"))
    lines = [len(p.read_text().splitlines()) for p in (tmp_path / "two").glob("*/parts/*/*.jsonl")]
    assert sorted(lines) == [2, 3]


def test_samples_are_scored_while_a_gpu_predicts_the_next(depth_set, tmp_path, monkeypatch):
    predict, score, second, calls = Predictor.predict_latents, scoring.score, threading.Event(), itertools.count()

    def predicts(self, *args, **more):
        if next(calls) == 1:
            second.set()
        return predict(self, *args, **more)

    def scores(protocol, prediction, truth):
        assert second.wait(timeout=60), "the second sample is not predicted before the first one is scored"
        return score(protocol, prediction, truth)

    monkeypatch.setattr(scoring, "threads_beside", lambda device: 4)
    monkeypatch.setattr(Predictor, "predict_latents", predicts)
    monkeypatch.setattr(scoring, "score", scores)
    _run(_config(tmp_path / "out", depth_set, steps=[1], ensemble=[1], batch_size=1))
    monkeypatch.setattr(scoring, "threads_beside", lambda device: 0)
    _run(_config(tmp_path / "alone", depth_set, steps=[1], ensemble=[1], batch_size=1))
    _assert_same(_rows(tmp_path / "out"), _rows(tmp_path / "alone"))
    monkeypatch.setattr(scoring, "threads_beside", lambda device: 4)

    def refuses(protocol, prediction, truth):
        raise UserError("this one is refused.")

    monkeypatch.setattr(scoring, "score", refuses)
    with pytest.raises(UserError, match=r"sample scene_000: this one is refused"):
        _run(_config(tmp_path / "other", depth_set))


def test_an_interrupted_run_goes_on(swept, depth_set, tmp_path, monkeypatch):
    config = _config(tmp_path / "out", depth_set)
    add, count = RecordLog.add, iter(range(1000))

    def dies(self, records):
        if next(count) == 2:  # with the third sample
            raise KeyboardInterrupt
        add(self, records)

    monkeypatch.setattr(RecordLog, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        _run(config)
    monkeypatch.setattr(RecordLog, "add", add)
    (part,) = (tmp_path / "out").glob("*/parts/*/*.jsonl")
    part.write_text(part.read_text() + '[[2, "scene_002", ["model", 1')  # a torn line
    assert not (tmp_path / "out" / "summary.json").exists()
    calls = calls_of(monkeypatch, Predictor, "predict_latents")

    def predicted() -> list[str]:
        """The keys since it was asked last."""
        keys = [key for (_, _, keys, *_), _ in calls for key in keys]
        calls.clear()
        return keys

    _run(config)
    assert set(predicted()) == {"scene_002", "scene_003", "scene_004"}
    _assert_same(_rows(tmp_path / "out"), _rows(swept[0]))
    _run(dataclasses.replace(config, steps=[1, 2, 3]))  # only what is new is predicted
    assert len(predicted()) == 5
    assert len(_rows(tmp_path / "out")) == 5 * (2 + 6)
    _run(dataclasses.replace(config, seed=1))  # other noise: nothing can be taken over
    assert len(predicted()) == 10


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_saved_predictions_score_the_same_as_given_ones(task, tmp_path):
    folder = make_set(tmp_path / "set", task)
    summary = _run(_config(tmp_path / "out", folder, steps=[2], ensemble=[2], save_predictions=True), task)
    saved = tmp_path / "out" / "synthetic_val" / "predictions" / "s2_n2"
    given = _config(tmp_path / "given", folder, predictions=str(saved), pictures=int(task == "flow"))
    again = evaluate(given)
    first, second = (s["sets"]["synthetic_val"]["results"][-1]["metrics"] for s in (summary, again))
    assert first == pytest.approx(second, rel=1e-5)
    main = {"depth": "abs_rel", "flow": "epe", "amodal": "iou"}[task]
    assert tracked_metrics(again)[f"eval/{task}/{main}"] == second[main]
    if task == "amodal":
        assert {"iou", "iou_pooled"} == set(second)
        one = again["sets"]["synthetic_val"]
        masks = [sample.truth for sample in map(EvaluationSet(folder).__getitem__, range(one["num_samples"]))]
        expected = np.mean([mask[:, 1:].sum() / mask.sum() for mask in masks])
        assert one["code"]["iou"] == pytest.approx(expected)
        assert tracked_metrics(again)["eval/amodal/code_iou"] == one["code"]["iou"]
    next(saved.glob("scene_003.*")).unlink()
    with pytest.raises(UserError, match="scene_003"):
        evaluate(given)


def test_what_one_rank_finds_wrong_ends_all_of_them(depth_set, tmp_path):
    """Rank 0 says why, whoever found it; the others are not left waiting."""
    saved = tmp_path / "saved"
    for number in range(5):
        save_prediction(saved, f"scene_{number:03d}", "depth", np.ones((4, 4)))
    (saved / "scene_001.npy").write_bytes(b"no array")  # of rank 1's share

    def on_rank() -> str:
        with pytest.raises(UserError) as caught:
            evaluate(_config(tmp_path / "out", depth_set, predictions=str(saved)))
        return str(caught.value)

    said = run_ranks(2, on_rank)
    assert said[0] == said[1]
    assert "scene_001.npy" in said[0]


def test_images_of_different_sizes_and_shapes_of_latents(tmp_path):
    folder = make_set(tmp_path / "set", size=(64, 32), with_targets=False)
    summary = _run(_config(tmp_path / "out", folder, max_samples=3))
    one = summary["sets"]["synthetic_val"]
    assert one["num_samples"] == 3
    assert one["ceiling"] is None


def test_the_only_set_of_a_task_is_tracked_by_the_task_too(swept):
    names = set(tracked_metrics(swept[1]))
    assert {"eval/depth/abs_rel", "eval/depth/abs_rel/s1_n1", "eval/depth/baseline_abs_rel"} <= names
    assert {"eval/depth/synthetic_val/abs_rel", "compute/forward_macs"} <= names


def test_bad_input_is_refused(depth_set, tmp_path):
    config = _config(tmp_path / "out", depth_set)
    for changes, words in (
        ({"data": []}, "data is empty"),
        ({"protocol": "kitti2"}, "unknown"),
        ({"protocol": "pix2gestalt"}, "amodal"),
    ):
        with pytest.raises(UserError, match=words):
            _run(dataclasses.replace(config, **changes))
    with pytest.raises(UserError, match="weights is empty"):
        evaluate(config)
    with pytest.raises(UserError, match="cannot predict"):
        _run(config, task="flow")
    manifest = read_manifest(depth_set)
    without = {name: spec for name, spec in manifest.members.items() if name != "truth"}
    for changes, words in (
        ({"vae": dataclasses.replace(manifest.vae, sha256="another")}, "another one"),
        ({"members": without}, "no truth"),
    ):
        write_manifest(depth_set, dataclasses.replace(manifest, **changes))
        with pytest.raises(UserError, match=words):
            _run(config)
    assert not (tmp_path / "out").exists()


def test_shards_of_classes_are_not_asked_for_what_they_never_hold(monkeypatch):
    shards = SimpleNamespace(manifest=SimpleNamespace(task="class"))
    monkeypatch.setattr("dpt.evaluation.sets.ShardFolder", lambda folder, cache_dir: shards)
    with pytest.raises(UserError, match=r"^some/set: shards of task class have no truth .* scored by dpt fid\.$"):
        EvaluationSet("some/set")


def test_picked_samples(depth_set):
    one = EvaluationSet(depth_set)
    setting = Setting(steps=1, ensemble=1)
    records = [
        Record(index=i, key=str(i), setting=setting, metrics={"abs_rel": v} if v else {})
        for i, v in enumerate([0.5, 0.1, 0.0, 0.3, 0.2])
    ]
    picked = pick_samples(one, records, 1)
    assert [picked[w][0].index for w in ("best", "median", "worst")] == [1, 4, 0]
    assert pick_samples(one, records[2:3], 1) == {}


def test_reports_show_every_model_on_the_same_scenes(depth_set, tmp_path):
    shown = []
    for name, kind in (("a", "sample"), ("b", "epsilon")):  # two models that err on other samples
        config = _config(tmp_path / name, depth_set, steps=[1], ensemble=[1], pictures=2)
        model = make_model("depth", prediction_type=kind)
        evaluate(config, predictor=Predictor(model, config=config, device="cpu"))
        folder = tmp_path / name / "synthetic_val" / "scenes"
        index = json.loads((folder / "scenes.json").read_text())
        assert (index["num_samples"], index["synthetic"], index["metric"]) == (5, False, "abs_rel")
        for scene in index["scenes"]:
            assert list(scene["panels"]) == ["input", "truth", "prediction", "error"]
            assert all((folder / panel["file"]).is_file() for panel in scene["panels"].values())
            assert scene["panels"]["truth"]["scale"] == scene["panels"]["prediction"]["scale"]
        shown.append([(s["key"], s["value"]) for s in index["scenes"]])
    (keys_a, values_a), (keys_b, values_b) = (zip(*scenes, strict=True) for scenes in shown)
    assert keys_a == keys_b
    assert values_a != values_b
    shuffled = [Record(index=9 - i, key=k, setting=Setting(), metrics={}) for i, k in enumerate(sorted(keys_a))]
    assert tuple(r.key for r in chosen_by_key(shuffled, 2)) == keys_a  # neither numbers nor order matter


def test_the_visible_mask_is_the_baseline_of_amodal_sets(tmp_path):
    amodal = make_set(tmp_path / "amodal", "amodal")
    config = _config(tmp_path / "out", amodal, steps=[1], ensemble=[1], pictures=1)
    summary = _run(config, "amodal")["sets"]["synthetic_val"]
    half = [ShardFolder(amodal)[i]["visible_mask"] for i in range(5)]
    whole = [ShardFolder(amodal)[i]["truth"] for i in range(5)]
    expected = np.mean([np.sum(v & w) / np.sum(v | w) for v, w in zip(half, whole, strict=True)])
    assert summary["baseline"]["iou"] == pytest.approx(expected)
    index = json.loads((tmp_path / "out" / "synthetic_val" / "scenes" / "scenes.json").read_text())
    assert "visible" in index["scenes"][0]["panels"]
    text = format_summary({"sets": {"synthetic_val": summary}})
    assert "visible mask" in text
    assert f"mIoU {100 * expected:.1f} %" in text
    assert "(truth through the image code = the true picture of the whole object thresholded" in text


@pytest.mark.parametrize(("predictions", "samples"), [(1, 16), (10, 3), (5, 3), (100, 1), (4, 4)])
def test_batches_of_16_are_filled(predictions, samples):
    assert samples_at_once(predictions, 16) == samples


def test_record_log_takes_whole_lines_only(tmp_path):
    log = RecordLog(tmp_path, {"a": 1})
    record = Record(index=3, key="k", setting=Setting(steps=2, ensemble=1), metrics={"abs_rel": 0.1 + 0.2}, macs=5.0)
    log.add([record])
    log.close()
    assert RecordLog(tmp_path, {"a": 1}).read() == {(3, record.setting): record}
    assert RecordLog(tmp_path, {"a": 2}).read() == {}
