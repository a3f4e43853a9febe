"""The documentation's index and navigation list every page, and paths of shards agree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_listed(page):
    assert f"({page}" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert page in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_shards_of_the_real_sets_lie_in_one_place():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for found in re.findall(r"[\w/.$-]*shards/(?:imagenet|hypersim|nyuv2|scannet|eth3d|diode|kitti)_\d+", path.read_text()):
            assert found.startswith("data/shards/"), f"{path.name}: {found}"


def test_every_set_of_the_paper_has_its_name_in_the_table():
    from dpt.scaling.shard_sets import ARGUMENTS

    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    table = " ".join(line for line in page.splitlines() if line.startswith("| "))
    missing = [name for name in ARGUMENTS if f"`{name}`" not in table and not name.startswith("kitti")]
    assert missing == []
