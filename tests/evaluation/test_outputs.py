import numpy as np
import pytest
from PIL import Image

from dpt.evaluation import Prediction
from dpt.evaluation.outputs import write_outputs
from dpt.pictures import read_flo


@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_files_of_a_prediction(task, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    value = {"depth": rng.random((12, 20)), "flow": rng.normal(0, 5, (2, 12, 20)), "amodal": rng.random((12, 20)) > 0.5}[task]
    value = value if task == "amodal" else value.astype(np.float32)
    whole = image if task == "amodal" else None
    uncertain = Prediction(value=value, uncertainty=rng.random((12, 20)).astype(np.float32), whole=whole)
    files = write_outputs(uncertain, task, image, tmp_path / "out", "a")
    assert all(f.is_file() for f in files)
    assert [f.name for f in files[-2:]] == ["a_uncertainty.npy", "a_uncertainty.png"]
    for file in files:
        if file.suffix == ".png":
            assert np.asarray(Image.open(file)).shape[:2] == (12, 20)
    if task == "depth":
        assert (np.load(files[0]) == value).all()
        stored = np.asarray(Image.open(files[1]))
        assert stored.dtype == np.uint16
        assert (stored.min(), stored.max()) == (0, 65535)
        assert np.corrcoef(stored.ravel(), value.ravel())[0, 1] > 0.9999
    elif task == "flow":
        assert (read_flo(files[0]) == value).all()
    else:
        assert ((np.asarray(Image.open(files[0])) > 127) == value).all()
        assert files[2].name == "a_whole.png"
        assert (np.asarray(Image.open(files[2])) == image).all()
    certain = Prediction(value=value, uncertainty=np.zeros((12, 20), np.float32), whole=whole)
    assert len(write_outputs(certain, task, image, tmp_path / "out", "b")) == len(files) - 2
