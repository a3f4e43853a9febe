"""Names of runs, classes and tags are shown as they are, whatever they look like."""

import pytest
from made_runs import Checker, made_run

from dpt.scaling.compare import as_html, compare
from dpt.scaling.report import render

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1$",
    "a & b </table>",
    "http://user:secret@host/",
)


@pytest.fixture
def runs(tmp_path):
    params = {"model.preset": "a1", "model.hidden_size": "256", "model.depth": "12", "model.num_heads": "16"}
    trained = {"histories": {"train/loss": [(s, 1 / (s + 1)) for s in range(10)]}, "metrics": {"train/loss": 0.1}}
    made = []
    for number, name in enumerate(NASTY):
        tags = {"dpt.label": name, "dpt.command": name, "study.axis": name}
        fields = trained | {"tags": tags, "params": params | {"tracking.run_name": name}}
        made.append(made_run(f"run{number}", name=name, folder=tmp_path / f"p{number}", **fields))
        evaluated = {
            "parents": [f"run{number}"],
            "tags": tags | {"dpt.dataset": name, "dpt.protocol": f"{name}: {name} v1, N=5, list 0"},
            "metrics": {"eval/depth/abs_rel/s10_n5": 0.1 + number / 100, "eval/depth/num_samples": 5},
        }
        made.append(made_run(f"e{number}", name=name, stage="evaluate", folder=tmp_path / f"e{number}", **evaluated))
    return made


def test_pages_escape_every_name(runs):
    report = render(NASTY[0], runs, "http://user:secret@host:5000")
    for page in (report, as_html(compare(runs, runs, metrics=["train/loss"]), runs)):
        found = Checker(page)
        assert "script" not in found.tags
        assert not any(name.startswith("on") for name in found.attributes)
        assert "&lt;script&gt;" in page
    assert "http://user:***@host:5000" in report
