"""The manifest beside a folder of shards: their contents, their origin, and whether several sets fit together."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpt.config.json_text import parse_object
from dpt.errors import UserError
from dpt.fits import FITS, Fit
from dpt.tasks import TASKS

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TRAINING_MEMBERS = (
    "label", "valid", "clip", "features", "latents", "latents_mirrored", "cond_latents", "target_latents"
)  # fmt: skip
MEMBER_ORDER = (*TRAINING_MEMBERS, "image", "truth", "code_mask", "second", "visible_mask")
"""Order of the arrays in a sample; `meta` follows. The last five occur only in evaluation sets."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One tar file of the set."""

    name: str
    num_samples: int
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """Numpy dtype name and shape of a member in every sample; -1 for a side that differs between samples."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class VAERecord:
    """The VAE that made the latents; `sha256` is its weights' hash. Networks see a latent of channel c as
    (latent - shift_factor - latents_mean[c]) * scaling_factor / latents_std[c], with the names of diffusers' configs.
    """

    name: str
    sha256: str
    scaling_factor: float
    latent_channels: int
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()
    """Mean per channel; empty: 0."""
    latents_std: tuple[float, ...] = ()
    """Standard deviation per channel; empty: 1."""
    downsampling: int = 8
    """Pixels per latent along a side."""

    def __post_init__(self) -> None:
        for name in ("latents_mean", "latents_std"):
            values = tuple(float(value) for value in getattr(self, name))  # lists, as JSON has them
            object.__setattr__(self, name, values)
            if values and len(values) != self.latent_channels:
                raise ValueError(f"{name} has {len(values)} numbers for {self.latent_channels} latent channels")
        if not self.scaling_factor > 0 or not all(value > 0 for value in self.latents_std):
            raise ValueError("scaling_factor and latents_std must be positive")

    def difference(self, said: Mapping[str, Any]) -> str:
        """How the VAE described by `said` (a record as a dictionary, or a part of one) differs from this one in its weights
        or its networks' latents, in words; empty if it does not."""
        if said.get("sha256", self.sha256) != self.sha256:
            return f"sha256 {said['sha256'][:12]}, not {self.sha256[:12]}"
        if "scaling_factor" not in said:
            return ""
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            wanted = getattr(self, name)
            found = said.get(name, 0.0 if name == "shift_factor" else ())
            found = tuple(found) if isinstance(found, list) else found
            if found != wanted:
                return f"{name} {_shortened(found)}, not {_shortened(wanted)}"
        return ""


def _shortened(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"[{', '.join(f'{number:.3g}' for number in value[:3])}{', ...' * (len(value) > 3)}]" if value else "none"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An input without a sample, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`. `resolution` is the side of the encoded square images in pixels."""

    format_version: int = FORMAT_VERSION
    dataset: str
    split: str
    task: str
    resolution: int
    num_samples: int
    shards: tuple[ShardRecord, ...]
    members: Mapping[str, MemberSpec]
    vae: VAERecord
    reader_version: str = ""
    filter: str = ""
    """Which inputs of the split were left out on purpose."""
    mirrored: bool = False
    synthetic: bool = False
    """Whether the inputs are our rendered scenes in the set's layout, not the set itself; results say so."""
    encoding: Mapping[str, Any] = field(default_factory=dict)
    """The encoder's settings: everything but the inputs that the shards' bytes depend on."""
    skipped: tuple[Skipped, ...] = ()
    """Inputs that could not be read."""
    num_skipped: int = 0
    excluded: tuple[Skipped, ...] = ()
    """Inputs that the set's own filter excluded."""
    class_names: tuple[str, ...] = ()
    """Name of each class id; empty where classes have none."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """Mean and standard deviation of the posterior mean per member of latents, by latent channel."""

    @property
    def fit(self) -> Fit | None:
        """How pictures were resized to `resolution`; None if the encoder did not record it."""
        how = self.encoding.get("fit")
        return Fit(how=how, resolution=self.resolution) if how in FITS else None

    @property
    def data_sha256(self) -> str:
        """One hash over all samples: of the shards' hashes in order. Runs record it as their data."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def profile(self) -> dict[str, Any]:
        """Summary of the set in a run's record."""
        return {
            "num_samples": self.num_samples,
            "task": self.task,
            "resolution": self.resolution,
            "vae": self.vae.name,
            "bytes": sum(shard.bytes for shard in self.shards),
        }


def data_sha256(manifests: Sequence[Manifest]) -> str:
    """One hash over all samples of several sets in this order; for a single set, its own."""
    if len(manifests) == 1:
        return manifests[0].data_sha256
    return hashlib.sha256("\n".join(manifest.data_sha256 for manifest in manifests).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest in `folder`. UserError if the folder is missing or empty, or the manifest missing or invalid."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such shard folder; make one with python -m data_tools.encode.")
    if not path.is_file():
        tars = any(folder.glob("*.tar"))
        state = f"it has shards but no {MANIFEST_NAME}: its encoding is not finished" if tars else "the shard folder is empty"
        raise UserError(f"{folder}: {state}; run python -m data_tools.encode with --out {folder}.")
    return parse_manifest(path.read_text(encoding="utf-8"), str(path))


def parse_manifest(text: str, name: str) -> Manifest:
    """Parse the manifest in the JSON `text`, called `name` in errors."""
    value = parse_object(text, name, "a manifest")
    if value.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{name}: format_version is {value.get('format_version')!r}, {FORMAT_VERSION} is read here; encode the set again."
        )
    try:
        manifest = _from_dict(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: a field is missing, unknown or of a wrong type ({error}); encode the set again.") from error
    _check_consistent(manifest, name)
    return manifest


def _from_dict(value: dict[str, Any]) -> Manifest:
    known = {f.name for f in dataclasses.fields(Manifest)}
    if unknown := sorted(set(value) - known):
        raise ValueError(f"unknown field {unknown[0]!r}")
    parts: dict[str, Any] = dict(value)
    parts["shards"] = tuple(ShardRecord(**shard) for shard in value["shards"])
    parts["members"] = {
        name: MemberSpec(dtype=str(spec["dtype"]), shape=tuple(int(side) for side in spec["shape"]))
        for name, spec in value["members"].items()
    }
    parts["vae"] = VAERecord(**value["vae"])
    for name in ("skipped", "excluded"):
        parts[name] = tuple(Skipped(**item) for item in value.get(name, ()))
    parts["class_names"] = tuple(value.get("class_names", ()))
    return Manifest(**parts)


def _check_consistent(manifest: Manifest, name: str) -> None:
    def require(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(f"{name}: {what}; encode the set again.")

    require(manifest.task in TASKS, f"task {manifest.task!r} is unknown")
    require(len(manifest.shards) > 0 and manifest.num_samples > 0, "it lists no samples")
    require(manifest.num_samples == sum(s.num_samples for s in manifest.shards), "num_samples is not the sum over the shards")
    require(all(s.num_samples > 0 and s.bytes > 0 for s in manifest.shards), "a shard without samples is listed")
    require(all(Path(s.name).name == s.name for s in manifest.shards), "a shard's name is a path")
    require(len({s.name for s in manifest.shards}) == len(manifest.shards), "a shard is listed twice")
    require(manifest.num_skipped == len(manifest.skipped), "num_skipped is not the number of inputs listed as skipped")


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Write `folder`/manifest.json atomically and return its path."""
    path = Path(folder) / MANIFEST_NAME
    _check_consistent(manifest, str(path))
    write_atomically(path, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under another name, then rename: `path` is never seen half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_manifests(manifests: Mapping[str, Manifest]) -> None:
    """Raise UserError unless all sets, keyed by source name, have one resolution and latents of one VAE."""
    first_name, first = next(iter(manifests.items()))
    for name, manifest in manifests.items():
        if difference := first.vae.difference(dataclasses.asdict(manifest.vae)):
            raise UserError(
                f'{name}: the latents were made by VAE "{manifest.vae.name}", not by "{first.vae.name}" of {first_name} '
                f"({difference}); encode both sets with one VAE."
            )
        if manifest.resolution != (size := first.resolution):
            found = f"the resolution is {manifest.resolution} px but {first_name} has {size} px"
            raise UserError(f"{name}: {found}; encode the set at {size} px.")


def choose_members(manifests: Mapping[str, Manifest], wanted: Collection[str] | None) -> dict[str, MemberSpec]:
    """The members of a batch from all sets: `wanted`, or all but the evaluation's.

    Sets may differ in which members they have and in the length of a member's first axis (number of targets): the batch has
    the largest, padded with zeros. UserError if they differ otherwise, or if no set has a wanted member.
    """
    chosen = set(TRAINING_MEMBERS if wanted is None else wanted)
    first_name = next(iter(manifests))
    specs: dict[str, MemberSpec] = {}
    for name, manifest in manifests.items():
        for member in (member for member in MEMBER_ORDER if member in chosen and member in manifest.members):
            spec = manifest.members[member]
            if -1 in spec.shape:
                raise UserError(f"{name}: {member} differs in size between samples; encode training sets to one size.")
            other = specs.setdefault(member, spec)
            if (other.dtype, other.shape[1:], len(other.shape)) != (spec.dtype, spec.shape[1:], len(spec.shape)):
                raise UserError(
                    f"{name}: {member} is {spec.dtype} {list(spec.shape)} but {other.dtype} {list(other.shape)} in "
                    f"{first_name}; encode both sets alike."
                )
            if spec.shape > other.shape:
                specs[member] = spec
    if missing := sorted(set(wanted or ()) - set(specs)):
        option = {"clip": " (--clip)", "features": " (--features)"}.get(missing[0], "")
        raise UserError(f"{first_name}: the shards hold no {missing[0]}; encode the set with it{option}.")
    return specs


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
