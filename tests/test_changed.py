"""Which tests `make check` runs, and that the figure of the architecture is of these imports."""

import runpy

import pytest
from changed import ALWAYS, ROOT, chosen_for


def test_a_changed_module_runs_its_own_rooms_tests() -> None:
    chosen = chosen_for(["dpt/data/stream.py"])
    assert "tests/data/test_stream.py" in chosen
    assert "tests/test_house.py" in chosen
    assert not any(path.startswith(("tests/training/", "tests/models/")) for path in chosen)


def test_a_changed_test_and_changed_docs_run() -> None:
    assert "tests/models/test_moe.py" in chosen_for(["tests/models/test_moe.py"])
    assert {"tests/test_docs_commands.py", "tests/test_doc_pages.py"} <= set(chosen_for(["docs/training.md"]))
    assert "tests/config/test_shipped_recipes.py" in chosen_for(["ds_configs/quickstart.json"])


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("dpt/training/state.py", "tests/training/test_resume.py"),  # imported by a module that the test imports
        ("dpt/pictures.py", "tests/test_picture_files.py"),  # no folder of its own
        ("dpt/commands/predict.py", "tests/test_predict_command.py"),  # imported by name
        ("data_tools/readers/kitti.py", "tests/data_tools/readers/test_readers_depth.py"),
        ("launchers/finetune.py", "tests/training/test_launchers.py"),
        ("tests/shards.py", "tests/test_fid_command.py"),
        ("tests/training/training_toys.py", "tests/training/test_continuing.py"),  # imported without its package
        ("tests/data/conftest.py", "tests/data/test_reader.py"),
    ],
)
def test_what_nothing_imports_directly_runs_the_nearest_tests(path: str, test: str) -> None:
    assert test in chosen_for([path])


def test_every_module_has_tests() -> None:
    files = [path for folder in ("dpt", "data_tools", "launchers", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    without = [str(path.relative_to(ROOT)) for path in files if chosen_for([str(path.relative_to(ROOT))]) == ALWAYS]
    assert without == []


def test_the_figure_of_the_architecture_is_of_these_imports() -> None:
    figure = runpy.run_path(str(ROOT / "docs" / "architecture_figure.py"))
    assert figure["PICTURE"].read_text(encoding="utf-8") == figure["draw"](figure["rooms"]()), (
        "the imports between rooms changed: run python docs/architecture_figure.py"
    )
