"""Encode a data set, as it was downloaded, into WebDataset shards of VAE latents.

Can be killed and started again at any moment; any number of jobs (`--shards i/n`, or ranks of a launcher) make the same shards.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_tools.encoding.samples import Layout
from data_tools.readers import READERS, open_reader
from dpt import distributed
from dpt.errors import UserError, reported


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.encode", description=__doc__)
    parser.add_argument("--dataset", required=True, choices=sorted(READERS), help="data set (layouts: docs/readers.md)")
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--split", default="train", help="split (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the set's reader")
    parser.add_argument("--vae", default="embedded", help='"embedded", a folder or a hub name (default: %(default)s)')
    parser.add_argument("--resolution", type=int, required=True, help="side of the encoded images, pixels")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--shards", default="", metavar="I/N", help="this job's share: shards I, I + N, ... (default: all)")
    parser.add_argument("--mirrored", action="store_true", help="class images: encode the mirrored image too")
    parser.add_argument("--evaluation", action="store_true", help="keep inputs and truths at their own size, to be scored")
    parser.add_argument(
        "--prompt", choices=("all_valid", "ground_truth", "none"), default="all_valid", help="depth's second input"
    )
    parser.add_argument("--fit", choices=("stretch", "crop"), default="stretch", help="perception inputs to a square")
    parser.add_argument("--samples-per-shard", type=int, default=1024, help="samples in one shard (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples encoded at once (default: %(default)s)")
    parser.add_argument("--readers", type=int, default=2, help="threads that read ahead (default: %(default)s)")
    parser.add_argument("--max-skipped-share", type=float, default=0.01, help="unreadable inputs allowed (%(default)s)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def share(text: str) -> tuple[int, int]:
    """This job's part and the number of parts: `--shards`, else the launcher's rank and world size."""
    if not text:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        part, parts = (int(n) for n in text.split("/"))
    except ValueError:
        raise UserError(f"--shards {text!r} is not of the form I/N, e.g. 0/4.") from None
    if not 0 <= part < parts:
        raise UserError(f"--shards {text!r}: I must be between 0 and N - 1.")
    return part, parts


def encode(arguments: argparse.Namespace) -> None:
    """Build the job and run it."""
    for name in ("resolution", "samples_per_shard", "batch_size", "readers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1.")
    part, num_parts = share(arguments.shards)
    options: dict[str, Any] = dict(o.partition("=")[::2] for o in arguments.option)
    reader = open_reader(arguments.dataset, Path(arguments.root), arguments.split, **options)
    import torch

    from data_tools.encoding.job import EncodingJob, run
    from dpt.data.codec import load_vae

    codec = load_vae(arguments.vae)
    if arguments.resolution % codec.downsampling:
        raise UserError(f"--resolution {arguments.resolution} is no multiple of {codec.downsampling}, the VAE's downsampling.")
    if torch.cuda.is_available():
        codec.to(distributed.device(), torch.bfloat16)
    layout = Layout(
        task=reader.task,
        resolution=arguments.resolution,
        mirrored=arguments.mirrored and reader.task == "class",
        evaluation=arguments.evaluation,
        prompt=arguments.prompt,
        fit=arguments.fit,
    )
    job = EncodingJob(
        reader=reader,
        codec=codec,
        layout=layout,
        split=arguments.split,
        out=Path(arguments.out),
        samples_per_shard=arguments.samples_per_shard,
        batch_size=arguments.batch_size,
        num_readers=arguments.readers,
        max_skipped_share=arguments.max_skipped_share,
    )
    manifest = run(job, part, num_parts)
    if manifest is None:
        print(f"{job.out}: this job's shards are done; the manifest follows when the others' are.")
    else:
        skipped = f", {manifest.num_skipped} inputs left out" if manifest.num_skipped else ""
        print(f"{job.out}: {manifest.num_samples} samples in {len(manifest.shards)} shards{skipped}.")


def main(argv: list[str] | None = None) -> None:
    with reported("encode"):
        encode(parser().parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
