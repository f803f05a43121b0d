"""Items on their way from a loader process to the training process.

1. `Packing`, in a loader process: each large tensor of an item lies in a slot of shared memory, the
   rest goes into a small message, the `Parcel`. A tensor made with `empty` lies there from the
   start; others are copied.
2. `Unpacking`, in the training process, puts the item together; its large tensors stay where they
   are. When the last one that shares a slot is dropped the slot is free, and used again.

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
from torch.utils.data import Dataset

from magneto_dist.errors import InputError

_LARGE_BYTES = 1 << 18
_START = 64  # byte of a slot where its tensor begins: any dtype may begin there
_FREE, _IN_USE = 0, 1  # the first byte of a slot


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of an item, as `torch.empty`; no copy is made when it is sent."""
    num_bytes = prod(size) * dtype.itemsize
    if _packing is None or num_bytes < _LARGE_BYTES:
        return torch.empty(size, dtype=dtype)
    slot = _packing.take_slot(num_bytes)
    return slot[_START : _START + num_bytes].view(dtype).view(size)


@dataclass(frozen=True)
class _Place:
    """A tensor in a slot."""

    slot: int
    """Number of the slot."""
    memory: Tensor | None
    """Bytes of the slot, when it is new to the training process."""
    start: int
    """Byte of the slot."""
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, slot: Tensor) -> Tensor:
        """The tensor itself."""
        # From its start to the end of the slot, as far as there are whole numbers.
        num_bytes = (len(slot) - self.start) // self.dtype.itemsize * self.dtype.itemsize
        numbers = slot[self.start : self.start + num_bytes].view(self.dtype)
        return numbers.as_strided(self.size, self.stride, numbers.storage_offset())


@dataclass(frozen=True)
class Parcel:
    """An item as it is sent."""

    places: tuple[_Place, ...]
    """Of the large tensors."""
    rest: bytes
    """The item without them, pickled."""


class Packing(Dataset[Parcel]):
    """The items of `dataset` as parcels.

    Args:
        dataset: picklable.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset
        self._slots: list[Tensor] = []
        self._states: list[memoryview] = []
        """Of each slot its first byte, without torch."""
        self._sent: set[int] = set()
        """Slots that the training process knows."""
        self._taken: dict[int, int] = {}
        """Where the memory of a slot begins, and its number: of those taken for this item."""

    def __getitem__(self, token: int) -> Parcel:
        global _packing
        _packing, places = self, ()
        try:
            rest, tensors = _split(self._dataset[token])
            places = tuple(self._place(tensor) for tensor in tensors)
        finally:
            _packing = None
            for number in set(self._taken.values()) - {place.slot for place in places}:
                self._states[number][0] = _FREE
            self._taken.clear()
        self._sent.update(place.slot for place in places)
        return Parcel(places, rest)

    def take_slot(self, num_bytes: int) -> Tensor:
        """A slot that is free and large enough, from now on in use."""
        number = self._free_slot(_START + num_bytes)
        slot = self._slots[number]
        self._states[number][0] = _IN_USE
        self._taken[slot.untyped_storage().data_ptr()] = number
        return slot

    def _free_slot(self, num_bytes: int) -> int:
        free = [number for number, state in enumerate(self._states) if state[0] == _FREE]
        for number in free:
            if len(self._slots[number]) >= num_bytes:
                return number
        number = free[0] if free else len(self._slots)
        try:
            slot = torch.zeros(num_bytes, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise InputError(
                f"no shared memory for a micro-batch of a loader process ({error}): make /dev/shm"
                " larger (docker run --ipc=host), lower --data.num_workers or"
                " --data.prefetch_batches, or set --train.overlap false"
            ) from None
        self._slots[number : number + 1] = [slot]
        self._states[number : number + 1] = [slot.numpy().data[:1]]
        self._sent.discard(number)
        return number

    def _place(self, tensor: Tensor) -> _Place:
        begin = tensor.untyped_storage().data_ptr()
        if begin not in self._taken:
            # The same strides, without gaps.
            strides = torch.empty_like(tensor, device="meta").stride()
            memory = self.take_slot(tensor.nbytes)
            copy = memory[_START : _START + tensor.nbytes].view(tensor.dtype)
            tensor = copy.as_strided(tensor.size(), strides, copy.storage_offset()).copy_(tensor)
            begin = memory.untyped_storage().data_ptr()
        number = self._taken[begin]
        return _Place(
            number,
            None if number in self._sent else self._slots[number],
            tensor.data_ptr() - begin,
            tensor.dtype,
            tuple(tensor.size()),
            tensor.stride(),
        )


_packing: Packing | None = None
"""What makes an item in this process now."""


class Unpacking:
    """Makes items of one loader process's parcels again.

    Args:
        pin: put large tensors into page-locked memory.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._slots: dict[int, Tensor] = {}

    def __call__(self, parcel: Parcel) -> Any:
        """The item in `parcel`."""
        slots = {place.slot: self._slot(place) for place in parcel.places}
        large = [place.view(slots[place.slot]) for place in parcel.places]
        return _Join(parcel.rest, [self._pinned(tensor) for tensor in large]).load()

    def _slot(self, place: _Place) -> Tensor:
        if place.memory is not None:
            self._slots[place.slot] = place.memory
        return _freed_when_dropped(self._slots[place.slot])

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor


def _freed_when_dropped(slot: Tensor) -> Tensor:
    """The bytes of a slot; it is free when no tensor that shares their storage is left."""
    memory = slot.numpy()
    holder = memory[:]  # the storage of a tensor made of it keeps this very object
    weakref.finalize(holder, memory.__setitem__, 0, _FREE).atexit = False
    return torch.from_numpy(holder)


def _split(item: Any) -> tuple[bytes, list[Tensor]]:
    """An item pickled without its large tensors, and these."""
    buffer = io.BytesIO()
    pickler = _Split(buffer)
    pickler.dump(item)
    return buffer.getvalue(), pickler.large


_Small = np.ndarray | tuple[tuple[int, ...], str, bytearray]
"""Shape, dtype and bytes where these lie in order: a numpy array is pickled in twice the time."""


class _Split(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.large: list[Tensor] = []

    def persistent_id(self, obj: Any) -> _Small | int | None:
        if not isinstance(obj, Tensor):
            return None
        if obj.nbytes < _LARGE_BYTES and obj.dtype != torch.bfloat16:  # numpy has none
            array = obj.numpy()
            if not array.flags.c_contiguous:
                return array
            return array.shape, array.dtype.char, bytearray(array.tobytes())
        self.large.append(obj)
        return len(self.large) - 1


class _Join(pickle.Unpickler):
    def __init__(self, rest: bytes, large: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(rest))
        self._large = large

    def persistent_load(self, pid: _Small | int) -> Tensor:
        if isinstance(pid, int):
            return self._large[pid]
        return torch.from_numpy(np.ndarray(*pid) if isinstance(pid, tuple) else pid)
