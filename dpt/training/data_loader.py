"""A recipe's data loader: the stream of latents to train on, checked against the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from dpt import distributed
from dpt.config.recipe import DptConfig
from dpt.data.codec import LatentScaling, load_vae
from dpt.data.manifest import Manifest, VAERecord, data_sha256
from dpt.data.stream import LatentStream
from dpt.errors import UserError
from dpt.fits import Fit
from dpt.target_codes import target_code
from dpt.tasks import DEPTH_PROMPT


@dataclass(frozen=True, kw_only=True)
class DataLoader:
    """An open stream and its manifests' contents."""

    stream: LatentStream
    manifests: list[Manifest]
    """One manifest per source, in the order of `dpt.data.shards`."""
    latent_size: tuple[int, int]
    """(h, w)."""
    depth_prompt: str
    """The image shown as the second condition by all depth sets (`dpt.tasks.DEPTH_PROMPTS`); empty if there is none."""
    fits: Mapping[str, Fit]
    """How pictures were resized, by task, for tasks whose sets record it."""
    codes: Mapping[str, str]
    """How targets are coded (`dpt.target_codes.TARGET_CODES`), by task, for tasks that have sets."""

    @property
    def vae(self) -> VAERecord:
        """The VAE that made all latents."""
        return self.manifests[0].vae

    @property
    def scaling(self) -> LatentScaling:
        """The scaling from the VAE's latents to the network's inputs."""
        return LatentScaling.of(self.vae)

    @property
    def tasks(self) -> list[str]:
        """Task of each source."""
        return [manifest.task for manifest in self.manifests]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the first set of class shards."""
        return self.manifests[0].class_names if self.tasks[0] == "class" else ()

    @property
    def data_sha256(self) -> str:
        """One hash over all samples of all sources."""
        return data_sha256(self.manifests)


def open_data_loader(
    config: DptConfig,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    start_sample: int,
    pin_memory: bool,
    codes: Mapping[str, str] | None = None,
) -> DataLoader:
    """Open this rank's stream from global position `start_sample` on. UserError if shards and network do not fit.

    codes: how the targets were coded that the initial weights learnt, by task, which the sets must share.
    """
    main = "latents" if config.task == "class" else "target_latents"
    stream = LatentStream(
        config.data.shards,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        seed=config.training.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        start_sample=start_sample,
        num_workers=config.data.num_workers,
        weights=config.data.weights,
        members=_members(config, main),
        max_bad_samples=config.data.max_bad_samples,
        pin_memory=pin_memory,
        cache_dir=config.data.cache_dir,
        verify=config.data.verify,
    )
    manifests = list(stream.manifests.values())
    for name, manifest in stream.manifests.items():
        _check(config, name, manifest)
    if config.training.feature_alignment.weight:
        _check_features(config, stream.manifests)
    shared = _shared_codes(stream.manifests, codes or {})
    prompts = {name: _depth_prompt(m) for name, m in stream.manifests.items() if m.task == "depth"}
    if config.model.num_conditions < 2:
        prompts = {}
    for name, prompt in prompts.items():
        wanted = next(iter(prompts.values()))
        if prompt != wanted:
            raise UserError(f"{name}: encoded with --prompt {prompt}, another set with {wanted}; encode both with the same.")
    height, width = manifests[0].members[main].shape[-2:]
    depth_prompt = next(iter(prompts.values()), "")
    return DataLoader(
        stream=stream,
        manifests=manifests,
        latent_size=(height, width),
        depth_prompt=depth_prompt,
        fits=_shared_fits(stream.manifests),
        codes=shared,
    )


def _shared_fits(manifests: Mapping[str, Manifest]) -> dict[str, Fit]:
    """How each perception task's pictures were resized; UserError if sets of one task differ."""
    shared: dict[str, Fit] = {}
    for name, manifest in manifests.items():
        if manifest.task == "class" or manifest.fit is None:
            continue
        wanted = shared.setdefault(manifest.task, manifest.fit)
        if manifest.fit != wanted:
            raise UserError(
                f"{name}: encoded with --fit {manifest.fit.how}, another set for {manifest.task} with {wanted.how}; encode "
                "both with the same, which predictions then follow."
            )
    return shared


def _shared_codes(manifests: Mapping[str, Manifest], learnt: Mapping[str, str]) -> dict[str, str]:
    """The code of each task's targets; UserError if sets of one task differ, or differ from the weights' training."""
    shared: dict[str, str] = {}
    for name, manifest in manifests.items():
        task = manifest.task
        code = target_code(task, manifest.encoding, name)
        if not code:
            continue
        wanted = learnt.get(task) or shared.setdefault(task, code)
        if code != wanted:
            other = "the initial weights" if task in learnt else "another set"
            raise UserError(
                f"{name}: {task} is coded as {code!r}, in {other} as {wanted!r}; encode the set with --{task}-code {wanted}."
            )
        shared[task] = code
    return shared


def _depth_prompt(manifest: Manifest) -> str:
    return str(manifest.encoding.get("prompt") or DEPTH_PROMPT)


def _members(config: DptConfig, main: str) -> list[str]:
    features = ["features"] if config.training.feature_alignment.weight else []
    if config.task == "class":
        return [main, "label", *(["latents_mirrored"] if config.data.horizontal_flip else []), *features]
    return ["cond_latents", main, "valid", *(["clip"] if config.model.clip_embedding_size else []), *features]


def _check_features(config: DptConfig, manifests: Mapping[str, Manifest]) -> None:
    """Raise UserError unless all sets with features hold the same ones, of the recipe's channels. A set may have none."""
    wanted, first = config.training.feature_alignment.channels, ""
    for name, manifest in manifests.items():
        if "features" not in manifest.members:
            continue
        found, channels = str(manifest.encoding.get("features", {}).get("name", "")), manifest.members["features"].shape[0]
        first = first or found
        if found != first:
            raise UserError(f"{name}: the features are {found!r}, in another set {first!r}; encode both with one --features.")
        if channels != wanted:
            raise UserError(
                f"{name}: the features have {channels} channels, dpt.training.feature_alignment.channels is {wanted}; set it "
                f"to {channels}."
            )


@lru_cache(maxsize=1)
def _vae_sha256(name: str, latent_channels: int) -> str:
    """Hash of a VAE's weights; empty if it cannot be loaded here."""
    try:
        return load_vae(name, latent_channels=latent_channels).sha256
    except UserError:
        return ""


def _check(config: DptConfig, name: str, manifest: Manifest) -> None:
    """Raise UserError unless the shards are of the run's task and VAE and fit the network's inputs."""
    tasks = ("depth", "flow", "amodal") if config.task == "generalist" else (config.task,)
    if manifest.task not in tasks:
        raise UserError(f'{name}: the shards are for task "{manifest.task}", dpt.task is "{config.task}"; choose other shards.')
    if manifest.vae.latent_channels != config.model.in_channels:
        raise UserError(
            f'{name}: VAE "{manifest.vae.name}" made latents of {manifest.vae.latent_channels} channels, dpt.model.in_channels '
            f"is {config.model.in_channels}; choose shards of the model's VAE."
        )
    main = manifest.members["latents" if config.task == "class" else "target_latents"]
    if max(main.shape[-2:]) != config.model.input_size:
        raise UserError(
            f'{name}: VAE "{manifest.vae.name}" made latents of {main.shape[-2]} x {main.shape[-1]} ({manifest.resolution} px, '
            f"{manifest.vae.downsampling} px per latent), dpt.model.input_size is {config.model.input_size}; set it to "
            f"{max(main.shape[-2:])}, or encode the set at {config.model.input_size * manifest.vae.downsampling} px."
        )
    if (
        config.data.vae
        and config.data.vae != manifest.vae.name
        and _vae_sha256(config.data.vae, config.model.in_channels) != manifest.vae.sha256
    ):
        raise UserError(
            f'{name}: the latents were made by VAE "{manifest.vae.name}", dpt.data.vae is "{config.data.vae}", which is '
            "another one or cannot be loaded here; set it to the shards' own, or encode the set again."
        )
    if config.task == "class" and len(manifest.class_names) > config.model.num_classes:
        raise UserError(
            f"{name}: the shards have {len(manifest.class_names)} classes, dpt.model.num_classes is "
            f"{config.model.num_classes}; raise it."
        )
    if config.task != "class" and manifest.members["cond_latents"].shape[0] < config.model.num_conditions:
        raise UserError(
            f"{name}: the shards have {manifest.members['cond_latents'].shape[0]} conditions, dpt.model.num_conditions is "
            f"{config.model.num_conditions}; lower it or encode the set again."
        )
