"""The parts around the training step on a GPU: sampling, evaluation, encoding, checkpoints, the data loader."""

import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import checkpoint, encode, harness, loader, sample
from benchmarks.gpu.training import kernel_seconds, speed
from benchmarks.train_step import model_config
from dpt.data.codec import load_vae
from dpt.data.stream import LatentStream
from dpt.evaluation.runner import evaluate
from dpt.models.costs import macs


def sampling(rounds: int = 3) -> list[harness.Row]:
    """Sampler steps of the class-conditional network: latents per second, and the share of the time that the GPU is busy."""
    from dpt.models.dit import DiT

    cuda = torch.cuda.is_available()
    config = model_config("XL/2") if cuda else model_config("a1:1", input_size=8)
    batch = 64 if cuda else 2
    network = DiT(config).to(harness.device(), torch.bfloat16 if cuda else torch.float32).eval()
    device, dtype = harness.device(), next(network.parameters()).dtype
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device, dtype=dtype)
    timesteps, labels = torch.full((1,), 500, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    rows = []
    for name in ("eager", "compiled") if cuda else ("eager",):
        if name == "compiled":
            network.compile_blocks()

        def action() -> None:
            with torch.no_grad():
                network(x, timesteps, labels)

        timing = harness.interleave({name: action}, rounds, warmup=3)
        row = harness.rows(f"sampler's step, batch {batch}", timing)[0]
        flops = 2.0 * batch * macs(config).forward
        row |= speed(flops, batch, row["median_s"])
        if cuda:
            row["gpu_busy"] = kernel_seconds(action) / row["median_s"]
        rows.append(row)
    return rows


def evaluation(rounds: int = 2) -> list[harness.Row]:
    """Depth of 512 px images by an XL/2-shaped network, five members of ten steps: predictions alone, and the evaluator, which
    also reads, scores and writes."""
    cuda = torch.cuda.is_available()
    side, images, steps = (512, 32, 10) if cuda else (32, 2, 2)
    codec = load_vae("embedded")
    settings = {"steps": steps, "ensemble": 5, "batch_size": 20, "input_size": side // codec.downsampling}
    predictor = sample.make_predictor("XL/2" if cuda else "a1:1", codec, precision="tf32" if cuda else "fp32", **settings)
    pictures = sample.pictures(4, side)
    timing = harness.interleave({"predictions alone": lambda: predictor(pictures)}, rounds)
    row = harness.rows(f"evaluation, {side} px, N=5, {steps} steps", timing)[0]
    rows = [row | {"images_per_s": len(pictures) / row["median_s"]}]
    with tempfile.TemporaryDirectory(prefix="dpt-evaluation-") as temporary:
        data = _evaluation_set(Path(temporary), images, side)

        def evaluator() -> None:
            with tempfile.TemporaryDirectory(dir=temporary) as out:
                evaluate(dataclasses.replace(predictor.config, data=[data], output_dir=out, pictures=0), predictor=predictor)

        begin = time.perf_counter()
        evaluator()
        seconds = time.perf_counter() - begin
        row = {"case": row["case"], "what": "the evaluator", "median_s": seconds, "images_per_s": images / seconds}
        rows.append(row | ({"gpu_busy": kernel_seconds(evaluator) / seconds} if cuda else {}))
    return rows


def _evaluation_set(folder: Path, images: int, side: int) -> str:
    """Render scenes and encode them as evaluation shards; returns their folder."""
    scenes, shards = folder / "scenes", folder / "shards"
    for command in (
        ["data_tools.synthesis", "--out", scenes, "--scenes", images, "--size", side, "--splits", "val=1", "--tasks", "depth"],
        ["data_tools.encode", "--dataset", "hypersim", "--root", scenes / "hypersim", "--split", "val"]
        + ["--evaluation", "--vae", "embedded", "--resolution", side, "--out", shards],
    ):
        subprocess.run([sys.executable, "-m", *map(str, command)], check=True, capture_output=True)
    return str(shards)


def encoding() -> list[harness.Row]:
    """The encoder with a VAE of Stable Diffusion's size (random weights), from JPEG files to shards."""
    from diffusers import AutoencoderKL

    cuda = torch.cuda.is_available()
    channels = (128, 256, 512, 512) if cuda else (8, 8, 8, 8)
    blocks = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=channels, layers_per_block=2 if cuda else 1, latent_channels=4, norm_num_groups=32 if cuda else 4,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dpt-vae-") as folder:
        vae.save_pretrained(folder)
        rows = encode.measure(folder, 256 if cuda else 32, 768 if cuda else 8, 64 if cuda else 4)
    return [row | {"case": f"encoding, SD-sized VAE, {row['case']}"} for row in rows]


def checkpoints() -> list[harness.Row]:
    """How long training stands still for a checkpoint, beside `torch.save`."""
    config = model_config("a3" if torch.cuda.is_available() else "a1:1")
    with tempfile.TemporaryDirectory(prefix="dpt-checkpoint-") as temporary:
        run = checkpoint.Run(config, Path(temporary))
        for _ in range(2):
            run.save()
            run.torch_save()
        size = sum(p.stat().st_size for p in (run.folder / "ours").rglob("*.safetensors"))
    return [
        {"case": f"checkpoint's pause, {size / 1e9:.1f} GB", "what": name, "median_s": pauses[-1]}
        for name, pauses in run.pauses.items()
    ]


def loading(demand: float | None) -> list[harness.Row]:
    """The data loader's rate from shards in the page cache, beside what the training step takes (images per second)."""
    with tempfile.TemporaryDirectory(prefix="dpt-loader-") as temporary:
        folder = Path(temporary)
        loader.write_shards(folder, 256 if torch.cuda.is_available() else 1)
        cuda = torch.cuda.is_available()
        stream = LatentStream([str(folder)], global_batch_size=256 if cuda else 8, num_workers=4, pin_memory=cuda)
        batches = iter(stream)
        next(batches)
        begin, seen, seconds = time.perf_counter(), stream.samples_seen, 3.0 if cuda else 0.2
        while time.perf_counter() - begin < seconds:
            next(batches)
        rate = (stream.samples_seen - seen) / (time.perf_counter() - begin)
        batches.close()  # type: ignore[attr-defined]
    row: harness.Row = {"case": "data loader, 4 threads, pinned", "what": "ours", "images_per_s": rate}
    return [row | ({"times_the_step": rate / demand} if demand else {})]
