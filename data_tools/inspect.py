"""Check a folder of shards, print what it holds, and draw some of its samples, decoded.

Hashes and sizes are compared with the manifest's, samples with the schema; damage ends the command with exit code 2.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dpt import distributed, target_codes, tasks
from dpt.config.numbers import AT_LEAST_1, NOT_NEGATIVE, numeric
from dpt.config.parser import Parser
from dpt.data.codec import VAECodec, load_vae, mean_latents
from dpt.data.manifest import Manifest, VAERecord, file_sha256
from dpt.data.reader import SampleError
from dpt.data.shards import ShardFolder
from dpt.errors import UserError, reported
from dpt.plugins import load_plugins
from dpt.progress import progress

CELL = 160
"""Width of a picture on the sheet, pixels."""
_CAPTION, _GAP = 14, 4


def parser() -> Parser:
    parser = Parser(prog="python -m data_tools.inspect", description=__doc__)
    add = parser.add_argument
    add("shards", help="shard folder")
    samples = "samples that the statistics cover (default: %(default)s)"
    add("--samples", type=numeric(int, AT_LEAST_1), default=256, help=samples)
    add("--picture", default="", help="file of the contact sheet (default: contact_sheet.png in the shard folder)")
    add("--rows", type=numeric(int, NOT_NEGATIVE), default=8, help="samples drawn; 0: no picture (default: %(default)s)")
    add("--vae", default="", help="VAE that decodes (default: the one named in the manifest)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="compare sizes only, not hashes")
    how.add_argument("--verify", action="store_true", help="compare hashes, and do nothing else: before a long run")
    return parser


def verify(samples: ShardFolder, *, hashes: bool) -> list[str]:
    """Faults of the shard files, one sentence each; an empty list if there are none."""
    problems = []
    listed = {shard.name for shard in samples.manifest.shards}
    for path in sorted(samples.folder.glob("*.tar")):
        if path.name not in listed:
            problems.append(f"{path.name} is not in the manifest")
    for shard in progress(samples.manifest.shards, "verify", "shard"):
        path = samples.folder / shard.name
        if not path.is_file():
            problems.append(f"{shard.name} is missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{shard.name} has {path.stat().st_size} bytes instead of {shard.bytes}")
        elif hashes and file_sha256(path) != shard.sha256:
            problems.append(f"{shard.name} has other contents than were written (sha256)")
    return problems


def spread(total: int, count: int) -> list[int]:
    """`count` numbers evenly over 0..total-1 (all if there are fewer)."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def statistics(samples: ShardFolder, numbers: Sequence[int]) -> tuple[dict[str, list[str]], list[str]]:
    """Rows of the members' table (by member: dtype, shape, mean, std, least, largest), and faults of the samples.

    For moments, the figures are those of the posterior means and, in a separate row, of the log-variances.
    """
    values: dict[str, list[NDArray[Any]]] = {}
    problems = []
    for number in numbers:
        try:
            sample = samples[number]
        except SampleError as error:
            problems.append(str(error))
            continue
        for name, spec in samples.manifest.members.items():
            array = sample.get(name)
            if array is None or array.dtype.name != spec.dtype or not _fits(array.shape, spec.shape):
                found = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
                problems.append(f"{sample['key']}: {name} is {found} instead of {spec.dtype} {list(spec.shape)}")
            elif not np.isfinite(array).all():
                problems.append(f"{sample['key']}: {name} has values that are not finite")
            elif "latents" in name:
                values.setdefault(f"{name} mean", []).append(array[..., 0, :, :, :])
                values.setdefault(f"{name} log-variance", []).append(array[..., 1, :, :, :])
            else:
                values.setdefault(name, []).append(array)
    rows = {}
    for name, arrays in values.items():
        spec = samples.manifest.members[name.split()[0]]
        flat = np.concatenate([array.astype(np.float64).ravel() for array in arrays])
        figures = (flat.mean(), flat.std(), flat.min(), flat.max())
        rows[name] = [spec.dtype, str(list(spec.shape)), *(f"{figure:.4g}" for figure in figures)]
    return rows, problems


def _fits(shape: Sequence[int], spec: Sequence[int]) -> bool:
    return len(shape) == len(spec) and all(b in (a, -1) for a, b in zip(shape, spec, strict=True))


def describe(manifest: Manifest, rows: dict[str, list[str]], seen: int) -> str:
    """Human-readable description of the folder."""
    gigabytes = sum(shard.bytes for shard in manifest.shards) / 1e9
    vae = manifest.vae
    lines = [
        f"{manifest.dataset}, {manifest.split}: {manifest.num_samples} {'synthetic ' * manifest.synthetic}samples, "
        f"task {manifest.task}, {manifest.resolution} px",
        f"{len(manifest.shards)} shards, {gigabytes:.3g} GB; data {manifest.data_sha256[:12]}",
        f"VAE {vae.name} ({vae.sha256[:12]}), scaling factor {vae.scaling_factor:g}{_statistics(vae)}, {vae.latent_channels} "
        f"channels, {vae.downsampling} px per latent",
    ]
    if code := target_codes.target_code(manifest.task, manifest.encoding, manifest.dataset):
        lines.append(f"{manifest.task} code {code}")
    if manifest.class_names:
        names = [*manifest.class_names[:8], *(["..."] if len(manifest.class_names) > 8 else [])]
        lines.append(f"{len(manifest.class_names)} classes: {', '.join(names)}")
    lines += [f"unreadable: {item.key}: {item.reason}" for item in manifest.skipped[:5]]
    if len(manifest.skipped) > 5:
        lines.append(f"unreadable: {len(manifest.skipped) - 5} more")
    if manifest.filter:
        lines.append(manifest.filter)
    header = ["member", "dtype", "shape", "mean", "std", "least", "largest"]
    table = [header, *([name, *row] for name, row in rows.items())]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)]
    return "\n".join([*lines, f"(of {seen} samples)"])


def _statistics(vae: VAERecord) -> str:
    shift = f", shift factor {vae.shift_factor:g}" if vae.shift_factor else ""
    return shift + (", statistics by channel" if vae.latents_mean or vae.latents_std else "")


def contact_sheet(samples: ShardFolder, numbers: Sequence[int], codec: VAECodec) -> Image.Image:
    """A row for each sample under its key: its picture if kept, decoded conditions, and each target's truth, where the set
    keeps it, beside the decoded target; class samples share rows."""
    manifest = samples.manifest
    spec = tasks.task_spec(manifest.task)
    code = target_codes.target_code(manifest.task, manifest.encoding, manifest.dataset)
    rows: list[tuple[str, list[tuple[str, NDArray[np.uint8]]]]] = []
    for number in progress(list(numbers), "draw", "sample"):
        sample = samples[number]
        cells: list[tuple[str, NDArray[np.uint8]]] = []
        if "image" in sample:
            cells.append(("image", sample["image"]))
        truths = dict(zip(spec.targets, _true_targets(manifest.task, sample, code), strict=False))
        members = [name for name in ("latents", "latents_mirrored", "cond_latents", "target_latents") if name in sample]
        for name in members:
            moments = np.atleast_2d(sample[name]).reshape(-1, *sample[name].shape[-4:])
            titles = {"cond_latents": spec.conditions, "target_latents": spec.targets}.get(name, (name,))
            images = codec.decode(mean_latents(torch.from_numpy(moments), codec.scaling))
            for title, image in zip(titles, images, strict=False):
                if name == "target_latents" and title in truths:
                    cells.append((f"true {title}", truths[title]))
                cells.append((f"{title}, decoded", tasks.image_to_uint8(image.cpu().numpy())))
        caption = sample["meta"].get("class_name") or sample["key"]
        rows.append((caption, cells))
    if manifest.task == "class":
        flat = [(f"{caption}: {title}", image) for caption, cells in rows for title, image in cells]
        rows = [("", flat[at : at + 8]) for at in range(0, len(flat), 8)]
    return _paste(rows)


def _true_targets(task: str, sample: Mapping[str, Any], code: str) -> list[NDArray[np.uint8]]:
    """The truth of an evaluation sample as the pictures that its targets are encoded from, before the VAE; else none.

    For amodal sets it is the mask of the object that the target shows.
    """
    if "truth" not in sample:
        return []
    if task == "depth":
        images = [target_codes.encode_depth(sample["truth"], code=code)[0]]
    elif task == "flow":
        images = list(target_codes.encode_flow(sample["truth"], code))
    else:
        images = [tasks.mask_image(sample["truth"] > 0)]
    return [tasks.image_to_uint8(image) for image in images]


def _paste(rows: list[tuple[str, list[tuple[str, NDArray[np.uint8]]]]]) -> Image.Image:
    """Rows of titled pictures, each under its caption (none if empty), whole captions where the sheet is wide enough."""
    scaled = [
        (caption, [(title, tasks.resize_image(i, (round(CELL * i.shape[0] / i.shape[1]), CELL))) for title, i in row])
        for caption, row in rows
    ]
    heads = [_CAPTION * (2 if caption else 1) for caption, _ in scaled]
    heights = [max(image.shape[0] for _, image in row) + head + _GAP for (_, row), head in zip(scaled, heads, strict=True)]
    sheet = Image.new("RGB", (max(len(row) for _, row in scaled) * (CELL + _GAP), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (caption, row), head, height in zip(scaled, heads, heights, strict=True):
        draw.text((0, top + 1), caption, fill="black")
        for column, (title, image) in enumerate(row):
            left = column * (CELL + _GAP)
            draw.text((left, top + head - _CAPTION + 1), _fitting(draw, title), fill="#495057" if caption else "black")
            sheet.paste(Image.fromarray(image), (left, top + head))
        top += height
    return sheet


def _fitting(draw: ImageDraw.ImageDraw, title: str) -> str:
    """The title, with an ellipsis if it is wider than a cell."""
    if draw.textlength(title) <= CELL:
        return title
    while title and draw.textlength(title + "...") > CELL:
        title = title[:-1]
    return title + "..."


def _decoder(manifest: Manifest, name: str) -> VAECodec:
    codec = load_vae(name or manifest.vae.name, latent_channels=manifest.vae.latent_channels)
    if difference := manifest.vae.difference(dataclasses.asdict(codec.record)):
        raise UserError(
            f"VAE {codec.name} is not the one that made the shards ({difference}); name that one with --vae, or draw nothing "
            "with --rows 0."
        )
    return codec.to(distributed.device())


def inspect(arguments: argparse.Namespace) -> None:
    """Verify, describe, draw. UserError if something is wrong."""
    suffix = Path(arguments.picture).suffix
    if arguments.picture and suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--picture {arguments.picture}: no picture has the suffix {suffix!r}; name a file such as sheet.png.")
    samples = ShardFolder(arguments.shards)
    problems = verify(samples, hashes=not arguments.quick)
    if problems:
        raise UserError(f"{samples.folder}: {'; '.join(problems[:5])} ({len(problems)} in all); encode these shards again.")
    if arguments.verify:
        count = len(samples.manifest.shards)
        print(f"{samples.folder}: {count} shard{'s are as they were' if count > 1 else ' is as it was'} written.")
        return
    numbers = spread(len(samples), max(arguments.samples, 1))
    rows, problems = statistics(samples, numbers)
    print(describe(samples.manifest, rows, len(numbers)))
    if problems:
        raise UserError(f"{samples.folder}: {'; '.join(problems[:5])} ({len(problems)} in all); encode the set again.")
    if arguments.rows > 0:
        codec = _decoder(samples.manifest, arguments.vae)
        path = Path(arguments.picture or samples.folder / "contact_sheet.png")
        contact_sheet(samples, spread(len(samples), arguments.rows), codec).save(path)
        print(f"pictures: {path}")


def main(argv: list[str] | None = None) -> None:
    """Run the command; damage and bad input end it with one sentence and exit code 2."""
    with reported("inspect"):
        load_plugins()
        inspect(parser().parse_args(argv))


if __name__ == "__main__":
    main()
