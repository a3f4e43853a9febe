"""Model cards (README.md): what the weights are, what they were trained on, for how long, from what, and how well they do.

Facts come from the MLflow run that trained them if it can be read, else from the weights' own metadata.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from dpt import hub
from dpt.config.sections import ModelConfig
from dpt.embedded import EMBEDDED_VAES
from dpt.errors import UserError
from dpt.models.costs import macs, num_params
from dpt.scaling.compute import total_train_macs, train_macs
from dpt.scaling.results import METRICS, Row, results_table, setting_words, show_macs, table_cells
from dpt.tracking.read import RunRecord, ancestors, load_runs, with_ancestors

Form = Literal["dpt", "diffusers"]
"""Kind of folder that holds the card: dpt's export, or a diffusers pipeline."""

UNKNOWN_LICENSE = "unknown"
_TAGS = {"depth": "depth-estimation", "flow": "optical-flow", "amodal": "image-segmentation", "class": "image-generation"}
_PIPELINE_TAGS = {"depth": "depth-estimation", "amodal": "image-segmentation"}  # tags known to the hub
_TITLES = {
    "class": "class-conditional images",
    "depth": "depth of single pictures, up to scale and shift",
    "flow": "optical flow between two pictures",
    "amodal": "whole objects behind what hides them",
    "generalist": "depth, optical flow and whole objects",
}


@dataclass(frozen=True, kw_only=True)
class History:
    """History of weights as recorded in MLflow."""

    line: list[RunRecord]
    """The run that trained them and its ancestors, nearest first."""
    total_macs: float
    """Total multiply-accumulates of their training."""
    rows: list[Row]
    """Results of these weights' evaluations."""


def read_history(uri: str, run: str) -> History:
    """Read the training run `run` (our id, MLflow's id, or name) from the store, its ancestors and evaluations.

    UserError if the store or the run does not exist, or the run trained nothing.
    """
    records = load_runs(uri, run_ids=[run])
    if len(records) != 1 or records[0].stage == "evaluate":
        what = "an evaluation" if len(records) == 1 else f"{len(records)} runs"
        raise UserError(f'run "{run}" of {uri} is {what}; name the one run that trained the weights with --run.')
    record = records[0]
    known = with_ancestors(records, uri)
    evaluations = load_runs(uri, filter="tags.`dpt.stage` = 'evaluate'")
    return History(
        line=[record, *ancestors(record, known)],
        total_macs=total_train_macs(record, known),
        rows=results_table(e for e in evaluations if record.run_id in e.parents),
    )


def model_card(
    model: ModelConfig,
    sections: Mapping[str, Any],
    *,
    form: Form,
    name: str,
    license: str = "",
    history: History | None = None,
) -> str:
    """Text of README.md for weights of this architecture with metadata `sections` (docs/architecture.md).

    name: what the reader opens, such as "owner/name"; license: an identifier of the hub, such as "apache-2.0"; empty: unknown.
    """
    task = sections.get("task", "class")
    front = yaml.safe_dump(_front(model, sections, form, name, license, history), sort_keys=False, allow_unicode=True)
    parts = [
        f"# {name.rpartition('/')[2]}",
        f"{_network(model)} for {_TITLES[task]}, trained with dpt.",
        "## Use",
        f"```python\n{usage(form, task, name, timestep_features=model.timestep_features)}\n```",
        "## Training",
        _table(["", ""], _training(model, sections, history)),
    ]
    if history is not None and len(history.line) > 1:
        parts += ["## Lineage", _table(["run", "stage", "data", "steps", "samples", "MACs"], _lineage(history))]
    elif origin := (sections.get("lineage") or {}).get("weights"):
        parts += ["## Lineage", f"Training began with `{origin}`."]
    if history is not None and history.rows:
        parts += ["## Results", *_results(history.rows)]
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


_CALLS = {
    "class": 'image = predictor.generate([0], ["a name"], steps=50)[0]  # uint8 [H, W, 3]',
    "depth": "depth = predictor([image])[0].value  # image: uint8 [H, W, 3]; depth: float32 [H, W]",
    "flow": "flow = predictor([first], others=[second])[0].value  # uint8 [H, W, 3] each; flow: float32 [2, H, W]",
    "amodal": "whole = predictor([image], others=[mask])[0].value  # uint8 [H, W, 3], bool [H, W]; whole: bool [H, W]",
    "generalist": 'depth = predictor([image], task="depth")[0].value  # image: uint8 [H, W, 3]; or flow, amodal',
}


def usage(form: Form, task: str, name: str, *, timestep_features: str = "dit") -> str:
    """Example of using the weights, in five lines of Python; timestep_features: the network's (`ModelConfig`)."""
    if form == "dpt":
        place = hub.with_prefix(name)
        return f'from dpt.evaluation import Predictor\n\npredictor = Predictor("{place}")\n{_CALLS[task]}'
    if task == "class":
        load = [f'pipe = DiTPipeline.from_pretrained("{name}")']
        if timestep_features == "dit":
            load = [
                f'pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="pipeline", trust_remote_code=True)',
                "# or DiTPipeline.from_pretrained, without the folder's code: timestep frequencies slightly off training's",
            ]
        use = 'pipe(class_labels=[0], num_inference_steps=50).images[0].save("image.png")'
        return "\n".join(["from diffusers import DiffusionPipeline, DiTPipeline", *load, use])
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "from PIL import Image",
            f'pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)',
            'depth = pipe(Image.open("picture.jpg")).depth[0]  # float32 [H, W], from 0 (near) to 1 (far)',
        ]
    )


def _front(
    model: ModelConfig, sections: Mapping[str, Any], form: Form, name: str, license: str, history: History | None
) -> dict[str, Any]:
    """The card's metadata, as read by the hub."""
    task = sections.get("task", "class")
    tags = ["dpt", "diffusion", "diffusion-transformer", _TAGS.get(task, "depth-estimation")]
    front: dict[str, Any] = {
        "license": license or UNKNOWN_LICENSE,
        "library_name": form,
        "tags": tags + (["mixture-of-experts"] if model.num_experts else []),
    }
    if task in _PIPELINE_TAGS:
        front["pipeline_tag"] = _PIPELINE_TAGS[task]
    origin = (sections.get("lineage") or {}).get("weights")
    if origin:
        front["base_model"] = hub.parse(origin).repo
    results = [] if history is None else [_result(row) for row in history.rows if row.run is not None]
    if results:
        front["model-index"] = [{"name": name.rpartition("/")[2], "results": results}]
    return front


def _result(row: Row) -> dict[str, Any]:
    setting = f", {setting_words(row)}" if row.steps else ""
    return {
        "task": {"type": _TAGS.get(row.task, row.task)},
        "dataset": {"name": row.dataset, "type": row.dataset},
        "metrics": [
            {"type": metric, "value": round(value, 6), "name": f"{METRICS[metric].name}{setting}"}
            for metric, value in row.metrics.items()
            if metric in METRICS
        ],
    }


def _network(model: ModelConfig) -> str:
    kind = f"Mixture-of-Experts Diffusion Transformer ({model.num_experts} experts, {model.top_k} per token)"
    return f"A {kind if model.num_experts else 'Diffusion Transformer'} of width {model.hidden_size} and depth {model.depth}"


def _training(model: ModelConfig, sections: Mapping[str, Any], history: History | None) -> list[list[str]]:
    """Rows that say what was trained, on what and for how long; unknown facts are left out."""
    lineage, vae = sections.get("lineage") or {}, sections.get("vae") or {}
    count = num_params(model)
    active = f" ({count.active / 1e6:,.0f} M active per token)" if model.num_experts else ""
    rows = [
        ["parameters", f"{count.total / 1e6:,.0f} M{active}"],
        ["MACs of a forward pass", show_macs(macs(model).forward)],
        ["predicts", (sections.get("diffusion") or {}).get("prediction_type", "")],
        ["VAE", vae.get("name", "") if hub.is_hub_name(vae.get("name", "")) or vae.get("name") in EMBEDDED_VAES else ""],
        ["VAE sha256", vae.get("sha256", "")[:16]],
    ]
    record = None if history is None else history.line[0]
    params, metrics = ({}, {}) if record is None else (record.params, record.metrics)
    rows += [
        ["data", "" if record is None else ", ".join(data_sets(record))],
        ["steps", _whole(lineage.get("step")) or _whole(params.get("training.steps"))],
        ["samples seen", _whole(lineage.get("samples_seen")) or _whole(metrics.get("train/samples_seen"))],
        ["MACs of training", _macs(lineage.get("train_macs", 0.0) if record is None else train_macs(record))],
        ["MACs of all training that led here", "" if history is None else _macs(history.total_macs)],
        ["run", lineage.get("run_id", "") if record is None else record.run_id],
        ["parents", ", ".join(lineage.get("parents") or []) if record is None else ""],
        ["sha256 of the data", lineage.get("data_sha256", "")[:16]],
    ]
    return [row for row in rows if row[1]]


def data_sets(record: RunRecord) -> list[str]:
    """Names of a run's training sets: the last parts of their paths, which may be on another machine."""
    try:
        places = json.loads(record.params.get("data.shards", "[]"))
    except ValueError:
        return []
    parts = [[p for p in PurePosixPath(str(place).split("?")[0]).parts if "{" not in p] for place in places]
    return list(dict.fromkeys(one[-1] for one in parts if one))


def _lineage(history: History) -> list[list[str]]:
    """Rows of the runs that led here, earliest first."""
    return [
        [
            record.name or record.run_id[:8],
            record.stage,
            ", ".join(data_sets(record)),
            _whole(record.params.get("training.steps")),
            _whole(record.metrics.get("train/samples_seen")),
            _macs(train_macs(record)),
        ]
        for record in reversed(history.line)
    ]


def _results(rows: list[Row]) -> list[str]:
    """A table for each task and data set."""
    parts = []
    for task, dataset in dict.fromkeys((row.task, row.dataset) for row in rows):
        header, cells = table_cells([row for row in rows if (row.task, row.dataset) == (task, dataset)])
        parts += [f"{task} on {dataset}" if dataset else task, _table(header, cells)]
    return parts


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _whole(value: Any) -> str:
    """A count with thousands separators; empty if it is not a number."""
    try:
        return f"{int(float(value)):,}"
    except (TypeError, ValueError):
        return ""


def _macs(value: float) -> str:
    return show_macs(value) if value else ""
