"""How much of the bare VAE's speed the encoder keeps, from JPEG files to shards, on the same device in one run.

python -m benchmarks.encode [--vae embedded] [--resolution 256] [--images 256] [--batch-size 16] [--json FILE]

`bound` is the VAE on prepared images, before and after. On a CPU, reading images takes processor time from the VAE, and
other programs may too: there the share in processor time, and `vae_at_work`, the VAE's share of the job's time, tell more.
"""

import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from data_tools import encode
from data_tools.encoding.job import run
from data_tools.encoding.pipeline import BatchEncoder


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of ImageNet's usual size, smooth enough to compress as photos do."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg", quality=90)


def clocks() -> np.ndarray:
    """Wall time and processor time (of this process and of children that have ended), in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)])


def bare(encoder: BatchEncoder, resolution: int, batches: int) -> np.ndarray:
    """Wall and processor seconds per image of the VAE alone, its input already on the device."""
    images = torch.rand(encoder.batch_size, 3, resolution, resolution, device=encoder.device) * 2 - 1
    encoder.codec.encode(images).cpu()
    begin = clocks()
    for _ in range(batches):
        moments = encoder.codec.encode(images)
    moments.cpu()
    return (clocks() - begin) / (batches * encoder.batch_size)


def measure(vae: str, resolution: int, images: int, batch_size: int) -> list[harness.Row]:
    """Measure the encoder between two measurements of the bare VAE."""
    with tempfile.TemporaryDirectory(prefix="dpt-encode-") as temporary:
        root = Path(temporary) / "pictures"
        root.mkdir()
        write_pictures(root, images)
        given = ["--dataset", "image_folder", "--root", str(root), "--out", str(Path(temporary) / "shards"), "--vae", vae]
        sizes = ["--resolution", str(resolution), "--batch-size", str(batch_size)]
        job = encode.build_job(encode.parser().parse_args([*given, *sizes, "--samples-per-shard", str(max(images // 4, 1))]))
        batches = max(1, images // batch_size // 2)
        before = bare(job.encoder, resolution, batches)
        busy = _time_vae(job.encoder)
        begin = clocks()
        manifest = run(job)
        wall, cpu = (clocks() - begin).tolist()
        busy_s = sum(busy)
        after = bare(job.encoder, resolution, batches)
    assert manifest is not None
    bare_wall, bare_cpu = ((before + after) / 2).tolist()
    case = f"{resolution} px, {job.encoder.device.type}"
    ours = {"images_per_s": images / wall, "share_of_bound": bare_wall * images / wall}
    if job.encoder.device.type == "cpu":
        ours |= {"share_of_bound_processor": bare_cpu * images / cpu, "vae_at_work": busy_s / wall}
    return [{"case": case, "what": harness.BOUND, "images_per_s": 1 / bare_wall}, {"case": case, "what": harness.OURS, **ours}]


def _time_vae(encoder: BatchEncoder) -> list[float]:
    """Make the VAE record how long each of its calls takes."""
    original, times = encoder.codec.encode, []

    def timed(images: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        moments = original(images)
        times.append(time.perf_counter() - started)
        return moments

    encoder.codec.encode = timed  # type: ignore[method-assign]
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, rounds=1, vae="embedded", images=256, batch_size=16)
    parser.add_argument("--resolution", type=int, default=256, help="pixels (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results: list[harness.Row] = []
    for _ in range(arguments.rounds):
        results += measure(arguments.vae, arguments.resolution, arguments.images, arguments.batch_size)
    harness.finish("encode", results, arguments)


if __name__ == "__main__":
    main()
