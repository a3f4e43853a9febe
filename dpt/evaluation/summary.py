"""Turn records into results: means and what they cover, samples worth showing, and the metrics that MLflow keeps."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from dpt.evaluation.protocols import HIGHER_IS_BETTER, average
from dpt.evaluation.records import REFERENCES, Record, list_sha256
from dpt.evaluation.sets import EvaluationSet
from dpt.scores import BASELINES, CEILING, CODE, EXPLANATIONS, METRICS, say

SAME = "same"
"""Key of the samples that are the same for every model."""


def summarize(one: EvaluationSet, records: Iterable[Record]) -> dict[str, Any]:
    """Summarize a set's results and what they cover: N, the list's hash, the protocol's version."""
    records = sorted(records, key=lambda r: (r.setting, r.index))
    by_setting = {s: list(group) for s, group in itertools.groupby(records, key=lambda r: r.setting)}
    figures = {s: average([r.metrics for r in rows]) for s, rows in by_setting.items()}
    results = [
        {
            **({"steps": s.steps, "ensemble": s.ensemble} if s.kind == "model" else {}),
            "metrics": figures[s],
            "num_scored": sum(bool(r.metrics) for r in rows),
            "macs_per_prediction": sum(r.macs for r in rows) / len(rows),
        }
        for s, rows in by_setting.items()
        if s.kind in ("model", "given")
    ]
    return {
        "task": one.task,
        "dataset": one.manifest.dataset,
        "split": one.manifest.split,
        "protocol": one.protocol.name,
        "protocol_version": one.protocol.version,
        "num_samples": len(one),
        "synthetic": one.manifest.synthetic,
        "num_samples_of_protocol": one.protocol.num_samples or None,
        "list_sha256": list_sha256(records),
        "data_sha256": one.manifest.data_sha256,
        **({"depth_prompt": one.depth_prompt} if one.depth_prompt else {}),
        **({"fit": str(one.manifest.fit)} if one.manifest.fit else {}),
        "results": results,
        **{reference.kind: figures.get(reference) or None for reference in REFERENCES},
    }


def pick_samples(one: EvaluationSet, records: Iterable[Record], count: int) -> dict[str, list[Record]]:
    """Pick `count` records each of the main (last) setting: the best, median and worst samples, and `SAME`, chosen by key."""
    rows = [r for r in records if r.metrics]
    if not rows:
        return {}
    last = max(r.setting for r in rows if r.setting.kind in ("model", "given"))
    metric, sign = one.protocol.main_metric, -1.0 if one.protocol.main_metric in HIGHER_IS_BETTER else 1.0
    ranked = sorted((r for r in rows if r.setting == last), key=lambda r: (sign * r.metrics[metric], r.index))
    middle = max(0, (len(ranked) - count) // 2)
    by_key = chosen_by_key(ranked, count)
    return {"best": ranked[:count], "median": ranked[middle : middle + count], "worst": ranked[::-1][:count], SAME: by_key}


def chosen_by_key(records: Sequence[Record], count: int) -> list[Record]:
    """`count` of the records (of one setting), chosen and ordered by key hash, so independent of model, metric or order."""
    return sorted(records, key=lambda r: (hashlib.sha256(r.key.encode()).digest(), r.index))[:count]


def tracked_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The summary as MLflow metrics: eval/TASK/SET/METRIC for the main setting, with /sSTEPS_nENSEMBLE for every setting.

    The only set of a task also appears as eval/TASK/METRIC. The metric "macs" is the set's mean of a prediction's
    multiply-accumulates, from the latents' own sizes.
    """
    metrics: dict[str, float] = {}
    for name, one in summary["sets"].items():
        alone = sum(other["task"] == one["task"] for other in summary["sets"].values()) == 1
        found: dict[str, float] = {}
        for result in one["results"]:
            figures = result["metrics"]
            if result["macs_per_prediction"]:
                figures = figures | {"macs": result["macs_per_prediction"]}
            found |= figures  # the last one wins: the main setting
            if "steps" in result:
                found |= {f"{m}/s{result['steps']}_n{result['ensemble']}": v for m, v in figures.items()}
        for reference in REFERENCES:
            found |= {f"{reference.kind}_{m}": v for m, v in (one[reference.kind] or {}).items()}
        found["num_samples"] = one["num_samples"]
        for place in (f"eval/{one['task']}/{name}", *([f"eval/{one['task']}"] if alone else [])):
            metrics |= {f"{place}/{m}": v for m, v in found.items()}
    if "forward_macs" in summary["settings"]:
        metrics["compute/forward_macs"] = summary["settings"]["forward_macs"]
    return metrics


def protocol_line(summary: dict[str, Any]) -> str:
    """Coverage of each set's results, on one line."""
    return "; ".join(
        f"{name}: {one['protocol']} v{one['protocol_version']}, N={one['num_samples']}"
        f"{' (synthetic)' if one.get('synthetic') else ''}, list {one['list_sha256'][:12]}"
        for name, one in summary["sets"].items()
    )


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as plain text: per set a line saying what its figures cover, then a line per setting with its figures in the
    tables' units, then explanations of the references."""
    return "\n".join(_block(name, one) for name, one in summary["sets"].items())


def _block(name: str, one: dict[str, Any]) -> str:
    rows = [
        (f"{r['steps']} steps, {r['ensemble']} members" if "steps" in r else "given predictions", r["metrics"])
        for r in one["results"]
    ]
    titles = {"baseline": BASELINES.get(one["task"], "baseline"), "ceiling": CEILING, "code": CODE}
    references = [(titles[r.kind], one[r.kind]) for r in REFERENCES if one[r.kind]]
    width = max(len(title) for title, _ in rows + references) + 2
    lines = [protocol_line({"sets": {name: one}})]
    for title, figures in rows + references:
        known = [metric for metric in figures if metric in METRICS] or list(figures)
        shown = [say(metric, figures[metric]) for metric in known]
        lines.append(f"  {title:{width}}" + "  ".join(shown or ["nothing could be scored"]))
    lines += [f"  ({title} = {EXPLANATIONS[title]})" for title, _ in references if title in EXPLANATIONS]
    return "\n".join(lines)
