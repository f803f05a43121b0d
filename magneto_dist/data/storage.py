"""Bytes of a data set, from a folder or from an object store.

1. A name is checked: it comes from a file that somebody else may have written.
2. In a folder, ranges of a file are read in place.
3. Elsewhere (http, https, s3, gs, hf) a shard is downloaded whole, once a node, into a bounded
   cache, checked, and read there; so is an index whose hash is known. Other files are read
   directly.
4. What the network spoils, or brings too slowly, is asked for again, with growing pauses.

Reading a range of a remote shard for every sample would cost a request each; a whole shard costs
one for thousands of samples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from magneto_dist.data.checksums import CheckedReadings, told_checksum
from magneto_dist.data.network import REMOTE_SCHEMES, filesystem, retried
from magneto_dist.data.open_files import OpenFile, OpenFiles
from magneto_dist.data.shard_cache import Download, ShardCache, Size, default_cache_dir
from magneto_dist.data.transfer import Readable, answer, download, stream
from magneto_dist.errors import FormatError, InputError
from magneto_dist.files import sha256_of

Result = TypeVar("Result")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OTHER_SHA256 = "its SHA-256 is not the one in dataset.json"
_WHAT_TO_DO = (
    "copy the file again, or make the data set again (if by `shards.py index` over a network, then"
    " with --read_twice true)"
)
_READ_ATTEMPTS = 3


class Storage:
    """The files of one data set; picklable, opens nothing before the first read.

    Args:
        root: folder, or URL prefix with one of the schemes http, https, s3, gs, hf.
        cache_dir: where shards of remote data sets are kept; None: ~/.cache/magneto_dist/shards.
        cache_gb: most disk space of the cache, in 1e9 bytes, shared by all its data sets.
        version: content hash of the data set; another one never meets old cached shards.
        sha256: of files by name, as far as known; a download that does not have it is no good.
        num_bytes: of files by name, for those that may be kept in the cache without asking for it.

    Raises:
        InputError: a root of another kind (a shell command, for instance).
    """

    def __init__(
        self,
        root: str,
        cache_dir: str | None = None,
        cache_gb: float = 200.0,
        version: str = "",
        sha256: Mapping[str, str] | None = None,
        num_bytes: Mapping[str, int] | None = None,
    ) -> None:
        scheme, has_scheme, _ = root.partition("://")
        if root.startswith("pipe:") or (has_scheme and scheme not in REMOTE_SCHEMES):
            raise InputError(
                f"data set {root!r}: must be a folder or a URL that begins with one of"
                f" {', '.join(f'{scheme}://' for scheme in REMOTE_SCHEMES)}"
            )
        self.root = root.rstrip("/") or "/"
        self.cache_dir = cache_dir
        self.cache_gb = cache_gb
        self.version = version
        self.sha256 = dict(sha256 or {})
        self.num_bytes = dict(num_bytes or {})
        self.is_remote = bool(has_scheme)
        self._open_nothing()

    def __getstate__(self) -> dict[str, Any]:
        names = ("root", "cache_dir", "cache_gb", "version", "sha256", "num_bytes")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _open_nothing(self) -> None:
        self._open_files = OpenFiles()
        self._filesystem: Any = None

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of the file `name` from byte `offset` on.

        Raises:
            InputError: the file is absent, or ends before that.
            OSError: it cannot be read.
        """
        if not self.is_remote:
            return self._open(name).read(offset, size)
        # Not kept open: a deleted file would go on taking space of the cache.
        where = self.where(name)
        return self._from_cache(name, lambda path: OpenFile(path, where).read(offset, size))

    def _from_cache(self, name: str, read: Callable[[Path], bytes]) -> bytes:
        for _ in range(_READ_ATTEMPTS):
            try:
                return read(self.local_path(name))
            except FileNotFoundError:  # another process made room between our two steps
                continue
        raise InputError(
            f"{self.where(name)}: leaves the cache of {self.cache_gb:g} GB as soon as it is there;"
            " raise data.cache_gb"
        )

    def read_file(self, name: str) -> bytes:
        """The whole content of the file `name`.

        Raises:
            InputError: the file is absent.
            FormatError: its hash is known, and is not that.
            OSError: it cannot be read.
        """
        return self.parse_file(name, lambda content: content)

    def parse_file(self, name: str, parse: Callable[[bytes], Result]) -> Result:
        """What `parse` makes of the content of the file `name`.

        Args:
            name: of the file.
            parse: raises FormatError for content that is no good; what came over a network is then
                asked for again.

        Raises:
            InputError: the file is absent.
            FormatError: of `parse`; or its hash is known, and is not that.
            OSError: it cannot be read.
        """
        if not self.is_remote:
            return parse(self._checked(name, self._read_local(name)))
        if name in self.num_bytes:
            return parse(self._from_cache(name, Path.read_bytes))
        return self._request(
            name, lambda fs, url: parse(self._checked(name, answer(fs, "cat_file", url)))
        )

    def _read_local(self, name: str) -> bytes:
        try:
            return self._local(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.where(name)}: does not exist") from None

    def _checked(self, name: str, content: bytes) -> bytes:
        if self.sha256.get(name, "") not in ("", hashlib.sha256(content).hexdigest()):
            raise FormatError(_OTHER_SHA256)
        return content

    def read_through(
        self, name: str, read: Callable[[Readable], Result], *, twice: bool = False
    ) -> Result:
        """What `read` makes of the file `name`, of which nothing is kept.

        Where the store tells a checksum, what came over the network is compared with it.

        Args:
            name: of the file.
            read: reads the file once, from its start to its end; raises FormatError for content
                that is no good. Called anew where the network fails.
            twice: where the store tells no checksum, read until two readings agree.

        Raises:
            InputError: the file is absent, or the server does not tell its size.
            FormatError: of `read`; or no reading was confirmed.
            OSError: it cannot be read.
        """
        if not self.is_remote:
            try:
                file = self._local(name).open("rb")
            except (FileNotFoundError, NotADirectoryError):
                raise InputError(f"{self.where(name)}: does not exist") from None
            with file:
                return read(file)
        info = self._info(name)
        readings = CheckedReadings(told_checksum(info), twice)

        def ask(fs: Any, url: str) -> Result:
            with stream(fs, url, info["size"]) as content:
                file = readings.hashed(content)
                result = read(file)
            if file.num_bytes != info["size"]:
                raise OSError(f"gave {file.num_bytes} of {info['size']} bytes")
            readings.check(file)
            return result

        return self._request(name, ask)

    def names(self) -> list[str]:
        """The files directly in the folder or under the URL, as far as it can list them.

        Raises:
            InputError: there is no such folder, or it cannot be listed.
        """
        try:
            if not self.is_remote:
                return sorted(path.name for path in Path(self.root).iterdir())
            paths = self._retried(self.root, lambda fs, url: answer(fs, "ls", url, detail=False))
        except OSError as error:
            raise InputError(f"{self.root}: cannot be listed: {error}") from None
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})

    def exists(self, name: str) -> bool:
        """Whether the data set has the file `name`."""
        try:
            self.size(name)
        except InputError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of the file `name`.

        Raises:
            InputError: the file is absent, or the server does not tell its size.
        """
        if not self.is_remote:
            try:
                return self._local(name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise InputError(f"{self.where(name)}: does not exist; is all copied?") from None
        return self._info(name)["size"]

    def _info(self, name: str) -> dict[str, Any]:
        """What the store tells of a file: its size at least."""
        try:
            return self._request(name, lambda fs, url: _with_size(answer(fs, "info", url)))
        except FormatError as error:
            raise InputError(f"{self.where(name)}: {error}") from None

    def local_path(self, name: str) -> Path:
        """The file `name` on this machine, downloaded first where it must be.

        A path into the cache may vanish when other shards need the room: open it at once.
        """
        if not self.is_remote:
            return self._local(name)
        try:
            return self._cache().path(*self._cached(name))
        except FormatError as error:
            raise OSError(f"{self.where(name)}: {error}") from None

    def fetch_ahead(self, name: str) -> None:
        """Downloads the file `name` of a remote data set, unless it is there or on its way.

        Raises:
            InputError, FormatError, OSError: it cannot be had.
        """
        self._cache().fetch_ahead(*self._cached(name))

    def require_cache_space(self, num_bytes: Mapping[str, int]) -> None:
        """Looks whether files of a remote data set, with those sizes, will fit into its cache.

        Raises:
            InputError: the disk has too little room for what they make the cache grow.
        """
        if self.is_remote:
            self._cache().require_space_for(self._cache_key, num_bytes)

    @property
    def _cache_key(self) -> str:
        return f"{self.root}\n{self.version}"

    def _cache(self) -> ShardCache:
        folder = Path(self.cache_dir) if self.cache_dir else default_cache_dir()
        return ShardCache(folder, self.cache_gb)

    def _cached(self, name: str) -> tuple[str, str, Size, Download]:
        """How the cache calls a file, and gets it."""
        _check_name(name)
        return (
            self._cache_key,
            name,
            lambda: self.num_bytes.get(name) or self.size(name),
            lambda target, num_bytes: self._request(
                name, lambda fs, url: self._download(fs, url, name, target, num_bytes)
            ),
        )

    def _download(self, fs: Any, url: str, name: str, target: Path, num_bytes: int) -> None:
        download(fs, url, target)
        if target.stat().st_size != num_bytes:
            raise OSError(f"download gave {target.stat().st_size} of {num_bytes} bytes")
        if self.sha256.get(name, "") not in ("", sha256_of(target)):
            raise FormatError(f"{_OTHER_SHA256}; {_WHAT_TO_DO}")

    def _local(self, name: str) -> Path:
        _check_name(name)
        return Path(self.root) / name

    def where(self, name: str) -> str:
        """Path or URL of the file `name`, for people."""
        return f"{self.root}/{name}"

    def _open(self, name: str) -> OpenFile:
        try:
            return self._open_files.get(name, lambda: OpenFile(self._local(name), self.where(name)))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.where(name)}: does not exist") from None

    def _request(self, name: str, ask: Any) -> Any:
        """`ask(filesystem, url)` about a file."""
        _check_name(name)
        return self._retried(self.where(name), ask)

    def _retried(self, url: str, ask: Any) -> Any:
        """`ask(filesystem, url)`, repeated where the network fails."""
        if self._filesystem is None:
            self._filesystem = filesystem(self.root)
        return retried(url, lambda: ask(self._filesystem, url))


def _with_size(info: dict[str, Any]) -> dict[str, Any]:
    if info.get("size") is None:  # a spoiled answer may lack it, too
        raise FormatError("the server does not tell its size")
    return info


def _check_name(name: str) -> None:
    # Also keeps out "../x", "/etc/x", "pipe:x" and hidden files.
    if _NAME.fullmatch(name) is None:
        raise InputError(
            f"data set names the file {name!r}: only letters, digits, '.', '_' and '-' are allowed"
        )
