"""What lies where in a WebDataset tar that somebody else has written.

A tar is read once from its start to its end, from wherever it is, and hashed on the way. Nothing in
it is trusted: links, devices and members that do not fit are left aside, nothing is unpickled or
unpacked to disk. Where the network fails, the tar is read anew. `tarfile` takes a damaged header
for the end of a tar: we look at what follows.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from magneto_dist.data.image_bytes import MAX_IMAGE_BYTES, checked_header
from magneto_dist.data.parallel import Tick
from magneto_dist.data.sample import AnnotationFields, BadSample, parse_annotation
from magneto_dist.data.shard_index import Member
from magneto_dist.data.storage import Storage
from magneto_dist.data.transfer import Readable
from magneto_dist.errors import FormatError, InputError

_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<extension>[^/]+)", re.DOTALL)
"""WebDataset's rule: the key ends at the first dot of the file name."""
_NO_FILE = "is no file of a sample"
_BLOCK_BYTES = 512
_READ_BYTES = 1 << 23  # where a store has to be asked for each piece, this is one


class ScannedSample(NamedTuple):
    """One sample, as good as its annotation says."""

    name: str
    """Its key in the tar, with folders."""
    members: tuple[Member, ...]
    """The picture, if it has one, and the annotation; without names."""
    tags: tuple[str, ...]
    important: tuple[bool, ...] | None


@dataclass(frozen=True)
class ScannedTar:
    """All samples of a tar."""

    name: str
    num_bytes: int
    sha256: str
    samples: list[ScannedSample]
    skipped: list[tuple[str, str]]
    """Name and reason."""


@dataclass(frozen=True)
class TarScan:
    """Reads a tar when called; runs in any process.

    Raises:
        InputError: it is no whole tar.
    """

    storage: Storage
    image_keys: tuple[str, ...]
    """Extensions that a picture may have."""
    annotation_key: str
    """Extension of the JSON."""
    fields: AnnotationFields
    max_megapixels: float
    read_twice: bool = False
    """What comes over a network, where the store tells no checksum."""

    def __call__(self, name: str, tick: Tick) -> ScannedTar:
        """All samples of the tar `name`; ticks at the end."""
        where = self.storage.where(name)
        try:
            scanned = self.storage.read_through(
                name, lambda file: self._scan(_Hashed(file), name), twice=self.read_twice
            )
        except FormatError as error:
            raise InputError(
                f"{where}: {error}: it is damaged or cut off; copy it again, repair it, or leave"
                " it out"
            ) from None
        except OSError as error:
            raise InputError(f"{where}: cannot be read: {error}") from None
        tick()
        return scanned

    def _scan(self, file: _Hashed, name: str) -> ScannedTar:
        samples: list[ScannedSample] = []
        skipped: list[tuple[str, str]] = []
        seen: set[str] = set()
        for key, members in self._samples(file, name, skipped):
            try:
                if key in seen:
                    raise BadSample("its name occurs twice in this tar")
                seen.add(key)
                samples.append(self._sample(key, members))
            except BadSample as error:
                skipped.append((f"{name}/{key}", error.reason))
        return ScannedTar(name, file.num_bytes, file.sha256.hexdigest(), samples, skipped)

    def _samples(
        self, file: _Hashed, name: str, skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[str, list[tuple[Member, bytes]]]]:
        """Neighbouring members of one key, with their contents."""
        current, members = None, []
        try:
            with tarfile.open(fileobj=cast(BinaryIO, file), mode="r|", bufsize=_READ_BYTES) as tar:
                for info in tar:
                    match = _MEMBER.fullmatch(info.name)
                    if not is_plain_file(info) or match is None:
                        if not info.isdir():
                            reason = "is a sparse file" if info.issparse() else _NO_FILE
                            skipped.append((f"{name}/{info.name[:200]}", reason))
                        continue
                    key, extension = match["key"], match["extension"].lower()
                    if key != current and members:
                        yield str(current), members
                        members = []
                    current = key
                    if extension not in (*self.image_keys, self.annotation_key):
                        continue
                    if info.size > MAX_IMAGE_BYTES:
                        skipped.append((f"{name}/{info.name[:200]}", f"has {info.size} bytes"))
                        continue
                    content = tar.extractfile(info)
                    assert content is not None  # it is a regular file
                    member = Member(extension, info.offset_data, info.size, "")
                    members.append((member, content.read()))
                if members:
                    yield str(current), members
            file.read_on()
            check_end(tar.offset, file.data_end, file.num_bytes)
        except (tarfile.TarError, EOFError) as error:
            raise FormatError(f"is no whole tar ({error})") from None

    def _sample(self, key: str, members: list[tuple[Member, bytes]]) -> ScannedSample:
        images = [entry for entry in members if entry[0].extension != self.annotation_key]
        annotations = [entry for entry in members if entry[0].extension == self.annotation_key]
        if len(annotations) != 1 or len(images) > 1:
            raise BadSample(f"has {len(images)} pictures and {len(annotations)} annotations")
        member, content = annotations[0]
        tags, important = parse_annotation(content, self.fields)
        found = [member._replace(extension="json")]
        for image, pixels in images:
            header = checked_header(pixels, self.max_megapixels)
            found.insert(0, image._replace(extension=header.kind))
        tags = tuple(map(sys.intern, tags))  # the same few in millions of samples
        return ScannedSample(key, tuple(found), tags, important)


def is_plain_file(info: tarfile.TarInfo) -> bool:
    """Whether the bytes in the tar are the file; of a sparse one the holes are not there."""
    return info.isreg() and not info.issparse()


def members_of(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar on disk; their contents are not read.

    Raises:
        TarError: it is no whole tar; members before the damage have been given.
    """
    with tarfile.open(path, "r:") as tar:
        yield from tar
    with path.open("rb") as file:
        num_bytes, data_end = file.seek(min(tar.offset, path.stat().st_size)), 0
        while content := file.read(_READ_BYTES):
            data_end = _data_end(content, num_bytes, data_end)
            num_bytes += len(content)
    check_end(tar.offset, data_end, num_bytes)


def check_end(offset: int, data_end: int, num_bytes: int) -> None:
    """Checks that a tar ends where reading it has stopped.

    Args:
        offset: where `tarfile` found no further header, in bytes from the start.
        data_end: bytes up to and including the last one that is not zero.
        num_bytes: of the tar.

    Raises:
        ReadError: no end of a tar is there, or something follows it.
    """
    if data_end > offset:
        raise tarfile.ReadError(f"no header is readable at byte {offset}, but data goes on there")
    if num_bytes < offset + _BLOCK_BYTES:
        raise tarfile.ReadError(f"nothing marks its end at byte {offset}")


def _data_end(content: bytes, offset: int, data_end: int) -> int:
    """`data_end` after the content that lies at the offset."""
    num_bytes = len(content.rstrip(b"\0"))
    return offset + num_bytes if num_bytes else data_end


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.data_end = 0
        """Bytes up to and including the last one so far that is not zero."""

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.sha256.update(content)
        self.data_end = _data_end(content, self.num_bytes, self.data_end)
        self.num_bytes += len(content)
        return content

    def read_on(self) -> None:
        """To the end, beyond which tar has nothing to say."""
        while self.read(_READ_BYTES):
            pass
