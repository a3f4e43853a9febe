"""Small shard folders for the tests of the stream and of the formats."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from data_tools.encoding.shards import ShardWriter
from dpt.data.manifest import Manifest, MemberSpec, VAERecord, write_manifest

settings.register_profile("dpt", deadline=None, derandomize=True)  # shared machines are slow now and then
settings.load_profile("dpt")

MakeShards = Callable[..., Path]


def class_sample(number: int, side: int = 4) -> dict[str, np.ndarray]:
    """A sample whose every value follows from its number."""
    latents = np.full((2, 4, side, side), number % 1024, np.float16)
    latents[1] = -number % 1024
    return {"latents": latents, "label": np.array(number, np.int64)}


def write_set(folder: Path, counts: Sequence[int], make: Callable[[int], dict[str, np.ndarray]], **fields: Any) -> Path:
    """Shards of `counts` samples each, numbered through; `fields` override the manifest's."""
    folder.mkdir(parents=True, exist_ok=True)
    records, number = [], 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"{shard:06d}.tar") as writer:
            for _ in range(count):
                writer.add(f"s{number:05d}", make(number), {"number": number})
                number += 1
            records.append(writer.commit())
    first = make(0)
    values: dict[str, Any] = {
        "dataset": "tiny",
        "split": "train",
        "task": "class",
        "resolution": 32,
        "num_samples": number,
        "shards": tuple(records),
        "members": {name: MemberSpec(dtype=a.dtype.name, shape=a.shape) for name, a in first.items()},
        "vae": VAERecord(name="tiny", sha256="a" * 64, scaling_factor=0.18215, latent_channels=4),
    }
    write_manifest(folder, Manifest(**{**values, **fields}))
    return folder


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Returns a function: counts per shard (and manifest fields) -> a new folder of class shards."""

    def make(counts: Sequence[int], sample: Callable[[int], dict[str, np.ndarray]] = class_sample, **fields: Any) -> Path:
        return write_set(tmp_path_factory.mktemp("shards"), counts, sample, **fields)

    return make


@pytest.fixture
def folder(make_shards: MakeShards) -> Path:
    """Three shards of ten samples each."""
    return make_shards([10, 10, 10])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Callable[[Path], str]]:
    """Returns a function: a folder -> its address on this machine, until the test ends."""
    with ExitStack() as stack:

        def serve(folder: Path) -> str:
            handler = functools.partial(_Quiet, directory=str(folder))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield serve
