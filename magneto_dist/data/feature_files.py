"""Features of pictures, written once and read in every epoch; who computes them is no matter here.

1. `FeatureWriter` fills the file of one view of a split, chunk by chunk, in any order, by any
   number of processes of one machine; chunks that were finished before a kill stay.
2. `finish` gives the file its name: a file that has it is complete.
3. `view_of` says which view a sample shows in an epoch; `FeatureViews` reads it.

NAME.npy holds [sample, region, channel], float16, or bfloat16 as uint16, which numpy does not know.
NAME.json says what that was made of, and which pictures could not be used and why: their features
are zero. While a file is made it is called .NAME.part, and .NAME.log has a line for every finished
chunk.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from magneto_dist.data.cache_room import locked
from magneto_dist.data.parcels import empty
from magneto_dist.data.randomness import random_bits
from magneto_dist.errors import InputError
from magneto_dist.files import sync_file, sync_folder, write_atomically

_ON_DISK = {torch.float16: np.dtype("<f2"), torch.bfloat16: np.dtype("<u2")}
_IN_MEMORY = {on_disk: dtype for dtype, on_disk in _ON_DISK.items()}


def view_of(
    sample_ids: Int64[np.ndarray, " sample"], epoch: int, num_views: int, seed: int
) -> Int64[np.ndarray, " sample"]:
    """The view that each sample shows: (epoch + hash of the sample) mod the number of views.

    So a sample shows all its views in as many epochs, and an epoch is a mixture of all views.
    """
    first = random_bits(seed, 0, sample_ids, "first view", 1)[:, 0] % np.uint64(num_views)
    return (first.astype(np.int64) + epoch) % num_views


class FeatureWriter:
    """The features of one view of a split on their way to disk.

    Args:
        path: what the file will be called, `.npy` at its end.
        shape: samples, regions, channels.
        dtype: float16 or bfloat16.
        chunk_samples: samples of a chunk; the last one is shorter.
        made_of: what the features depend on, as JSON can hold it; for people.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        chunk_samples: int,
        made_of: Mapping[str, Any],
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._chunk_samples, self._made_of = chunk_samples, made_of
        self._part = path.with_name(f".{path.stem}.part")
        self._log = path.with_name(f".{path.stem}.log")

    @property
    def num_chunks(self) -> int:
        """Chunks of the file."""
        return -(-self.shape[0] // self._chunk_samples)

    def rows(self, chunk: int) -> range:
        """The samples of a chunk."""
        first = chunk * self._chunk_samples
        return range(first, min(first + self._chunk_samples, self.shape[0]))

    @property
    def missing_bytes(self) -> int:
        """Of disk space that the file has not taken yet; 0: it is complete, or will not grow."""
        if self.path.exists():
            return 0
        taken = self._part.stat().st_blocks * 512 if self._part.exists() else 0
        return max(self._num_bytes - taken, 0)

    @property
    def _num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def missing_chunks(self) -> list[int]:
        """Chunks that nobody has finished."""
        if self.path.exists():
            return []
        finished = {entry["chunk"] for entry in self._entries()}
        return [chunk for chunk in range(self.num_chunks) if chunk not in finished]

    def begin(self) -> None:
        """Makes room for the features, unless somebody has, or the file is complete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.path.exists() or self._part.exists():
                return
            self._log.unlink(missing_ok=True)  # of a file that somebody has removed
            fresh = self._part.with_suffix(".new")
            np.lib.format.open_memmap(fresh, "w+", _ON_DISK[self.dtype], self.shape).flush()
            sync_file(fresh)
            fresh.rename(self._part)
        sync_folder(self.path.parent)

    def write(self, first_sample: int, features: Float[Tensor, "sample region channel"]) -> None:
        """Puts features, on the CPU and of `dtype`, where they belong."""
        content = memoryview(features.contiguous().view(torch.uint8).numpy().tobytes())
        sample_bytes = self._num_bytes // self.shape[0]
        # Not through a mapping of the file: on a full disk that would be a SIGBUS.
        with self._open() as file:
            header_bytes = os.fstat(file.fileno()).st_size - self._num_bytes
            offset = header_bytes + first_sample * sample_bytes
            while content:
                written = os.pwrite(file.fileno(), content, offset)
                content, offset = content[written:], offset + written

    def finish_chunk(self, chunk: int, bad: Mapping[int, str]) -> None:
        """Notes, once it is on disk, that a chunk is done.

        Args:
            chunk: all its samples were written; those that are bad may have been left out.
            bad: sample id -> why its picture cannot be used.
        """
        with self._open() as file:
            os.fsync(file.fileno())
        line = json.dumps({"chunk": chunk, "bad": bad}, ensure_ascii=False).encode()
        with self._log.open("ab", buffering=0) as file:
            file.write(b"\n" + line + b"\n")  # one write; and never behind half a line of a crash
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the file its name, once all chunks are there; does nothing where it has it."""
        with self._locked():
            if not self.path.exists():
                missing = self.missing_chunks()
                assert not missing, f"{self.path}: chunks {missing} are missing"
                bad = {sample: why for e in self._entries() for sample, why in e["bad"].items()}
                bad = dict(sorted(bad.items(), key=lambda item: int(item[0])))
                about = json.dumps({"made_of": self._made_of, "bad": bad}, ensure_ascii=False)
                write_atomically(self.path.with_suffix(".json"), about.encode())
                self._part.rename(self.path)
                sync_folder(self.path.parent)
            self._log.unlink(missing_ok=True)

    def _open(self) -> FileIO:
        try:
            return self._part.open("r+b", buffering=0)
        except FileNotFoundError:  # another run was quicker: the same bytes once more do no harm
            return self.path.open("r+b", buffering=0)

    def _entries(self) -> Iterator[dict[str, Any]]:
        lines = self._log.read_bytes().splitlines() if self._log.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # half a line of a crash, or none
                yield json.loads(line)

    def _locked(self) -> contextlib.AbstractContextManager[bool]:
        """Another run may make the same features, and gives the same files their names."""
        return locked(self.path.parent / ".lock")


class FeatureViews:
    """The features of a split in all of its views; a loader process opens the files for itself.

    Args:
        paths: the complete file of each view.
        seed: of the views.
    """

    def __init__(self, paths: tuple[Path, ...], seed: int) -> None:
        self._paths, self._seed = paths, seed

    def __reduce__(self) -> tuple[type[FeatureViews], tuple[tuple[Path, ...], int]]:
        return FeatureViews, (self._paths, self._seed)  # without the open files

    def read(
        self, epoch: int, sample_ids: Int64[Tensor, " batch"], sample_valid: Bool[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch region channel"], tuple[str | None, ...]]:
        """Features of samples at an epoch, and why a picture cannot be used (None: it can).

        Those of rows that are not valid, or of bad pictures, are zero.
        """
        stored = self._files[0]
        features = empty(len(sample_ids), *stored.shape[1:], dtype=_IN_MEMORY[stored.dtype])
        out = features.view(torch.int16).numpy().view(stored.dtype)
        errors: list[str | None] = [None] * len(sample_ids)
        ids = sample_ids.numpy()
        views = view_of(ids, epoch, len(self._paths), self._seed)
        for row, (sample, view) in enumerate(zip(ids.tolist(), views.tolist(), strict=True)):
            if sample_valid[row]:
                out[row] = self._files[view][sample]
                errors[row] = self._bad[view].get(str(sample))
            else:
                out[row] = 0
        return features, tuple(errors)

    @cached_property
    def _files(self) -> list[np.ndarray]:
        try:
            return [np.load(path, mmap_mode="r") for path in self._paths]
        except OSError as error:
            raise InputError(f"{error.filename}: cached features are gone: start again") from None

    @cached_property
    def _bad(self) -> list[dict[str, str]]:
        return [json.loads(path.with_suffix(".json").read_bytes())["bad"] for path in self._paths]
