"""Train depth on your own pairs: python examples/train_own_pairs.py FOLDER OUT, with FOLDER/NAME.png beside NAME.npy (metres).

The reader below is all that a data set needs; the recipe is a toy one. Settings for real runs: ds_configs/finetune_depth.json.
"""

import json
import sys
from pathlib import Path

import numpy as np

from data_tools import encode
from data_tools.readers import Sample, register_reader
from dpt.commands.training import run_launcher
from dpt.pictures import read_picture


class Pairs:
    """FOLDER/NAME.png and FOLDER/NAME.npy, float32 [H, W] in metres, 0 where unknown."""

    name, task, version, class_names = "my_pairs", "depth", 1, ()

    def __init__(self, root: Path, split: str) -> None:
        self.root = Path(root)

    def keys(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("*.png"))

    def read(self, key: str) -> Sample:
        depth = np.load(self.root / f"{key}.npy").astype(np.float32)
        return Sample(key=key, images=(read_picture(self.root / f"{key}.png"),), depth=depth)


folder, out = sys.argv[1], Path(sys.argv[2])
register_reader("my_pairs", Pairs)
encode.main(["--dataset", "my_pairs", "--root", folder, "--resolution", "64", "--prompt", "none", "--out", str(out / "shards")])
recipe = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "dpt": {
        "task": "depth",
        "model": {"input_size": 8, "num_conditions": 1, "hidden_size": 64, "depth": 2, "num_heads": 4},
        "data": {"shards": [str(out / "shards")], "posterior": "mean"},
        "training": {"steps": 20, "output_dir": str(out / "run")},
        "tracking": {"uri": f"sqlite:///{out / 'mlflow.db'}"},
    },
}
(out / "recipe.json").write_text(json.dumps(recipe, indent=2))
sys.argv = ["finetune", "--ds_config", str(out / "recipe.json")]
run_launcher("finetune", __doc__ or "")
print(f"Predict with: dpt predict PICTURE --weights {out / 'run' / 'weights'}")
