"""Our runs in MLflow's own pages, as a browser shows them."""

import shutil
import subprocess
import urllib.parse
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dpt.config.sections import TrackingConfig
from dpt.distributed import free_port
from dpt.tracking import start_run
from dpt.tracking.read import load_runs
from tests.tracking.server import serve, stop

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")]


class Words(HTMLParser):
    """The text pieces of a page, without scripts and styles."""

    def __init__(self):
        super().__init__()
        self.words, self._hidden = [], 0

    def handle_starttag(self, tag, attributes):
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden and data.strip():
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def site(empty_store, tmp_path_factory):
    """A server with two training runs of 20 steps that differ in their width: its address, and MLflow's ids of the runs."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for width in (64, 128):
        params = {"train_batch_size": 32, "dpt": {"task": "class", "model": {"depth": 4, "hidden_size": width}}}
        options = {"stage": "pretrain", "name": f"pretrain w{width}", "params": params, "parents": [], "tags": {}}
        config = TrackingConfig(uri=uri, experiment="sizes")
        with start_run(config, output_dir=folder / str(width), **options) as run:
            for step in range(1, 21):
                run.log_metrics({"train/loss": width / step, "compute/train_macs": 1e6 * width * step}, step)
    records = sorted(load_runs(uri, "sizes"), key=lambda record: record.name)
    assert [record.name for record in records] == ["pretrain w128", "pretrain w64"]
    port = free_port()
    server = serve(port, folder)
    experiment = records[0].client.get_experiment_by_name("sizes").experiment_id
    yield f"http://127.0.0.1:{port}", [record.mlflow_run_id for record in records], experiment
    stop(server)


def look(address, folder, expected):
    """What a browser shows there: its words, its picture uint8 [H, W, 3]. A page slow to show `expected` is loaded again."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900"]
    command = ["chromium", *options, "--virtual-time-budget=60000"]
    for _ in range(4):
        page = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=180, check=True).stdout
        words = Words()
        words.feed(page)
        if set(expected) <= set(words.words):
            break
    shot = folder / "page.png"
    subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, timeout=180, check=True)
    assert set(expected) <= set(words.words)
    return words.words, np.asarray(Image.open(shot).convert("RGB"))


def has_been_drawn(picture):
    """Not one empty colour: text and lines in many shades."""
    return len(np.unique(picture.reshape(-1, 3), axis=0)) > 200


def test_runs_stand_side_by_side(site, tmp_path):
    address, ids, experiment = site
    runs, experiments = (urllib.parse.quote(str(names).replace("'", '"')) for names in (ids, [experiment]))
    expected = ["pretrain w64", "pretrain w128", "model.hidden_size", "128", "64", "train/loss", "6.4", "3.2"]
    words, picture = look(f"{address}/#/compare-runs?runs={runs}&experiments={experiments}", tmp_path, expected)
    assert "Comparing 2 Runs from 1 Experiment" in words
    assert "model" not in words  # parameters are flat
    assert has_been_drawn(picture)


def test_an_experiment_lists_its_runs_by_name(site, tmp_path):
    address, _, experiment = site
    _, picture = look(f"{address}/#/experiments/{experiment}/runs", tmp_path, ["pretrain w64", "pretrain w128"])
    assert has_been_drawn(picture)


def test_metrics_are_charts_by_step(site, tmp_path):
    address, ids, experiment = site
    expected = ["train_macs", "loss", "Step", "5", "10", "15", "20"]  # sections by what stands before the "/"; ticks of an axis
    _, picture = look(f"{address}/#/experiments/{experiment}/runs/{ids[0]}/model-metrics", tmp_path, expected)
    assert has_been_drawn(picture)
