"""Evaluation sets behind URLs are the sets of their folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dpt.evaluation.sets import open_sets
from tests.evaluation.tiny import make_set


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http through curl")
def test_over_http(tmp_path: Path, served) -> None:
    folder, cache = make_set(tmp_path / "set", count=3), tmp_path / "cache"
    address = served(folder)
    (local,) = open_sets([str(folder)], protocol="hypersim", max_samples=0)
    (remote,) = open_sets([address], protocol="hypersim", max_samples=0, cache_dir=str(cache))
    assert (len(remote), remote.name, remote.folder) == (3, local.name, address)
    for index in range(3):
        assert remote[index].key == local[index].key
        np.testing.assert_array_equal(remote[index].truth, local[index].truth)
    assert len(list(cache.iterdir())) == 1
