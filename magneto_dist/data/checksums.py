"""Checksums that a store tells of a file, compared with what came over the network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from magneto_dist.data.transfer import Readable
from magneto_dist.errors import FormatError

_HEX_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_DIGESTS = {"sha-256": "sha256", "md5": "md5"}


class Checksum(NamedTuple):
    """Hash of a file's content."""

    algorithm: Literal["sha256", "md5"]
    digest: str
    """Hexadecimal digits."""


def told_checksum(info: Mapping[str, Any]) -> Checksum | None:
    """What an fsspec client's `info` tells of a file's content; None: nothing, as far as we know.

    That is a SHA-256 from hf, `md5Hash` from gs, the headers Digest and Content-MD5 from http, and
    an ETag that looks like an MD5, as in S3 unless the object was uploaded in parts. It may be of
    something else (an encrypted or compressed form): `CheckedReadings` bears with that.
    """
    if sha256 := (info.get("lfs") or {}).get("sha256"):
        return Checksum("sha256", sha256)
    for part in str(info.get("Digest", "")).split(","):
        name, _, value = part.strip().partition("=")
        if (algorithm := _DIGESTS.get(name.lower())) and (digest := _from_base64(value)):
            return Checksum("sha256" if algorithm == "sha256" else "md5", digest)
    for field in ("md5Hash", "Content-MD5"):
        if digest := _from_base64(str(info.get(field, ""))):
            return Checksum("md5", digest)
    is_md5 = _HEX_MD5.fullmatch(str(info.get("ETag", "")))
    return Checksum("md5", is_md5[1]) if is_md5 else None


def _from_base64(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).hex()
    except ValueError:
        return ""


class CheckedReadings:
    """Readings of one file, of which the first is accepted that the store's checksum confirms.

    One that gives the same as an earlier reading is accepted, too: then the checksum is of
    something else, for a network does not spoil a file twice in the same way.

    Args:
        told: by the store; None: nothing.
        twice: without a checksum, too, accept no reading before another has given the same.
    """

    def __init__(self, told: Checksum | None, twice: bool) -> None:
        self._told, self._twice = told, twice
        self._seen: set[str] = set()

    def hashed(self, file: Readable) -> HashedFile:
        """The file, for one reading."""
        is_needed = self._told is not None or self._twice
        return HashedFile(file, self._told.algorithm if self._told else "sha256", is_needed)

    def check(self, file: HashedFile) -> None:
        """Raises FormatError unless the reading is accepted."""
        if file.digest == (self._told.digest if self._told else ""):
            return
        is_new = file.digest not in self._seen
        self._seen.add(file.digest)
        if is_new and self._told is not None:
            algorithm = self._told.algorithm.upper()
            raise FormatError(f"its {algorithm} is not the one that the server tells")
        if is_new and self._twice:
            raise FormatError("no two readings gave the same content")


class HashedFile:
    """A file that is hashed, and its bytes counted, while it is read."""

    def __init__(self, file: Readable, algorithm: str, is_needed: bool = True) -> None:
        self._file = file
        self._hash = hashlib.new(algorithm, usedforsecurity=False) if is_needed else None
        self.num_bytes = 0

    @property
    def digest(self) -> str:
        """Hexadecimal digits; "" where no hash is needed."""
        return self._hash.hexdigest() if self._hash else ""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, and none only at the end."""
        content = self._file.read(size)
        self.num_bytes += len(content)
        if self._hash:
            self._hash.update(content)
        return content
