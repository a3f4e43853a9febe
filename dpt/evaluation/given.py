"""Ready-made predictions from any system, read from files named by sample key and scored like our own."""

from pathlib import Path

import numpy as np
from PIL import Image

from dpt import tasks
from dpt.errors import UserError
from dpt.pictures import decode_mask, flo_bytes, read_flo

SUFFIXES = {"depth": (".npy", ".png"), "flow": (".flo", ".npy"), "amodal": (".png", ".npy")}


def read_prediction(folder: Path, key: str, task: str, size: tuple[int, int]) -> np.ndarray:
    """Read the prediction for a sample, resized to `size` (H, W): depth float32 `[H, W]` up to scale and shift; flow float32
    `[2, H, W]` in pixels; amodal bool `[H, W]`; registered tasks float32 `[C, H, W]`.

    Files: depth as .npy `[h, w]` or PNG of any bit depth; flow as .flo or .npy (`[2, h, w]` or `[h, w, 2]`) in pixels at its
    own size; masks as PNG or .npy (`dpt.pictures.decode_mask`). UserError if it is missing, unreadable or of another shape.
    """
    suffixes = SUFFIXES.get(task, (".npy",))
    path = next((file for suffix in suffixes if (file := folder / f"{key}{suffix}").is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no prediction for {key}; name its file {key} with suffix {' or '.join(suffixes)}.")
    try:
        if task == "amodal":
            values = decode_mask(path)
        elif path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".flo":
            values = read_flo(path)
        else:
            values = np.asarray(Image.open(path))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the prediction cannot be read ({error}); write it again.") from error
    if task == "flow":
        values = np.moveaxis(values, -1, 0) if values.ndim == 3 and values.shape[-1] == 2 and values.shape[0] != 2 else values
        _require(path, values.ndim == 3 and len(values) == 2, f"shape {values.shape}; flow has two channels")
        return tasks.resize_flow(values.astype(np.float32), size)
    if tasks.task_spec(task).registered:
        _require(path, values.ndim == 3, f"shape {values.shape}; {task} has channels, height and width")
        return tasks.resize_smooth(values.astype(np.float32), size)
    values = values[..., 0] if values.ndim == 3 else values
    _require(path, values.ndim == 2, f"shape {values.shape}; a map has height and width")
    if task == "amodal":
        return tasks.resize_smooth(values.astype(np.float32), size) > 0.5
    return tasks.resize_smooth(values.astype(np.float32), size)


def _require(path: Path, ok: bool, what: str) -> None:
    if not ok:
        raise UserError(f"{path}: the prediction has {what}.")


def save_prediction(folder: Path, key: str, task: str, value: np.ndarray) -> None:
    """Save a prediction where `read_prediction` finds it: depth and registered tasks .npy, flow .flo, masks 8-bit PNG."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    if task == "depth" or tasks.task_spec(task).registered:
        np.save(f"{path}.npy", value.astype(np.float32))
    elif task == "flow":
        Path(f"{path}.flo").write_bytes(flo_bytes(value))
    else:
        Image.fromarray(value.astype(np.uint8) * 255).save(f"{path}.png")
