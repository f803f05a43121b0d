"""Items on their way from a loader process to the training process.

1. `Packing`, in a loader process: what is large in an item goes to a slot of shared memory, the
   rest into a small message, the `Parcel`.
2. `Unpacking`, in the training process, puts the item together; its large tensors stay where they
   are. When the last of them is dropped the slot is free, and used again.

torch would make new shared memory for each tensor of each item; the kernel takes a tenth of the
time of decoding a batch of pictures to clear the pages for it. The memory has no name: nothing is
left of it when processes die.
"""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

_LARGE_BYTES = 1 << 18
_ALIGNMENT = 64  # bytes: any dtype may begin there
_FREE, _IN_USE = 0, 1  # the first byte of a slot


@dataclass(frozen=True)
class _Place:
    """A tensor in a slot."""

    start: int
    """Byte of the slot."""
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + prod(self.size) * self.dtype.itemsize

    def view(self, slot: Tensor) -> Tensor:
        """The tensor itself."""
        numbers = slot[self.start : self.end].view(self.dtype)
        return numbers.as_strided(self.size, self.stride, numbers.storage_offset())


@dataclass(frozen=True)
class Parcel:
    """An item as it is sent."""

    slot: tuple[int, int] | None
    """Loader process and number; None: nothing is large."""
    memory: Tensor | None
    """Bytes of the slot, when it is new."""
    places: tuple[_Place, ...]
    """Of the large tensors."""
    rest: bytes | None
    """The item without them, pickled; None: it is large, too, and lies in the last place."""


class Packing(Dataset[Parcel]):
    """The items of `dataset` as parcels.

    Args:
        dataset: picklable.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset
        self._slots: list[Tensor] = []

    def __getitem__(self, token: int) -> Parcel:
        rest, tensors = _split(self._dataset[token])
        if is_large := len(rest) >= _LARGE_BYTES:
            tensors.append(torch.frombuffer(bytearray(rest), dtype=torch.uint8))
        if not tensors:
            return Parcel(None, None, (), rest)
        places = _places(tensors)
        number, is_new = self._free_slot(places[-1].end)
        slot = self._slots[number]
        slot[0] = _IN_USE
        for place, tensor in zip(places, tensors, strict=True):
            place.view(slot).copy_(tensor)
        worker = get_worker_info()
        return Parcel(
            (worker.id if worker else 0, number),
            slot if is_new else None,
            tuple(places),
            None if is_large else rest,
        )

    def _free_slot(self, num_bytes: int) -> tuple[int, bool]:
        """The number of a slot that is free and large enough, and whether it is new."""
        free = [number for number, slot in enumerate(self._slots) if slot[0] == _FREE]
        for number in free:
            if len(self._slots[number]) >= num_bytes:
                return number, False
        number = free[0] if free else len(self._slots)
        self._slots[number : number + 1] = [torch.zeros(num_bytes, dtype=torch.uint8)]
        self._slots[number].share_memory_()
        return number, True


class Unpacking:
    """Makes items of parcels again.

    Args:
        pin: put large tensors into page-locked memory.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._slots: dict[tuple[int, int], Tensor] = {}

    def __call__(self, parcel: Parcel) -> Any:
        """The item in `parcel`."""
        if parcel.slot is None:
            return _Join(parcel.rest or b"", []).load()
        if parcel.memory is not None:
            self._slots[parcel.slot] = parcel.memory
        slot = _freed_when_dropped(self._slots[parcel.slot])
        large = [place.view(slot) for place in parcel.places]
        rest = parcel.rest if parcel.rest is not None else large.pop().numpy().data
        return _Join(rest, [self._pinned(tensor) for tensor in large]).load()

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor


def _freed_when_dropped(slot: Tensor) -> Tensor:
    """The bytes of a slot; it is free when no tensor that shares their storage is left."""
    holder = slot.numpy()[:]  # the storage of a tensor made of it keeps this very object
    weakref.finalize(holder, slot.__setitem__, 0, _FREE).atexit = False
    return torch.from_numpy(holder)


def _places(tensors: Sequence[Tensor]) -> list[_Place]:
    places, end = [], _ALIGNMENT
    for tensor in tensors:
        stride = torch.empty_like(tensor, device="meta").stride()  # the same, without gaps
        places.append(_Place(end, tensor.dtype, tuple(tensor.shape), stride))
        end = -(-places[-1].end // _ALIGNMENT) * _ALIGNMENT
    return places


def _split(item: Any) -> tuple[bytes, list[Tensor]]:
    """An item pickled without its large tensors, and these."""
    buffer = io.BytesIO()
    pickler = _Split(buffer)
    pickler.dump(item)
    return buffer.getvalue(), pickler.large


class _Split(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.large: list[Tensor] = []

    def persistent_id(self, obj: Any) -> np.ndarray | int | None:
        if not isinstance(obj, Tensor):
            return None
        if obj.nbytes < _LARGE_BYTES:
            return obj.numpy()
        self.large.append(obj)
        return len(self.large) - 1


class _Join(pickle.Unpickler):
    def __init__(self, rest: bytes | memoryview, large: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(rest))
        self._large = large

    def persistent_load(self, pid: np.ndarray | int) -> Tensor:
        return self._large[pid] if isinstance(pid, int) else torch.from_numpy(pid)
