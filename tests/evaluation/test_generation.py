"""Figures of generated images against independent implementations (numpy, scipy), and how the images are made."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torchmetrics.image.fid import _compute_fid

from dpt import distributed
from dpt.config.generation import GenerationConfig
from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation import Predictor, generation
from dpt.evaluation.feature_networks import load_features
from dpt.evaluation.generation_runner import score_generation
from dpt.evaluation.image_metrics import Moments, ScoreSums, frechet_distance, precision_recall
from dpt.evaluation.image_sources import ImageSource, read_statistics
from dpt.evaluation.references import Reference
from dpt.locking import held
from tests.evaluation.image_networks import Random, random_images, save_network
from tests.evaluation.tiny import make_model
from tests.gloo import run_ranks


@pytest.fixture
def network(tmp_path):
    path, sha256 = save_network(Random(), tmp_path / "features.pt")
    return {"features": path, "features_sha256": sha256}


def _predictor(**settings) -> Predictor:
    config = EvaluationConfig(**{"batch_size": 3, "steps": [2]} | settings)
    return Predictor(make_model("class", num_conditions=0), config=config, device="cpu")


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al.'s own formula."""
    (mean_a, cov_a), (mean_b, cov_b) = [(x.mean(0), np.cov(x.T)) for x in (a.astype(np.float64), b.astype(np.float64))]
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root))


def _features(images: np.ndarray) -> list[np.ndarray]:
    return [part.numpy().astype(np.float64) for part in Random()(torch.from_numpy(images).permute(0, 3, 1, 2))]


def _precision(real: np.ndarray, generated: np.ndarray) -> float:
    reach = np.sort(np.linalg.norm(real[:, None] - real[None], axis=-1), axis=1)[:, 3]
    return float(np.mean((np.linalg.norm(generated[:, None] - real[None], axis=-1) <= reach).any(1)))


def test_frechet_distance_equals_the_definition_and_torchmetrics():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (300, 8)) @ rng.normal(0, 1, (8, 8)), rng.normal(0.5, 2, (200, 8))
    (mean_a, cov_a), (mean_b, cov_b) = [(x.mean(0), np.cov(x.T)) for x in (a, b)]
    found = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert found == pytest.approx(_frechet(a, b), rel=1e-9)
    theirs = _compute_fid(*(torch.from_numpy(x) for x in (mean_a, cov_a, mean_b, cov_b)))
    assert found == pytest.approx(theirs.item(), rel=1e-6)
    assert frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_a_singular_covariance():
    flat = np.diag([1.0, 0.0])
    assert frechet_distance(np.zeros(2), flat, np.ones(2), flat) == pytest.approx(2.0)


def test_moments_of_parts_are_those_of_the_whole():
    values = np.random.default_rng(0).normal(1e3, 1, (70, 5))
    total = Moments.of(values[:1]) + Moments.of(values[1:40]) + Moments.of(values[40:])
    np.testing.assert_allclose(total.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(values.T), rtol=1e-9)


def test_inception_score_is_the_mean_over_splits(monkeypatch):
    from dpt.evaluation import image_metrics

    monkeypatch.setattr(image_metrics, "SPLIT", 10)
    p = np.random.default_rng(0).dirichlet(np.ones(4), 25).astype(np.float32)
    p[3] = (1, 0, 0, 0)
    even, odd = ScoreSums(), ScoreSums()
    even.add(range(0, 25, 2), p[::2])
    odd.add(range(1, 25, 2), p[1::2])
    even.merge(odd)
    expected = []
    for part in (p[:10], p[10:20], p[20:]):
        part = part.astype(np.float64)
        kl = np.where(part > 0, part * (np.log(np.maximum(part, 1e-300)) - np.log(part.mean(0))), 0.0).sum(1)
        expected.append(np.exp(kl.mean()))
    assert even.score() == pytest.approx(np.mean(expected), rel=1e-9)


def test_precision_and_recall_by_hand_and_by_definition():
    real = np.array([[0.0], [1.0], [2.0], [10.0]], np.float32)
    generated = np.array([[0.4], [1.4], [30.0], [31.0]], np.float32)
    # Reach of the real points to their first neighbour: 1, 1, 1, 8; of the generated ones: 1, 1, 1, 1.
    assert precision_recall(real, generated, neighbours=1) == (0.5, 0.75)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (60, 3)).astype(np.float32), rng.normal(0.7, 1, (50, 3)).astype(np.float32)
    assert precision_recall(a, b)[0] == pytest.approx(_precision(a, b))
    assert precision_recall(a, a) == (1.0, 1.0)


def test_all_figures_equal_an_independent_implementation(tmp_path, network):
    samples, real = random_images(41, 0), random_images(37, 1, 200)
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "real.npz", real)
    config = GenerationConfig(images=str(tmp_path / "samples.npz"), reference=str(tmp_path / "real.npz"), **network)
    out = EvaluationConfig(output_dir=str(tmp_path / "out"))
    summary = score_generation(config, out)
    (own, own_spatial, p), (there, there_spatial, _) = _features(samples), _features(real)
    kl = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert summary["metrics"] == {
        "fid": pytest.approx(_frechet(own, there), rel=1e-4),
        "sfid": pytest.approx(_frechet(own_spatial, there_spatial), rel=1e-4),
        "inception_score": pytest.approx(np.exp(kl), rel=1e-5),
        "precision": pytest.approx(_precision(there, own)),
        "recall": pytest.approx(_precision(own, there)),
    }
    assert json.loads((tmp_path / "out" / "fid.json").read_text())["metrics"] == summary["metrics"]
    # A folder of the same pictures, and two ranks, give the same.
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    folder = GenerationConfig(images=str(tmp_path / "folder"), reference=str(tmp_path / "real.npz"), **network)
    ranks = run_ranks(2, lambda: score_generation(folder, out)["metrics"])
    assert ranks[0] == ranks[1] == {name: pytest.approx(value, rel=1e-9) for name, value in summary["metrics"].items()}


def test_statistics_of_adms_evaluator_are_read_and_ours_are_kept(tmp_path, network):
    samples, real = random_images(41, 0), random_images(30, 1, 200)
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "real.npz", real)
    there, spatial, _ = _features(real)
    moments = {"mu": there.mean(0), "sigma": np.cov(there.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}
    np.savez(tmp_path / "adm.npz", arr_0=real[:20], **moments)
    np.savez_compressed(tmp_path / "moments.npz", mu=moments["mu"], sigma=moments["sigma"])
    out = EvaluationConfig(output_dir=str(tmp_path / "out"))

    def score(reference: str, **more):
        config = GenerationConfig(images=str(tmp_path / "samples.npz"), reference=str(tmp_path / reference), **network, **more)
        return score_generation(config, out)["metrics"]

    whole = score("real.npz", save_reference=str(tmp_path / "kept" / "ours.npz"))
    assert score("kept/ours.npz") == whole
    adm = score("adm.npz")
    own = _features(samples)[0]
    assert adm["fid"] == pytest.approx(whole["fid"], rel=1e-4)
    assert adm["sfid"] == pytest.approx(whole["sfid"], rel=1e-4)
    assert adm["precision"] == pytest.approx(_precision(there[:20], own))  # of the images that the file has
    assert score("moments.npz").keys() == {"fid", "inception_score"}

    def refuse(words: str, **arrays) -> None:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UserError, match=words):
            score("bad.npz")

    refuse("features have 6 and 5 dimensions", mu=np.zeros(5), sigma=np.eye(5))
    refuse(r"they must be \[D\] and \[D, D\]", mu=np.zeros(6), sigma=np.eye(5))
    refuse("not finite", mu=np.full(6, np.nan), sigma=np.eye(6))
    refuse("a reference of 8 x 8 pixels, for images of 6 x 6", arr_0=random_images(9, 0, side=8))
    refuse("give an .npz that numpy.savez wrote, without objects", arr_0=np.array([{}], dtype=object))
    refuse("arr_0 is float64", arr_0=np.zeros((2, 4, 4, 3)))
    refuse("precision and recall need more than 3 images of each kind; 41 generated and 2 real", arr_0=random_images(2, 0))
    kept = read_statistics(tmp_path / "kept" / "ours.npz")
    assert (kept.count, kept.resolution) == (30, 6)
    refuse("made with the feature network aaaa", mu=kept.pooled[0], sigma=kept.pooled[1], network=np.array("a" * 64))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images there"):
        ImageSource(tmp_path / "empty")


def test_labels_follow_the_shares_in_every_stretch():
    assert generation.spread_labels(7, [1.0, 1.0, 1.0]) == [0, 1, 2, 0, 1, 2, 0]
    shares = np.array([5, 0, 3, 2])
    labels = generation.spread_labels(1000, shares)
    assert generation.spread_labels(100, shares) == labels[:100]
    for start in range(0, 1000, 100):
        counts = np.bincount(labels[start : start + 100], minlength=4)
        assert np.abs(counts - 10 * shares).max() <= 3


def test_generated_images_do_not_depend_on_ranks_or_interruptions(tmp_path):
    labels = [i % 4 for i in range(10)]

    def write(name: str, **settings) -> None:
        generation.write_samples(_predictor(**settings), tmp_path / name, labels, steps=2)

    def write_late() -> None:
        # A rank that begins later must not take what the other has written by then for an earlier run's.
        time.sleep(0.5 * distributed.rank())
        write("two")

    write("one")
    run_ranks(2, write_late)
    files = sorted(p.name for p in (tmp_path / "one").glob("*.png"))
    assert files == [f"{i:06d}.png" for i in range(10)]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # As a kill leaves it: some images missing, one half written.
    first = (tmp_path / "one" / files[4]).read_bytes()
    for name in (files[4], files[9]):
        (tmp_path / "one" / name).unlink()
    (tmp_path / "one" / ".000004.png.part").write_bytes(first[:20])
    kept = (tmp_path / "one" / files[3]).stat().st_mtime_ns
    write("one")
    assert (tmp_path / "one" / files[4]).read_bytes() == first
    assert (tmp_path / "one" / files[3]).stat().st_mtime_ns == kept
    assert not list((tmp_path / "one").glob(".*.part"))


def test_images_of_other_settings_are_not_taken_for_these(tmp_path):
    generation.claim_folder(tmp_path / "out", {"guidance_scale": 1.5})
    generation.write_samples(_predictor(), tmp_path / "out", [0, 1], steps=1)
    with pytest.raises(UserError, match=r"made with guidance_scale 1\.5, not 4\.0"):
        generation.claim_folder(tmp_path / "out", {"guidance_scale": 4.0})
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(UserError, match="nothing is known of"):
        generation.claim_folder(tmp_path / "out", {"guidance_scale": 1.5})


def test_scoring_weights_says_what_the_figures_depend_on(tmp_path, network):
    np.savez(tmp_path / "real.npz", random_images(12, 1, side=32))
    config = GenerationConfig(reference=str(tmp_path / "real.npz"), num_images=10, guidance_channels=3, **network)

    def score(where: str):
        predictor = _predictor(guidance_scale=1.5, output_dir=str(tmp_path / where))
        summary = score_generation(config, predictor.config, predictor)
        return {"metrics": summary["metrics"], "sampling": summary["settings"]["sampling"]}

    alone = score("alone")
    sampling = alone["sampling"]
    assert (sampling["guidance_scale"], sampling["guidance_channels"], sampling["steps"], sampling["ema"]) == (1.5, 3, 2, True)
    assert {"vae_sha256", "seed", "sampler", "timestep_spacing", "guidance_low", "precision"} <= sampling.keys()
    for ranks in run_ranks(2, lambda: score("ranks")):
        assert ranks["metrics"] == {name: pytest.approx(value, rel=1e-9) for name, value in alone["metrics"].items()}
    assert score("alone") == alone  # from the images there


def test_images_are_scored_whether_they_are_listed_yet_or_not(tmp_path, network, monkeypatch):
    """As on another node's network file system."""
    np.savez(tmp_path / "real.npz", random_images(12, 1, side=32))
    config = GenerationConfig(reference=str(tmp_path / "real.npz"), num_images=10, **network)
    predictor, listed = _predictor(output_dir=str(tmp_path / "out")), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: list(listed(self, pattern))[:4])
    summary = score_generation(config, predictor.config, predictor)
    monkeypatch.undo()
    assert score_generation(config, predictor.config, predictor) == summary


def test_a_folder_that_another_run_fills_is_refused(tmp_path, network):
    np.savez(tmp_path / "real.npz", random_images(12, 1, side=32))
    config = GenerationConfig(reference=str(tmp_path / "real.npz"), num_images=10, **network)
    predictor = _predictor(output_dir=str(tmp_path / "out"))
    with held(tmp_path / "out"), pytest.raises(UserError, match="another run is using it"):
        score_generation(config, predictor.config, predictor)


def test_networks_whose_features_are_not_numbers_are_refused(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1)[:, :4] / 0.0

    np.savez(tmp_path / "zeros.npz", np.zeros((5, 4, 4, 3), np.uint8))
    network = load_features(*save_network(Broken(), tmp_path / "broken.pt"))
    with pytest.raises(UserError, match="not finite"):
        generation.collect_features(ImageSource(tmp_path / "zeros.npz"), network)


def test_a_stored_reference_is_thinned_evenly(network, tmp_path):
    """The first rows of a set in the order of its classes would be one class."""
    np.savez(tmp_path / "real.npz", random_images(9, 0, side=64))
    config = GenerationConfig(reference=str(tmp_path / "real.npz"), save_reference=str(tmp_path / "kept.npz"), **network)
    features = load_features(config.features, config.features_sha256)
    whole = Reference(config, features, 64).statistics(features).features
    config = dataclasses.replace(config, reference=config.save_reference, save_reference="", manifold_images=3)
    thinned = Reference(config, features, 64).statistics(features).features
    np.testing.assert_array_equal(thinned, whole[[0, 4, 8]])
