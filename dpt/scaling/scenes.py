"""The scenes that evaluations have kept (`dpt.evaluation.pictures`), the same for every model, and how a report shows them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dpt.scaling.page import colour_bar, grid, legend, picture, slider
from dpt.scaling.results import Row, setting_words
from dpt.scores import readable, say

MOST_MODELS = 6


@dataclass(frozen=True, kw_only=True)
class ShownScenes:
    """The scenes that one evaluation run has kept of one set."""

    row: Row
    """The table's row that they belong to."""
    index: dict[str, Any]
    """The contents of scenes.json."""

    def scene(self, key: str) -> dict[str, Any] | None:
        """The scene with that key."""
        return next((s for s in self.index["scenes"] if s["key"] == key), None)

    def panel(self, scene: dict[str, Any], name: str) -> Path | None:
        """The picture's file, if the scene has it."""
        panel = scene["panels"].get(name)
        if panel is None or self.row.run is None:
            return None
        return self.row.run.download(f"{self.row.dataset}/scenes/{Path(panel['file']).name}")

    def caption(self, scene: dict[str, Any]) -> str:
        """The model and how well it does on the scene."""
        return f"{self.row.label}, {setting_words(self.row)}: {say(self.index['metric'], scene['value'])}"

    def spread(self, scene: dict[str, Any]) -> str:
        """Meaning of the brightest place of the members' spread, in words."""
        scale = (scene["panels"].get("uncertainty") or {}).get("scale")
        until = f", 0 to {readable(scale['high'])} {scale['unit']}" if scale else ""
        return f"{self.row.label}: spread of the members{until}"

    def figure(self, scene: dict[str, Any], name: str, caption: str = "") -> str:
        """A panel as a figure, under `caption` (default: its own title); "" if the scene has none."""
        file = self.panel(scene, name)
        return picture(file, caption or scene["panels"][name]["title"]) if file is not None else ""

    def over(self, scene: dict[str, Any], caption: str) -> str:
        """The input under the prediction, with a slider between them."""
        below, above = self.panel(scene, "input"), self.panel(scene, "prediction")
        if below is None or above is None:
            return ""
        return slider(below, above, (scene["panels"]["input"]["title"], scene["panels"]["prediction"]["title"]), caption)

    def scale(self, scene: dict[str, Any], name: str) -> str:
        """Legend of a panel's colours."""
        panel = scene["panels"].get(name) or {}
        scale = panel.get("scale")
        if scale is None:
            return ""
        if scale["colours"] != "wheel":
            return colour_bar(scale["colours"], scale["low"], scale["high"], scale["unit"], panel["title"])
        assert self.row.run is not None
        words = f"colour: direction of the motion, white: none, rim: {readable(scale['high'])} {scale['unit']}"
        return legend(self.row.run.download(f"{self.row.dataset}/scenes/wheel.png"), words)


def read_scenes(row: Row) -> ShownScenes | None:
    """The scenes of a row's evaluation; None if it has kept none that can be read."""
    if row.run is None or not row.dataset:
        return None
    path = f"{row.dataset}/scenes/scenes.json"
    if path not in row.run.artifacts(f"{row.dataset}/scenes"):
        return None
    try:
        index = json.loads(row.run.download(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return ShownScenes(row=row, index=index) if index.get("scenes") else None


def typical(shown: ShownScenes, mean: float) -> dict[str, Any]:
    """The scene whose value is nearest to the set's mean."""
    scene: dict[str, Any] = min(shown.index["scenes"], key=lambda s: abs(s["value"] - mean))
    return scene


def headline_picture(shown: ShownScenes, mean: float) -> str:
    """A typical scene, large: the input with the prediction over it, the truth and the prediction."""
    scene = typical(shown, mean)
    title = scene["panels"]["input"]["title"]
    figures = [shown.over(scene, f"{title} and prediction: drag across"), shown.figure(scene, "truth")]
    figures.append(shown.figure(scene, "prediction"))
    count = len(shown.index["scenes"])
    value = say(shown.index["metric"], scene["value"])
    words = f"Scene {scene['key']}, {setting_words(shown.row)}, {value}: the nearest to the mean of the {count} chosen by key."
    caption = f'<p class="soft small">{escape(words)}</p>'
    return grid(figures, "trio") + shown.scale(scene, "truth") + caption


def scenes_section(models: Sequence[ShownScenes]) -> str:
    """Every scene of the first model, with the predictions of all of one set's `models` side by side, best first."""
    first = models[0]
    parts = []
    for scene in first.index["scenes"]:
        found = [(model, s) for model in models[:MOST_MODELS] if (s := model.scene(scene["key"])) is not None]
        inputs = [first.over(scene, f"{scene['panels']['input']['title']}: drag across")]
        inputs += [first.figure(scene, name) for name in ("second", "visible", "truth")]
        predictions = [model.figure(s, "prediction", model.caption(s)) for model, s in found]
        errors = [model.figure(s, "error", model.row.label) for model, s in found]
        spreads = [model.figure(s, "uncertainty", model.spread(s)) for model, s in found]
        title = scene["panels"]["error"]["title"]
        more = f"<details><summary>{escape(title)}, and the spread of ensembles</summary>{grid(errors, 'scenes')}"
        more += f"{first.scale(scene, 'error')}{grid([s for s in spreads if s], 'scenes')}</details>"
        shown = grid([f for f in inputs + predictions if f], "scenes")
        parts.append(f"<h4>{escape(scene['key'])}</h4>{shown}{first.scale(scene, 'truth')}{more}")
    rest = len(models) - MOST_MODELS
    if rest > 0:
        parts.append(f'<p class="soft small">The {MOST_MODELS} best models; {rest} more are in the table.</p>')
    return "".join(parts)
