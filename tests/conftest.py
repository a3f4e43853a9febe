"""What every test starts from."""

import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks are forked, which no pool of threads survives

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """No launcher's variables before a test, and none left behind by what it ran."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    yield
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function: a command's `main` and its words -> the one sentence that ends it, with exit code 2."""

    def run(main: Callable[[list[str]], object], *words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        assert caught.value.code == 2
        *shown, sentence = capsys.readouterr().err.splitlines()
        assert all(line.endswith("]") for line in shown)  # progress
        return sentence

    return run


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Callable[[Path], str]]:
    """Returns a function: a folder -> its address on this machine, until the test ends."""
    with ExitStack() as stack:

        def serve(folder: Path) -> str:
            handler = functools.partial(_Quiet, directory=str(folder))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield serve


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random CLIP image tower: 48 px, embeddings of 6 numbers."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(**sizes, projection_dim=6, image_size=48, patch_size=16)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder
