"""Depth of pictures, from Python: python examples/predict.py WEIGHTS PICTURE ... (writes PICTURE_depth.npy beside each)."""

import sys
from pathlib import Path

import numpy as np

from dpt.evaluation import Predictor
from dpt.pictures import read_picture

weights, *names = sys.argv[1:]
predictor = Predictor(weights)
for name in names:
    prediction = predictor([read_picture(Path(name))], task="depth", keys=[name], steps=10, ensemble=5)[0]
    out = Path(name).with_name(f"{Path(name).stem}_depth.npy")
    np.save(out, prediction.value)  # float32 [H, W], up to scale and shift
    print(f"{out}: uncertain by {prediction.uncertainty.mean():.3f} of its range")
