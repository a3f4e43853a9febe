"""The stage that scores class-conditional weights: generate images, compare them with real ones, record scores and settings."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.config.generation import GenerationConfig
from dpt.config.recipe import Recipe
from dpt.config.sections import EvaluationConfig
from dpt.data.manifest import MANIFEST_NAME, file_sha256
from dpt.errors import UserError
from dpt.evaluation.feature_networks import FeatureNetwork, load_dinov2, load_features
from dpt.evaluation.files import write_json
from dpt.evaluation.generation import claim_folder, collect_features, compare_features, image_name, spread_labels, write_samples
from dpt.evaluation.image_metrics import frechet_distance
from dpt.evaluation.image_sources import ImageSource, label_counts
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.recording import Recording, open_predictor, shards_as_dataset
from dpt.evaluation.references import Reference
from dpt.evaluation.runner import sampling_settings, weights_sha256
from dpt.locking import held
from dpt.models.costs import macs
from dpt.models.pretrained import read_weights
from dpt.models.weights import Weights
from dpt.scores import name_of
from dpt.urls import is_url

SUMMARY_VERSION = 1
_PICTURES = 16


def score_generation(
    config: GenerationConfig,
    evaluation: EvaluationConfig,
    predictor: Predictor | None = None,
    *,
    cache_dir: str = "",
    begin: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Generate images with `predictor` (or take `config.images`) and compare them with `config.reference`. Collective.

    Writes OUT/images/NNNNNN.png, from which an interrupted run resumes, and OUT/fid.json, below `evaluation.output_dir`.
    Returns the file's content, {"version", "metrics", "settings"}, on every rank. Everything that can be checked is checked
    before the first image is made; then `begin` is called. UserError for bad input.
    """
    output = Path(evaluation.output_dir)
    with distributed.shared_errors():
        network = load_features(config.features, config.features_sha256)
        dinov2 = load_dinov2(config.dinov2, config.dinov2_sha256) if config.dinov2 else None
        if predictor is None:
            images = ImageSource(config.images)
            resolution, count = images.resolution, len(images)
        else:
            resolution, count = predictor.model.input_size * predictor.codec.downsampling, config.num_images
        codec = None if predictor is None else predictor.codec
        reference = Reference(config, network, resolution, codec=codec, cache_dir=cache_dir)
        if dinov2 is not None and reference.stored is not None:
            raise UserError(
                f"{config.reference}: FD-DINOv2 needs all images of the reference; give those, or leave out --dinov2."
            )
        _check_counts(config, count, reference)
        labels: list[int] = []
        if predictor is not None:
            classes = predictor.model.num_classes
            shares = [1] * classes if config.labels == "balanced" else label_counts(config.reference, classes, cache_dir)
            labels = spread_labels(config.num_images, shares)
    settings = _settings(config, evaluation, predictor, count, resolution, network, dinov2, reference)
    with held(output):
        if predictor is not None:
            made_with = {"weights_sha256": weights_sha256(predictor), "labels": config.labels}
            claim_folder(output / "images", settings["sampling"] | made_with)
        begin()
        distributed.log(format_settings(settings))
        real, real_dinov2 = reference.statistics(network), None
        if dinov2 is not None and reference.source is not None:
            real_dinov2 = collect_features(reference.source, dinov2, manifold_images=1, title="the reference (DINOv2)").pooled
        if predictor is not None:
            write_samples(
                predictor,
                output / "images",
                labels,
                steps=evaluation.steps[-1],
                guidance_channels=config.guidance_channels,
            )
            images = ImageSource(output / "images", resolution, names=[image_name(i) for i in range(count)])
        generated = collect_features(images, network, title="the images")
        metrics = compare_features(generated, real, neighbours=config.neighbours)
        if dinov2 is not None and real_dinov2 is not None:
            own = collect_features(images, dinov2, manifold_images=1, title="the images (DINOv2)").pooled
            metrics["fd_dinov2"] = frechet_distance(*own, *real_dinov2)
        summary = {"version": SUMMARY_VERSION, "metrics": metrics, "settings": settings}
        with distributed.shared_errors():
            if distributed.is_main():
                write_json(output / "fid.json", summary)
    return summary


def _as_dataset(path: str, found: dict[str, Any], cache_dir: str) -> dict[str, Any]:
    """A reference as an MLflow data set, identified by its hash (for a folder, of its file names and sizes)."""
    if is_url(path) or (Path(path) / MANIFEST_NAME).is_file():
        return shards_as_dataset(path, cache_dir)
    if Path(path).is_dir():
        files = (p for p in sorted(Path(path).rglob("*")) if p.is_file())
        listed = "".join(f"{p.relative_to(path)} {p.stat().st_size}\n" for p in files)
        digest = hashlib.sha256(listed.encode()).hexdigest()
    else:
        digest = file_sha256(Path(path))
    return {"name": Path(path).name, "digest": digest, "source": path, "context": "evaluation", "profile": found}


def _check_counts(config: GenerationConfig, count: int, reference: Reference) -> None:
    """Raise UserError if there are too few images for precision and recall, before any is made."""
    if reference.manifold and min(count, reference.manifold) <= config.neighbours:
        raise UserError(
            f"precision and recall need more than {config.neighbours} images of each kind; {count} generated and "
            f"{reference.manifold} real ones are given: more images, or fewer --neighbours."
        )


def _settings(
    config: GenerationConfig,
    evaluation: EvaluationConfig,
    predictor: Predictor | None,
    count: int,
    resolution: int,
    network: FeatureNetwork,
    dinov2: FeatureNetwork | None,
    reference: Reference,
) -> dict[str, Any]:
    """All settings that the figures depend on."""
    features = [{"name": n.name, "sha256": n.sha256, "resize": n.resize} for n in (network, dinov2) if n is not None]
    settings: dict[str, Any] = {
        "num_images": count,
        "resolution": resolution,
        "reference": {"path": config.reference, "kind": reference.kind, "num_images": reference.count or None},
        "features": features,
        "precision_recall": {"neighbours": config.neighbours, "real": reference.manifold, "generated": count},
    }
    if predictor is None:
        return settings | {"images": config.images}
    passes = predictor.passes(evaluation.steps[-1])
    sampling = {
        "steps": evaluation.steps[-1],
        **sampling_settings(evaluation, predictor),
        "guidance_channels": config.guidance_channels or predictor.model.in_channels,
        "ema": evaluation.use_ema,
        "vae": getattr(predictor.codec, "name", ""),
        "vae_sha256": predictor.codec.sha256,
    }
    return settings | {
        "weights": evaluation.weights,
        "labels": config.labels,
        "sampling": sampling,
        "macs_per_image": float(macs(predictor.model).forward) * passes,
        "lineage": predictor.lineage,
    }


def format_settings(settings: dict[str, Any]) -> str:
    """The settings that change the figures, as lines of text."""
    reference, known = settings["reference"], settings["reference"]["num_images"]
    lines = [
        f"{settings['num_images']} images of {settings['resolution']} pixels against {reference['path']} ({reference['kind']}"
        + (f", {known} images)" if known else ")"),
        *(f"features: {f['name']} (sha256 {f['sha256'][:12]}), resized: {f['resize']}" for f in settings["features"]),
    ]
    if "sampling" in settings:
        found = settings["sampling"]
        lines.append(f"labels {settings['labels']}, " + ", ".join(f"{n} {v}" for n, v in found.items() if n != "vae_sha256"))
    return "\n".join(lines)


def format_metrics(summary: dict[str, Any]) -> str:
    """The figures as text, one per line."""
    titles = {"inception_score": "Inception Score"}
    return "\n".join(f"{titles.get(name, name_of(name)):16}{value:.4f}" for name, value in summary["metrics"].items())


def run_generation(recipe: Recipe, *, vae: str = "", read: Callable[..., Weights] = read_weights) -> dict[str, Any]:
    """Run `score_generation` on a recipe's `dpt.generation`, recorded in MLflow as a run nested in the one that trained the
    weights; `vae` (empty: the recipe's) and `read` as in `dpt.evaluation.loading.load_model`."""
    config = recipe.dpt.generation
    if not config.reference:
        raise UserError("dpt.generation.reference is empty; name class shards, a folder of pictures, or an .npz.")
    if not config.images and not recipe.dpt.evaluation.weights:
        raise UserError("dpt.evaluation.weights is empty; name the weights to evaluate, or dpt.generation.images.")
    if config.images and config.labels == "shares":
        raise UserError("dpt.generation.labels says which images are generated, and dpt.generation.images are ready-made.")
    recipe, predictor = open_predictor(recipe, ready_made=bool(config.images), vae=vae, read=read)
    evaluation, cache_dir = recipe.dpt.evaluation, recipe.dpt.data.cache_dir
    if predictor is not None:
        evaluation = predictor.config
        if predictor.task != "class":
            raise UserError(
                f"{evaluation.weights} were trained for {predictor.task}; only class-conditional weights generate images."
            )
    with Recording(recipe, predictor, name=f"fid {Path(config.images or evaluation.weights).name}") as recording:
        summary = score_generation(config, evaluation, predictor, cache_dir=cache_dir, begin=lambda: recording.begin("class"))
        run, settings = recording.run, summary["settings"]
        run.set_tags(
            {"dpt.dataset": Path(config.reference).name, "dpt.protocol": format_settings(settings).replace("\n", "; ")}
        )
        if distributed.is_main():
            run.log_dataset(**_as_dataset(config.reference, settings["reference"], cache_dir))
        figures = summary["metrics"] | {"num_samples": float(settings["num_images"])}
        if "macs_per_image" in settings:
            figures["macs"] = settings["macs_per_image"]
        run.log_metrics({f"eval/class/{name}": value for name, value in figures.items()}, step=0)
        output = Path(evaluation.output_dir)
        run.log_artifact(output / "fid.json")
        for picture in sorted((output / "images").glob("*.png"))[:_PICTURES] if predictor is not None else ():
            run.log_picture(picture, picture.stem)
    return summary
