"""Pictures and videos named by a user: finding them, reading their frames in order, and writing videos from frames."""

import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpt.errors import UserError
from dpt.pictures import read_picture

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
ANIMATIONS = (".gif",)
FRAME_RATE = 25.0
"""Frames per second of a video made from pictures."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One thing to predict for: a picture, or a video as a file or as its frames' files."""

    name: str
    """Path of its results below the output folder, without suffix; also seeds its noise."""
    path: Path
    """The picture, the video, or the frames' folder."""
    frames: tuple[Path, ...] = ()
    """Frames of a video given as pictures."""
    other: Path | None = None
    """Input that accompanies a picture: the second frame for flow, the visible mask for amodal."""

    @property
    def is_video(self) -> bool:
        """Whether it has frames."""
        if self.frames or self.path.suffix.lower() in VIDEOS:
            return True
        if self.path.suffix.lower() not in ANIMATIONS:
            return False
        try:
            return _num_frames(self.path) > 1
        except UserError:  # reading it as a picture will say so
            return False


def find_sources(
    inputs: Sequence[Path],
    *,
    patterns: Sequence[str] = (),
    recursive: bool = True,
    as_frames: bool = False,
    out: Path | None = None,
) -> list[Source]:
    """Find the pictures and videos that `inputs` name, in order: files as given, folders sorted by name.

    patterns: which files of a folder to take, such as "*.png" or "cam0/*.jpg", matched from the right; empty: all pictures
    and videos. recursive: include subfolders. as_frames: a folder's pictures are the frames of one video. A file's result is
    named after it, a folder's after the paths within it. out: where results go; files there are never taken as input.
    UserError for missing inputs, for folders without pictures, and for a folder whose results would lie among its pictures.
    """
    found: list[Source] = []
    for path in inputs:
        if path.is_dir():
            if out is not None and out.resolve() == path.resolve():
                raise UserError(
                    f"--out {out}: results beside the pictures of a folder would be taken for pictures the next time; "
                    "choose another folder."
                )
            found += _of_folder(path, patterns, recursive, as_frames, out)
        elif path.is_file():
            found.append(Source(name=path.stem, path=path))
        else:
            raise UserError(f"{path}: there is no such file or folder; check the path.")
    return _unique(found)


def _of_folder(folder: Path, patterns: Sequence[str], recursive: bool, as_frames: bool, out: Path | None) -> list[Source]:
    known = PICTURES + VIDEOS + ANIMATIONS
    files = [p for p in sorted(folder.rglob("*") if recursive else folder.iterdir()) if p.is_file() and p.name[0] != "."]
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        results = folder / out.resolve().relative_to(folder.resolve())
        files = [p for p in files if not p.is_relative_to(results)]
    files = [p for p in files if (any(p.match(pattern) for pattern in patterns) if patterns else p.suffix.lower() in known)]
    if not files:
        which = f"file like {' or '.join(patterns)}" if patterns else "picture or video"
        raise UserError(f"{folder}: no {which} there; name another folder, or --pattern.")
    if not as_frames:
        return [Source(name=str(p.relative_to(folder).with_suffix("")), path=p) for p in files]
    groups: dict[Path, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parent, []).append(file)
    return [
        Source(
            name=str(parent.relative_to(folder)) if parent != folder else folder.resolve().name, path=parent, frames=tuple(g)
        )
        for parent, g in groups.items()
    ]


def _unique(sources: list[Source]) -> list[Source]:
    """The same sources, with duplicate names numbered."""
    counts = Counter(source.name for source in sources)
    taken = {name for name, times in counts.items() if times == 1}
    result = []
    for source in sources:
        name = source.name
        if counts[name] > 1:
            name = next(n for number in count() if (n := f"{source.name}_{number}") not in taken)
            taken.add(name)
        result.append(replace(source, name=name))
    return result


def iter_frames(source: Source) -> Iterator[np.ndarray]:
    """Yield a video's frames uint8 `[H, W, 3]`, one at a time. UserError if it cannot be read, naming the frame."""
    if source.frames:
        yield from (read_picture(path) for path in source.frames)
    elif source.path.suffix.lower() in ANIMATIONS:
        with Image.open(source.path) as image:
            for number in range(_num_frames(source.path)):
                image.seek(number)
                yield np.array(image.convert("RGB"))
    else:
        yield from _decode(source.path)


def count_frames(source: Source) -> int:
    """Number of frames; if not stored, about rate times duration; 0 if that is unknown too."""
    if source.frames:
        return len(source.frames)
    if source.path.suffix.lower() in ANIMATIONS:
        return _num_frames(source.path)
    with _open(source.path) as container:
        stream = container.streams.video[0]
        lasts = (container.duration or 0) / 1e6  # microseconds
        return int(stream.frames or round(lasts * float(stream.average_rate or 0)))


def frame_rate(source: Source) -> float:
    """Frames per second; `FRAME_RATE` if unknown."""
    if source.frames:
        return FRAME_RATE
    if source.path.suffix.lower() in ANIMATIONS:
        with Image.open(source.path) as image:
            return 1000.0 / (image.info.get("duration") or 1000.0 / FRAME_RATE)
    with _open(source.path) as container:
        return float(container.streams.video[0].average_rate or FRAME_RATE)


def _num_frames(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a picture that can be read ({error}).") from error


def can_encode() -> bool:
    """Whether a library that reads and writes video files is installed."""
    return importlib.util.find_spec("av") is not None


def _open(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{path}: reading videos needs the package av (install dpt[video]); or give a folder with --frames."
        ) from error
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a video that can be read ({error}).") from error
    if not container.streams.video:
        container.close()
        raise UserError(f"{path}: the file has no pictures in it.")
    return container


def _decode(path: Path) -> Iterator[np.ndarray]:
    """Frames, rotated in quarter turns by the file's display matrix, as players do."""
    with _open(path) as container:
        import av

        try:
            for frame in container.decode(video=0):
                quarters = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
        except av.error.FFmpegError as error:
            raise UserError(f"{path}: the video breaks off ({error}); cut it there, or convert it again.") from error


def write_video(path: Path, pictures: Sequence[Path], rate: float, kind: str = ".mp4") -> None:
    """Make the video `path` of picture files of one size: ".gif" by Pillow, ".mp4" (H.264) by the package av.

    Odd sides lose their last row or column, as the codec requires even ones.
    """
    if kind == ".gif":
        frames = (Image.open(p) for p in pictures[1:])
        with Image.open(pictures[0]) as first:
            first.save(path, format="gif", save_all=True, append_images=frames, duration=round(1000 / rate), loop=0)
        return
    from fractions import Fraction

    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(rate).limit_denominator(1001))
        with Image.open(pictures[0]) as first:
            stream.width, stream.height = first.width // 2 * 2, first.height // 2 * 2
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            pixels = np.ascontiguousarray(read_picture(picture)[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
