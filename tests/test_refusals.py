"""What a command cannot do is one sentence and exit code 2: outputs that cannot be written, devices that are not there, ..."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt.errors import UserError, file_problem, hide_passwords, naming, reported
from tests.test_cli import export_tiny, refusal


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileExistsError(errno.EEXIST, "File exists", "out"), "out: cannot be read or written (file exists); check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file cannot be written (no space left on device); make room."),
        (OSError(errno.EROFS, "Read-only file system", "a", None, "b"), "b: cannot be read or written (read-only file system)"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), "...: cannot be read or written (file name too long)"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ""),
        (OSError("no number"), ""),
    ],
)
def test_errors_of_files_are_sentences(error: OSError, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in file_problem(error)
    assert bool(file_problem(error)) == bool(words)
    assert len(file_problem(error)) < 400
    with pytest.raises(SystemExit if words else OSError) as end, reported("do"):
        raise error
    if words:
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("do: error: ")


def test_what_a_sentence_is_about_is_named_once() -> None:
    for sentence in ("it has no experts.", "a/b: it has no experts."):
        with pytest.raises(UserError) as refusal, naming("a/b"):
            raise UserError(sentence)
        assert str(refusal.value) == "a/b: it has no experts."


def test_an_interrupt_leaves_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="130"), reported("do"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "do: interrupted.\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:5000/x", "http://user:***@host:5000/x"),
        ("cannot reach postgresql://u:p%40ss@h/db now", "cannot reach postgresql://u:***@h/db now"),
        ("mysql://u:p@ss:w@h/db", "mysql://u:***@h/db"),
        ('{"uri": "https://:token@h"}', '{"uri": "https://:***@h"}'),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_passwords_of_addresses_are_hidden(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hide_passwords(text) == shown
    with pytest.raises(SystemExit), reported("do"):
        raise UserError(text)
    assert capsys.readouterr().err == f"do: error: {shown}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, weights, and a file where folders are wanted."""
    folder = tmp_path_factory.mktemp("refusals")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "a.png")
    export_tiny(folder, "depth", num_conditions=1)
    export_tiny(folder, "class")
    export_tiny(folder, "flow", num_conditions=2)
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("predict a.png --weights depth --steps 1 --out file", "file: cannot be read or written (file exists)"),
        ("predict a.png --weights depth --steps 1 --out file/below", "file"),
        ("predict a.png --weights depth --device gpu", '--device "gpu": there is no such device here; choose one of cpu'),
        ("predict a.png --weights depth --device cuda:99", '--device "cuda:99": there is no such device here'),
        ("predict a.png --weights depth --device meta", '--device "meta": there is no such device here'),
        ("predict a.png --weights class", "class: class-conditional weights predict nothing of pictures; draw images with"),
        ("predict a.png --weights depth --task flow --second a.png", "a model trained for 'depth' cannot predict 'flow_x'"),
        ("predict a.png --weights flow", "flow predicts flow: each picture needs its second frame; give --second."),
        ("predict a.png --weights depth --mask a.png", "--mask is for amodal"),
        ("predict a.png --weights depth --second a.png", "--second is for flow"),
        ("predict a.png --weights depth --resolution -7", "--resolution: '-7' is no whole number at least 0 and at most 8192"),
        ("predict a.png --weights depth --steps 0", "argument --steps"),
        ("predict a.png --weights depth --fov nan", "argument --fov"),
        ("routing depth --data nowhere", "nowhere: there is no such shard folder"),
        ("sample --weights class --labels 0 --steps 1 --out file", "file: cannot be read or written"),
        ("export class file --diffusers", "file"),
        ("sync " + "x" * 5000, "file name too long"),
    ],
)
def test_commands_refuse(
    line: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = set(place.iterdir())
    message = refusal(capsys, *line.split()).strip()
    assert words in message
    assert set(place.iterdir()) == before
    assert "\n" not in message.rpartition("file/s]\n")[2]  # behind the progress bar


def test_a_bad_store_is_refused_at_once(tmp_path: Path) -> None:
    from dpt.tracking.store import check_sqlite, connect, out_of_reach, with_password

    (tmp_path / "text.db").write_text("this is no database, as anybody can see who reads it" * 20)
    (tmp_path / "folder").mkdir()
    for uri in (f"sqlite:///{tmp_path}/text.db/x.db", f"sqlite:///{tmp_path}/folder", f"sqlite:///{tmp_path}/text.db"):
        with pytest.raises(UserError, match="no SQLite store can be opened there"):
            connect(uri)
    check_sqlite("http://nowhere:5000")  # which it is not for
    assert out_of_reach("http://127.0.0.1:9")
    assert out_of_reach("http://127.0.0.1:99999")
    assert not out_of_reach("postgresql://nowhere/x")
    with pytest.raises(UserError, match=r"set DPT_TRACKING_URI to the whole address"):
        with_password("postgresql://u:***@h/x")
    os.environ["DPT_TRACKING_URI"] = "postgresql://u:p@h/x"
    try:
        assert with_password("postgresql://u:***@h/x") == "postgresql://u:p@h/x"
    finally:
        del os.environ["DPT_TRACKING_URI"]
