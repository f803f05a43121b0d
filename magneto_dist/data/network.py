"""Files behind URLs: clients by scheme, asked again where the network fails."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, TypeVar

from magneto_dist.data.transfer import stream
from magneto_dist.errors import FormatError, InputError

Answer = TypeVar("Answer")
REMOTE_SCHEMES = ("http", "https", "s3", "gs", "hf")
ATTEMPTS = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0  # three times as long each time: 66 s in all
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # it is not the network
_SPOILED_ATTEMPTS = 4  # more would get the same wrong content: the server has no other
_READ_TIMEOUT_S = 60  # between two pieces of an answer; see also transfer.py


def is_url(name: str) -> bool:
    """Whether the name begins with one of the schemes."""
    scheme, has_scheme, _ = name.partition("://")
    return bool(has_scheme) and scheme in REMOTE_SCHEMES


def filesystem(url: str) -> Any:
    """The fsspec client for the scheme of a URL.

    Raises:
        InputError: its package is not installed.
    """
    scheme = url.partition("://")[0]
    import fsspec  # here, because a local data set needs no network client

    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(
                    total=None, sock_connect=_READ_TIMEOUT_S, sock_read=_READ_TIMEOUT_S
                )
            }
        if scheme == "s3":  # else a part of 50 MB is seen only when it is whole
            options["max_concurrency"] = 1
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        client = {"s3": "magneto-dist[s3]", "gs": "gcsfs", "hf": "huggingface_hub"}
        raise InputError(
            f"{url}: {error}; install it: pip install '{client.get(scheme, 'fsspec[http]')}'"
        ) from None


def retried(url: str, ask: Callable[[], Answer], attempts: int | None = None) -> Answer:
    """`ask()`, repeated with growing pauses where the network fails.

    Args:
        url: what it is about, for messages.
        ask: may be called again after an error; a FormatError says that the answer is no good.
        attempts: at most; None: ATTEMPTS.

    Raises:
        InputError: there is no such file.
        FormatError: of `ask`, which was given no better answer.
        OSError: refused, or the last attempt has failed, too.
    """
    attempts = ATTEMPTS if attempts is None else attempts
    num_spoiled = 0
    for attempt in range(attempts):
        try:
            return ask()
        except FormatError:
            num_spoiled += 1
            if num_spoiled == _SPOILED_ATTEMPTS or attempt == attempts - 1:
                raise
        except Exception as raised:  # every client has its own errors of the network
            error = _cause(url, raised)
            if isinstance(error, FileNotFoundError):
                raise InputError(f"{url}: does not exist") from None
            if attempt == attempts - 1 or _is_refusal(error):
                raise OSError(f"{url}: {type(error).__name__}: {error}") from error
        time.sleep(min(_FIRST_PAUSE_S * 3.0**attempt, _LONGEST_PAUSE_S))
    raise AssertionError("unreachable")


def fetch(url: str, max_bytes: int, attempts: int) -> bytes:
    """The content of one file.

    Raises:
        InputError: there is no such file, or it is larger than that.
        OSError: as `retried`.
    """
    client = filesystem(url)

    def ask() -> bytes:
        content = bytearray()
        with stream(client, url, max_bytes + 1) as file:
            # A read gives what has arrived; only the one at the end tells that the connection was
            # cut.
            while piece := file.read(max_bytes + 1 - len(content)):
                content += piece
        return bytes(content)

    content = retried(url, ask, attempts)
    if len(content) > max_bytes:
        raise InputError(f"{url}: has more than {max_bytes} bytes")
    return content


def _cause(url: str, error: Exception) -> BaseException:
    """What went wrong: HTTP's client calls whatever kept it from a size FileNotFoundError."""
    cause = error.__cause__
    if not url.startswith("http") or not isinstance(error, FileNotFoundError) or cause is None:
        return error
    return error if getattr(cause, "status", None) in (404, 410) else cause


def _is_refusal(error: BaseException) -> bool:
    """Whether asking again would get the same answer."""
    status = getattr(error, "status", None)
    has_been_refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    is_of_the_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
    return has_been_refused or is_of_the_disk or isinstance(error, PermissionError)
