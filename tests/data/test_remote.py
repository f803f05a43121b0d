"""Data sets behind real servers: HTTP with faults, and S3; every sample arrives once."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from faulty_server import FAULTS, FaultyServer, serving, standing_before
from magneto_dist.config import AugmentConfig, Config, DataConfig, TagsConfig, TrainConfig
from magneto_dist.data.indexing import index_tars
from magneto_dist.data.loader import Loader
from magneto_dist.data.network import filesystem
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset, ShardIndex
from magneto_dist.data.storage import Storage
from magneto_dist.data.transfer import Readable, _Ranges
from magneto_dist.errors import InputError
from magneto_dist.world import World
from processes import TINY, run
from small_data import NUM_SAMPLES, VOCABULARY, key_of, read_jsonl

KEYS = Counter(key_of(number) for number in range(NUM_SAMPLES["train"]))


@pytest.fixture
def server(small_dataset_dir: Path) -> Iterator[FaultyServer]:
    with serving(small_dataset_dir) as server:
        yield server


def loader(dataset: Dataset, num_workers: int, batch_size: int = 8, **data: int) -> Loader:
    config = Config(
        augment=AugmentConfig(image_size=16),
        data=DataConfig(num_workers=num_workers, decoder="cpu", num_streams=2, **data),
        tags=TagsConfig(max_tags=8),
        train=TrainConfig(global_batch_size=batch_size),
    )
    plan = BatchPlan.derive(batch_size, 1, batch_size, 1)
    return Loader(dataset, "train", config, World(), plan, training=True)


def keys_of_an_epoch(made: Loader) -> Counter[str]:
    batches = list(made.batches(1, made.steps_per_epoch))
    assert [reject for batch in batches for reject in batch.rejects] == []
    return Counter(key for batch in batches for key in batch.keys if key)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(server, tmp_path, fault):
    server.faults = (fault,)
    dataset = Dataset.open(server.url, cache_dir=str(tmp_path))
    assert keys_of_an_epoch(loader(dataset, num_workers=0)) == KEYS
    assert server.done[fault] >= 2


@pytest.mark.parametrize("fault", ["short", "flipped"])
def test_spoiled_indexes_and_vocabulary_are_asked_for_again(server, tmp_path, fault):
    server.faults, server.probability = (fault,), 1.0  # each file is good at the third time
    dataset = Dataset.open(server.url, cache_dir=str(tmp_path))
    assert dataset.vocabulary.tags == VOCABULARY.tags
    assert server.asked["vocabulary.txt"] == 3
    assert ShardIndex.read(dataset.storage, "train-000003.tar").keys[0] == key_of(21)
    assert server.asked["train-000003.idx"] == 3
    assert server.asked["dataset.json"] == (3 if fault == "short" else 1)


def test_index_is_asked_for_once(server, tmp_path):
    for _ in range(2):
        dataset = Dataset.open(server.url, cache_dir=str(tmp_path))
        assert ShardIndex.read(dataset.storage, "train-000001.tar").num_samples == 7
    assert server.asked["train-000001.idx"] == 1
    (path,) = tmp_path.glob("*/*.idx")
    path.unlink()  # to make room
    assert ShardIndex.read(dataset.storage, "train-000001.tar").num_samples == 7


def test_spoiled_files_for_good_are_one_error_each(small_dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("magneto_dist.data.network._FIRST_PAUSE_S", 0.001)
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset_dir, folder)
    (folder / "train-000001.idx").write_bytes(b"v1.2 0\n")
    with serving(folder) as server:
        dataset = Dataset.open(server.url, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(InputError, match=r"train-000001\.idx: cannot be read: .* 7 of \d+ byt"):
            ShardIndex.read(dataset.storage, "train-000001.tar")
        (folder / "vocabulary.txt").write_bytes(b"sea\nsea\n")
        with pytest.raises(InputError, match=r"/vocabulary\.txt: .*'sea' occurs twice"):
            Dataset.open(server.url)
        (folder / "dataset.json").write_bytes(b"<!DOCTYPE html>")
        with pytest.raises(InputError, match=r"/dataset\.json: is not JSON"):
            Dataset.open(server.url)
        assert 1 < server.asked["dataset.json"] < 10


INDEX_OPTIONS = {"important_field": "important", "important_as": "flags"}


@pytest.mark.parametrize("fault", ["503", "reset", "cut off", "short", "slow"])
def test_index_over_a_bad_network_is_that_of_a_good_one(server, small_dataset_dir, tmp_path, fault):
    index_tars(str(small_dataset_dir), tmp_path / "local", **INDEX_OPTIONS)
    server.faults = (fault,)
    index_tars(server.url, tmp_path / "remote", **INDEX_OPTIONS)
    assert server.done[fault] >= 2
    local, remote = (Dataset.open(str(tmp_path / name)) for name in ("local", "remote"))
    assert remote.splits == local.splits  # with all hashes
    assert remote.vocabulary.tags == local.vocabulary.tags


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "cannot be read: .*503"),
        ("reset", "cannot be read: "),
        ("cut off", "cannot be read: .*not completed"),
        ("short", "is no whole tar .* damaged or cut off"),
    ],
)
def test_tar_that_never_arrives_whole_is_one_clear_error(
    server, tmp_path, monkeypatch, fault, reason
):
    monkeypatch.setattr("magneto_dist.data.network.ATTEMPTS", 2)
    server.faults, server.probability = (fault,), 1.0
    with pytest.raises(InputError, match=rf"train-000002\.tar: {reason}"):
        index_tars(f"{server.url}/train-000002.tar", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_failing_to_tell_a_size_is_not_taken_for_absence(server, monkeypatch):
    server.faults, server.probability = ("503",), 1.0
    assert Storage(server.url).size("train-000000.tar") > 0
    monkeypatch.setattr("magneto_dist.data.network.ATTEMPTS", 1)
    with pytest.raises(OSError, match="503"):
        Storage(server.url).size("train-000001.tar")


def test_run_over_a_bad_network_trains_on_every_sample_once(server, tmp_path):
    server.faults = FAULTS
    run(
        "train_ls.py",
        f"--data.path={server.url}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'run'}",
        "--data.ledger=true",
        "--train.epochs=2",
        *TINY,
        "--data.num_workers=2",
        ranks=2,
    )
    entries = [e for path in (tmp_path / "run/ledger").iterdir() for e in read_jsonl(path)]
    for epoch in range(2):
        assert Counter(e["key"] for e in entries if e["epoch"] == epoch) == KEYS
    assert not [e for path in (tmp_path / "run/quarantine").iterdir() for e in read_jsonl(path)]
    assert server.done.total() >= 5


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("magneto_dist.data.network._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("magneto_dist.data.transfer.WINDOW_S", 0.5)
    monkeypatch.setattr("magneto_dist.data.transfer.ANSWER_WITHIN_S", 0.5)


@pytest.mark.usefixtures("impatient")
def test_what_trickles_is_broken_off_and_asked_for_again(server, tmp_path):
    server.faults, server.probability = ("trickle",), 0.3
    dataset = Dataset.open(server.url, cache_dir=str(tmp_path / "cache"))
    assert keys_of_an_epoch(loader(dataset, num_workers=0)) == KEYS
    index_tars(server.url, tmp_path / "index", **INDEX_OPTIONS)
    assert server.done["trickle"] >= 2


@pytest.mark.usefixtures("impatient")
def test_a_server_that_only_trickles_is_one_clear_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr("magneto_dist.data.network.ATTEMPTS", 2)
    server.faults, server.probability = ("trickle",), 1.0
    too_slow = r"train-000001\.tar: .*broken off, for it gave \d+ bytes in 0\.\d* s, fewer than"
    with pytest.raises(OSError, match=too_slow):
        Storage(server.url, str(tmp_path)).local_path("train-000001.tar")
    assert [path.name for path in tmp_path.glob("*/*")] == [".train-000001.tar.lock"]
    with pytest.raises(InputError, match=r"train-000002\.tar: cannot be read: .*broken off"):
        index_tars(f"{server.url}/train-000002.tar", tmp_path / "index")
    with pytest.raises(InputError, match=r"dataset\.json: .*no answer within 0\.5 s"):
        Dataset.open(server.url)


@pytest.mark.parametrize("options", [{"read_twice": True}, {}])
def test_a_bit_flipped_while_tars_are_indexed_is_found(
    server, small_dataset_dir, tmp_path, monkeypatch, options
):
    monkeypatch.setattr("magneto_dist.data.network._FIRST_PAUSE_S", 0.01)
    index_tars(str(small_dataset_dir), tmp_path / "local", **INDEX_OPTIONS)
    server.faults, server.probability = ("flipped",), 0.3
    server.tells_md5 = not options
    index_tars(server.url, tmp_path / "remote", **INDEX_OPTIONS, **options)
    assert server.done["flipped"] >= 2
    local, remote = (Dataset.open(str(tmp_path / name)) for name in ("local", "remote"))
    assert remote.splits == local.splits


def test_shards_are_asked_for_before_they_are_needed(server, tmp_path):
    dataset = Dataset.open(server.url, cache_dir=str(tmp_path))
    made = loader(dataset, num_workers=0, batch_size=2, read_ahead_steps=29)
    batches = made.batches(1, 30)
    next(batches)
    # A batch of two comes from two of the nine shards; the last batch needs others.
    deadline_s = time.monotonic() + 20
    while len(shards_asked_for(server)) < 3 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert len(shards_asked_for(server)) >= 3
    assert Counter(key for batch in [*batches] for key in batch.keys).total() == 58
    assert set(shards_asked_for(server).values()) == {1}


def shards_asked_for(server: FaultyServer) -> dict[str, int]:
    names = [name for name in server.asked if name.startswith("train") and name.endswith(".tar")]
    return {name: server.asked[name] for name in names}


def test_refusal_is_final_and_named(small_dataset_dir, tmp_path):
    with serving(small_dataset_dir) as server:
        storage = Storage(server.url, str(tmp_path))
        with pytest.raises(InputError, match=r"absent\.tar: does not exist"):
            storage.read("absent.tar", 0, 1)
        assert server.asked["absent.tar"] <= 1


def test_wrong_content_under_the_right_name_is_never_used(server, tmp_path, monkeypatch):
    monkeypatch.setattr("magneto_dist.data.network.ATTEMPTS", 2)
    storage = Storage(server.url, str(tmp_path), sha256={"train-000000.tar": "0" * 64})
    with pytest.raises(OSError, match="SHA-256"):
        storage.read("train-000000.tar", 0, 1)
    assert not list(tmp_path.glob("*/*.tar"))


@pytest.fixture(scope="module")  # clients are kept and never ask where the server is again
def bucket(small_dataset_dir) -> Iterator[FaultyServer]:
    """The small data set under S3, in a server on loopback that stands behind a proxy."""
    pytest.importorskip("s3fs", reason="needs the extra s3")
    moto = pytest.importorskip("moto.server", reason="needs moto's S3 server")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment, standing_before(host, port) as proxy:
        environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "a")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "b")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_MAX_ATTEMPTS", "1")  # what is tried again is up to us
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="photos")
        for path in small_dataset_dir.iterdir():
            client.upload_file(str(path), "photos", f"set one/{path.name}")
        client.close()
        yield proxy
    server.stop()


@pytest.fixture
def s3(bucket) -> Iterator[str]:
    yield "s3://photos/set one"
    bucket.faults = ()


def test_s3_gives_every_sample_once(s3, tmp_path):
    dataset = Dataset.open(s3, cache_dir=str(tmp_path))
    assert keys_of_an_epoch(loader(dataset, num_workers=2)) == KEYS
    with pytest.raises(InputError, match="no data set there"):
        Dataset.open("s3://photos/another")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_on_the_way_to_s3_is_survived(s3, bucket, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("magneto_dist.data.network._FIRST_PAUSE_S", 0.01)
    bucket.faults, bucket.done = (fault,), Counter()
    dataset = Dataset.open(s3, cache_dir=str(tmp_path))
    assert keys_of_an_epoch(loader(dataset, num_workers=0)) == KEYS
    assert bucket.done[fault] >= 2


def test_index_of_tars_in_s3_over_a_bad_network(
    s3, bucket, small_dataset_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("magneto_dist.data.network._FIRST_PAUSE_S", 0.01)
    index_tars(str(small_dataset_dir), tmp_path / "local", **INDEX_OPTIONS)
    bucket.faults, bucket.done = ("503", "reset", "cut off", "slow", "flipped"), Counter()
    index_tars(s3, tmp_path / "remote", **INDEX_OPTIONS)
    assert bucket.done.total() >= 5
    local, remote = (Dataset.open(str(tmp_path / name)) for name in ("local", "remote"))
    assert remote.splits == local.splits


@pytest.mark.usefixtures("impatient")
def test_what_trickles_from_s3_is_broken_off_and_asked_for_again(s3, bucket, tmp_path):
    bucket.faults, bucket.done = ("trickle",), Counter()
    storage = Storage(s3, str(tmp_path))
    names = [f"train-{number:06}.tar" for number in range(4)]
    sizes = [storage.local_path(name).stat().st_size for name in names]
    assert [storage.read_through(name, lambda file: len(read_all(file))) for name in names] == sizes
    assert bucket.done["trickle"] >= 4


def test_files_are_read_piece_by_piece_where_the_client_has_no_stream(s3, bucket):
    storage = Storage(s3)
    size = storage.size("train-000000.tar")
    client, url = filesystem(s3), f"{s3}/train-000000.tar"
    pieces = _Ranges(client, url, size)
    whole = client.cat_file(url)
    assert read_all(pieces) == whole
    assert read_all(_Ranges(client, url, size + 5)) == whole


def read_all(file: Readable) -> bytes:
    return b"".join(iter(lambda: file.read(1000), b""))


def test_index_of_tars_in_s3_is_trained_on(s3, tmp_path):
    index_tars(s3, tmp_path / "index", **INDEX_OPTIONS, num_processes=2)
    dataset = Dataset.open(str(tmp_path / "index"), cache_dir=str(tmp_path / "cache"))
    assert dataset.num_samples("validation") == NUM_SAMPLES["validation"]
    assert keys_of_an_epoch(loader(dataset, num_workers=0)) == KEYS
