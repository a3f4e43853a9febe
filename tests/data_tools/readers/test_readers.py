"""All readers: what is not as it should be, options, protocols; readers of one's own."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.native.files import save, write
from data_tools.readers import READERS, ReadError, open_reader, parse_options
from dpt.errors import UserError
from dpt.evaluation.protocols import find_protocol
from dpt.pictures import flo_bytes
from tests.data_tools.readers.reader_layouts import DEPTH, chairs, check_depth, picture, read_all


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_root_is_named_with_the_layout_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            open_reader(name, root, "val" if name not in ("nyuv2", "kitti", "eth3d") else "test")
        assert str(root) in str(caught.value)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in READERS if name != "image_folder"])
def test_an_unknown_split_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"validation|does not hold"):
        open_reader(name, tmp_path / "set", "validation")


def test_options_have_the_types_of_the_readers_signature():
    assert parse_options("hypersim", {"filtered": "False", "filename_list": "a.txt"}) == {
        "filtered": False,
        "filename_list": "a.txt",
    }
    assert parse_options("coco_amodal", {"occluded_only": "true"}) == {"occluded_only": True}
    with pytest.raises(UserError, match="choose one of true, false"):
        parse_options("hypersim", {"filtered": "nope"})
    with pytest.raises(UserError, match="has no option 'filterd'; it has filename_list, filtered"):
        parse_options("hypersim", {"filterd": "1"})


def test_unknown_sets_and_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'nuy'.*nyuv2"):
        open_reader("nuy", tmp_path, "test")
    with pytest.raises(UserError, match=r"'lists'.*filename_list"):
        open_reader("kitti", tmp_path, "test", lists="x")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("00001_img2.ppm", None, "missing"),
        ("00001_img1.ppm", b"P6\n8 6\n255\n\x00", "does not read"),
        ("00001_img1.ppm", b"", "does not read"),
        ("00001_flow.flo", b"nothing", "too few"),
        ("00001_flow.flo", flo_bytes(np.zeros((2, 5, 8))), "is expected"),
    ],
)
def test_one_bad_sample_is_named_with_its_file(tmp_path: Path, file: str, content: bytes | None, reason: str) -> None:
    chairs(tmp_path, [1, 1])
    if content is None:
        (tmp_path / "data" / file).unlink()
    else:
        write(tmp_path / "data" / file, content)
    reader = open_reader("flying_chairs", tmp_path, "train")
    with pytest.raises(ReadError, match=reason) as caught:
        reader.read("00001")
    assert caught.value.key == "00001"
    assert caught.value.path.parent == tmp_path / "data"
    assert reader.read("00002").key == "00002"


def test_errors_and_readers_travel_between_processes(tmp_path: Path) -> None:
    chairs(tmp_path, [1])
    reader = pickle.loads(pickle.dumps(open_reader("flying_chairs", tmp_path, "train")))
    assert reader.read("00001").key == "00001"
    error = pickle.loads(pickle.dumps(ReadError("k", Path("p"), "r")))
    assert (error.key, error.path, error.reason) == ("k", Path("p"), "r")


def test_the_example_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "readers.md").read_text()
    code = next(block.split("```")[0] for block in page.split("```python\n") if "class MyDepth" in block.split("```")[0])
    module: dict[str, Any] = {}
    exec(code, module)
    monkeypatch.setitem(READERS, "my_depth", module["MyDepth"])
    save(tmp_path / "train/rgb/kitchen/7.jpg", picture())
    (tmp_path / "train/depth/kitchen").mkdir(parents=True)
    np.save(tmp_path / "train/depth/kitchen/7.npy", DEPTH.astype(np.float32))
    samples = read_all(open_reader("my_depth", tmp_path, "train"))
    check_depth(samples["kitchen/7"])
    (tmp_path / "train/depth/kitchen/7.npy").unlink()
    with pytest.raises(ReadError, match="missing"):
        open_reader("my_depth", tmp_path, "train").read("kitchen/7")
    with pytest.raises(UserError, match="expected"):
        open_reader("my_depth", tmp_path, "val")


TASKS = {"flying_chairs": "flow", "pix2gestalt": "amodal", "coco_amodal": "amodal", "mp3d_amodal": "amodal"}


@pytest.mark.parametrize("name", sorted(set(READERS) - {"imagenet", "image_folder"}))
def test_every_reader_has_a_protocol(name):
    assert find_protocol(name, TASKS.get(name, "depth")).task == TASKS.get(name, "depth")
