import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torchmetrics.image.fid import _compute_fid

from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation import Predictor, generation
from tests.evaluation.tiny import make_model
from tests.gloo import run_ranks


class Pooled(torch.nn.Module):
    """Means of 2 x 2 blocks of a uint8 image as features."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "features.pt"
    torch.jit.script(Pooled()).save(str(path))
    return path


def _images(count: int, seed: int, level: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, level, (count, 6, 6, 3), dtype=np.uint8)


def test_frechet_distance_equals_the_definition_and_torchmetrics():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (300, 8)) @ rng.normal(0, 1, (8, 8)), rng.normal(0.5, 2, (200, 8))
    moments = [(x.mean(0), np.cov(x.T)) for x in (a, b)]
    (mean_a, cov_a), (mean_b, cov_b) = moments
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    found = generation.frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert found == pytest.approx(expected, rel=1e-9)
    theirs = _compute_fid(*(torch.from_numpy(x) for x in (mean_a, cov_a, mean_b, cov_b)))
    assert found == pytest.approx(theirs.item(), rel=1e-6)
    assert generation.frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_a_singular_covariance():
    flat = np.diag([1.0, 0.0])
    assert generation.frechet_distance(np.zeros(2), flat, np.ones(2), flat) == pytest.approx(2.0)


def test_precision_and_recall_by_hand_and_by_definition():
    real = np.array([[0.0], [1.0], [2.0], [10.0]], np.float32)
    generated = np.array([[0.4], [1.4], [30.0], [31.0]], np.float32)
    # Reach of the real points to their first neighbour: 1, 1, 1, 8; of the generated ones: 1, 1, 1, 1.
    assert generation.precision_recall(real, generated, neighbours=1) == (0.5, 0.75)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (60, 3)).astype(np.float32), rng.normal(0.7, 1, (50, 3)).astype(np.float32)
    own = np.sort(np.linalg.norm(a[:, None] - a[None], axis=-1), axis=1)[:, 3]
    expected = np.mean((np.linalg.norm(b[:, None] - a[None], axis=-1) <= own).any(1))
    assert generation.precision_recall(a, b)[0] == pytest.approx(expected)
    assert generation.precision_recall(a, a) == (1.0, 1.0)


def test_folders_and_archives_give_the_same_figures_on_any_number_of_ranks(tmp_path, network):
    samples, real = _images(41, 0), _images(37, 1, 200)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "real.npz", real)
    found = generation.evaluate_images(tmp_path / "folder", tmp_path / "real.npz", features=network, batch_size=7)
    assert found["num_samples"] == 41
    assert 0 < found["precision"] <= 1
    again = generation.evaluate_images(tmp_path / "samples.npz", tmp_path / "real.npz", features=network)
    assert found == pytest.approx(again)
    ranks = run_ranks(
        2, lambda: generation.evaluate_images(tmp_path / "samples.npz", tmp_path / "real.npz", features=network, batch_size=8)
    )
    assert ranks[0] == ranks[1] == pytest.approx(again)
    features = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(real).permute(0, 3, 1, 2).float(), 2).flatten(1).numpy()
    np.savez(tmp_path / "moments.npz", mu=features.mean(0), sigma=np.cov(features.T))
    stored = generation.evaluate_images(tmp_path / "samples.npz", tmp_path / "moments.npz", features=network)
    assert stored["fid"] == pytest.approx(again["fid"], rel=1e-4)
    assert "precision" not in stored


def test_what_is_missing_is_named(tmp_path, network):
    with pytest.raises(UserError, match="inception-2015-12-05"):
        generation.load_features("")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no TorchScript"):
        generation.load_features(tmp_path / "bad.pt")
    with pytest.raises(UserError, match="no images"):
        generation.ImageSource(tmp_path / "empty")
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(UserError, match="float64"):
        generation.ImageSource(tmp_path / "float.npz")


def test_samples_are_written_once(tmp_path):
    predictor = Predictor(make_model("class", num_conditions=0), config=EvaluationConfig(batch_size=2), device="cpu")
    generation.write_samples(predictor, tmp_path / "out", 5, steps=2, labels=[1, 3])
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    first = files[2].read_bytes()
    files[2].unlink()
    time_of_others = files[3].stat().st_mtime_ns
    generation.write_samples(predictor, tmp_path / "out", 5, steps=2, labels=[1, 3])
    assert files[2].read_bytes() == first
    assert files[3].stat().st_mtime_ns == time_of_others
