"""Model cards: facts of MLflow where it is read, else of the weights; metadata that the hub understands."""

import json
from pathlib import Path

import pytest
import yaml

from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.publishing import card
from dpt.scaling.compute import total_train_macs
from dpt.scaling.results import results_table
from tests.publishing.small import LINEAGE
from tests.scaling.made_runs import made_run

SECTIONS = {
    "task": "depth",
    "diffusion": {"prediction_type": "v_prediction"},
    "vae": {"name": "/somewhere/vae", "sha256": "a" * 64},
    "lineage": LINEAGE,
}
MOE = ModelConfig(num_experts=8)


def parts(text: str) -> tuple[dict, str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def history() -> card.History:
    trained = {"params": {"data.shards": json.dumps(["/data/imagenet_256"]), "training.steps": "400"},
               "metrics": {"compute/train_macs": 2e15, "train/samples_seen": 102400.0}}  # fmt: skip
    base = made_run("base", stage="pretrain", start_time=1.0, **trained)
    shards = ["s3://bucket/hypersim_train/{000000..000009}.tar", "/data/vkitti"]
    params = {"data.shards": json.dumps(shards), "training.steps": "100"}
    tuned = made_run(
        "tuned", stage="finetune", parents=["base"], params=params, start_time=2.0, metrics={"compute/train_macs": 1e15}
    )
    scores = {
        "eval/depth/nyu/abs_rel/s50_n5": 0.072,
        "eval/depth/nyu/delta1/s50_n5": 0.94,
        "eval/depth/nyu/baseline_abs_rel": 0.3,
    }
    scored = made_run("scored", stage="evaluate", parents=["tuned"], metrics=scores, start_time=3.0)
    return card.History(line=[tuned, base], total_macs=total_train_macs(tuned, [tuned, base]), rows=results_table([scored]))


def test_a_card_without_mlflow_says_what_the_weights_know() -> None:
    front, body = parts(card.model_card(MOE, SECTIONS, form="dpt", name="lab/depth-moe"))
    assert front["license"] == "unknown"
    assert front["library_name"] == "dpt"
    assert front["pipeline_tag"] == "depth-estimation"
    assert {"dpt", "mixture-of-experts", "depth-estimation"} <= set(front["tags"])
    for words in ("# depth-moe", "experts, 2 per token", "| steps | 100 |", "| samples seen | 6,400 |", "1.5 P", "v_prediction",
                  "f" * 32, 'Predictor("hub:lab/depth-moe")'):  # fmt: skip
        assert words in body, words
    assert "/somewhere" not in body


def test_a_card_from_mlflow_has_data_lineage_compute_and_results() -> None:
    front, body = parts(
        card.model_card(MOE, SECTIONS, form="diffusers", name="lab/depth-moe", license="cc-by-nc-4.0", history=history())
    )
    assert front["license"] == "cc-by-nc-4.0"
    assert front["library_name"] == "diffusers"
    results = front["model-index"][0]["results"]
    assert results[0]["dataset"]["name"] == "nyu"
    assert {m["type"]: m["value"] for m in results[0]["metrics"]} == {"abs_rel": 0.072, "delta1": 0.94}
    assert not any("%" in m["name"] for m in results[0]["metrics"])  # values are fractions
    for words in ("| data | hypersim_train, vkitti |", "| MACs of training | 1 P |", "training that led here | 3 P |",
                  "| base | pretrain | imagenet_256 | 400 | 102,400 | 2 P |", "depth on nyu", "7.20", "best constant",
                  'from_pretrained("lab/depth-moe", trust_remote_code=True)'):  # fmt: skip
        assert words in body, words
    assert "/data" not in body
    assert "s3://" not in body


def test_weights_of_the_hub_are_named_as_base() -> None:
    sections = SECTIONS | {"lineage": LINEAGE | {"weights": "hub:facebook/DiT-XL-2-256@" + "1" * 40}}
    front, body = parts(card.model_card(ModelConfig(), sections, form="dpt", name="x"))
    assert front["base_model"] == "facebook/DiT-XL-2-256"
    assert "Training began with `hub:facebook/DiT-XL-2-256@" in body


@pytest.mark.parametrize(
    ("form", "task"),
    [("dpt", task) for task in ("class", "depth", "flow", "amodal", "generalist")]
    + [("diffusers", t) for t in ("class", "depth")],
)
@pytest.mark.parametrize("features", ["dit", "diffusers"])
def test_use_is_python_of_at_most_five_lines(form: card.Form, task: str, features: str) -> None:
    lines = card.usage(form, task, "lab/name", timestep_features=features).splitlines()
    assert ("custom_pipeline" in "".join(lines)) == ((form, task, features) == ("diffusers", "class", "dit"))
    compile("\n".join(lines), "card", "exec")
    assert len(lines) <= 5


def test_a_run_that_trained_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "load_runs", lambda *_, **__: [made_run("x", stage="evaluate")])
    with pytest.raises(UserError, match="is an evaluation; name the one run that trained"):
        card.read_history("sqlite:///x.db", "x")


def test_history_is_the_run_its_ancestors_and_the_evaluations_of_it(tmp_path: Path) -> None:
    from dpt.tracking import store

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = store.connect(uri)
    experiment = store.experiment_id(client, uri, "e")
    runs = {
        "base": ("pretrain", "", {"compute/train_macs": 2e15}),
        "tuned": ("finetune", "base", {"compute/train_macs": 1e15}),
        "scored": ("evaluate", "tuned", {"eval/depth/nyu/abs_rel/s50_n1": 0.08}),
        "of_another": ("evaluate", "base", {"eval/depth/nyu/abs_rel/s50_n1": 0.5}),
    }
    for name, (stage, parents, metrics) in runs.items():
        tags = {"dpt.run_id": name, "dpt.stage": stage, "dpt.parents": parents}
        run = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        for metric, value in metrics.items():
            client.log_metric(run, metric, value, step=1)
    found = card.read_history(uri, "tuned")
    assert [record.run_id for record in found.line] == ["tuned", "base"]
    assert found.total_macs == 3e15
    assert [row.metrics for row in found.rows] == [{"abs_rel": 0.08}]
    with pytest.raises(UserError, match="is an evaluation"):
        card.read_history(uri, "scored")


def test_a_store_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no MLflow store here"):
        card.read_history(f"sqlite:///{tmp_path / 'none.db'}", "x")
