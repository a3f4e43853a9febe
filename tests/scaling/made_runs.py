"""Runs made by hand, for the tests of what reads them, and a look at the pages made of them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

from dpt.tracking.read import RunRecord

PNG = b"\x89PNG\r\n\x1a\n"


class Client:
    """Histories and artifacts of made runs."""

    def __init__(self, folder: Path | None = None, histories=None):
        self.folder, self.histories = folder, histories or {}

    def get_metric_history(self, run_id, metric):
        points = self.histories.get(metric, [])
        return [SimpleNamespace(step=s, value=v, timestamp=i) for i, (s, v) in enumerate(points)]

    def list_artifacts(self, run_id, folder):
        if self.folder is None:
            return []
        root = self.folder / (folder or "")
        paths = sorted(root.iterdir()) if root.is_dir() else []
        return [SimpleNamespace(path=str(p.relative_to(self.folder)), is_dir=p.is_dir()) for p in paths]

    def download_artifacts(self, run_id, path, to):
        return str(self.folder / path)


def made_run(run_id="r", *, stage="pretrain", folder=None, histories=None, recipe=None, **fields) -> RunRecord:
    """A RunRecord; `recipe` and a picture are laid into `folder` as artifacts if it is given."""
    if folder is not None:
        (folder / "pictures").mkdir(parents=True)
        (folder / "pictures" / "sample.png").write_bytes(PNG)
        (folder / "recipe.json").write_text(json.dumps(recipe or {"train_batch_size": 8}))
    values = {
        "mlflow_run_id": "m" + run_id, "experiment": "e", "name": run_id, "status": "FINISHED", "start_time": 1e9,
        "end_time": 1e9 + 60, "parents": [], "params": {}, "tags": {}, "metrics": {},
    }  # fmt: skip
    return RunRecord(run_id=run_id, stage=stage, client=Client(folder, histories), **(values | fields))


class Checker(HTMLParser):
    """Tags must nest; addresses must not leave the page."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                assert value.startswith(("data:", "#")), value
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
