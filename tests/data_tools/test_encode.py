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
from data_tools.encoding.pipeline import BatchEncoder
from data_tools.encoding.records import Records
from data_tools.encoding.shards import ShardWriter
from dpt import tasks
from dpt.data.codec import load_vae
from dpt.data.manifest import read_manifest
from dpt.data.shards import ShardFolder
from dpt.data.stream import LatentStream
from tests.data_tools.encode_runs import SIDE, arguments, contents, encode_alone
from tests.gloo import run_ranks


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pictures: Path, vae: str) -> Path:
    """Their shards, made at once."""
    out = tmp_path_factory.mktemp("shards") / "whole"
    main(arguments(pictures, out, vae))
    return out


def test_class_images(pictures: Path, tmp_path: Path, vae: str) -> None:
    out = tmp_path / "out"
    main(arguments(pictures, out, vae, "--mirrored"))
    manifest = read_manifest(out)
    settings = {"batch_size": 3, "dtype": "float32", "num_inputs": 11, "samples_per_shard": 4, "fit": "crop", "shuffle_seed": 0}
    assert settings.items() <= manifest.encoding.items()
    assert (manifest.dataset, manifest.task, manifest.num_samples) == ("image_folder", "class", 11)
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 3]
    assert manifest.class_names == ("cat", "dog")
    assert manifest.vae.sha256 == load_vae(vae).sha256
    assert manifest.mirrored
    assert sorted(contents(out)) == ["000000.tar", "000001.tar", "000002.tar", "manifest.json"]
    samples = list(ShardFolder(out))
    sources = [sample["meta"]["source"] for sample in samples]
    assert len(set(sources)) == 11
    assert sources != sorted(sources)  # shuffled: neighbours in a folder are not neighbours in a shard
    for sample in samples:
        meta = sample["meta"]
        assert manifest.class_names[int(sample["label"])] == meta["class_name"] == Path(meta["source"]).parent.name
        picture = np.asarray(Image.open(pictures / meta["source"]))
        assert (meta["height"], meta["width"]) == picture.shape[:2]
        image = tasks.image_to_float(tasks.centre_crop(picture, SIDE))
        np.testing.assert_allclose(sample["latents"], encode_alone(vae, image), atol=2e-3)
        np.testing.assert_allclose(sample["latents_mirrored"], encode_alone(vae, image[..., ::-1].copy()), atol=2e-3)
    means = np.stack([sample["latents"][0] for sample in samples]).astype(np.float64)
    np.testing.assert_allclose(manifest.statistics["latents"]["mean"], means.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(manifest.statistics["latents"]["std"], means.std(axis=(0, 2, 3)), rtol=1e-6)
    batch = next(iter(LatentStream([str(out)], global_batch_size=5)))
    assert batch["latents_mirrored"].shape == (5, 2, 4, 4, 4)


def test_a_limit_takes_the_first_of_the_order(whole: Path, pictures: Path, tmp_path: Path, vae: str, refused) -> None:
    main(arguments(pictures, tmp_path / "five", vae, "--limit", "5"))
    five, every = ([sample["key"] for sample in ShardFolder(folder)] for folder in (tmp_path / "five", whole))
    assert five == every[:5]
    said = refused(main, *arguments(pictures, tmp_path / "none", vae, "--limit", "0"))
    assert "argument --limit: '0' is no whole number at least 1" in said


def test_the_same_bytes_however_it_is_done(
    whole: Path, pictures: Path, tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(whole)
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
    before = (whole / "000000.tar").stat().st_mtime_ns
    main(arguments(pictures, whole, vae))
    assert (whole / "000000.tar").stat().st_mtime_ns == before


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))

    def on_rank() -> bool:
        """In a process of its own: the number of torch's threads is set for good."""
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(BatchEncoder(load_vae(), 4).encode(images).get())
        return len(found[0]) == 3 and bool((found[0] == found[1]).all())

    assert run_ranks(1, on_rank) == [True]


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


def test_killed_anywhere_and_started_again(whole: Path, pictures: Path, tmp_path: Path, vae: str) -> None:
    out, killed = tmp_path / "out", []
    for steps in (0, 1, 2, 3, 14, 9, 15, 13, 16, 17, 2, 18, 1, 15, 16, 3, 2, 1, 19, 20, 21, 100):
        status = run_until_killed(steps, arguments(pictures, out, vae))
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        killed.append(sorted(path.name for path in out.iterdir()) if out.exists() else [])
    assert len(killed) >= 10
    assert len(set(map(tuple, killed))) >= 5
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_two_processes_of_a_launcher(whole: Path, pictures: Path, tmp_path: Path, vae: str) -> None:
    script = Path(__file__).resolve().parents[2] / "data_tools" / "encode.py"
    jobs = []
    for rank in range(2):  # as the deepspeed launcher starts it: as a file, with --local_rank
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), f"--local_rank={rank}", *arguments(pictures, tmp_path / "out", vae)]
        jobs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=tmp_path))
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors.decode()
    assert contents(tmp_path / "out") == contents(whole)


def test_unreadable_inputs_are_listed(pictures: Path, tmp_path: Path, vae: str, capsys: pytest.CaptureFixture, refused) -> None:
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    for path in pictures.rglob("*.png"):
        shutil.copy(path, root / "cat")
    (root / "cat" / "broken.png").write_bytes(b"not a picture")
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "p.03.png").read_bytes()[:300])
    out = tmp_path / "out"
    found = refused(main, *arguments(root, out, vae))
    assert "1 of 13 inputs cannot be read" in found
    assert "--max-skipped-share" in found
    assert "does not read" in found
    assert not out.exists() or not [name for name in contents(out) if name.endswith(".part")]
    main(arguments(root, out, vae, "--max-skipped-share", "0.2"))
    manifest = read_manifest(out)
    assert (manifest.num_samples, manifest.num_skipped) == (11, 2)
    assert {item.key for item in manifest.skipped} == {"cat/broken", "cat/cut"}
    assert all("does not read" in item.reason for item in manifest.skipped)
    assert "2 unreadable inputs skipped" in capsys.readouterr().out


def test_nothing_half_written_is_left(tmp_path: Path, vae: str, refused) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(b"no")
    assert "1 of 6 inputs cannot be read" in refused(main, *arguments(root, tmp_path / "out", vae))
    assert not (tmp_path / "out").exists()
    found = refused(main, *arguments(root, tmp_path / "out", vae, "--max-skipped-share", "1"))
    assert "none of the 6 inputs" in found


def test_refusals(whole: Path, pictures: Path, tmp_path: Path, vae: str, refused) -> None:
    out = tmp_path / "out"
    assert "does not exist" in refused(main, *arguments(tmp_path / "none", out, vae))
    assert "VAE" in refused(main, *arguments(pictures, out, str(tmp_path / "no_vae")))
    for options, words in (
        (("--resolution", "33"), "no multiple of 8"),
        (("--shards", "3/3"), "--shards '3/3'"),
        (("--shards", "1"), "form I/N"),
        (("--option", "colour=red"), "no option 'colour'"),
        (("--clip", "x"), "--clip is for amodal"),
        (("--evaluation",), "--evaluation is for perception"),
        (("--finish",), "3 of 3 shards are missing"),
    ):
        assert words in refused(main, *arguments(pictures, out, vae, *options))
    assert not out.exists()
    assert "mirrored False instead of True" in refused(main, *arguments(pictures, whole, vae, "--mirrored"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert "do not belong to an unfinished set" in refused(main, *arguments(pictures, tmp_path / "full", vae))


def test_a_rank_that_fails_says_why(tmp_path: Path, vae: str, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks have shards of their own: no other one could say it."""
    root = tmp_path / "root"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(b"no")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "1 of 6 inputs cannot be read" in refused(main, *arguments(root, tmp_path / "out", vae))


def test_a_job_that_joins_as_the_last_one_ends_makes_nothing_again(
    whole: Path, pictures: Path, tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "out", Records.done

    def end_meanwhile(self: Records, number: int) -> bool:
        if self.folder.exists():
            shutil.copytree(whole, out, dirs_exist_ok=True)
            self.remove()
        return done(self, number)

    monkeypatch.setattr(Records, "done", end_meanwhile)
    monkeypatch.setattr(ShardWriter, "add", None)
    main(arguments(pictures, out, vae))
    assert contents(out) == contents(whole)


def test_finish_writes_the_manifest_of_finished_shards(pictures: Path, tmp_path: Path, vae: str, refused) -> None:
    out = tmp_path / "out"
    main(arguments(pictures, out, vae, "--shards", "0/2"))
    assert "1 of 3 shards are missing, 000001 for one" in refused(main, *arguments(pictures, out, vae, "--finish"))
    main(arguments(pictures, out, vae, "--shards", "1/2"))
    main(arguments(pictures, out, vae, "--finish"))
    assert read_manifest(out).num_samples == 11


def test_a_job_in_the_way(pictures: Path, tmp_path: Path, vae: str, refused) -> None:
    out = tmp_path / "out"
    main(arguments(pictures, out, vae, "--shards", "0/2"))
    with ShardWriter(out / "000001.tar"):
        assert "another process is writing this shard" in refused(main, *arguments(pictures, out, vae))
