"""HTTP servers on loopback that do what networks do to a folder, or to another server's answers."""

from __future__ import annotations

import base64
import hashlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("503", "reset", "cut off", "short", "flipped", "slow")
# "trickle", too: a byte a moment, never silent; only for clients that do not wait for the end
_TRICKLE_S = 30


class FaultyServer:
    """What is wrong with the answers to come.

    A file that is asked for over and over is served at last: no fault comes three times in a row.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.faults: tuple[str, ...] = ()
        self.probability = 0.5
        self.tells_md5 = False
        self.random = random.Random(0)
        self.asked: Counter[str] = Counter()
        """Contents, by file."""
        self.done: Counter[str] = Counter()
        """Faults that were committed."""
        self._in_a_row: Counter[str] = Counter()
        self._lock = threading.Lock()

    def next_fault(self, name: str) -> str | None:
        with self._lock:
            self.asked[name] += 1
            # No check could find every flipped bit in the one file without a hash.
            has_hash = not name.endswith("dataset.json")
            faults = [fault for fault in self.faults if has_hash or fault != "flipped"]
            return self._choice(name, faults)

    def fails_to_tell_size(self, name: str) -> bool:
        with self._lock:
            faults = [fault for fault in self.faults if fault == "503"]
            return self._choice(f"size of {name}", faults) is not None

    def _choice(self, name: str, faults: list[str]) -> str | None:
        if not faults or self._in_a_row[name] == 2 or self.random.random() >= self.probability:
            self._in_a_row[name] = 0
            return None
        self._in_a_row[name] += 1
        fault = self.random.choice(faults)
        self.done[fault] += 1
        return fault


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: object, server_state: FaultyServer, **options: object) -> None:
        self.state = server_state
        super().__init__(*args, **options)

    def do_HEAD(self) -> None:
        if self.state.fails_to_tell_size(self.path.lstrip("/")):
            self.send_error(503)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        fault = self.state.next_fault(self.path.lstrip("/"))
        path = Path(self.translate_path(self.path))
        if fault is None or not path.is_file():
            super().do_GET()
        else:
            self._spoil(fault, path.read_bytes())

    def _spoil(self, fault: str, content: bytes) -> None:
        if fault == "503":
            self.send_error(503)
        elif fault == "slow":
            self._answer(content[:100], length=len(content))
            time.sleep(0.3)
            self.wfile.write(content[100:])
        elif fault == "trickle":
            self._answer(b"", length=len(content))
            with suppress(ConnectionError):
                self._trickle(content)
        elif fault == "flipped":
            at = self.state.random.randrange(len(content))  # a network flips another bit each time
            flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
            self._answer(flipped, length=len(content))
        elif fault == "short":
            self._answer(content[: len(content) // 3], length=None)
        else:
            self._answer(content[: len(content) // 2], length=len(content))
            if fault == "reset":
                reset_at_close = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_at_close)

    def _trickle(self, content: bytes) -> None:
        for number in range(int(_TRICKLE_S / 0.05)):
            self.wfile.write(content[number : number + 1])
            time.sleep(0.05)

    def _answer(self, content: bytes, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.state.tells_md5 and path.is_file():
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()
            self.send_header("Content-MD5", base64.b64encode(md5).decode())
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Proxy(_Handler):
    def __init__(self, *args: object, upstream: tuple[str, int], **options: object) -> None:
        self.upstream = upstream
        super().__init__(*args, **options)

    def do_HEAD(self) -> None:
        self._forward(None)

    def do_GET(self) -> None:
        self._forward(self.state.next_fault(self.path.partition("?")[0].lstrip("/")))

    def _forward(self, fault: str | None) -> None:
        connection = HTTPConnection(*self.upstream, timeout=30)
        with closing(connection):
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        if fault is not None and answer.status in (200, 206):
            self._spoil(fault, content)
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    with _running(partial(_Handler, directory=str(folder))) as state:
        yield state


@contextmanager
def standing_before(host: str, port: int) -> Iterator[FaultyServer]:
    """A proxy of another server, for what is read from it."""
    with _running(partial(_Proxy, upstream=(host, port))) as state:
        yield state


@contextmanager
def _running(handler: partial[_Handler]) -> Iterator[FaultyServer]:
    state = FaultyServer("")
    handler = partial(handler, server_state=state)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield state
        server.shutdown()
        thread.join()
