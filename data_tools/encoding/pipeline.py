"""Run the VAE on images of many samples in batches of one size; a separate thread writes the results.

The stages overlap: samples are read ahead by processes, the next batch is on its way to the device while one is encoded,
and results come back and are written while the next ones are made.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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

    Results do not depend on what is encoded together. On a GPU batches of one size, padded with zeros where a shard ends, keep
    its kernels the same. On a CPU every image is encoded by one thread, as many at once as torch has threads: sums that several
    threads share would depend on their number.
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
        """Apply `action` to each item, one thread per item."""
        if self._threads is None:  # not before the processes that read ahead have been forked
            self._threads = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        return list(self._threads.map(action, items))

    def _upload(self, images: Sequence[NDArray[Any]], size: int) -> Tensor:
        """The images on the device, float32 `[size, 3, H, W]` in [-1, 1]. Uploaded as uint8 if all are."""
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
        """Wait for the result and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


Place = tuple[Pending, int]
"""A batch on its way, and the index of a result in it."""


@dataclass(kw_only=True)
class Encoded:
    """A sample and the places of those of its results that are under way."""

    sample: Prepared
    moments: dict[str, list[Place]]
    prompt: NDArray[np.float16] | None
    """Moments of the last condition, where it is the all-valid prompt."""
    clip: list[Place] = field(default_factory=list)

    def is_under_way(self) -> bool:
        """Whether all its results are under way."""
        images = self.sample.images
        whole = all(len(places) == len(images[name]) for name, places in self.moments.items())
        return whole and len(self.clip) == (self.sample.visible is not None)

    def members(self) -> dict[str, NDArray[Any]]:
        """Wait for all its members and return them."""
        members = dict(self.sample.arrays)
        for pending, number in self.clip:
            members["clip"] = pending.get()[number]
        for name, places in self.moments.items():
            stack = [pending.get()[number] for pending, number in places]
            if name in ("cond_latents", "target_latents"):
                prompt = [self.prompt] if self.prompt is not None and name == "cond_latents" else []
                members[name] = np.stack([*stack, *prompt])
            else:
                members[name] = stack[0]
        return members


class SampleEncoder:
    """Encodes samples and passes them in order to `deliver`, which a separate thread calls.

    An exception in that thread is raised by a later call here; the thread then does nothing more.
    """

    def __init__(self, encoder: BatchEncoder, deliver: Callable[[Encoded], None]) -> None:
        self._encoder, self._deliver = encoder, deliver
        self._images: list[tuple[list[Place], NDArray[Any]]] = []
        self._pictures: list[tuple[list[Place], NDArray[Any]]] = []
        self._samples: deque[Encoded] = deque()
        """Samples whose results are not all under way, and all that came after them."""
        self._thread = Workers(1, "write shards")
        self._calls: deque[Future[None]] = deque()
        """Calls not yet known to have ended in the thread."""
        self._stopped = False

    def add(self, sample: Prepared) -> None:
        """Encode a sample, together with those before and after it."""
        size = _size(next(iter(sample.images.values()))[0])
        encoded = Encoded(
            sample=sample,
            moments={name: [] for name in sample.images},
            prompt=self._encoder.all_valid_prompt(size) if sample.all_valid_prompt else None,
        )
        self._samples.append(encoded)
        for name, images in sample.images.items():
            for image in images:
                if self._images and _size(self._images[0][1]) != _size(image):
                    self._start(self._images, self._encoder.encode)
                self._images.append((encoded.moments[name], image))
                if len(self._images) == self._encoder.batch_size:
                    self._start(self._images, self._encoder.encode)
        if sample.visible is not None:
            self._pictures.append((encoded.clip, sample.visible))
            if len(self._pictures) == self._encoder.batch_size:
                self._start(self._pictures, self._encoder.embed)

    def end(self, action: Callable[[], None]) -> None:
        """Finish what has been added, and let the thread call `action` after it."""
        if self._images:
            self._start(self._images, self._encoder.encode)
        if self._pictures:
            self._start(self._pictures, self._encoder.embed)
        self._call(action)

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

    def _start(self, waiting: list[tuple[list[Place], NDArray[Any]]], compute: Callable[[list[Any]], Pending]) -> None:
        """Start computing a batch, and hand the thread the samples that need nothing else."""
        pending = compute([image for _, image in waiting])
        for number, (places, _) in enumerate(waiting):
            places.append((pending, number))
        waiting.clear()
        while self._samples and self._samples[0].is_under_way():
            self._call(partial(self._deliver, self._samples.popleft()))

    def _call(self, action: Callable[[], None]) -> None:
        while len(self._calls) >= _QUEUED or (self._calls and self._calls[0].done()):
            self._calls.popleft().result()
        self._calls.append(self._thread.submit(self._run, action))

    def _run(self, action: Callable[[], None]) -> None:
        """Run `action` in the thread, unless stopped; stop if it fails."""
        if self._stopped:
            return
        try:
            action()
        except BaseException:
            self._stopped = True
            raise


def _size(image: NDArray[Any]) -> tuple[int, int]:
    """Height and width of an image in either of its forms."""
    return image.shape[:2] if image.dtype == np.uint8 else image.shape[1:]
