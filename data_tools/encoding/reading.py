"""Reading ahead: processes that read and prepare samples while the VAE works."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data_tools.encoding.samples import Features, Layout, Prepared, prepare
from data_tools.readers import Excluded, Reader, ReadError


@dataclass(frozen=True, kw_only=True)
class Unread:
    """An input that gave no sample; `excluded`: on purpose, by the set's own filter."""

    key: str
    reason: str
    excluded: bool


class _Keys(Dataset):
    def __init__(self, reader: Reader, layout: Layout, keys: Sequence[str], shared: bool, features: Features | None) -> None:
        self._reader, self._layout, self._keys, self._shared = reader, layout, keys, shared
        self._features = features

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> Any:
        key = self._keys[number]
        try:
            found = prepare(self._reader.read(key), self._layout, self._features)
        except ReadError as error:
            return Unread(key=key, reason=error.reason, excluded=isinstance(error, Excluded))
        return [_converted(sample, _tensor) for sample in found] if self._shared else found


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _converted(sample: Prepared, convert: Any) -> Prepared:
    """The sample with its large arrays converted: tensors go between processes in shared memory, arrays through a pipe."""
    return Prepared(
        key=sample.key,
        images={name: [convert(image) for image in images] for name, images in sample.images.items()},
        arrays={name: convert(array) if array.ndim else array for name, array in sample.arrays.items()},
        meta=sample.meta,
        all_valid_prompt=sample.all_valid_prompt,
        visible=None if sample.visible is None else convert(sample.visible),
    )


def read_ahead(
    reader: Reader, layout: Layout, keys: Sequence[str], processes: int, ahead: int, features: Features | None = None
) -> Generator[list[Prepared] | Unread]:
    """Yield each key's samples (two where mirrored) in order, or why it has none.

    `processes` processes read about `ahead` keys ahead between them; 0: read here, on demand.
    """
    if processes == 0:
        dataset = _Keys(reader, layout, keys, shared=False, features=features)
        yield from (dataset[number] for number in range(len(keys)))
        return
    processes = min(processes, len(keys))
    loader = DataLoader(
        _Keys(reader, layout, keys, shared=True, features=features),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=max(2, -(-ahead // processes)),
        multiprocessing_context="fork",
    )

    def array(tensor: torch.Tensor) -> NDArray[Any]:
        return tensor.numpy()

    for found in loader:
        yield found if isinstance(found, Unread) else [_converted(sample, array) for sample in found]
