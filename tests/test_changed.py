"""Which tests `make check` runs, and that the figure of the architecture is of these imports."""

import runpy
from pathlib import Path

from changed import chosen_for

ROOT = Path(__file__).resolve().parents[1]


def test_a_changed_module_runs_its_own_rooms_tests() -> None:
    chosen = chosen_for(["dpt/data/stream.py"])
    assert "tests/data/test_stream.py" in chosen
    assert "tests/test_house.py" in chosen
    assert all(path.startswith(("tests/data/", "tests/test_house")) for path in chosen)


def test_a_changed_test_and_changed_docs_run() -> None:
    assert "tests/models/test_moe.py" in chosen_for(["tests/models/test_moe.py"])
    assert "tests/test_docs_commands.py" in chosen_for(["docs/training.md"])


def test_the_figure_of_the_architecture_is_of_these_imports() -> None:
    figure = runpy.run_path(str(ROOT / "docs" / "architecture_figure.py"))
    assert figure["PICTURE"].read_text(encoding="utf-8") == figure["draw"](figure["rooms"]()), (
        "the imports between rooms changed: run python docs/architecture_figure.py"
    )
