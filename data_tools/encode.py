"""Encode a data set, as downloaded, into WebDataset shards of VAE latents.

Can be killed and restarted at any time; any number of jobs (`--shards i/n`, or the ranks of a launcher) make the same
shards together, and the last of them writes the manifest.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: inspect.py beside it must not hide Python's own module of that name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
from typing import TYPE_CHECKING, Any

from data_tools.readers import READERS, Reader, changed_options, is_synthetic, open_reader, parse_options
from dpt import distributed
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, SHARE, Range, numeric
from dpt.config.parser import Parser
from dpt.errors import UserError, reported
from dpt.fits import FITS
from dpt.plugins import load_plugins
from dpt.target_codes import DEPTH_CODE, DEPTH_CODES, FLOW_CODE, FLOW_CODES
from dpt.tasks import task_spec

if TYPE_CHECKING:
    from data_tools.encoding.job import EncodingJob


def parser() -> Parser:
    parser = Parser(prog="python -m data_tools.encode", description=__doc__)
    add, count, ratio = parser.add_argument, numeric(int, AT_LEAST_1), numeric(float, SHARE)
    add("--dataset", required=True, choices=sorted(READERS), help="data set (layouts: docs/readers.md)")
    add("--root", required=True, help="folder of the data set")
    add("--split", default="train", help="split (default: %(default)s)")
    add(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the set's reader, e.g. filtered=false"
    )
    add(
        "--vae",
        default="embedded",
        help='"embedded", "embedded16" (with 16 channels), a folder, or hub:owner/name[@revision] (default: %(default)s)',
    )
    add("--resolution", type=numeric(int, Range(least=1, most=8192)), required=True, help="side of the encoded images, pixels")
    add("--out", required=True, help="folder of the shards")
    add("--shards", default="", metavar="I/N", help="this job's share: shards I, I + N, ... (default: all)")
    add("--finish", action="store_true", help="encode nothing, only write the manifest of finished shards")
    add("--mirrored", action="store_true", help="encode the mirrored images too")
    add("--evaluation", action="store_true", help="keep inputs and truths at their own size, to be scored")
    add("--prompt", choices=("all_valid", "ground_truth", "none"), default="all_valid", help="depth's second input")
    add(
        "--fit",
        choices=FITS,
        default="stretch",
        help="perception: stretch to the square, crop its centre, pad, or keep the aspect (default: %(default)s)",
    )
    add("--depth-code", choices=DEPTH_CODES, default=DEPTH_CODE, help="depth: how targets are coded (default: %(default)s)")
    add("--flow-code", choices=FLOW_CODES, default=FLOW_CODE, help="flow: how targets are coded (default: %(default)s)")
    add("--clip", default="", metavar="FOLDER", help="amodal: keep CLIP embeddings of the visible object by this model")
    add(
        "--features",
        default="",
        metavar="normals|segments|FOLDER",
        help="keep features to align hidden states with: exact ones of synthetic scenes, or FOLDER/KEY.npy, [C, h, w]",
    )
    add("--samples-per-shard", type=count, help="inputs of a shard (default: class 1024, perception 256, evaluation 64)")
    add("--limit", type=count, help="encode only this many inputs, the first in the order of the shards (default: all)")
    order = "seed of the order of training samples; negative: the set's own order"
    add("--shuffle-seed", type=numeric(int), default=0, help=order)
    add("--batch-size", type=count, default=32, help="images encoded at once (default: %(default)s)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the VAE (auto: bfloat16 on GPUs)",
    )
    ahead = "processes that read ahead; 0: none (default: by the machine's cores)"
    add("--processes", type=numeric(int, NOT_NEGATIVE), help=ahead)
    add("--max-skipped-share", type=ratio, default=0.01, help="unreadable inputs allowed (default: %(default)s)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def share(text: str) -> tuple[int, int]:
    """This job's part and the number of parts: `--shards` and, within it, the launcher's rank and world size."""
    distributed.set_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        part, parts = (int(number) for number in text.split("/")) if text else (0, 1)
    except ValueError:
        raise UserError(f"--shards {text!r} is not of the form I/N, e.g. 0/4.") from None
    if not 0 <= part < parts:
        raise UserError(f"--shards {text!r}: I must be between 0 and N - 1.")
    return part + parts * rank, parts * world_size


def build_job(arguments: argparse.Namespace) -> "EncodingJob":
    """The job that the command line describes. UserError if it is invalid."""
    if wrong := [option for option in arguments.option if "=" not in option]:
        raise UserError(f"--option {wrong[0]!r} is not of the form NAME=VALUE.")
    options = parse_options(arguments.dataset, dict(option.split("=", 1) for option in arguments.option))
    reader = open_reader(arguments.dataset, Path(arguments.root), arguments.split, **options)
    _check_for_task(arguments, reader)
    from data_tools.encoding.features import open_features
    from data_tools.encoding.job import EncodingJob
    from data_tools.encoding.samples import Layout

    encoder = _encoder(arguments)
    layout = Layout(
        task=reader.task,
        resolution=arguments.resolution,
        downsampling=encoder.codec.downsampling,
        mirrored=arguments.mirrored,
        evaluation=arguments.evaluation,
        prompt=arguments.prompt,
        fit=arguments.fit,
        depth_code=arguments.depth_code,
        flow_code=arguments.flow_code,
        clip=bool(arguments.clip),
    )
    shard_size = 64 if arguments.evaluation else 1024 if reader.task == "class" else 256
    on_gpu = encoder.device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) // (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_gpu else 1)
    return EncodingJob(
        reader=reader,
        encoder=encoder,
        layout=layout,
        split=arguments.split,
        out=Path(arguments.out),
        options=changed_options(arguments.dataset, options),
        features=open_features(arguments.features, reader, Path(arguments.root), layout) if arguments.features else None,
        samples_per_shard=arguments.samples_per_shard or shard_size,
        limit=arguments.limit,
        shuffle_seed=None if arguments.evaluation or arguments.shuffle_seed < 0 else arguments.shuffle_seed,
        processes=(max(1, min(16, cores - 1)) if on_gpu else 1) if arguments.processes is None else arguments.processes,
        max_skipped_share=arguments.max_skipped_share,
        synthetic=is_synthetic(Path(arguments.root)),
    )


def _check_for_task(arguments: argparse.Namespace, reader: Reader) -> None:
    if arguments.clip and reader.task != "amodal":
        raise UserError(f"--clip is for amodal sets; {reader.name} is for {reader.task}: leave it out.")
    if arguments.evaluation and arguments.features:
        raise UserError("--features are for training, and --evaluation sets are scored: leave one of them out.")
    spec = task_spec(reader.task)
    if arguments.mirrored and spec.registered and spec.mirror is None:
        raise UserError(f"--mirrored: task {spec.name} has no mirror; leave it out, or give it one.")
    if arguments.evaluation and reader.task == "class":
        raise UserError(f"--evaluation is for perception; {reader.name} is a set of class images: leave it out.")
    if arguments.evaluation and (arguments.mirrored or arguments.fit in ("crop", "pad")):
        raise UserError("--evaluation scores whole images: take --fit stretch or aspect, without --mirrored.")


def _encoder(arguments: argparse.Namespace) -> Any:
    import torch

    from data_tools.encoding.pipeline import BatchEncoder
    from dpt.clip import load_clip
    from dpt.data.codec import load_vae

    codec = load_vae(arguments.vae)
    if arguments.resolution % codec.downsampling:
        raise UserError(f"--resolution {arguments.resolution} is no multiple of {codec.downsampling}, the VAE's downsampling.")
    device = distributed.device()
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if arguments.dtype == "auto" else arguments.dtype)
    codec.to(device, dtype)
    clip = load_clip(arguments.clip) if arguments.clip else None
    if clip is not None:
        clip.model.to(device)
    return BatchEncoder(codec, arguments.batch_size, clip)


def encode(arguments: argparse.Namespace) -> None:
    """Build the job and run this part of it."""
    part, num_parts = share(arguments.shards)
    job = build_job(arguments)
    from data_tools.encoding.job import finish, run

    with reported("encode", by_rank=True):  # each rank has its own shards
        manifest = finish(job) if arguments.finish else run(job, part, num_parts)
    if manifest is None:
        print(f"{job.out}: this job's shards are done; the manifest follows when the others' are.")
    else:
        skipped = f", {manifest.num_skipped} unreadable inputs skipped" if manifest.num_skipped else ""
        excluded = f", {len(manifest.excluded)} left out by the set's filter" if manifest.excluded else ""
        print(f"{job.out}: {manifest.num_samples} samples in {len(manifest.shards)} shards{skipped}{excluded}.")


def main(argv: list[str] | None = None) -> None:
    """Run the command; bad input ends it with one sentence and exit code 2."""
    with reported("encode"):
        load_plugins()
        encode(parser().parse_args(argv))


if __name__ == "__main__":
    main()
