"""The scenes that a report shows: drawn by key, so that every model is seen on the same ones, as panels of their own."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from dpt.evaluation.pictures import Row, flow_wheel
from dpt.evaluation.records import Record

INDEX = "scenes.json"
WHEEL = "wheel.png"
"""The legend of motions, beside the scenes of flow."""
VERSION = 1


def write_scenes(scenes: Sequence[tuple[Record, Row]], folder: Path, *, metric: str, about: dict[str, Any]) -> None:
    """Write each panel of each scene, of one setting, to `folder` as a PNG of its own, and `INDEX`, which names them; older
    ones are replaced.

    `about` (the set's name, task, number of samples, whether it is synthetic) is kept in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    listed = []
    if any(p.scale is not None and p.scale.colours == "wheel" for _, row in scenes for p in row.panels.values()):
        Image.fromarray(flow_wheel()).save(folder / WHEEL, format="png")
    for number, (record, row) in enumerate(scenes):
        panels = {}
        for name, panel in row.panels.items():
            file = f"{number:02d}_{name}.png"
            Image.fromarray(panel.picture).save(folder / file, format="png")
            panels[name] = {
                "file": file,
                "title": panel.title,
                "scale": asdict(panel.scale) if panel.scale is not None else None,
            }
        listed.append({"key": record.key, "value": record.metrics[metric], "panels": panels})
    setting = scenes[0][0].setting
    steps = {"steps": setting.steps, "ensemble": setting.ensemble} if setting.kind == "model" else {}
    index = {"version": VERSION, **about, "metric": metric, **steps, "scenes": listed}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
