"""Names of runs, classes and tags are shown as they are, whatever they look like."""

from html.parser import HTMLParser

import pytest
from made_runs import made_run

from dpt.scaling.compare import as_html, compare
from dpt.scaling.report import render

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1$",
    "a & b </table>",
    "http://user:secret@host/",
)


class Tags(HTMLParser):
    """The elements that there are, and where they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.addresses |= {value for name, value in attributes if name in ("src", "href")}
        assert not any(name.startswith("on") for name, _ in attributes)


@pytest.fixture
def runs(tmp_path):
    params = {"model.preset": "a1", "model.hidden_size": "256", "model.depth": "12", "model.num_heads": "16"}
    loss = [(step, 1 / (step + 1)) for step in range(10)]
    made = []
    for number, name in enumerate(NASTY):
        common = {"params": params | {"tracking.run_name": name}, "histories": {"train/loss": loss}}
        tags = {"dpt.label": name, "dpt.command": name, "study.axis": name}
        made.append(
            made_run(
                f"run{number}", name=name, folder=tmp_path / f"p{number}", tags=tags, metrics={"train/loss": 0.1}, **common
            )
        )
        tags |= {"dpt.dataset": name, "dpt.protocol": f"{name}: {name} v1, N=5, list 0"}
        metrics = {"eval/depth/abs_rel/s10_n5": 0.1 + number / 100, "eval/depth/num_samples": 5}
        parents = [f"run{number}"]
        folder = tmp_path / f"e{number}"
        made.append(
            made_run(f"e{number}", name=name, stage="evaluate", folder=folder, parents=parents, tags=tags, metrics=metrics)
        )
    return made


@pytest.mark.parametrize("which", ["report", "compare"])
def test_pages_escape_every_name(runs, which):
    if which == "report":
        page = render(NASTY[0], runs, "http://user:secret@host:5000")
    else:
        page = as_html(compare(runs, runs, metrics=["train/loss"]), runs)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names
    assert all(address.startswith(("data:", "#")) for address in tags.addresses)
    assert "&lt;script&gt;" in page
    if which == "report":
        assert "http://user:***@host:5000" in page
