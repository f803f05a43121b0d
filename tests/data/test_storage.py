from __future__ import annotations

import fcntl
import os
import pickle
import resource
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import pytest

from magneto_dist.data.storage import Storage
from magneto_dist.errors import InputError

CONTENT = bytes(range(256)) * 4000
NAMES = [f"train-{number:06d}.tar" for number in range(4)]


class Server:
    """Serves a folder on loopback and counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.cut_off_after: int | None = None
        self.failures_left = 0
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_HEAD(self) -> None:
                server.requests["HEAD", self.path.lstrip("/")] += 1
                super().do_HEAD()

            def do_GET(self) -> None:
                server.requests["GET", self.path.lstrip("/")] += 1
                if server.failures_left > 0:
                    server.failures_left -= 1
                    self.send_error(503)
                    return
                if server.cut_off_after is None:
                    super().do_GET()
                    return
                self.send_response(200)  # without a length, as from a broken proxy
                self.end_headers()
                self.wfile.write(CONTENT[: server.cut_off_after])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def gets(self, name: str) -> int:
        return self.requests["GET", name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(CONTENT)
    (folder / "dataset.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture(params=["local", "http"])
def storage(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(folder))
    return Storage(request.getfixturevalue("server").url + "/", str(tmp_path / "cache"))


def test_reads_ranges_files_and_sizes(storage):
    for offset, size in [(0, 1), (513, 70_000), (len(CONTENT) - 7, 7), (100, 0)]:
        assert storage.read(NAMES[0], offset, size) == CONTENT[offset : offset + size]
    assert storage.read_file("dataset.json") == b"{}"
    assert storage.size(NAMES[0]) == len(CONTENT)
    assert storage.exists(NAMES[0])
    assert not storage.exists("train-000099.tar")


def test_absent_file_and_range_past_the_end_name_the_file(storage):
    for read in (storage.read_file, storage.size, lambda name: storage.read(name, 0, 1)):
        with pytest.raises(InputError, match=r"train-000099\.tar: does not exist"):
            read("train-000099.tar")
    with pytest.raises(InputError, match=r"train-000000\.tar: has 1024000 bytes, but 1024001"):
        storage.read(NAMES[0], len(CONTENT), 1)
    with pytest.raises(InputError, match="are needed"):
        storage.read(NAMES[0], 0, 1 << 60)  # no attempt to hold an exabyte


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd", "a/b.tar", "pipe:id", "..", "", ".hidden", "a\0b", "a\nb"]
)
def test_names_that_lead_elsewhere_are_refused(storage, name):
    for read in (storage.read_file, storage.size, storage.local_path):
        with pytest.raises(InputError, match="data set names the file"):
            read(name)
    with pytest.raises(InputError, match="data set names the file"):
        storage.read(name, 0, 1)


@pytest.mark.parametrize(
    "root", ["pipe:cat /etc/passwd", "file:///etc", "ftp://host/x", "github://x", "a::http://b"]
)
def test_other_roots_are_refused(root):
    with pytest.raises(InputError, match="must be a folder or a URL"):
        Storage(root)


def test_missing_client_is_named():
    pytest.importorskip("fsspec")
    if __import__("importlib.util").util.find_spec("gcsfs"):
        pytest.skip("the client is installed")
    with pytest.raises(InputError, match="pip install 'gcsfs'"):
        Storage("gs://bucket/data").read_file("dataset.json")


def test_pickled_storage_reads_and_holds_no_descriptor(storage):
    storage.read(NAMES[0], 0, 1)
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read(NAMES[0], 5, 5) == CONTENT[5:10]
    assert copy.is_remote == storage.is_remote


def test_open_descriptors_are_bounded(folder):
    storage = Storage(str(folder))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(100):
        name = f"train-{number:06d}.tar"
        (folder / name).write_bytes(b"x")
        assert storage.read(name, 0, 1) == b"x"
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 64
    del storage
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def read_byte(storage: Storage, offset: int) -> bytes:
    return storage.read(NAMES[0], offset, 1)


def test_threads_and_processes_download_a_shard_once(server, tmp_path):
    storage = Storage(server.url, str(tmp_path / "cache"))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool, ThreadPoolExecutor(4) as threads:
        offsets = range(8)
        results = [*pool.map(partial(read_byte, storage), offsets)]
        results += threads.map(partial(read_byte, storage), offsets)
    assert results == [CONTENT[k : k + 1] for k in (*offsets, *offsets)]
    assert server.gets(NAMES[0]) == 1


def test_a_shard_on_its_way_is_left_to_who_fetches_it(server, tmp_path):
    storage = Storage(server.url, str(tmp_path / "cache"))
    lock = storage.local_path(NAMES[0]).with_name(f".{NAMES[1]}.lock")
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for name in NAMES[:3]:
            storage.fetch_ahead(name)
        assert cached(tmp_path / "cache") == {NAMES[0], NAMES[2]}
    assert storage.read(NAMES[1], 0, 5) == CONTENT[:5]
    assert [server.gets(name) for name in NAMES[:3]] == [1, 1, 1]


def test_disk_that_fills_up_is_named_and_keeps_nothing(server, tmp_path):
    storage = Storage(server.url, str(tmp_path / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a write past that limit fails as one on a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, limits[1]))
        with pytest.raises(OSError, match=r"train-000000\.tar: OSError: .*File too large"):
            storage.read(NAMES[0], 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert server.gets(NAMES[0]) == 1  # the network is not to blame
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == [f".{NAMES[0]}.lock"]


def test_shard_stays_cached_without_a_request(server, tmp_path):
    cache = str(tmp_path / "cache")
    Storage(server.url, cache).read(NAMES[0], 0, 1)
    before = server.requests.total()
    assert Storage(server.url, cache).read(NAMES[0], 9, 9) == CONTENT[9:18]
    assert server.requests.total() == before


def test_other_version_of_a_data_set_is_not_mistaken_for_the_cached_one(server, folder, tmp_path):
    cache = str(tmp_path / "cache")
    Storage(server.url, cache, version="1").read(NAMES[0], 0, 1)
    (folder / NAMES[0]).write_bytes(b"new")
    assert Storage(server.url, cache, version="1").read(NAMES[0], 0, 3) == CONTENT[:3]
    assert Storage(server.url, cache, version="2").read(NAMES[0], 0, 3) == b"new"


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*.tar")}


def test_cache_is_bounded_and_drops_what_was_unused_for_longest(server, tmp_path):
    cache = tmp_path / "cache"
    storage = Storage(server.url, str(cache), cache_gb=2.5 * len(CONTENT) / 1e9)
    for seconds, name in ((300, NAMES[0]), (200, NAMES[1])):
        storage.read(name, 0, 1)
        path = storage.local_path(name)
        os.utime(path, (path.stat().st_mtime - seconds,) * 2)
    storage.read(NAMES[0], 0, 1)  # used again: now 1 is the oldest
    storage.read(NAMES[2], 0, 1)
    assert cached(cache) == {NAMES[0], NAMES[2]}
    assert storage.read(NAMES[1], 3, 3) == CONTENT[3:6]  # comes back when it is needed
    assert server.gets(NAMES[1]) == 2
    assert len(cached(cache)) == 2


def test_shard_larger_than_the_cache_is_an_error_that_names_the_setting(server, tmp_path):
    storage = Storage(server.url, str(tmp_path / "cache"), cache_gb=1e-6)
    with pytest.raises(InputError, match=r"raise data\.cache_gb"):
        storage.read(NAMES[0], 0, 1)


def test_short_download_never_gets_into_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setattr("magneto_dist.data.network.ATTEMPTS", 2)
    cache = tmp_path / "cache"
    storage = Storage(server.url, str(cache))
    server.cut_off_after = 1000
    with pytest.raises(OSError, match=r"download gave 1000 of 1024000 bytes"):
        storage.read(NAMES[0], 0, 1)
    assert not [path for path in cache.glob("*/*") if path.suffix != ".lock"]
    server.cut_off_after = None
    assert storage.read(NAMES[0], 0, 5) == CONTENT[:5]


def test_leftovers_of_a_killed_download_are_replaced(server, tmp_path):
    storage = Storage(server.url, str(tmp_path / "cache"))
    path = storage.local_path(NAMES[0])
    path.rename(path.with_name(f".{NAMES[0]}.tmp"))
    path.with_name(f".{NAMES[0]}.tmp").write_bytes(b"half")
    assert storage.read(NAMES[0], 0, 5) == CONTENT[:5]


def test_network_failure_is_retried_then_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr("magneto_dist.data.network.ATTEMPTS", 2)
    storage = Storage(server.url, str(tmp_path / "cache"))
    server.failures_left = 1
    assert storage.read_file("dataset.json") == b"{}"
    server.failures_left = 100
    with pytest.raises(OSError, match=r"dataset\.json: .*503"):
        storage.read_file("dataset.json")
