"""The page: well formed, self-contained, escaped, and showing what the runs hold."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from made_runs import Checker, made_run
from PIL import Image

from dpt.errors import UserError
from dpt.scaling import report
from dpt.scaling.page import picture
from dpt.scaling.report import render, write_report


@pytest.fixture
def runs(tmp_path):
    sizes = {"preset": "a1", "hidden_size": "256", "depth": "12", "num_heads": "16", "patch_size": "2"}
    model = {f"model.{name}": value for name, value in sizes.items()}
    loss = [(s, 1 / (s + 1)) for s in range(100)]
    metrics = {"train/loss": 0.01, "compute/train_macs": 3e15}
    return [
        made_run("pretrain", folder=tmp_path / "a", params=model, metrics=metrics, histories={"train/loss": loss}),
        made_run(
            "evaluate",
            stage="evaluate",
            folder=tmp_path / "b",
            parents=["pretrain"],
            tags={
                "dpt.label": "ours <script>",
                "dpt.command": "a & b",
                "dpt.versions": '{"torch": "2.13"}',
                "dpt.dataset": "nyu_test",
                "dpt.protocol": "nyu_test: nyu_v2 v1, N=654, list 0",
            },
            metrics={
                "eval/depth/abs_rel/s10_n5": 0.07, "eval/depth/delta1/s10_n5": 0.95,
                "eval/depth/baseline_abs_rel": 0.3, "compute/forward_macs": 1e9, "eval/depth/num_samples": 654,
            },
        ),
    ]  # fmt: skip


def test_the_page_is_whole_and_shows_everything(runs):
    page = render("my <experiment>", runs, "sqlite:///mlflow.db")
    assert Checker(page).tags.count("img") == 4  # two pictures (one of them the headline's too) and the loss curve
    assert "<script" not in page
    texts = ("ours &lt;script&gt;", "7.00", "the paper", "a &amp; b", "torch 2.13", "14.8M", "14.8 M", "3 PMACs", "0.23")
    for text in texts:
        assert text in page, text


def test_another_number_of_images_is_not_put_beside_the_paper(runs):
    runs[1].metrics["eval/depth/num_samples"] = 60.0
    page = render("e", runs, "sqlite:///mlflow.db")
    assert "Marigold" not in page
    assert "7.00" in page


def test_superseded_runs_are_left_out_unless_a_result_descends_from_them(runs, tmp_path):
    again = made_run("again", name="pretrain", folder=tmp_path / "c", params=runs[0].params)
    page = render("e", [runs[0], again, runs[1]], "sqlite:///mlflow.db")
    assert "superseded" not in page  # the evaluation descends from the older one
    page = render("e", [runs[0], again], "sqlite:///mlflow.db")
    assert "1 superseded one is left out" in page


def test_large_pictures_are_compressed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    shown = picture(tmp_path / "x.png", "a picture")
    assert "data:image/webp;base64," in shown
    assert len(shown) < (tmp_path / "x.png").stat().st_size / 3


def test_an_empty_experiment_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "load_runs", lambda uri, experiment: [])
    with pytest.raises(UserError, match="holds no run"):
        write_report("e", uri="sqlite:///x.db", out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def _with_scenes(folder, label, value, keys=("a/1", "b/2"), **fields):
    """An evaluation that has kept scenes."""
    scenes = folder / "flats_val" / "scenes"
    scenes.mkdir(parents=True)
    listed = []
    for number, key in enumerate(keys):
        panels = {}
        for name in ("input", "truth", "prediction", "error"):
            Image.fromarray(np.full((32, 48, 3), 9 * number, np.uint8)).save(scenes / f"{number}_{name}.png")
            scale = {"colours": "Spectral", "low": 1.2, "high": 4.9, "unit": "m"} if name in ("truth", "prediction") else None
            panels[name] = {"file": f"{number}_{name}.png", "title": f"the {name}", "scale": scale}
        listed.append({"key": key, "value": value * (number + 1), "panels": panels})
    (scenes / "scenes.json").write_text(json.dumps({"metric": "abs_rel", "scenes": listed}))
    return made_run(
        label,
        stage="evaluate",
        folder=folder,
        metrics={"eval/depth/flats_val/abs_rel/s10_n1": value, "eval/depth/flats_val/num_samples": 60},
        tags={"dpt.label": label, "dpt.protocol": "flats_val: hypersim v1, N=60 (synthetic), list 0"},
    )


def test_the_result_comes_first_and_every_model_is_shown_on_the_same_scenes(tmp_path):
    worse, better = _with_scenes(tmp_path / "a", "plain", 0.4), _with_scenes(tmp_path / "b", "better", 0.1)
    page = render("e", [worse, better], "sqlite:///mlflow.db")
    Checker(page)
    assert page.index("10.00 %") < page.index('<input type="range"') < page.index("<table>") < page.index('id="scenes"')
    assert page.count("Depth on flats_val, 60 synthetic samples") == 3  # headline, table, scenes
    assert "the better" not in page
    assert "Scene a/1, 10 steps, AbsRel 10.00 %" in page  # of the two the nearest to the mean
    captions = [f"{one}: AbsRel {value} %" for one, value in
                (("better, 10 steps", "10.00"), ("plain, 10 steps", "40.00"), ("better, 10 steps", "20.00"),
                 ("plain, 10 steps", "80.00"))]  # fmt: skip
    assert [page.count(f"<figcaption>{caption}</figcaption>") for caption in captions] == [1] * 4
    assert sorted(captions, key=page.index) == captions
    assert "the truth, m" in page
    assert ">2</span>" in page


def test_the_headline_and_its_bars_are_of_each_models_best_setting(tmp_path):
    runs = [_with_scenes(tmp_path / "a", "plain", 0.4), _with_scenes(tmp_path / "b", "better", 0.2)]
    runs[0].metrics["eval/depth/flats_val/abs_rel/s1_n1"] = 0.1
    page = render("e", runs, "sqlite:///mlflow.db")
    hero = page[: page.index("</section>")]
    assert "10.00 %</b>" in hero
    assert hero.index("<span>plain</span>") < hero.index("<b>10.00</b>") < hero.index("<span>better</span>")
    assert "40.00</b>" not in hero


def test_synthetic_scenes_do_not_stand_beside_the_paper(tmp_path):
    run = _with_scenes(tmp_path / "a", "plain", 0.4)
    run.metrics["eval/depth/flats_val/num_samples"] = 7370
    run.tags["dpt.protocol"] = "flats_val: hypersim v1, N=7370 (synthetic), list 0"
    assert "Marigold" not in render("e", [run], "sqlite:///mlflow.db")


def _in_a_browser(page, script, width):
    """What the script leaves as the page's title."""
    probed = page.with_name("probe.html")
    probed.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    dom = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    return dom.split("<title>")[1].split("</title>")[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_shows_the_page_without_sideways_scrolling_and_moves_the_slider(runs, monkeypatch, tmp_path):
    shown = [*runs, _with_scenes(tmp_path / "d", "a model with quite a long name", 0.1)]
    monkeypatch.setattr(report, "load_runs", lambda uri, experiment: shown)
    page = write_report("e", uri="sqlite:///x.db", out=tmp_path / "r.html")
    for width in (500, 1200):
        size = _in_a_browser(page, "document.title=document.documentElement.scrollWidth+'/'+innerWidth", width)
        wide, window = size.split("/")
        assert int(wide) <= int(window)
    move = "let s=document.querySelector('input[type=range]');s.value=20;s.dispatchEvent(new Event('input'));"
    clip = "document.title=getComputedStyle(s.parentNode.querySelector('.over')).clipPath"
    assert _in_a_browser(page, move + clip, 500).endswith(" 20%)")


def test_the_colours_of_motion_are_explained_by_a_wheel(tmp_path):
    run = _with_scenes(tmp_path / "a", "flow", 3.2)
    folder = tmp_path / "a" / "flats_val" / "scenes"
    Image.new("RGB", (8, 8)).save(folder / "wheel.png")
    index = json.loads((folder / "scenes.json").read_text()) | {"metric": "epe"}
    for scene in index["scenes"]:
        scene["panels"]["truth"]["scale"] = {"colours": "wheel", "low": 0.0, "high": 7.3149, "unit": "px"}
    (folder / "scenes.json").write_text(json.dumps(index))
    run.metrics.clear()
    run.metrics.update({"eval/flow/flats_val/epe/s10_n1": 3.2, "eval/flow/flats_val/baseline_epe": 6.0})
    page = render("e", [run], "sqlite:///mlflow.db")
    Checker(page)
    assert page.index("3.200 px") < page.index('class="legend"') < page.index("rim: 7.31 px") < page.index("<table>")
    assert "No motion: flow of zero everywhere." in page
    assert "<th>no motion =&nbsp;1</th>" in page
