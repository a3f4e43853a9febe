"""Jobs that share a folder, at the moments when one begins, fails or ends while another looks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.encoding import records
from data_tools.encoding.records import Description, Records
from dpt.data.manifest import MANIFEST_NAME
from dpt.errors import UserError

SETTINGS = {"resolution": 32}


def _meanwhile(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object]) -> None:
    """Let `action` happen once, just after the first call of a method."""
    original, calls = getattr(owner, name), iter([action])

    def call(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        next(calls, lambda: None)()
        return result

    monkeypatch.setattr(owner, name, call)


def test_of_two_jobs_with_other_settings_that_begin_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Records(tmp_path / "out"), Records(tmp_path / "out")
    _meanwhile(monkeypatch, Path, "mkdir", lambda: second.claim({"resolution": 64}))
    with pytest.raises(UserError, match="resolution 64 instead of 32"):
        first.claim(SETTINGS)
    assert not Records(tmp_path / "out").claim({"resolution": 64})


def test_a_set_that_another_job_begins_meanwhile_is_no_foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "out", Records(tmp_path / "out")

    def begin() -> None:
        other.claim(SETTINGS)
        (out / ".000000.tar.part").touch()

    out.mkdir()
    _meanwhile(monkeypatch, Path, "is_dir", begin)
    assert not Records(out).claim(SETTINGS)


def test_a_set_that_another_job_ends_meanwhile_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "out", Records(tmp_path / "out")
    other.claim(SETTINGS)
    monkeypatch.setattr(records, "read_manifest", lambda folder: type("Manifest", (), {"encoding": SETTINGS}))

    def end() -> None:
        (out / "000000.tar").touch()
        (out / MANIFEST_NAME).touch()
        other.remove()

    _meanwhile(monkeypatch, Path, "exists", end)
    assert Records(out).claim(SETTINGS)


def test_a_job_that_fails_leaves_the_settings_to_those_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    failing, working = Records(out), Records(out)
    for one in (failing, working):
        assert not one.claim(SETTINGS)
    failing.remove_if_unused()
    del failing
    working.write(0, None, Description())
    assert working.done(0)
    with pytest.raises(UserError, match="resolution"):
        Records(out).claim({"resolution": 64})


def test_the_last_job_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    failing, working = Records(out), Records(out)
    for one in (failing, working):
        one.claim(SETTINGS)
    failing.remove_if_unused()
    del failing, one
    working.remove_if_unused()
    assert not out.exists()
