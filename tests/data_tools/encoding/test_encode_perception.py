"""Encoding of perception sets: conditions, targets, truths, mirror images, fits, embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import inspect
from data_tools.encode import main
from data_tools.inspect import main as inspect_main
from data_tools.readers import READERS, ReadError, Sample
from dpt import target_codes, tasks
from dpt.data.codec import load_vae
from dpt.data.manifest import read_manifest
from dpt.data.shards import ShardFolder
from tests.data_tools.encode_runs import SIDE, arguments, encode_alone


class Made:
    """A reader of made-up samples."""

    name = "made"
    version = 3
    class_names: tuple[str, ...] = ()

    def __init__(self, task: str, sizes: list[tuple[int, int]]) -> None:
        self.task, self.sizes = task, sizes

    def keys(self) -> list[str]:
        return [f"scene/{number:02d}" for number in range(len(self.sizes))]

    def read(self, key: str) -> Sample:
        number = int(key[-2:])
        height, width = self.sizes[number]
        random = np.random.default_rng(number)
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        meta = {"source": f"{key}.png"}
        if self.task == "depth":
            if number == 3:
                raise ReadError(key, Path("x"), "is broken")
            depth = random.uniform(1, 9, (height, width)).astype(np.float32)
            valid = np.ones((height, width), bool)
            valid[: height // 4] = False
            return Sample(key=key, images=(image,), depth=np.where(valid, depth, 0).astype(np.float32), valid=valid, meta=meta)
        if self.task == "flow":
            flow = random.uniform(-9, 9, (2, height, width)).astype(np.float32)
            return Sample(key=key, images=(image, image[::-1].copy()), flow=flow, meta=meta)
        mask = np.zeros((height, width), bool)
        mask[4:20, 6:30] = True
        visible = np.repeat((mask & (np.arange(width) > 12))[..., None], 3, axis=2).astype(np.uint8) * 255
        return Sample(key=key, images=(image, visible), mask=mask, meta=meta)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    def make(task: str, sizes: list[tuple[int, int]]) -> Made:
        reader = Made(task, sizes)
        monkeypatch.setitem(READERS, "made", lambda root, split: reader)
        return reader

    return make


SIZES = [(48, 64)] * 5


def test_depth(made, tmp_path: Path, vae: str) -> None:
    reader = made("depth", SIZES)
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--max-skipped-share", "0.5", "--shuffle-seed", "-1", dataset="made"))
    samples = list(ShardFolder(out))
    assert [sample["key"] for sample in samples] == ["scene/00", "scene/01", "scene/02", "scene/04"]
    for sample in samples:
        source = reader.read(sample["key"])
        rgb = tasks.image_to_float(tasks.resize_image(source.images[0], (SIDE, SIDE)))
        valid = tasks.resize_nearest(source.valid, (SIDE, SIDE))
        target, (near, far) = target_codes.encode_depth(tasks.resize_nearest(source.depth, (SIDE, SIDE)), valid)
        expected = [encode_alone(vae, image) for image in (rgb, tasks.all_valid_prompt(SIDE, SIDE), target)]
        np.testing.assert_allclose(sample["cond_latents"], expected[:2], atol=2e-3)
        np.testing.assert_allclose(sample["target_latents"], expected[2:], atol=2e-3)
        assert (sample["meta"]["near"], sample["meta"]["far"]) == (near, far)
        np.testing.assert_array_equal(sample["valid"], [[0] * 4, [1] * 4, [1] * 4, [1] * 4])
    assert read_manifest(out).skipped[0].reason == "is broken"


@pytest.mark.parametrize("fit", ["stretch", "aspect"])
def test_evaluation_keeps_truth_at_its_size(made, tmp_path: Path, vae: str, fit: str) -> None:
    reader = made("depth", [(48, 64), (32, 32), (48, 80)])
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--evaluation", "--fit", fit, "--prompt", "none", dataset="made"))
    manifest = read_manifest(out)
    assert manifest.members["truth"].shape == (-1, -1)
    assert manifest.members["image"].shape == (-1, -1, 3)
    assert manifest.members["cond_latents"].shape == ((1, 2, 4, -1, 4) if fit == "aspect" else (1, 2, 4, 4, 4))
    for sample in ShardFolder(out):
        source = reader.read(sample["key"])
        np.testing.assert_array_equal(sample["truth"], source.depth)
        np.testing.assert_array_equal(sample["image"], source.images[0])
    assert [sample["key"] for sample in ShardFolder(out)] == reader.keys()


def test_depth_codes_are_in_the_targets_and_in_the_manifest(made, tmp_path: Path, vae: str, capsys, refused) -> None:
    reader = made("depth", SIZES[:2])
    for code in target_codes.DEPTH_CODES:
        out = tmp_path / code
        main(arguments(tmp_path, out, vae, "--depth-code", code, dataset="made"))
        manifest = read_manifest(out)
        assert target_codes.target_code("depth", manifest.encoding, "") == code
        for sample in ShardFolder(out):
            source = reader.read(sample["key"])
            maps = [tasks.resize_nearest(values, (SIDE, SIDE)) for values in (source.depth, source.valid)]
            target, constants = target_codes.encode_depth(*maps, code=code)
            np.testing.assert_allclose(sample["target_latents"][0], encode_alone(vae, target), atol=2e-3)
            assert (sample["meta"]["near"], sample["meta"]["far"]) == constants
    other = arguments(tmp_path, tmp_path / "log", vae, "--depth-code", "disparity", dataset="made")
    assert "made with depth_code 'log' instead of 'disparity'" in refused(main, *other)  # a job does not go on in another code
    inspect_main([str(tmp_path / "log"), "--rows", "0"])
    assert "depth code log" in capsys.readouterr().out


def test_ground_truth_prompt(made, tmp_path: Path, vae: str) -> None:
    made("depth", SIZES[:2])
    main(arguments(tmp_path, tmp_path / "out", vae, "--prompt", "ground_truth", dataset="made"))
    valid = np.ones((SIDE, SIDE), bool)
    valid[: SIDE // 4] = False
    for sample in ShardFolder(tmp_path / "out"):
        np.testing.assert_allclose(sample["cond_latents"][1], encode_alone(vae, tasks.mask_image(valid)), atol=2e-3)


def test_flow_and_its_mirror_image(made, tmp_path: Path, vae: str) -> None:
    reader = made("flow", SIZES)
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--mirrored", dataset="made"))
    samples = {sample["key"]: sample for sample in ShardFolder(out)}
    assert len(samples) == 10
    for key in sorted(reader.keys()):
        source = reader.read(key)
        for mirrored in (False, True):
            sample = samples[f"{key}_mirrored" if mirrored else key]
            images = [image[:, ::-1].copy() if mirrored else image for image in source.images]
            flow = source.flow[..., ::-1] * np.array([-1, 1], np.float32)[:, None, None] if mirrored else source.flow
            frames = [tasks.image_to_float(tasks.resize_image(image, (SIDE, SIDE))) for image in images]
            targets = target_codes.encode_flow(tasks.resize_flow(np.ascontiguousarray(flow), (SIDE, SIDE)))
            np.testing.assert_allclose(sample["cond_latents"], [encode_alone(vae, f) for f in frames], atol=2e-3)
            np.testing.assert_allclose(sample["target_latents"], [encode_alone(vae, t) for t in targets], atol=2e-3)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_fits(made, tmp_path: Path, vae: str, fit: str) -> None:
    reader = made("depth", [(48, 64), (64, 32)])
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--fit", fit, "--prompt", "none", dataset="made"))
    for sample in ShardFolder(out):
        image = reader.read(sample["key"]).images[0]
        height, width = image.shape[:2]
        if fit == "crop":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            expected = tasks.resize_image(np.ascontiguousarray(image[top : top + side, left : left + side]), (SIDE, SIDE))
        else:
            size = (24, 32) if height == 48 else (32, 16)
            expected = np.zeros((SIDE, SIDE, 3), np.uint8)
            expected[: size[0], : size[1]] = tasks.resize_image(image, size)
            assert sample["valid"][size[0] // 8 :].sum() == sample["valid"][:, size[1] // 8 :].sum() == 0
        assert sample["valid"].any()
        np.testing.assert_allclose(sample["cond_latents"][0], encode_alone(vae, tasks.image_to_float(expected)), atol=2e-3)


def test_amodal_with_clip_embeddings(made, tmp_path: Path, vae: str, clip: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    reader = made("amodal", [(48, 48)] * 5)
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--clip", str(clip), dataset="made"))
    manifest = read_manifest(out)
    assert manifest.members["clip"].shape == (6,)
    assert len(manifest.encoding["clip_sha256"]) == 64
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for sample in ShardFolder(out):
        source = reader.read(sample["key"])
        whole = tasks.image_to_float(tasks.resize_image(np.where(source.mask[..., None], source.images[0], 255), (SIDE, SIDE)))
        np.testing.assert_allclose(sample["target_latents"][0], encode_alone(vae, whole), atol=2e-3)
        visible = torch.from_numpy(np.where(source.images[1] > 0, source.images[0], 255)).float() / 255
        embedding = tower(((visible - mean) / std).movedim(-1, 0)[None]).image_embeds[0]
        np.testing.assert_allclose(sample["clip"], embedding.detach(), atol=1e-4)


def test_amodal_evaluation_sets_keep_the_mask_that_the_true_picture_gives(tmp_path: Path, vae: str) -> None:
    whole = np.full((24, 24, 3), 255, np.uint8)
    whole[4:12, 4:12] = 90
    whole[12:16, 4:12] = 252  # too bright to count as the object
    mask = np.zeros((24, 24), np.uint8)
    mask[4:16, 4:12] = 255
    pictures = {"occlusion": whole // 2, "whole": whole, "whole_mask": mask, "visible_mask": mask}
    for name, picture in pictures.items():
        folder = tmp_path / "root" / ("visible_object_mask" if name == "visible_mask" else name)
        folder.mkdir(parents=True)
        Image.fromarray(picture).save(folder / f"7_{name}.png")
    out = tmp_path / "out"
    (tmp_path / "root" / "val.txt").write_text("7\n")
    main(arguments(tmp_path / "root", out, vae, "--split", "val", "--evaluation", dataset="pix2gestalt"))
    (sample,) = ShardFolder(out)
    assert sample["code_mask"].sum() == 64
    np.testing.assert_array_equal(sample["code_mask"] > 0, (mask > 0) & (whole[..., 0] == 90))
    np.testing.assert_array_equal(sample["visible_mask"] > 0, mask > 0)
    assert not ShardFolder(out).manifest.synthetic
    (tmp_path / "synthesis.json").write_text("{}")  # beside the root, as data_tools.synthesis leaves it
    again = tmp_path / "again"
    main(arguments(tmp_path / "root", again, vae, "--split", "val", "--evaluation", dataset="pix2gestalt"))
    assert ShardFolder(again).manifest.synthetic
    ((caption, cells),) = _rows_of_sheet(again, vae)
    assert caption == "7"
    titles = ["image", "rgb, decoded", "visible_mask, decoded", "true whole", "whole, decoded"]
    assert [title for title, _ in cells] == titles
    np.testing.assert_array_equal(cells[3][1][..., 0] > 127, mask > 0)


def _rows_of_sheet(shards: Path, vae: str) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """What the contact sheet pastes together."""
    pasted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "_paste", pasted.append)
        inspect.contact_sheet(ShardFolder(shards), [0], load_vae(vae))
    return pasted[0]


def test_shards_of_other_reader_options_are_refused(tmp_path: Path, vae: str, monkeypatch, refused) -> None:
    def opened(root: Path, split: str, *, filtered: bool = True) -> Made:
        return Made("depth", [(40, 48), (40, 48)])

    monkeypatch.setitem(READERS, "made", opened)
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--option", "filtered=false", dataset="made"))
    assert read_manifest(out).encoding["options"] == {"filtered": False}
    found = refused(main, *arguments(tmp_path, out, vae, dataset="made"))
    assert "made with options {'filtered': False} instead of None" in found
    plain = tmp_path / "plain"
    main(arguments(tmp_path, plain, vae, dataset="made"))
    main(arguments(tmp_path, plain, vae, "--option", "filtered=true", dataset="made"))  # the default, named
    assert "options" not in read_manifest(plain).encoding
