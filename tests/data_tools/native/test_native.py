"""Tiny sets in their native layouts: every reader reads its own, and every command of docs/reproduce.md encodes one."""

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from data_tools import encode
from data_tools.native.__main__ import main
from data_tools.native.pictures import outline
from data_tools.native.scenes import scenes, square_scenes
from data_tools.native.sets import WRITERS
from data_tools.readers import READERS, Sample, open_reader
from data_tools.readers.rle import decode_polygons
from data_tools.synthesis import CLASS_NAMES
from dpt.data.manifest import read_manifest
from dpt.scaling.shard_sets import ARGUMENTS
from tests.data_tools.encode_runs import contents
from tests.data_tools.readers.reader_layouts import read_all

SAMPLES = 2
SPLITS = {
    "coco_amodal": ("train", "val"),
    "diode": ("train", "val"),
    "eth3d": ("test",),
    "flying_chairs": ("train", "val"),
    "hypersim": ("train", "val", "test"),
    "image_folder": ("train",),
    "imagenet": ("train", "val"),
    "kitti": ("test",),
    "mp3d_amodal": ("test",),
    "nyuv2": ("train", "test"),
    "pix2gestalt": ("train", "val"),
    "scannet": ("val", "test"),
}
PAGE = (Path(__file__).resolve().parents[3] / "docs/reproduce.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python -m data_tools\.encode (--dataset .*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native")
    main(["--out", str(out), "--samples", str(SAMPLES), "--seed", "3"])
    return out


def test_every_reader_has_a_native_set() -> None:
    assert WRITERS.keys() == READERS.keys() == SPLITS.keys()


@pytest.mark.parametrize(("name", "split"), [(name, split) for name, splits in SPLITS.items() for split in splits])
def test_every_reader_reads_its_own(sets: Path, name: str, split: str) -> None:
    reader = open_reader(name, sets / name, split)
    samples = list(read_all(reader).values())
    assert len(samples) == SAMPLES
    shown = "val" if name == "scannet" else split
    truths = scenes(3, shown, SAMPLES) if name != "pix2gestalt" else list(itertools.islice(square_scenes(3, shown), SAMPLES))
    if reader.task == "class":
        truths = sorted(truths, key=lambda truth: truth.label) if split == "train" else truths
        classes = CLASS_NAMES if name == "imagenet" else sorted({truth.class_name for truth in truths})
        assert [sample.label for sample in samples] == [classes.index(truth.class_name) for truth in truths]
    for sample, truth in zip(samples, truths, strict=True):
        assert sample.images[0].shape == truth.image.shape
        _check_depth(sample, truth.depth)
        if reader.task == "flow":
            np.testing.assert_array_equal(sample.flow, truth.flow)
        if reader.task == "amodal":
            np.testing.assert_array_equal(sample.images[1][..., 0] > 0, truth.visible_mask)
            assert (sample.mask ^ truth.whole_mask).sum() <= 0.1 * truth.whole_mask.sum()


def _check_depth(sample: Sample, depth: np.ndarray) -> None:
    if sample.depth is None:
        return
    assert 0 < (~sample.valid).sum() <= 0.03 * sample.valid.size
    np.testing.assert_allclose(sample.depth[sample.valid], depth[sample.valid], rtol=2e-3, atol=2e-3)


def test_the_same_seed_gives_the_same_files(sets: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        main(["scannet", "coco_amodal", "--out", str(tmp_path / str(seed)), "--samples", str(SAMPLES), "--seed", str(seed)])

    for name in ("scannet", "coco_amodal"):
        assert contents(tmp_path / "3" / name) == contents(sets / name)
        assert contents(tmp_path / "4" / name) != contents(sets / name)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nuy"], "'nuy' is unknown"),
        (["kitti", "--samples", "0"], "argument --samples: '0' is no whole number at least 1"),
        (["kitti", "--seed", "-1"], "argument --seed: '-1' is no whole number at least 0"),
        (["eth3d", "kitti"], "kitti exists already"),
    ],
)
def test_bad_input_costs_one_sentence(tmp_path: Path, refused, arguments: list[str], reason: str) -> None:
    (tmp_path / "kitti").mkdir()
    (tmp_path / "kitti" / "mine.txt").write_text("x")
    assert reason in refused(main, *arguments, "--out", tmp_path)
    assert not (tmp_path / "eth3d").exists()


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == len(ARGUMENTS) > 0


@pytest.mark.parametrize("command", COMMANDS, ids=[command.split()[-1] for command in COMMANDS])
def test_every_command_of_the_page_encodes_its_native_set(sets: Path, tmp_path: Path, clip: Path, command: str) -> None:
    words = shlex.split(command)
    name, out = words[words.index("--dataset") + 1], tmp_path / "shards"
    assert words[words.index("--root") + 1] == f"DIR/{name}"
    evaluation, task = "--evaluation" in words, open_reader(name, sets / name, words[words.index("--split") + 1]).task
    given = {"DIR/" + name: str(sets / name), "CLIP": str(clip)}
    smaller = ["--resolution", "32", "--vae", "embedded", "--out", str(out), "--processes", "0", "--max-skipped-share", "0"]
    encode.main([*(given.get(word, word) for word in words), *smaller])
    manifest = read_manifest(out)
    assert manifest.num_samples == SAMPLES
    assert ("latents_mirrored" in manifest.members) == ("--mirrored" in words)
    assert (manifest.dataset, manifest.num_skipped, len(manifest.excluded)) == (name, 0, 0)
    assert ("truth" in manifest.members) == (evaluation and task != "class")
    assert ("clip" in manifest.members) == ("--clip" in words) == (task == "amodal")


def test_the_outline_of_a_rectangle_is_filled_again() -> None:
    mask = np.zeros((20, 30), bool)
    mask[3:15, 4:26] = True
    filled = decode_polygons(outline(mask), 20, 30)
    assert (filled ^ mask).sum() <= 4
