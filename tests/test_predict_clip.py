"""`dpt predict --clip`: whole objects from weights that take CLIP embeddings."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpt import cli
from dpt.clip import load_clip
from dpt.evaluation.prediction import Predictor
from dpt.tasks import visible_object
from tests.evaluation.tiny import calls_of
from tests.test_cli import export_tiny, refusal


def test_predict_embeds_the_visible_object(tmp_path: Path, clip: Path, capsys, monkeypatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:48] = 255
    picture, mask_file = tmp_path / "cup.png", tmp_path / "cup_mask.png"
    Image.fromarray(image).save(picture)
    Image.fromarray(mask).save(mask_file)
    weights = export_tiny(tmp_path, "amodal", num_conditions=2, clip_embedding_size=6)
    calls = calls_of(monkeypatch, Predictor, "__call__")
    command = ["predict", str(picture), "--weights", str(weights), "--steps", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--mask", str(mask_file), "--clip", str(clip)]) == 0
    expected = load_clip(str(clip))([visible_object(image, mask > 0)])
    torch.testing.assert_close(calls[0][1]["embeddings"], expected)
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written
    assert all(path.is_file() and path.name.startswith("cup") for path in written)

    depth = export_tiny(tmp_path, "depth", num_conditions=1)
    for more, words in (
        (["--mask", str(mask_file)], "take a CLIP embedding of 6 numbers"),
        (["--clip", str(clip)], r"give a --mask for each picture (1 pictures, 0 masks)"),
        (["--mask", str(mask_file), "--clip", str(clip), "--weights", str(depth)], "--mask is for amodal"),
        (["--mask", str(mask_file), "--clip", str(tmp_path / "none")], "the image tower cannot be loaded"),
    ):
        assert words in refusal(capsys, *command, *more)
