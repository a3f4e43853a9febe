"""How fast one core fills batches from shards in the page cache, compared with reading the same tars and copying them once.

python -m benchmarks.loader [--megabytes 512] [--shards FOLDER] [--json FILE]

Samples per second of processor time. `bound` reads whole tars into memory and copies them from there; in chunks that stay in
the cache between the two, which no shuffled order allows, it is faster. `data_wait`: the share of a training loop's time in
which it waits for batches of 256, if its steps compute for 50 ms (5120 samples/s).
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from data_tools.encoding.shards import ShardWriter
from dpt.data.manifest import Manifest, MemberSpec, VAERecord, read_manifest, write_manifest
from dpt.data.stream import LatentStream

SAMPLES_PER_SHARD = 1024
BATCH = 256
STEP_S = 0.05


def write_shards(folder: Path, megabytes: int) -> None:
    """Class shards of 32x32x4 moments (256 px images)."""
    random = np.random.default_rng(0)
    records = []
    for shard in range(max(1, megabytes * 2**20 // (SAMPLES_PER_SHARD * 18 * 1024))):
        with ShardWriter(folder / f"{shard:06d}.tar") as writer:
            for number in range(SAMPLES_PER_SHARD):
                latents = random.integers(0, 2**14, (2, 4, 32, 32), np.uint16).view(np.float16)
                writer.add(f"s{shard:04d}_{number:04d}", {"label": np.array(number % 1000), "latents": latents}, {"width": 256})
            records.append(writer.commit())
    members = {"label": MemberSpec(dtype="int64", shape=()), "latents": MemberSpec(dtype="float16", shape=(2, 4, 32, 32))}
    vae = VAERecord(name="none", sha256="0" * 64, scaling_factor=0.18215, latent_channels=4)
    total = sum(record.num_samples for record in records)
    manifest = Manifest(
        dataset="random", split="train", task="class", resolution=256, num_samples=total, shards=tuple(records),
        members=members, vae=vae,
    )  # fmt: skip
    write_manifest(folder, manifest)


def read_and_copy(folder: Path, chunk: int | None = None) -> int:
    """Read every tar into a buffer and copy it from there to another, whole or in chunks of `chunk` bytes.

    Chunks stay in the core's cache between the two, which no shuffled order allows. Returns the samples passed.
    """
    manifest = read_manifest(folder)
    size = chunk or max(shard.bytes for shard in manifest.shards)
    buffer, copy = _buffers(size)
    for shard in manifest.shards:
        with (folder / shard.name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer.data):
                copy[:count] = buffer[:count]
    return manifest.num_samples


@lru_cache
def _buffers(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(size, np.uint8), np.zeros(size, np.uint8)


def rate(action: Callable[[], int]) -> float:
    """Samples per second of processor time, which other programs on the core do not affect."""
    started = time.process_time()
    samples = action()
    return samples / (time.process_time() - started)


def wait_share(folder: Path, step_s: float, workers: int) -> float:
    """Share of a training loop's time spent waiting for batches, once started, when a step computes for `step_s`."""
    batches = iter(LatentStream([str(folder)], global_batch_size=BATCH, num_workers=workers))
    weights = torch.randn(512, 512)
    waited = started = 0.0
    for step in range(40):
        if step == 10:
            waited, started = 0.0, time.perf_counter()
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        while time.perf_counter() - before < step_s:
            weights @ weights
    return waited / (time.perf_counter() - started)


def speed(folder: Path, rounds: int) -> list[harness.Row]:
    """Samples per second on one core, the best of several rounds that measure all in turn."""
    batches = iter(LatentStream([str(folder)], global_batch_size=BATCH))

    def stream() -> int:
        return sum(len(batch["key"]) for batch in islice(batches, 256))

    measured = {
        harness.BOUND: lambda: read_and_copy(folder),
        "bound in chunks of 4 MB": lambda: read_and_copy(folder, 4 << 20),
        harness.OURS: stream,
    }
    rates = [{name: rate(action) for name, action in measured.items()} for _ in range(rounds + 1)][1:]
    best = {name: max(figures[name] for figures in rates) for name in measured}
    found = [{"case": "one core", "what": name, "samples_per_s": value} for name, value in best.items()]
    found[-1]["share_of_bound"] = best[harness.OURS] / best[harness.BOUND]
    return found


def measure(folder: Path, rounds: int) -> list[harness.Row]:
    """Measure speed on one core, then the waiting shares of a loop that computes for STEP_S per step."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    found = speed(folder, rounds)
    os.sched_setaffinity(0, cores)
    for workers in (0, 4):
        share = wait_share(folder, STEP_S, workers)
        found.append({"case": f"steps of {1e3 * STEP_S:.0f} ms", "what": f"{workers} threads", "data_wait": share})
    torch.set_num_threads(threads)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the shards made for it (default: %(default)s)")
    parser.add_argument("--shards", type=Path, help="measure with these shards instead")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dpt-loader-") as temporary:
        folder = arguments.shards or Path(temporary)
        if arguments.shards is None:
            write_shards(folder, arguments.megabytes)
        results = measure(folder, arguments.rounds)
    harness.finish("loader", results, arguments)


if __name__ == "__main__":
    main()
