"""The scenes that a report shows: drawn by key, so that every model is seen on the same ones, as panels of their own."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dpt.evaluation.pictures import Row, flow_wheel
from dpt.evaluation.records import Setting

INDEX = "scenes.json"
WHEEL = "wheel.png"
"""The legend of motions, beside the scenes of flow."""
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One sample that is shown: its key, its main metric's value and its panels."""

    key: str
    value: float
    row: Row


def write_scenes(scenes: Sequence[Scene], folder: Path, *, setting: Setting, metric: str, about: dict[str, Any]) -> None:
    """Write each panel of each scene to `folder` as a PNG of its own, and `INDEX`, which names them; older ones are replaced.

    `about` (the set's name, task, number of samples, whether it is synthetic) is kept in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    listed = []
    if any(p.scale is not None and p.scale.colours == "wheel" for scene in scenes for p in scene.row.panels.values()):
        Image.fromarray(flow_wheel()).save(folder / WHEEL, format="png")
    for number, scene in enumerate(scenes):
        panels = {}
        for name, panel in scene.row.panels.items():
            file = f"{number:02d}_{name}.png"
            Image.fromarray(panel.picture).save(folder / file, format="png")
            panels[name] = {
                "file": file,
                "title": panel.title,
                "scale": asdict(panel.scale) if panel.scale is not None else None,
            }
        listed.append({"key": scene.key, "value": scene.value, "panels": panels})
    steps = {"steps": setting.steps, "ensemble": setting.ensemble} if setting.kind == "model" else {}
    index = {"version": VERSION, **about, "metric": metric, **steps, "scenes": listed}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
