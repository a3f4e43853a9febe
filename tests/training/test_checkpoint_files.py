"""Checkpoints on the disk: complete or invisible, hashed, kept as asked for, whatever happens while they are written."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_toys import make_saver, number_engine, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpt.errors import UserError
from dpt.training import checkpoint, saving
from dpt.training.checkpoint import (
    STATE_NAME,
    CheckpointReader,
    DamagedCheckpoint,
    check_file,
    checkpoint_name,
    find_checkpoints,
    newest_checkpoint,
    read_state,
    write_state,
    write_tensors,
)
from dpt.training.export import checkpoint_weights

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@settings(max_examples=20, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6), seed=st.integers(0, 99))
def test_files_are_safetensors(tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], seed: int) -> None:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, shape in enumerate(shapes):
        values = torch.randint(0, 2, shape, generator=generator)
        tensors[f"t{number}"] = values.to(DTYPES[number % len(DTYPES)])
    entry = write_tensors(path, tensors)
    check_file(path, entry)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 23), max_size=4), low=st.integers(0, 23), length=st.integers(1, 24))
def test_any_range_is_read_from_any_partition(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], low: int, length: int
) -> None:
    folder = tmp_path_factory.mktemp("reader")
    whole = torch.arange(24, dtype=torch.float32)
    edges = [0, *sorted(set(cuts)), 24]
    files = {}
    for rank, (start, end) in enumerate(itertools.pairwise(edges)):
        name = checkpoint.rank_file(rank)
        files[name] = {
            **write_tensors(folder / name, {"master/w": whole[start:end]}),
            "fragments": {"w": [start, end - start]},
        }
    reader = CheckpointReader(folder, {"files": files})
    target = torch.empty(min(length, 24 - low))
    reader.read_into(target, "master", "w", low)
    assert torch.equal(target, whole[low : low + len(target)])
    assert torch.equal(reader.whole("master", "w", [4, 6]), whole.view(4, 6))
    with pytest.raises(DamagedCheckpoint, match="24 of 25 numbers of master/w"):
        reader.read_into(torch.empty(25), "master", "w", 0)


# --- a run of checkpoints -----------------------------------------------------------------------------------------------


def _check_whole(folder: Path) -> int:
    """The newest checkpoint's step, after checking that its content is that step's."""
    found = newest_checkpoint(folder)
    assert found is not None
    path, state = found
    values = CheckpointReader(path, state).whole("master", "w", state["parameters"]["w"])
    assert values.eq(state["step"]).all()
    assert path.name == checkpoint_name(state["step"])
    assert state["note"] == "kept"
    return int(state["step"])


def test_the_newest_and_the_marked_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make_saver(tmp_path / "c", monkeypatch, keep_last=2, keep_every=4)
    for step in range(1, 8):
        assert save(saver, step)
    assert [p.name for p in find_checkpoints(tmp_path / "c")] == [checkpoint_name(s) for s in (7, 6, 4)]
    assert _check_whole(tmp_path / "c") == 7
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(checkpoint_name(s) for s in (7, 6, 4))


def test_what_is_not_complete_is_invisible_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_saver(tmp_path, monkeypatch), 3)
    left_over = tmp_path / (checkpoint_name(9) + ".tmp")
    left_over.mkdir()
    write_state(left_over, {"step": 9})
    (tmp_path / checkpoint_name(8)).mkdir()  # a folder without a state
    assert _check_whole(tmp_path) == 3
    make_saver(tmp_path, monkeypatch)
    assert not left_over.exists()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "state"])
def test_damage_is_found_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    saver = make_saver(tmp_path, monkeypatch)
    save(saver, 1)
    save(saver, 2)
    file = tmp_path / checkpoint_name(2) / (STATE_NAME if harm == "state" else checkpoint.rank_file(0))
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-1] if harm == "cut" else content)
    assert _check_whole(tmp_path) == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert str(file) in said
    assert said.endswith(f"; falling back to {tmp_path / checkpoint_name(1)}, the newest checkpoint that is whole.")
    with pytest.raises(UserError, match=re.escape(f"the one before it is {tmp_path / checkpoint_name(1)}")):
        checkpoint_weights(tmp_path / checkpoint_name(2), ema=True)
    (tmp_path / checkpoint_name(1) / STATE_NAME).write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is whole") as refused:
        newest_checkpoint(tmp_path)
    assert str(file) in str(refused.value)


def test_a_damaged_one_is_replaced_and_does_not_count_as_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make_saver(tmp_path, monkeypatch, keep_last=1, keep_every=2)
    for step in (2, 5, 6):
        save(saver, step)
        (tmp_path / checkpoint_name(step) / checkpoint.rank_file(0)).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        newest_checkpoint(tmp_path)
    assert save(saver, 5)  # a shorter course, with damaged ones at its end and behind it
    assert _check_whole(tmp_path) == 5
    assert [path.name for path in find_checkpoints(tmp_path)] == [checkpoint_name(5), checkpoint_name(2)]
    assert save(saver, 6)
    assert _check_whole(tmp_path) == 6


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path, {"format_version": 99})
    with pytest.raises(UserError, match="format_version is 99"):
        read_state(tmp_path)


@pytest.mark.parametrize("when", ["before", "while writing", "state"])
def test_a_full_disk_costs_the_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    saver = make_saver(tmp_path, monkeypatch, size=250_000)
    assert save(saver, 1)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if when == "before":
            patched.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        else:
            patched.setattr(saving, "write_tensors" if when == "while writing" else "write_state", full)
        assert not save(saver, 2)
    said = capsys.readouterr().out
    assert "The checkpoint of step 2 was not written" in said
    assert f"It needs 0.001 GB in {tmp_path}" in said
    assert f"the newest is still {checkpoint_name(1)}" in said
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint_name(1)]
    assert _check_whole(tmp_path) == 1
    assert save(saver, 3)
    assert _check_whole(tmp_path) == 3


def test_training_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make_saver(tmp_path, monkeypatch)
    write, slow = write_tensors, 0.3

    def slowly(*arguments: Any) -> Any:
        time.sleep(slow)
        return write(*arguments)

    monkeypatch.setattr(saving, "write_tensors", slowly)
    engine = number_engine(5)
    begin = time.monotonic()
    saver.begin(engine, 5, {"note": "kept"})
    assert time.monotonic() - begin < slow
    engine.number = 6  # the next step changes the weights meanwhile
    assert saver.busy
    assert saver.pending
    assert not find_checkpoints(tmp_path)
    assert saver.finish()
    assert _check_whole(tmp_path) == 5


# --- kill -9 ------------------------------------------------------------------------------------------------------------


def _save_for_ever(folder: Path, first: int) -> None:
    saver = make_saver(folder, size=20_000)
    (folder / "started").touch()
    for step in range(first, 10**8):
        save(saver, step)


def test_a_kill_at_any_moment_leaves_the_newest_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    save(make_saver(tmp_path, monkeypatch), 1)
    duration = time.monotonic() - begin
    context, moments = multiprocessing.get_context("fork"), random.Random(0)
    newest, halfway = 1, 0
    for attempt in range(25):
        (tmp_path / "started").unlink(missing_ok=True)
        writer = context.Process(target=_save_for_ever, args=(tmp_path, newest + 1))
        writer.start()
        while not (tmp_path / "started").exists():
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 3 * duration))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        halfway += any(tmp_path.glob("*.tmp"))
        step = _check_whole(tmp_path)
        assert step >= newest, f"attempt {attempt} lost step {newest}"
        newest = step
    assert newest > 1
    assert halfway >= 5, "the kills hit no checkpoint that was being written"
    assert json.loads((tmp_path / checkpoint_name(newest) / STATE_NAME).read_text())["step"] == newest
