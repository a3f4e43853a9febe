"""How much of the bare VAE's speed the encoder keeps, from JPEG files to shards, on the same device in one run.

python -m benchmarks.encode [--vae embedded] [--resolution 128] [--images 512] [--batch-size 32]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools import encode
from data_tools.encoding.job import EncodingJob, run
from data_tools.encoding.pipeline import BatchEncoder


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of ImageNet's usual size, smooth enough to compress as photos do."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg", quality=90)


def bare_rate(encoder: BatchEncoder, resolution: int, seconds: float) -> float:
    """Images a second that the VAE alone encodes, its input lying ready on the device, for about `seconds`."""
    images = torch.rand(encoder.batch_size, 3, resolution, resolution, device=encoder.device) * 2 - 1

    def synchronize() -> None:
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    encoder.codec.encode(images)
    synchronize()
    batches, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        encoder.codec.encode(images)
        synchronize()
        batches += 1
    return batches * encoder.batch_size / (time.perf_counter() - started)


def job_rate(job: EncodingJob) -> float:
    """Images a second of a whole job, start and end included."""
    started = time.perf_counter()
    manifest = run(job)
    assert manifest is not None
    return manifest.num_samples / (time.perf_counter() - started)


def measure(vae: str, resolution: int, images: int, batch_size: int) -> dict[str, float]:
    """The bare VAE's speed before and after the job's, since other programs share the machine."""
    with tempfile.TemporaryDirectory(prefix="dpt-encode-") as temporary:
        root = Path(temporary) / "pictures"
        root.mkdir()
        write_pictures(root, images)
        given = ["--dataset", "image_folder", "--root", str(root), "--out", str(Path(temporary) / "shards"), "--vae", vae]
        sizes = [
            "--resolution",
            str(resolution),
            "--batch-size",
            str(batch_size),
            "--samples-per-shard",
            str(max(images // 4, 1)),
        ]
        job = encode.build_job(encode.parser().parse_args([*given, *sizes]))
        before = bare_rate(job.encoder, resolution, 5.0)
        encoded = job_rate(job)
        after = bare_rate(job.encoder, resolution, 5.0)
    bare = (before + after) / 2
    return {"bare VAE, images/s": bare, "encoder, images/s": encoded, "encoder / bare VAE": encoded / bare}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="embedded")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    for name, value in measure(**vars(parser.parse_args())).items():
        print(f"{name:32s} {value:12,.4g}")


if __name__ == "__main__":
    main()
