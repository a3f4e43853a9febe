"""Names of models on the Hugging Face Hub, `hub:owner/name[/path][@revision]`, as files in this machine's hub cache.

The one place that turns such a name into a path: weights, VAEs and image towers are all opened through it. Downloads, the cache
(HF_HOME), its locks between processes, and tokens are huggingface_hub's; with HF_HUB_OFFLINE=1 only the cache is read.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt import distributed
from dpt.errors import UserError

PREFIX = "hub:"
WEIGHT_FILES = (
    "config.json",
    "weights.safetensors",
    "model_index.json",
    "diffusion_pytorch_model*.safetensors*",
    "scheduler/*.json",
    "transformer/*.json",
    "transformer/*.safetensors",
)
"""Files of weights that are read: our exports, and diffusers' models and pipelines."""
VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")
CLIP_FILES = ("config.json", "model*.safetensors*")
_OLD_FILES = ("diffusion_pytorch_model*.bin*", "transformer/*.bin*")
"""Pickled weights, used only where there are no safetensors."""

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repo>{_REPO})(?P<path>(?:/[\w.=+-]+)*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the hub, or what is below `path` in it, at a branch, tag or commit (empty: main)."""

    repo: str
    path: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}{'/' if self.path else ''}{self.path}{'@' if self.revision else ''}{self.revision}"


def is_hub_name(place: str | Path) -> bool:
    """Whether `place` is a name on the hub rather than a path."""
    return str(place).startswith(PREFIX)


def with_prefix(place: str) -> str:
    """Prefix `owner/name`, as the hub's own tools write it, unless there is such a folder; others unchanged."""
    bare = re.fullmatch(_REPO, place, re.ASCII) and not Path(place).exists()
    return f"{PREFIX}{place}" if bare else place


def parse(place: str | Path) -> HubName:
    """Parse `hub:owner/name[/path][@revision]`; UserError for any other form."""
    found = _NAME.fullmatch(str(place).removeprefix(PREFIX))
    if not found or not is_hub_name(place) or ".." in str(place):
        raise UserError(f'"{place}" is no name on the hub; write hub:owner/name[/path][@revision].')
    return HubName(repo=found["repo"], path=found["path"].strip("/"), revision=found["revision"] or "")


def local_path(place: str | Path, files: Sequence[str] = WEIGHT_FILES) -> Path:
    """A folder or file on this machine: `place` itself, or the cached copy of the hub's, fetched if necessary.

    `files`: patterns of the wanted files in a folder. Any number of processes may call it at the same time. UserError, one
    sentence, if there is no such model, revision or file, or it cannot be reached and is not in the cache.
    """
    return resolve(place, files)[0]


def resolve(place: str | Path, files: Sequence[str] = WEIGHT_FILES) -> tuple[Path, str]:
    """`local_path`, and `place` with its resolved commit (paths unchanged)."""
    if not is_hub_name(place):
        return Path(place), str(place)
    name = parse(place)
    beside = [f"{name.path}/{pattern}" for pattern in files] if name.path else list(files)
    snapshot = _fetch(name, [name.path, *beside] if name.path else beside)
    path = snapshot / name.path
    if files == WEIGHT_FILES and path.is_dir() and not any(path.rglob("*.safetensors")):
        _fetch(name, [f"{name.path}/{old}" if name.path else old for old in _OLD_FILES])
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        wanted = name.path or ", ".join(files[:3])
        raise UserError(f"{name}: the model is there, but has no {wanted}; check the path behind its name.")
    return path, str(dataclasses.replace(name, revision=snapshot.name))


def pinned(place: str, files: Sequence[str] = WEIGHT_FILES) -> str:
    """Resolve `place` to a commit, the same on all ranks, so that records show what was read. Collective.

    Rank 0 fetches what it names; the others then find it in the cache, or fetch that commit on their node.
    """
    if not is_hub_name(place):
        return place
    with distributed.shared_errors():
        known = resolve(place, files)[1] if distributed.is_main() else ""
    return distributed.broadcast_object(known)


def _fetch(name: HubName, patterns: list[str]) -> Path:
    """The cached snapshot of a model, with the files that match the patterns."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.repo, revision=name.revision or None, allow_patterns=patterns))
    except Exception as error:  # httpx, the file system and the hub client raise a dozen types
        raise UserError(f"{name}: {_reason(error, name)}.") from error


def _reason(error: Exception, name: HubName) -> str:
    """The reason `name` cannot be fetched, and the remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"its owner grants access on request; ask on {constants.ENDPOINT}/{name.repo}, and `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no model {name.repo} that you may read; check the name, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} has no branch, tag or commit {name.revision or 'main'}; check what is behind the @"
    if not isinstance(error, errors.LocalEntryNotFoundError):
        return f"cannot be fetched ({one_line(error)}); check the network and the disk"
    if constants.HF_HUB_OFFLINE:
        command = f"hf download {name.repo}{f' --revision {name.revision}' if name.revision else ''}"
        return (
            "not, or not all, in this machine's cache, and HF_HUB_OFFLINE forbids to ask the hub; fetch it once where there is "
            f"a network: `{command}`"
        )
    here = "this machine's cache does not have (all of) it"
    return f"the hub at {constants.ENDPOINT} cannot be reached, and {here}; check the network"


def one_line(error: BaseException) -> str:
    """An exception's text, shortened to one line, without the token that requests to the hub carry."""
    from huggingface_hub import get_token

    text = " ".join(str(error).split()) or type(error).__name__
    token: Any = get_token()
    return (text.replace(token, "<token>") if token else text)[:200].rstrip(". ")
