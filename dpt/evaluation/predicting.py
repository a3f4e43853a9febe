"""Predict for any number of files: a few in memory at a time, results written as they come, resumable after a stop."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpt import distributed
from dpt.errors import UserError, file_problem
from dpt.evaluation.ensembling import Prediction
from dpt.evaluation.files import JsonLines, fingerprint
from dpt.evaluation.frames import Source
from dpt.evaluation.outputs import OutputConfig, write_outputs
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.videos import predict_video
from dpt.pictures import read_mask, read_picture
from dpt.progress import Progress, progress
from dpt.threads import InOrder, threads_beside

Written = tuple[Source, list[Any], list[Path]]
"""A source, its stamp and the files of its result."""

Embed = Callable[[np.ndarray, np.ndarray], Tensor]
"""Image uint8 `[H, W, 3]`, mask bool `[H, W]` -> CLIP embedding `[D]`."""


@dataclass(kw_only=True)
class Progressed:
    """Outcome of a `predict_files` call on this rank."""

    written: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """One sentence per source that could not be predicted."""
    skipped: int = 0
    """Number of sources that were already done."""


class DoneLog(JsonLines):
    """Log of finished results below OUT/.done, one per line, from which a stopped run resumes.

    A result counts if it was made with the same settings from the same file and its files still exist.
    """

    def __init__(self, out: Path, settings: Any) -> None:
        super().__init__(out / ".done")
        self._out, self._settings = out, fingerprint(settings)

    def read(self) -> dict[str, list[Any]]:
        """Read name -> [stamp, files] of the results with these settings, whichever ranks wrote them."""
        newest: dict[str, list[Any]] = {}
        for when, name, *rest in self.values():
            if name not in newest or newest[name][0] < when:
                newest[name] = [when, *rest]
        return {name: [stamp, files] for name, (_, settings, stamp, files) in newest.items() if settings == self._settings}

    def has(self, known: dict[str, list[Any]], source: Source) -> bool:
        """Whether a source's results exist, according to `known` from `read`."""
        stamp, files = known.get(source.name, (None, []))
        return stamp == _stamp(source) and all((self._out / file).is_file() for file in files)

    def add(self, source: Source, stamp: list[Any], files: Sequence[Path]) -> None:
        """Record that a source is done. `stamp`: taken before it was read; the source may have changed since."""
        names = [str(file.relative_to(self._out)) for file in files]
        self.append([time.time(), source.name, self._settings, stamp, names])


def _stamp(source: Source) -> list[Any]:
    """Stamp that tells whether a source's files have changed: their number, total size and newest time."""
    files = [*(source.frames or (source.path,)), *((source.other,) if source.other else ())]
    stats = [file.stat() for file in files]
    return [len(files), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]


def predict_files(
    predictor: Predictor,
    sources: Sequence[Source],
    out: Path,
    *,
    task: str = "",
    outputs: OutputConfig | None = None,
    resolution: int = 0,
    embed: Embed | None = None,
    settings: Any = None,
    again: bool = False,
    report: Callable[[Path], None] = lambda path: None,
) -> Progressed:
    """Predict for every source and write OUT/NAME_* (see `write_outputs`; videos: `dpt.evaluation.videos`).

    At most three batches of pictures are in memory: one read, one predicted, one written. Results appear one by one, each file
    complete; `report` gets its path. With `settings` (all that results depend on besides their files), results of earlier
    calls are not redone unless `again` is set. Ranks share the sources: videos one by one, pictures in batches that are the
    same for any number of ranks. Unreadable sources are skipped and named in the result. UserError if the network cannot
    predict at all.
    """
    task = predictor.check_task(task or predictor.task).name
    outputs = outputs or OutputConfig()
    outputs.for_task(task)
    log, done = DoneLog(out, settings), Progressed()
    with distributed.shared_errors():
        found = log.read() if settings is not None and distributed.is_main() else {}
    known = distributed.broadcast_object(found)
    size = max(1, predictor.config.batch_size // predictor.config.ensemble[-1])
    batches, videos = _share(sources, size)
    here = sum(map(len, batches)) + len(videos)
    if not again:
        batches = [[source for source in batch if not log.has(known, source)] for batch in batches]
        videos = [source for source in videos if not log.has(known, source)]
    total = sum(map(len, batches)) + len(videos)
    done.skipped = here - total
    bar: Progress[int] = progress(total, f"predict {task}", "file")

    def keep(source: Source, stamp: list[Any], files: list[Path]) -> None:
        log.add(source, stamp, files)
        done.written += files
        for file in files:
            report(file)
        bar.update()

    def leave_out(problem: str) -> None:
        done.failed.append(problem)
        bar.update()

    def write(source: Source, stamp: list[Any], image: np.ndarray, prediction: Prediction) -> Written:
        place = out / source.name
        return source, stamp, write_outputs(prediction, task, image, place.parent, place.name, config=outputs)

    writers = InOrder[Written](threads_beside(predictor.device.type), "prediction writer", behind=size)
    with contextlib.closing(log), bar, contextlib.closing(writers):
        try:
            for batch, read in _read_ahead([batch for batch in batches if batch], task):
                for problem in (r for r in read if isinstance(r, str)):
                    leave_out(problem)
                sound = [(source, r) for source, r in zip(batch, read, strict=True) if not isinstance(r, str)]
                predictions = _predict_batch(predictor, sound, task, resolution, embed)
                for (source, (image, _, stamp)), prediction in zip(sound, predictions, strict=True):
                    for written in writers.submit(write, source, stamp, image, prediction):
                        keep(*written)
        finally:  # what has been written counts, whatever stops the others
            for written in writers.finish():
                keep(*written)
        for source in videos:
            stamp = _stamp(source)
            made_with = None if again or settings is None else [settings, stamp]
            try:
                files = predict_video(
                    predictor, source, out, task=task, outputs=outputs, resolution=resolution, settings=made_with
                )
                keep(source, stamp, files)
            except UserError as error:
                leave_out(str(error))
    return done


def _share(sources: Sequence[Source], size: int) -> tuple[list[list[Source]], list[Source]]:
    """This rank's pictures, in batches of `size`, and its videos."""
    rank, ranks = distributed.rank(), distributed.world_size()
    videos = [source for source in sources if source.is_video]
    pictures = [source for source in sources if not source.is_video]
    batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    return batches[rank::ranks], videos[rank::ranks]


def _predict_batch(
    predictor: Predictor, batch: Sequence[tuple[Source, Any]], task: str, resolution: int, embed: Embed | None
) -> list[Prediction]:
    """Predict a batch of loaded pictures."""
    if not batch:
        return []
    images = [image for _, (image, _, _) in batch]
    others = [other for _, (_, other, _) in batch]
    embeddings = None
    if embed is not None:
        embeddings = torch.stack([embed(image, other) for image, other in zip(images, others, strict=True)])
    return predictor(
        images,
        task=task,
        others=None if others[0] is None else others,
        embeddings=embeddings,
        keys=[source.name for source, _ in batch],
        resolution=resolution,
    )


def _read_ahead(batches: Sequence[Sequence[Source]], task: str) -> Iterator[tuple[Sequence[Source], list[Any]]]:
    """Yield batches with their loaded inputs, reading the next one while one is being processed."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(_read_batch, batches[0], task)] if batches else []
        for number, batch in enumerate(batches):
            read = waiting.pop().result()
            if number + 1 < len(batches):
                waiting.append(pool.submit(_read_batch, batches[number + 1], task))
            yield batch, read


def _read_batch(batch: Sequence[Source], task: str) -> list[Any]:
    """Read each source as (image, other or None, stamp), or a sentence that says why it cannot be read."""
    found: list[Any] = []
    for source in batch:
        try:
            stamp = _stamp(source)
            image = read_picture(source.path)
            other = None
            if source.other is not None:
                other = read_picture(source.other) if task == "flow" else read_mask(source.other)
                if other.shape[:2] != image.shape[:2]:
                    sizes = [f"{a.shape[1]} x {a.shape[0]}" for a in (image, other)]
                    what = "second frame" if task == "flow" else "mask"
                    raise UserError(f"{source.path} is of {sizes[0]} pixels, its {what} of {sizes[1]}.")
            found.append((image, other, stamp))
        except UserError as error:
            found.append(str(error))
        except FileNotFoundError as error:  # removed since it was listed
            found.append(file_problem(error))
    return found
