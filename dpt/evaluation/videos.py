"""Videos: every frame starts from the same noise, and depth, known up to scale and shift, is carried from frame to frame."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np

from dpt.errors import UserError
from dpt.evaluation.ensembling import Prediction
from dpt.evaluation.files import write_arrays, write_atomically
from dpt.evaluation.frames import ANIMATIONS, Source, can_encode, count_frames, frame_rate, iter_frames, write_video
from dpt.evaluation.outputs import OutputConfig, write_outputs
from dpt.evaluation.prediction import Predictor
from dpt.progress import Progress, progress
from dpt.threads import Workers, threads_beside

CUT = 0.5
"""Correlation of two frames' depths below which the later frame begins a new scene."""
_KEPT = 0.7


@dataclass(kw_only=True)
class Carried:
    """State that later frames of a video take from earlier ones."""

    depth: np.ndarray | None = None
    """Aligned depth of the last frame, float32 `[H, W]`; None at the beginning."""
    limits: tuple[float, float] = (0.0, 1.0)
    """Range of colours and 16-bit pictures: that of the scene's first frame, widened by a quarter on both sides."""

    def align(self, prediction: Prediction) -> Prediction:
        """Scale and shift the next frame's depth and uncertainty to the last one's (`align_to`); a cut starts afresh."""
        value, uncertainty = prediction.value, prediction.uncertainty
        fit = align_to(value, self.depth) if self.depth is not None and self.depth.shape == value.shape else None
        if fit is not None:
            scale, shift = fit
            value, uncertainty = (scale * value + shift).astype(np.float32), (scale * uncertainty).astype(np.float32)
        else:
            low, high = float(value.min()), float(value.max())
            margin = 0.25 * max(high - low, 1e-6)
            self.limits = (low - margin, high + margin)
        self.depth = value
        return Prediction(value=value, uncertainty=uncertainty)


def align_to(depth: np.ndarray, reference: np.ndarray) -> tuple[float, float] | None:
    """Return scale and shift that give `depth` `[H, W]` the mean and spread of `reference`, over the pixels that agree best.

    Means and standard deviations are matched instead of minimising squares: least squares shrinks the scale a little at every
    frame, by the correlation, so a long video would fade. A first fit over all pixels selects the 70% with the smallest
    differences, so that moving objects do not count; the second fit uses only those. None, meaning a cut, if the two do not
    correlate or a map is constant.
    """
    a, b = depth.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    fit = _match(a, b)
    if fit is None:
        return None
    apart = np.abs(fit[0] * a + fit[1] - b)
    inside = apart <= np.quantile(apart, _KEPT)
    return _match(a[inside], b[inside])


def _match(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    spread_a, spread_b = float(a.std()), float(b.std())
    if min(spread_a, spread_b) <= 1e-9:
        return None
    correlation = float(np.mean((a - a.mean()) * (b - b.mean()))) / (spread_a * spread_b)
    if correlation < CUT:
        return None
    scale = spread_b / spread_a
    return scale, float(b.mean() - scale * a.mean())


def predict_video(
    predictor: Predictor,
    source: Source,
    out: Path,
    *,
    task: str,
    outputs: OutputConfig,
    resolution: int = 0,
    settings: Any = None,
) -> list[Path]:
    """Predict a video's frames and write OUT/NAME/NNNNNN_*, and colour pictures as OUT/NAME_TASK.mp4 (.gif for an animation).

    One batch of frames is in memory at a time. Depth: see `Carried`. Flow: from each frame to the next, so one frame fewer.
    Without the package av no .mp4 is written, only the pictures. With `settings`, a stopped video resumes after its last
    batch. UserError for amodal, as a video has no masks, and for videos that cannot be read.
    """
    if task == "amodal":
        raise UserError(f"{source.path}: whole objects need a mask for each picture; give pictures, not a video.")
    folder, name = out / source.name, Path(source.name).name
    state = out / ".done" / f"{source.name.replace('/', '__')}.npz"
    made_with = json.dumps(settings, sort_keys=True, default=str)
    carried, start = _read_state(state, made_with) if settings is not None else (Carried(), 0)
    total = count_frames(source) - (task == "flow")
    size = max(1, predictor.config.batch_size // predictor.config.ensemble[-1])
    steps: Iterator[tuple[np.ndarray, np.ndarray | None]]
    steps = pairwise(iter_frames(source)) if task == "flow" else zip(iter_frames(source), repeat(None))
    number = start
    files: list[Path] = [f for i in range(start) for f in sorted(folder.glob(f"{i:06d}_*"))]
    frames = islice(steps, start, None)
    bar: Progress[int] = progress(max(total - start, 0), f"predict {name}", "frame")
    with bar, closing(Workers(threads_beside(predictor.device.type), "prediction writer")) as writers:
        while batch := list(islice(frames, size)):
            if len({image.shape for image, _ in batch}) > 1:
                raise UserError(f"{source.path}: its frames differ in size from number {number} on; give those of one video.")
            predictions = predictor(
                [image for image, _ in batch],
                task=task,
                others=[after for _, after in batch if after is not None] or None,
                keys=[source.name] * len(batch),
                resolution=resolution,
            )
            written = []
            for (image, _), prediction in zip(batch, predictions, strict=True):
                if task == "depth":
                    prediction = carried.align(prediction)
                elif number == 0:
                    carried.limits = (0.0, 1.5 * float(np.hypot(*prediction.value).max()))
                write = partial(write_outputs, config=outputs, limits=carried.limits)
                written.append(writers.submit(write, prediction, task, image, folder, f"{number:06d}"))
                number += 1
            files += [file for frame in written for file in frame.result()]
            if settings is not None:
                depth = np.zeros((0, 0), np.float32) if carried.depth is None else carried.depth
                kept = {"depth": depth, "limits": carried.limits, "number": number, "settings": made_with}
                write_arrays(state, kept)
            bar.update(len(batch))
    if not number:
        raise UserError(f"{source.path}: the video has no {'pair of frames' if task == 'flow' else 'frame'}.")
    colours = sorted(f for f in files if f.name.endswith(("_depth_colour.png", "_flow.png")))
    suffix = ".gif" if source.path.suffix.lower() in ANIMATIONS else ".mp4"
    if colours and (suffix == ".gif" or can_encode()):
        files.append(out / f"{source.name}_{task}{suffix}")
        write_atomically(files[-1], lambda path: write_video(path, colours, frame_rate(source), suffix))
    state.unlink(missing_ok=True)
    return files


def _read_state(path: Path, settings: str) -> tuple[Carried, int]:
    """The carried state and next frame number that a stop left; the beginning if there are none or the settings
    differ."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if str(found["settings"]) != settings:
                return Carried(), 0
            depth = found["depth"] if found["depth"].size else None
            low, high = (float(v) for v in found["limits"])
            return Carried(depth=depth, limits=(low, high)), int(found["number"])
    except (OSError, ValueError, KeyError):
        return Carried(), 0
