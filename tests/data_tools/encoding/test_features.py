"""Features in shards: exact ones of synthetic scenes in every layout, ready-made ones, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.encode import main
from data_tools.readers import open_reader
from data_tools.synthesis.dataset import DESCRIPTION, SynthesisConfig, synthesize
from data_tools.synthesis.generation import make_scene
from data_tools.synthesis.geometry import SEGMENTS, SceneGeometry
from data_tools.synthesis.layouts import TASKS
from data_tools.synthesis.rendering import render
from dpt.data.manifest import read_manifest
from dpt.data.shards import ShardFolder
from dpt.errors import UserError
from tests.data_tools.encode_runs import arguments

SIZE = 32


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    synthesize(out, SynthesisConfig(scenes=10, size=SIZE, seed=3, splits={"train": 0.7, "val": 0.3}), workers=1)
    return out


@pytest.mark.parametrize("dataset", TASKS.values())
@pytest.mark.parametrize("split", ["train", "val"])
def test_maps_are_of_the_scene_that_the_sample_shows(scenes: Path, dataset: str, split: str) -> None:
    reader, geometry = open_reader(dataset, scenes / dataset, split), SceneGeometry(scenes / dataset, dataset)
    for key in reader.keys()[:3]:
        sample = reader.read(key)
        truth = render(geometry._scene(key), SIZE)
        np.testing.assert_array_equal(sample.images[0], truth.image)
        segments = geometry.segments(key)
        np.testing.assert_array_equal(segments.sum(axis=0), 1.0)
        target = SEGMENTS.index(geometry._scene(key).bodies[1].class_name)
        assert (segments[target][truth.visible_mask] == 1.0).all()
        np.testing.assert_allclose(np.linalg.norm(geometry.normals(key), axis=0), 1.0, atol=1e-5)


def test_normals_are_those_of_the_surfaces_behind_the_depth() -> None:
    """On flat faces the cross product of the differences between neighbouring points, which depth gives, is the normal."""
    size, scene = 96, make_scene(3, "train", 0)
    camera, truth = scene.cameras[0], render(scene, size)
    geometry = SceneGeometry.__new__(SceneGeometry)
    geometry.size, geometry._scene = size, lambda _: scene  # type: ignore[method-assign, assignment]
    normals = geometry.normals("")
    rows, cols = np.mgrid[:size, :size] + 0.5
    focal = camera.focal(size)
    points = np.stack([(cols - size / 2) / focal, (rows - size / 2) / focal, np.ones_like(rows)]) * truth.depth.astype(
        np.float64
    )
    across, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    found = np.cross(down, across, axis=0)
    found /= np.linalg.norm(found, axis=0)
    cosine = (found * normals[:, 1:-1, 1:-1]).sum(axis=0)
    assert np.median(cosine) > 0.99999
    assert (cosine > 0.999).mean() > 0.8  # the rest: edges, and curved faces seen at a slant
    rays = points / np.linalg.norm(points, axis=0)
    assert ((rays * normals).sum(axis=0) < 1e-6).all()  # every face that is seen looks back


def _given(scenes: Path, out: Path, vae: str, features: str, *more: str, dataset: str = "hypersim") -> list[str]:
    return arguments(scenes / dataset, out, vae, "--split", "train", "--features", features, *more, dataset=dataset)


def _encode(scenes: Path, out: Path, *given: str, dataset: str = "hypersim") -> ShardFolder:
    main(_given(scenes, out, *given, dataset=dataset))
    return ShardFolder(out)


def test_normals_and_segments_lie_in_shards_on_the_grid_of_the_latents(scenes: Path, tmp_path: Path, vae: str) -> None:
    geometry = SceneGeometry(scenes / "hypersim", "hypersim")
    shards = _encode(scenes, tmp_path / "normals", vae, "normals", "--mirrored")
    manifest = read_manifest(tmp_path / "normals")
    assert manifest.encoding["features"] == {"name": "normals", "channels": 3, "grid": [4, 4]}
    assert (manifest.members["features"].dtype, manifest.members["features"].shape) == ("float16", (3, 4, 4))
    for sample in shards:
        key = sample["meta"]["source"].rpartition(".")[0]
        maps = geometry.normals(key)
        if sample["meta"].get("mirrored"):
            maps = maps[..., ::-1] * np.array([-1, 1, 1], np.float32)[:, None, None]
        means = maps.reshape(3, 4, 8, 4, 8).mean(axis=(2, 4))
        np.testing.assert_allclose(sample["features"].astype(np.float32), means, atol=2e-3)
    classes = _encode(scenes, tmp_path / "class", vae, "segments", "--processes", "1", dataset="imagenet")
    assert read_manifest(tmp_path / "class").members["features"].shape == (len(SEGMENTS), 4, 4)
    for sample in classes:
        np.testing.assert_allclose(sample["features"].astype(np.float32).sum(axis=0), 1.0, atol=5e-3)


def test_ready_made_features(scenes: Path, tmp_path: Path, vae: str) -> None:
    reader = open_reader("flying_chairs", scenes / "flying_chairs", "train")
    folder = tmp_path / "dino"
    folder.mkdir()
    for number, key in enumerate(reader.keys()):
        np.save(folder / f"{key}.npy", np.full((5, 3, 2), number, np.float32))
    shards = _encode(scenes, tmp_path / "out", vae, str(folder), dataset="flying_chairs")
    assert read_manifest(tmp_path / "out").encoding["features"] == {"name": "dino", "channels": 5, "grid": [3, 2]}
    for sample in shards:
        key = Path(sample["meta"]["source"]).name.partition("_")[0]
        assert (sample["features"] == reader.keys().index(key)).all()


def test_what_has_none_is_refused(scenes: Path, tmp_path: Path, vae: str, refused) -> None:
    folder = tmp_path / "dino"
    folder.mkdir()
    keys = open_reader("flying_chairs", scenes / "flying_chairs", "train").keys()
    cases: list[tuple[str, tuple[str, ...], str]] = [
        (str(tmp_path / "none"), (), "it is no folder"),
        (str(folder), (), f"it holds no KEY.npy of a sample of flying_chairs, such as {keys[0]}.npy"),
        ("normals", ("--evaluation",), "leave one of them out"),
    ]
    for features, more, words in cases:
        assert words in refused(main, *_given(scenes, tmp_path / "out", vae, features, *more, dataset="flying_chairs"))
    np.save(folder / f"{keys[0]}.npy", np.zeros(4))
    given = _given(scenes, tmp_path / "out", vae, str(folder), dataset="flying_chairs")
    assert "it is no array of numbers [C, h, w]" in refused(main, *given)
    np.save(folder / f"{keys[0]}.npy", np.zeros((1, 2, 2)))
    np.save(folder / f"{keys[1]}.npy", np.zeros((1, 2, 3)))
    _encode(scenes, tmp_path / "skipped", vae, str(folder), "--max-skipped-share", "1", dataset="flying_chairs")
    reasons = {skipped.key: skipped.reason for skipped in read_manifest(tmp_path / "skipped").skipped}
    assert "has the shape [1, 2, 3], not [1, 2, 2]" in reasons.pop(keys[1])
    assert keys[0] not in reasons
    assert all("does not read" in reason for reason in reasons.values())
    description = json.loads((scenes / DESCRIPTION).read_text())
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / DESCRIPTION).write_text(json.dumps(description | {"generator_version": 0}))
    with pytest.raises(UserError, match="of version 0 of the scenes"):
        SceneGeometry(tmp_path / "older" / "hypersim", "hypersim")
    with pytest.raises(UserError, match="synthetic scenes are no nyuv2"):
        SceneGeometry(scenes / "hypersim", "nyuv2")
    with pytest.raises(UserError, match="no synthetic scenes lie there"):
        SceneGeometry(tmp_path / "elsewhere", "hypersim")
