"""The VAE at work: images of many samples in batches of one size, results written by a thread of its own.

Nothing waits for anything longer than it must: samples are read ahead by processes, the next batch is on its way to the device
while one is encoded, and results come back and are written while the next ones are made.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.encoding.samples import Prepared
from dpt import tasks
from dpt.clip import ClipEncoder
from dpt.data.codec import VAECodec
from dpt.threads import Workers

_QUEUED = 8


class BatchEncoder:
    """A VAE (and an image tower) on its device, fed batches of exactly `batch_size` images.

    Results are the same whatever is encoded together. On a GPU batches of one size, padded with zeros where a shard ends, keep
    its kernels the same. On a CPU every image is encoded by one thread, as many at once as torch has threads: sums that several
    threads share would come out in another order with another number of them.
    """

    def __init__(self, codec: VAECodec, batch_size: int, clip: ClipEncoder | None = None) -> None:
        self.codec, self.batch_size, self.clip = codec, batch_size, clip
        self.device: torch.device = codec.vae.device
        self._prompts: dict[tuple[int, ...], NDArray[np.float16]] = {}
        self._threads: ThreadPoolExecutor | None = None
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True

    def encode(self, images: Sequence[NDArray[Any]]) -> "Pending":
        """uint8 `[H, W, 3]` or float32 `[3, H, W]` in [-1, 1], all of one size -> moments, float16 `[B, 2, C, h, w]`."""
        assert 0 < len(images) <= self.batch_size
        if self.device.type == "cpu":
            return Pending(torch.cat(self._each(lambda image: self.codec.encode(self._upload([image], 1)), images)).half())
        return Pending(self.codec.encode(self._upload(images, self.batch_size))[: len(images)].half())

    def _each(self, action: Callable[[Any], Tensor], items: Sequence[Any]) -> list[Tensor]:
        """`action` of each item, by one thread each."""
        if self._threads is None:  # not before the processes that read ahead have been forked
            self._threads = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        return list(self._threads.map(action, items))

    def _upload(self, images: Sequence[NDArray[Any]], size: int) -> Tensor:
        """The images on the device, float32 `[size, 3, H, W]` in [-1, 1]. As uint8 on the way if all are."""
        as_bytes = all(image.dtype == np.uint8 for image in images)
        if not as_bytes:
            images = [image if image.dtype == np.float32 else tasks.image_to_float(image) for image in images]
        batch = torch.zeros(
            (size, *images[0].shape), dtype=torch.uint8 if as_bytes else torch.float32, pin_memory=self.device.type == "cuda"
        )
        np.stack(images, out=batch.numpy()[: len(images)])
        moved = batch.to(self.device, non_blocking=True)
        return moved.movedim(-1, 1).float().div_(127.5).sub_(1.0) if as_bytes else moved

    def all_valid_prompt(self, size: tuple[int, int]) -> NDArray[np.float16]:
        """Moments `[2, C, h, w]` of the all-valid prompt of a size (H, W): encoded once."""
        if size not in self._prompts:
            self._prompts[size] = self.encode([tasks.all_valid_prompt(*size)]).get()[0]
        return self._prompts[size]

    def embed(self, pictures: Sequence[NDArray[np.uint8]]) -> "Pending":
        """CLIP embeddings, float32 `[B, D]`, of pictures of objects on white."""
        clip = self.clip
        assert clip is not None
        if self.device.type == "cpu":
            return Pending(torch.cat(self._each(lambda picture: clip([picture]), pictures)))
        padding = [pictures[0]] * (self.batch_size - len(pictures))
        return Pending(clip([*pictures, *padding])[: len(pictures)])


class Pending:
    """A result on its way from the device."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        if value.device.type == "cuda":
            self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value

    def get(self) -> NDArray[Any]:
        """The result, waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


@dataclass(kw_only=True)
class Encoded:
    """A sample and its results, as far as they have come."""

    sample: Prepared
    arrays: dict[str, NDArray[Any]]
    moments: dict[str, list[NDArray[np.float16]]]
    missing: int
    """Results still to come."""
    prompt: NDArray[np.float16] | None
    """Moments of the last condition, where it is the all-valid prompt."""

    def members(self) -> dict[str, NDArray[Any]]:
        """All its members."""
        members = dict(self.arrays)
        for name, stack in self.moments.items():
            if name in ("cond_latents", "target_latents"):
                prompt = [self.prompt] if self.prompt is not None and name == "cond_latents" else []
                members[name] = np.stack([*stack, *prompt])
            else:
                members[name] = stack[0]
        return members


class SampleEncoder:
    """Takes samples, gives them encoded and in order to `deliver`, which a thread of its own calls.

    What that thread raises is raised by a later call here; it does nothing any more then.
    """

    def __init__(self, encoder: BatchEncoder, deliver: Callable[[Encoded], None]) -> None:
        self._encoder, self._deliver = encoder, deliver
        self._images: list[tuple[Encoded, str, NDArray[Any]]] = []
        self._pictures: list[tuple[Encoded, NDArray[np.uint8]]] = []
        self._thread = Workers(1, "write shards")
        self._calls: deque[Future[None]] = deque()
        """Those that the thread has not been seen to end."""
        self._waiting: deque[Encoded | Callable[[], None]] = deque()
        """Samples, and what is to be done after them, until their turn comes. The thread's own."""
        self._stopped = False

    def add(self, sample: Prepared) -> None:
        """Encode a sample, together with those before and after it."""
        count = sum(map(len, sample.images.values())) + (sample.visible is not None)
        size = _size(next(iter(sample.images.values()))[0])
        encoded = Encoded(
            sample=sample,
            arrays=dict(sample.arrays),
            moments={name: [] for name in sample.images},
            missing=count,
            prompt=self._encoder.all_valid_prompt(size) if sample.all_valid_prompt else None,
        )
        self._put(encoded)
        for name, images in sample.images.items():
            for image in images:
                if self._images and _size(self._images[0][2]) != _size(image):
                    self._encode()
                self._images.append((encoded, name, image))
                if len(self._images) == self._encoder.batch_size:
                    self._encode()
        if sample.visible is not None:
            self._pictures.append((encoded, sample.visible))
            if len(self._pictures) == self._encoder.batch_size:
                self._embed()

    def end(self, action: Callable[[], None]) -> None:
        """Finish what has been added, and let the thread call `action` after it."""
        if self._images:
            self._encode()
        if self._pictures:
            self._embed()
        self._put(action)

    def close(self) -> None:
        """Wait until all is delivered."""
        while self._calls:
            self._calls.popleft().result()
        self._thread.close()

    def abort(self) -> None:
        """Stop without delivering what is under way."""
        self._stopped = True
        for call in self._calls:
            call.exception()
        self._thread.close()

    def _encode(self) -> None:
        pending = self._encoder.encode([image for _, _, image in self._images])
        self._put((pending, [(encoded, name) for encoded, name, _ in self._images]))
        self._images = []

    def _embed(self) -> None:
        pending = self._encoder.embed([picture for _, picture in self._pictures])
        self._put((pending, [(encoded, None) for encoded, _ in self._pictures]))
        self._pictures = []

    def _put(self, item: Any) -> None:
        while len(self._calls) >= _QUEUED or (self._calls and self._calls[0].done()):
            self._calls.popleft().result()
        self._calls.append(self._thread.submit(self._take, item))

    def _take(self, item: Any) -> None:
        """Results, a sample or an action: deliver what has its turn now. Called by the thread."""
        if self._stopped:
            return
        try:
            if isinstance(item, tuple):
                _assign(*item)
            else:
                self._waiting.append(item)
            while self._waiting and not (isinstance(self._waiting[0], Encoded) and self._waiting[0].missing):
                ready = self._waiting.popleft()
                if isinstance(ready, Encoded):
                    self._deliver(ready)
                else:
                    ready()
        except BaseException:
            self._stopped = True
            raise


def _assign(pending: Pending, places: list[tuple[Encoded, str | None]]) -> None:
    for value, (encoded, name) in zip(pending.get(), places, strict=True):
        if name is None:
            encoded.arrays["clip"] = value
        else:
            encoded.moments[name].append(value)
        encoded.missing -= 1


def _size(image: NDArray[Any]) -> tuple[int, int]:
    """Height and width of an image in either of its forms."""
    return image.shape[:2] if image.dtype == np.uint8 else image.shape[1:]
