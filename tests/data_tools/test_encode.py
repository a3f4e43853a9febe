"""Encoding: what the shards hold, restarts at any moment, many jobs, unreadable inputs, refusals."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.encode import main
from data_tools.encoding.samples import centre_crop
from data_tools.readers import READERS, ReadError, Sample
from dpt import tasks
from dpt.data.codec import load_vae
from dpt.data.manifest import read_manifest
from dpt.data.shards import ShardWriter, iter_samples
from dpt.data.stream import LatentStream

SIDE = 32


@pytest.fixture
def vae(tiny_vae: str) -> str:
    return tiny_vae


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of differing size in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(11):
        folder = root / ("cat" if number % 2 else "dog")
        folder.mkdir(exist_ok=True)
        image = random.integers(0, 256, (40 + 7 * number, 70, 3), np.uint8)
        Image.fromarray(image).save(folder / f"p.{number:02d}.png")
    return root


def arguments(root: Path, out: Path, vae: str, *more: str, dataset: str = "image_folder") -> list[str]:
    base = ["--dataset", dataset, "--root", str(root), "--out", str(out), "--vae", vae, "--resolution", str(SIDE)]
    return [*base, "--samples-per-shard", "4", "--batch-size", "3", "--processes", "0", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refusal(capsys: pytest.CaptureFixture, *given: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(given))
    assert caught.value.code == 2
    found = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in found
    return found


def encode_alone(vae: str, image: np.ndarray) -> np.ndarray:
    return load_vae(vae).encode(torch.from_numpy(image)[None])[0].numpy()


def test_class_images(pictures: Path, tmp_path: Path, vae: str) -> None:
    out = tmp_path / "out"
    main(arguments(pictures, out, vae, "--mirrored"))
    manifest = read_manifest(out)
    assert (manifest.dataset, manifest.task, manifest.num_samples) == ("image_folder", "class", 11)
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 3]
    assert manifest.class_names == ("cat", "dog")
    assert manifest.vae.sha256 == load_vae(vae).sha256
    assert manifest.mirrored
    assert sorted(contents(out)) == ["000000.tar", "000001.tar", "000002.tar", "manifest.json"]
    samples = list(iter_samples(out))
    sources = [sample["meta"]["source"] for sample in samples]
    assert len(set(sources)) == 11
    assert sources != sorted(sources)  # shuffled: neighbours in a folder are not neighbours in a shard
    for sample in samples:
        meta = sample["meta"]
        assert manifest.class_names[int(sample["label"])] == meta["class_name"] == Path(meta["source"]).parent.name
        picture = np.asarray(Image.open(pictures / meta["source"]))
        assert (meta["height"], meta["width"]) == picture.shape[:2]
        image = tasks.image_to_float(centre_crop(picture, SIDE))
        np.testing.assert_allclose(sample["latents"], encode_alone(vae, image), atol=2e-3)
        np.testing.assert_allclose(sample["latents_mirrored"], encode_alone(vae, image[..., ::-1].copy()), atol=2e-3)
    means = np.stack([sample["latents"][0] for sample in samples]).astype(np.float64)
    np.testing.assert_allclose(manifest.statistics["latents"]["mean"], means.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(manifest.statistics["latents"]["std"], means.std(axis=(0, 2, 3)), rtol=1e-6)
    batch = next(iter(LatentStream([str(out)], global_batch_size=5)))
    assert batch["latents_mirrored"].shape == (5, 2, 4, 4, 4)


def test_the_same_bytes_however_it_is_done(pictures: Path, tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main(arguments(pictures, tmp_path / "whole", vae))
    expected = contents(tmp_path / "whole")
    main(arguments(pictures, tmp_path / "ahead", vae, "--processes", "2"))
    assert contents(tmp_path / "ahead") == expected
    for part in (2, 0, 1):
        assert not (tmp_path / "parts" / "manifest.json").exists()
        main(arguments(pictures, tmp_path / "parts", vae, "--shards", f"{part}/3"))
    assert contents(tmp_path / "parts") == expected
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        main(arguments(pictures, tmp_path / "ranks", vae))
    assert contents(tmp_path / "ranks") == expected
    before = (tmp_path / "whole" / "000000.tar").stat().st_mtime_ns
    main(arguments(pictures, tmp_path / "whole", vae))
    assert (tmp_path / "whole" / "000000.tar").stat().st_mtime_ns == before


def run_until_killed(steps: int, given: list[str]) -> int:
    """Run the command in a process of its own that kills itself at its `steps`-th write. Returns how it ended."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        left = iter(range(steps))

        def counted(original):
            def call(*arguments, **options):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        for owner, name in ((ShardWriter, "_write"), (os, "fsync"), (Path, "replace"), (shutil, "rmtree")):
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            main(given)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_killed_anywhere_and_started_again(pictures: Path, tmp_path: Path, vae: str) -> None:
    main(arguments(pictures, tmp_path / "whole", vae))
    out, killed = tmp_path / "out", []
    for steps in (0, 1, 2, 3, 14, 9, 15, 13, 16, 17, 2, 18, 1, 15, 16, 3, 2, 1, 19, 20, 21, 100):
        status = run_until_killed(steps, arguments(pictures, out, vae))
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        killed.append(sorted(path.name for path in out.iterdir()) if out.exists() else [])
    assert len(killed) >= 10
    assert len(set(map(tuple, killed))) >= 5
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_of_a_launcher(pictures: Path, tmp_path: Path, vae: str) -> None:
    main(arguments(pictures, tmp_path / "whole", vae))
    script = Path(__file__).resolve().parents[2] / "data_tools" / "encode.py"
    jobs = []
    for rank in range(2):  # as the deepspeed launcher starts it: as a file, with --local_rank
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), f"--local_rank={rank}", *arguments(pictures, tmp_path / "out", vae)]
        jobs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=tmp_path))
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors.decode()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_unreadable_inputs_are_listed(pictures: Path, tmp_path: Path, vae: str, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    for path in pictures.rglob("*.png"):
        (root / "cat" / path.name).write_bytes(path.read_bytes())
    (root / "cat" / "broken.png").write_bytes(b"not a picture")
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "p.03.png").read_bytes()[:300])
    out = tmp_path / "out"
    found = refusal(capsys, *arguments(root, out, vae))
    assert "1 of 13 inputs cannot be read" in found
    assert "--max-skipped-share" in found
    assert "does not read" in found
    assert not out.exists() or not [name for name in contents_of(out) if name.endswith(".part")]
    main(arguments(root, out, vae, "--max-skipped-share", "0.2"))
    manifest = read_manifest(out)
    assert (manifest.num_samples, manifest.num_skipped) == (11, 2)
    assert {item.key for item in manifest.skipped} == {"cat/broken", "cat/cut"}
    assert all("does not read" in item.reason for item in manifest.skipped)
    assert "2 unreadable inputs skipped" in capsys.readouterr().out


def contents_of(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")]


def test_nothing_half_written_is_left(tmp_path: Path, vae: str, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(b"no")
    assert "1 of 6 inputs cannot be read" in refusal(capsys, *arguments(root, tmp_path / "out", vae))
    assert not (tmp_path / "out").exists()
    found = refusal(capsys, *arguments(root, tmp_path / "out", vae, "--max-skipped-share", "1"))
    assert "none of the 6 inputs" in found


def test_refusals(pictures: Path, tmp_path: Path, vae: str, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert "does not exist" in refusal(capsys, *arguments(tmp_path / "none", out, vae))
    assert "no multiple of 8" in refusal(capsys, *arguments(pictures, out, vae, "--resolution", "33"))
    assert "--shards '3/3'" in refusal(capsys, *arguments(pictures, out, vae, "--shards", "3/3"))
    assert "form I/N" in refusal(capsys, *arguments(pictures, out, vae, "--shards", "1"))
    assert "no option 'colour'" in refusal(capsys, *arguments(pictures, out, vae, "--option", "colour=red"))
    assert "--clip is for amodal" in refusal(capsys, *arguments(pictures, out, vae, "--clip", "x"))
    assert "--evaluation is for perception" in refusal(capsys, *arguments(pictures, out, vae, "--evaluation"))
    assert "VAE" in refusal(capsys, *arguments(pictures, out, str(tmp_path / "no_vae")))
    assert "11 inputs" not in refusal(capsys, *arguments(pictures, out, vae, "--finish"))
    assert not out.exists()
    main(arguments(pictures, out, vae))
    found = refusal(capsys, *arguments(pictures, out, vae, "--mirrored"))
    assert "mirrored False instead of True" in found
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert "holds something else" in refusal(capsys, *arguments(pictures, tmp_path / "full", vae))


def test_finish_writes_the_manifest_of_finished_shards(pictures: Path, tmp_path: Path, vae: str, capsys) -> None:
    out = tmp_path / "out"
    main(arguments(pictures, out, vae, "--shards", "0/2"))
    assert "1 of 3 shards are missing, 000001 for one" in refusal(capsys, *arguments(pictures, out, vae, "--finish"))
    main(arguments(pictures, out, vae, "--shards", "1/2"))
    main(arguments(pictures, out, vae, "--finish"))
    assert read_manifest(out).num_samples == 11


# --- perception ---------------------------------------------------------------------------------------------------------


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
    samples = list(iter_samples(out))
    assert [sample["key"] for sample in samples] == ["scene/00", "scene/01", "scene/02", "scene/04"]
    for sample in samples:
        source = reader.read(sample["key"])
        assert source.depth is not None
        rgb = tasks.image_to_float(tasks.resize_image(source.images[0], (SIDE, SIDE)))
        valid = tasks.resize_nearest(source.valid, (SIDE, SIDE))
        target, (near, far) = tasks.encode_depth(tasks.resize_nearest(source.depth, (SIDE, SIDE)), valid)
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
    for sample in iter_samples(out):
        source = reader.read(sample["key"])
        np.testing.assert_array_equal(sample["truth"], source.depth)
        np.testing.assert_array_equal(sample["image"], source.images[0])
    assert [sample["key"] for sample in iter_samples(out)] == reader.keys()


def test_ground_truth_prompt(made, tmp_path: Path, vae: str) -> None:
    made("depth", SIZES[:2])
    main(arguments(tmp_path, tmp_path / "out", vae, "--prompt", "ground_truth", dataset="made"))
    valid = np.ones((SIDE, SIDE), bool)
    valid[: SIDE // 4] = False
    for sample in iter_samples(tmp_path / "out"):
        np.testing.assert_allclose(sample["cond_latents"][1], encode_alone(vae, tasks.mask_image(valid)), atol=2e-3)


def test_flow_and_its_mirror_image(made, tmp_path: Path, vae: str) -> None:
    reader = made("flow", SIZES)
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--mirrored", dataset="made"))
    samples = {sample["key"]: sample for sample in iter_samples(out)}
    assert len(samples) == 10
    for key in sorted(reader.keys()):
        source = reader.read(key)
        assert source.flow is not None
        for mirrored in (False, True):
            sample = samples[f"{key}_mirrored" if mirrored else key]
            images = [image[:, ::-1].copy() if mirrored else image for image in source.images]
            flow = source.flow[..., ::-1] * np.array([-1, 1], np.float32)[:, None, None] if mirrored else source.flow
            frames = [tasks.image_to_float(tasks.resize_image(image, (SIDE, SIDE))) for image in images]
            targets = tasks.encode_flow(tasks.resize_flow(np.ascontiguousarray(flow), (SIDE, SIDE)))
            np.testing.assert_allclose(sample["cond_latents"], [encode_alone(vae, f) for f in frames], atol=2e-3)
            np.testing.assert_allclose(sample["target_latents"], [encode_alone(vae, t) for t in targets], atol=2e-3)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_fits(made, tmp_path: Path, vae: str, fit: str) -> None:
    reader = made("depth", [(48, 64), (64, 32)])
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--fit", fit, "--prompt", "none", dataset="made"))
    for sample in iter_samples(out):
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


def test_amodal_with_clip_embeddings(made, tmp_path: Path, vae: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=6, image_size=48, patch_size=16)).eval()
    tower.save_pretrained(tmp_path / "clip")
    reader = made("amodal", [(48, 48)] * 5)
    out = tmp_path / "out"
    main(arguments(tmp_path, out, vae, "--clip", str(tmp_path / "clip"), dataset="made"))
    manifest = read_manifest(out)
    assert manifest.members["clip"].shape == (6,)
    assert len(manifest.encoding["clip_sha256"]) == 64
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for sample in iter_samples(out):
        source = reader.read(sample["key"])
        assert source.mask is not None
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
    (sample,) = iter_samples(out)
    assert sample["code_mask"].sum() == 64
    np.testing.assert_array_equal(sample["code_mask"] > 0, (mask > 0) & (whole[..., 0] == 90))


def test_a_job_in_the_way(pictures: Path, tmp_path: Path, vae: str, capsys: pytest.CaptureFixture) -> None:
    from dpt.data.shards import ShardWriter

    out = tmp_path / "out"
    main(arguments(pictures, out, vae, "--shards", "0/2"))
    with ShardWriter(out / "000001.tar"):
        assert "another process is writing this shard" in refusal(capsys, *arguments(pictures, out, vae))


def test_settings_are_those_of_the_bytes(pictures: Path, tmp_path: Path, vae: str) -> None:
    main(arguments(pictures, tmp_path / "out", vae))
    settings = read_manifest(tmp_path / "out").encoding
    expected = {"batch_size": 3, "dtype": "float32", "num_inputs": 11, "samples_per_shard": 4, "fit": "crop", "shuffle_seed": 0}
    assert {name: settings[name] for name in expected} == expected
