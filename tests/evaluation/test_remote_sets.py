"""Evaluation sets behind URLs are the sets of their folders."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from dpt.evaluation.sets import open_sets
from tests.evaluation.tiny import make_set


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http through curl")
def test_over_http(tmp_path: Path) -> None:
    folder, cache = make_set(tmp_path / "set", count=3), tmp_path / "cache"
    (local,) = open_sets([str(folder)], protocol="hypersim", max_samples=0)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            (remote,) = open_sets([address], protocol="hypersim", max_samples=0, cache_dir=str(cache))
            assert (len(remote), remote.name, remote.folder) == (3, local.name, address)
            for index in range(3):
                assert remote[index].key == local[index].key
                np.testing.assert_array_equal(remote[index].truth, local[index].truth)
            assert len(list(cache.iterdir())) == 1
        finally:
            server.shutdown()
            thread.join()
