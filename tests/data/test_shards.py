from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.data.sample import Sample
from magneto_dist.data.shard_index import FormatError, Member, index_bytes
from magneto_dist.data.shards import Dataset, ShardIndex
from magneto_dist.data.writer import write_dataset
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary


def load(row: int) -> Sample:
    important = None if row < 3 else (True,)
    return Sample(f"item-{row}", None, ("sea",), important)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(
        tmp_path,
        {"train": range(10), "validation": range(10, 14)},
        load,
        Vocabulary(["sea", "sky"]),
        samples_per_shard=4,
        num_processes=1,
        source={"builder": "test"},
    )
    return tmp_path


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    """Applies an edit to dataset.json."""
    fields = json.loads((folder / "dataset.json").read_text())
    edit(fields)
    (folder / "dataset.json").write_text(json.dumps(fields))


def test_opened_data_set_counts_its_samples(folder):
    dataset = Dataset.open(str(folder))
    assert dataset.shard_sizes("train") == (4, 4, 2)
    assert dataset.num_samples("train") == 10
    assert dataset.num_labelled("train") == 7
    assert dataset.shard_sizes("validation") == (4,)
    assert dataset.vocabulary.tags == ("sea", "sky")
    assert not dataset.has_images
    assert dataset.source == {"builder": "test"}
    with pytest.raises(InputError, match=r"no split 'test', only train, validation"):
        dataset.num_samples("test")


def test_missing_data_set_says_what_to_give(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"no data set there \(no dataset\.json\)"):
            Dataset.open(str(root))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON in UTF-8"),
        (b"[]", "not of the format 'magneto_dist'"),
        (b'{"format": "other"}', "not of the format 'magneto_dist'"),
        (b'{"format": "magneto_dist", "version": 2}', "is of version 2, only 1 is known"),
        (b'{"format": "magneto_dist", "version": 1}', "has no 'splits' of type dict"),
    ],
)
def test_other_dataset_files_are_refused(folder, content, message):
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"dataset\.json: .*{message}"):
        Dataset.open(str(folder))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.update(splits={}), "has the splits"),
        (lambda f: f["splits"].update(test=[]), "has the splits"),
        (lambda f: f["splits"].update(train={}), "has no 'train' of type list"),
        (lambda f: f["splits"]["train"].append("x"), "no object"),
        (lambda f: f["splits"]["train"].append(f["splits"]["train"][0]), "twice"),
        (lambda f: f["splits"]["train"][0].update(num_samples="4"), "'num_samples' of type int"),
        (lambda f: f["splits"]["train"][0].update(num_samples=True), "'num_samples' of type int"),
        (lambda f: f["splits"]["train"][0].update(num_samples=-1), "impossible numbers"),
        (lambda f: f["splits"]["train"][0].update(num_labelled=5), "impossible numbers"),
        (lambda f: f["splits"]["train"][0].update(num_bytes=1e9), "'num_bytes' of type int"),
        (lambda f: f["splits"]["train"][0].update(index_num_bytes=-1), "impossible numbers"),
        (lambda f: f["splits"]["train"][0].update(index_sha256=1), "'index_sha256' of type str"),
        (lambda f: f.update(has_images="no"), "'has_images' of type bool"),
        (lambda f: f.update(num_tags=3), "not the vocabulary"),
        (lambda f: f.update(vocabulary_sha256="0" * 64), "not the vocabulary"),
    ],
)
def test_odd_fields_are_named(folder, edit, message):
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        Dataset.open(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/train-000000.tar",
        "pipe:cat train-000000.tar",
        "sub/train-000000.tar",
        "train-000000.tar\n",
        "train-000000.tar.gz",
        "validation-000000.tar",
        "http://host/train-000000.tar",
    ],
)
def test_shard_names_that_lead_elsewhere_are_refused(folder, name):
    change(folder, lambda fields: fields["splits"]["train"][0].update(name=name))
    with pytest.raises(InputError, match="names a shard"):
        Dataset.open(str(folder))


def test_another_vocabulary_is_refused(folder):
    (folder / "vocabulary.txt").write_text("sky\nsea\n")
    with pytest.raises(InputError, match=r"vocabulary\.txt: is not the vocabulary.*\(2 tags"):
        Dataset.open(str(folder))
    (folder / "vocabulary.txt").unlink()
    with pytest.raises(InputError, match=r"vocabulary\.txt: does not exist"):
        Dataset.open(str(folder))


def test_absent_and_short_shards_are_named(folder):
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(InputError, match=r"train-000001\.tar: has \d+ bytes, dataset\.json says"):
        Dataset.open(str(folder))
    path.unlink()
    with pytest.raises(InputError, match=r"train-000001\.tar: does not exist"):
        Dataset.open(str(folder))
    assert Dataset.open(str(folder), check_shards=False).num_samples("train") == 10


def without_index_hashes(fields: Any) -> None:
    """As in data sets that were made before indexes had any."""
    for shard in (shard for shards in fields["splits"].values() for shard in shards):
        del shard["index_num_bytes"], shard["index_sha256"]


def test_index_that_is_absent_or_broken_is_named(folder):
    change(folder, without_index_hashes)
    dataset = Dataset.open(str(folder))
    assert ShardIndex.read(dataset.storage, "train-000000.tar").num_samples == 4
    (folder / "train-000000.idx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"train-000000\.idx: does not begin"):
        ShardIndex.read(dataset.storage, "train-000000.tar")
    index = index_bytes([[Member("json", 512, 9, "k1.json")]] * 2)
    (folder / "train-000000.idx").write_bytes(index)
    with pytest.raises(InputError, match=r"train-000000\.idx: has the key 'k1' twice"):
        ShardIndex.read(dataset.storage, "train-000000.tar")
    (folder / "train-000000.idx").unlink()
    with pytest.raises(InputError, match=r"train-000000\.idx: does not exist"):
        ShardIndex.read(dataset.storage, "train-000000.tar")


def test_index_that_was_changed_is_found_by_its_hash(folder):
    path = folder / "train-000000.idx"
    content = bytearray(path.read_bytes())
    content[content.index(b"item-1")] ^= 1  # "htem-1": a key like any other
    path.write_bytes(content)
    dataset = Dataset.open(str(folder))
    with pytest.raises(InputError, match=r"train-000000\.idx: its SHA-256 is not .* copy it again"):
        ShardIndex.read(dataset.storage, "train-000000.tar")
    assert ShardIndex.read(dataset.storage, "train-000001.tar").num_samples == 4


GOOD = b"jpg 512 9 k1.jpg json 1536 7 k1.json\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin"),
        (b"v1.2\n", "does not begin"),
        (b"v1.2 many\n" + GOOD, "does not begin"),
        (b"v1.1 1\n" + GOOD, "version b'v1.1'"),
        (b"v1.2 2\n" + GOOD, "annotation last"),
        (b"v1.2 3\n" + GOOD, "members of 3 samples"),
        (b"v1.2 -1\n" + GOOD, "members of -1 samples"),
        (b"v1.2 0\n" + GOOD, "members of 0 samples"),
        (b"v1.2 999999999999\n" + GOOD, "members of 999999999999 samples"),
        (b"v1.2 1\njpg 512 9 k1.jpg txt 1536 7 k1.txt\n", "annotation last"),
        (b"v1.2 1\ngif 512 9 k1.gif json 1536 7 k1.json\n", "odd member"),
        (b"v1.2 1\njpg 512 -9 k1.jpg json 1536 7 k1.json\n", "odd member"),
        (b"v1.2 1\njpg 512 x k1.jpg json 1536 7 k1.json\n", "odd member"),
        (b"v1.2 1\njpg 512 9 k1.jpg json 1536 99999999999999999999 k1.json\n", "odd member"),
        (b"v1.2 1\njpg 512 9 k1.jpg json 1536 7 ../k1.json\n", "has a key"),
        (b"v1.2 1\njpg 512 9 k1.jpg json 1536 7 k\xff.json\n", "has a key"),
        (b"v1.2 2\n" + GOOD + GOOD, "has the key 'k1' twice"),
    ],
)
def test_broken_index_is_refused(content, message):
    with pytest.raises(FormatError, match=message):
        ShardIndex.from_bytes(content)


NUMBER = st.integers(0, 2**62)


@given(
    rows=st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER, st.sampled_from(["jpg", "png"]))),
    has_images=st.booleans(),
)
def test_index_round_trip(rows, has_images):
    samples = [
        [
            Member(kind, offset, size, f"k-{row}.{kind}"),
            Member("json", annotation_offset, annotation_size, f"k-{row}.json"),
        ][not has_images :]
        for row, (offset, size, annotation_offset, annotation_size, kind) in enumerate(rows)
    ]
    index = ShardIndex.from_bytes(index_bytes(samples))
    assert index.num_samples == len(rows)
    assert list(index.keys) == [f"k-{row}" for row in range(len(rows))]
    assert index.annotation_offset.tolist() == [row[2] for row in rows]
    assert index.annotation_size.tolist() == [row[3] for row in rows]
    assert index.image_offset.tolist() == [row[0] * has_images for row in rows]
    assert index.image_size.tolist() == [row[1] * has_images for row in rows]
    if has_images:
        assert index.image_kind.tolist() == [["jpg", "png"].index(row[4]) for row in rows]


def test_index_of_many_samples_is_read_fast_and_is_small():
    count = 100_000
    content = index_bytes(
        [
            [
                Member("jpg", row * 60_000, 52_000, f"{row:08d}.jpg"),
                Member("json", row * 60_000 + 53_000, 700, f"{row:08d}.json"),
            ]
            for row in range(count)
        ]
    )
    started_at_s = time.process_time()
    index = ShardIndex.from_bytes(content)
    assert time.process_time() - started_at_s < 1.0
    arrays = [value for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 5
    assert sum(array.nbytes for array in arrays) <= 64 * count
    assert index.keys[count - 1] == f"{count - 1:08d}"
    assert index.keys[3:5] == ["00000003", "00000004"]
