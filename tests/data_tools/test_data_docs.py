"""The options and code of docs/data.md work (tests/test_docs_commands.py: its commands)."""

import re
from pathlib import Path

from data_tools.encode import parser

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_every_option_is_on_the_page_or_in_the_help() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text(encoding="utf-8")))
    known = {"--verify"} | {option for action in parser()._actions for option in action.option_strings}  # data_tools.inspect's
    assert named <= known


def test_the_five_lines_for_stock_webdataset(make_class_shards, capsys) -> None:
    folder = make_class_shards()
    code = re.findall(r"```python\n(import webdataset.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code.replace("data/shards/imagenet_256/train/{000000..001251}", f"{folder}/000000"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("(2, 4, 4, 4) ")
