"""Where each sample lies in its shard: the `.idx` beside a tar, in the format of DALI's `wds2idx`.

A first line `v1.2 N`, then for each sample `jpg OFFSET SIZE NAME json OFFSET SIZE NAME`; without a
picture only the second half. Offsets count bytes from the start of the tar to a member's content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int64, UInt8

from magneto_dist.data.image_bytes import IMAGE_KINDS
from magneto_dist.data.sample import valid_key
from magneto_dist.data.storage import Storage
from magneto_dist.errors import FormatError, InputError

_NO_IMAGE = len(IMAGE_KINDS)  # in ShardIndex.image_kind


class Member(NamedTuple):
    """One file inside a shard."""

    extension: str
    offset: int
    """Of its content, in bytes from the start of the shard."""
    size: int
    """Bytes."""
    name: str


class Keys(Sequence[str]):
    """The keys of a shard's samples, kept as bytes of one width."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = np.array(keys, dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [key.decode("ascii") for key in self._keys[index].tolist()]
        return self._keys.item(index).decode("ascii")


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie; 33 bytes a sample and its key."""

    image_offset: Int64[np.ndarray, " sample"]
    """Bytes from the start of the shard; 0 without a picture."""
    image_size: Int64[np.ndarray, " sample"]
    """Bytes; 0 without a picture."""
    image_kind: UInt8[np.ndarray, " sample"]
    """Position in IMAGE_KINDS; their number without a picture."""
    annotation_offset: Int64[np.ndarray, " sample"]
    annotation_size: Int64[np.ndarray, " sample"]
    keys: Sequence[str]

    @property
    def num_samples(self) -> int:
        """Samples of the shard."""
        return len(self.keys)

    def members(self, row: int) -> list[Member]:
        """The members of a sample, the annotation last, called after its key."""
        key = self.keys[row]
        kinds = [IMAGE_KINDS[self.image_kind[row]]] if self.image_kind[row] != _NO_IMAGE else []
        image = (self.image_offset.item(row), self.image_size.item(row))
        annotation = (self.annotation_offset.item(row), self.annotation_size.item(row))
        return [
            *(Member(kind, *image, f"{key}.{kind}") for kind in kinds),
            Member("json", *annotation, f"{key}.json"),
        ]

    @classmethod
    def read(cls, storage: Storage, shard: str) -> ShardIndex:
        """Reads the index that lies beside the shard of that name.

        Raises:
            InputError: absent, not of this format, or not the one that `dataset.json` speaks of.
        """
        name = index_name(shard)
        try:
            return storage.parse_file(name, cls.from_bytes)
        except FormatError as error:
            raise InputError(
                f"{storage.where(name)}: {error}; copy it again, or build the data set again"
            ) from None
        except OSError as error:
            raise InputError(f"{storage.where(name)}: cannot be read: {error}") from None

    @classmethod
    def from_bytes(cls, content: bytes) -> ShardIndex:
        """Parses the content of an index."""
        head, _, body = content.partition(b"\n")
        words = body.split()
        try:
            version, num_samples = head.split()
            count = int(num_samples)
        except ValueError:
            raise FormatError("does not begin with its version and its number of samples") from None
        if version != b"v1.2":
            raise FormatError(f"is of version {version[:20]!r}, only v1.2 is known")
        width = len(words) // count if count > 0 else 8
        if count < 0 or width not in (4, 8) or len(words) != count * width:
            raise FormatError(f"does not have the members of {count} samples")
        has_images = width == 8
        if set(words[width - 4 :: width]) - {b"json"}:
            raise FormatError("does not have an annotation last in every sample")
        names = words[width - 1 :: width]
        keys = [name.removesuffix(b".json") for name in names]
        if not all(map(valid_key, map(_ascii, keys))):
            raise FormatError("has a key that is not made of letters, digits, '_' and '-'")
        if len(set(keys)) < count:
            twice = next(key for key, number in Counter(keys).items() if number > 1)
            raise FormatError(f"has the key {_ascii(twice)!r} twice")
        kinds = {kind.encode(): number for number, kind in enumerate(IMAGE_KINDS)}
        zeros = np.zeros(count, dtype=np.int64)
        try:
            image_kind = [kinds[kind] for kind in words[0::8]] if has_images else _NO_IMAGE
            return cls(
                image_offset=_numbers(words[1::8]) if has_images else zeros,
                image_size=_numbers(words[2::8]) if has_images else zeros,
                image_kind=np.full(count, image_kind, dtype=np.uint8),
                annotation_offset=_numbers(words[width - 3 :: width]),
                annotation_size=_numbers(words[width - 2 :: width]),
                keys=Keys(keys),
            )
        except (KeyError, ValueError, OverflowError) as error:
            raise FormatError(f"has an odd member ({error})") from None


def index_name(shard: str) -> str:
    """The name of the index that lies beside a shard."""
    return f"{shard.removesuffix('.tar')}.idx"


def index_bytes(samples: Sequence[Iterable[Member]]) -> bytes:
    """The content of an index: for each sample its members, the annotation last."""
    lines = (" ".join(" ".join(map(str, member)) for member in sample) for sample in samples)
    return "".join([f"v1.2 {len(samples)}\n", *(f"{line}\n" for line in lines)]).encode("ascii")


def _ascii(content: bytes) -> str:
    return content.decode("ascii", "replace")


def _numbers(words: list[bytes]) -> Int64[np.ndarray, " sample"]:
    numbers = np.fromiter(map(int, words), dtype=np.int64, count=len(words))
    if len(numbers) and numbers.min() < 0:
        raise ValueError("a negative number")
    return numbers
