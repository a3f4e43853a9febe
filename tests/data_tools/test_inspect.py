"""Inspection: what it prints and draws, and that damage does not pass."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.inspect import main, spread
from dpt.data.manifest import read_manifest


@pytest.fixture
def shards(make_class_shards) -> Path:
    return make_class_shards()


def test_what_it_says_and_draws(shards: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(shards)])
    printed = capsys.readouterr().out
    assert "image_folder, train: 6 samples, task class, 32 px" in printed
    assert "3 classes: class0, class1, class2" in printed
    assert "(of 6 samples)" in printed
    row = next(line for line in printed.splitlines() if line.startswith("latents mean"))
    assert row.split()[2:8] == ["float16", "[2,", "4,", "4,", "4]", row.split()[7]]
    mean = np.mean(read_manifest(shards).statistics["latents"]["mean"])
    assert float(row.split()[7]) == pytest.approx(mean, rel=1e-3)
    sheet = Image.open(shards / "contact_sheet.png")
    assert np.asarray(sheet).std() > 10
    assert sheet.width >= 6 * 160


def test_no_picture(shards: Path, tmp_path: Path) -> None:
    main([str(shards), "--rows", "0", "--vae", str(tmp_path / "none")])
    assert not (shards / "contact_sheet.png").exists()


def test_verifying_alone(shards: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(shards), "--verify"])
    assert capsys.readouterr().out.strip().endswith("shards are as they were written.")
    assert not (shards / "contact_sheet.png").exists()


def test_spread() -> None:
    assert spread(10, 3) == [0, 4, 9]
    assert spread(2, 256) == [0, 1]
    assert spread(5, 1) == [0]


def test_damage(shards: Path, refused) -> None:
    path = shards / "000001.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert "000001.tar has other contents than were written (sha256)" in refused(main, shards)
    assert "000001.tar has other contents" in refused(main, shards, "--verify")
    os.truncate(path, 3000)
    assert "000001.tar has 3000 bytes instead of" in refused(main, shards, "--quick")
    path.rename(shards / "stray.tar")
    found = refused(main, shards)
    assert "000001.tar is missing" in found
    assert "stray.tar is not in the manifest" in found


def test_bad_input(shards: Path, tmp_path: Path, refused) -> None:
    assert "no such shard folder" in refused(main, tmp_path / "none")
    assert "is not the one that made the shards (sha256" in refused(main, shards, "--vae", "embedded")


@pytest.mark.parametrize("name", ["-", "sheet", "sheet.txt"])
def test_sheets_that_are_no_pictures_are_refused_before_any_work(name: str, shards: Path, refused) -> None:
    assert "name a file such as sheet.png" in refused(main, shards, "--picture", name)


def test_values_that_are_not_finite(shards: Path, refused) -> None:
    path = shards / "000000.tar"
    content = path.read_bytes()
    stride = (len(content) - 1024) // 2
    where = content.index(b"latents.npy", stride) // 512 * 512 + 512 + 128
    path.write_bytes(content[:where] + b"\x00\x7e" + content[where + 2 :])
    size = path.stat().st_size
    assert size == read_manifest(shards).shards[0].bytes
    assert "latents has values that are not finite" in refused(main, shards, "--quick")
