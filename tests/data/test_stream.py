from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from magneto_dist.batch import Reject
from magneto_dist.data.indexing import index_tars
from magneto_dist.data.shards import Dataset
from magneto_dist.data.storage import Storage
from magneto_dist.data.stream import Record, SampleReader, load_rows
from magneto_dist.errors import InputError
from shard_edits import note_index_hashes
from small_data import NUM_SAMPLES, key_of, make_sample, picture


def reader(dataset: Dataset, *, with_images: bool = True, **limit: int) -> SampleReader:
    return SampleReader(dataset, "train", with_images=with_images, **limit)


def load(dataset: Dataset, ids: list[int], *stages, images: bool = True, labels: bool = True):
    return load_rows(
        np.array(ids, dtype=np.int64),
        reader(dataset, with_images=images),
        stages,
        needs_images=images,
        needs_labels=labels,
    )


def unlabelled(content: bytes) -> bytes:
    return content.replace(b'"important"', b'"imp0rtant"')


@pytest.mark.parametrize("most", [1, 20, 100])
def test_every_sample_is_read_as_it_was_written(small_dataset, most):
    ids = np.random.default_rng(0).permutation(NUM_SAMPLES["train"])
    made = reader(small_dataset, max_indexed_samples=most)
    raw = list(made.read(ids))
    assert sum(index.num_samples for index in made._indexes.values()) <= max(most, 7)
    assert [sample.sample_id for sample in raw] == list(range(NUM_SAMPLES["train"]))
    for sample in raw:
        written = make_sample(("train", sample.sample_id))
        assert (sample.key, sample.image) == (written.key, written.image)
        assert json.loads(sample.annotation)["tags"] == list(written.tags)
        assert sample.shard == f"train-{sample.sample_id // 7:06}.tar"


def test_pictures_are_not_read_where_they_do_not_matter(small_dataset, text_dataset):
    with_pictures = list(reader(small_dataset, with_images=False).read(np.arange(9)))
    without = list(reader(text_dataset).read(np.arange(9)))
    assert [sample.image for sample in with_pictures + without] == [None] * 18
    assert [s.annotation for s in with_pictures] == [s.annotation for s in without]


def test_rows_keep_their_places_and_padding_is_none(small_dataset):
    rows = load(small_dataset, [41, -1, 3, 40, -1])
    assert [row and row.sample_id for row in rows] == [41, None, 3, 40, None]
    assert rows[2] == Record(3, "train-000000.tar", make_sample(("train", 3)))
    assert load(small_dataset, [-1, -1]) == [None, None]


def test_a_bad_sample_is_named_with_its_reason_and_its_neighbours_are_intact(damaged):
    damaged.edit_annotation(8, lambda content: content[:-1] + b"?")
    damaged.edit_annotation(9, unlabelled)
    bad, unlabelled_row, good = load(damaged.open(), [8, 9, 10])
    assert (bad.key, bad.shard) == (key_of(8), "train-000001.tar")
    assert "JSON" in bad.reason
    assert unlabelled_row == Reject(key_of(9), "train-000001.tar", "has no 'important' labels")
    assert good.sample == make_sample(("train", 10))
    assert load(damaged.open(), [9], labels=False)[0].sample.important is None


def test_a_sample_without_picture_is_bad_where_pictures_are_needed(text_dataset):
    assert load(text_dataset, [5]) == [Reject(key_of(5), "train-000000.tar", "has no picture")]
    assert isinstance(load(text_dataset, [5], images=False)[0], Record)


def test_stages_may_change_samples_or_leave_them_out_but_add_none(small_dataset):
    def renamed(records):
        for record in records:
            yield replace(record, sample=replace(record.sample, tags=("x",), important=(True,)))

    def odd(records):
        return (record for record in records if record.sample_id % 2)

    def twice(records):
        for record in records:
            yield from (record, record)

    def emptied(records):
        for record in records:
            yield replace(record, sample=replace(record.sample, tags=(), important=()))

    rows = load(small_dataset, [4, 5], renamed, odd)
    assert rows[0] == Reject(key_of(4), "train-000000.tar", "left out by a stage")
    assert (rows[1].sample.key, rows[1].sample.tags) == (key_of(5), ("x",))
    assert load(small_dataset, [5], emptied)[0].reason == "has no tags"
    with pytest.raises(InputError, match="a stage made a second record of sample 4"):
        load(small_dataset, [4, 5], twice)
    with pytest.raises(InputError, match="a stage made"):
        load(small_dataset, [4], lambda records: (replace(r, sample_id=7) for r in records))


def test_a_shard_that_vanishes_or_shrinks_is_one_clear_line_with_its_name(damaged):
    dataset = damaged.open()
    cut, absent, unreadable = (damaged.folder / f"train-00000{k}.tar" for k in (2, 4, 5))
    cut.write_bytes(cut.read_bytes()[:2000])
    absent.unlink()
    unreadable.unlink()
    unreadable.symlink_to(unreadable)  # a loop; permissions would not stop root
    with pytest.raises(InputError, match=r"train-000002\.tar: has 2000 bytes"):
        load(dataset, [20])
    with pytest.raises(InputError, match=r"train-000004\.tar: does not exist"):
        load(dataset, [28])
    with pytest.raises(InputError, match=r"train-000005\.tar: sample 6 cannot be read"):
        load(dataset, [41])
    (damaged.folder / "train-000003.idx").unlink()
    with pytest.raises(InputError, match=r"train-000003\.idx"):
        load(dataset, [21])
    (damaged.folder / "train-000003.idx").write_bytes(
        (damaged.folder / "train-000008.idx").read_bytes()
    )
    with pytest.raises(InputError, match=r"train-000003\.idx: its SHA-256 is not the one in"):
        load(dataset, [21])
    note_index_hashes(damaged.folder)
    dataset = Dataset.open(str(damaged.folder), check_shards=False)
    with pytest.raises(InputError, match=r"its index has 4 samples, dataset.json says 7"):
        load(dataset, [21])


@pytest.mark.parametrize(("gap_bytes", "num_reads"), [(1000, 1), (64 << 20, 2)])
def test_what_others_put_between_two_members_is_not_read(
    tmp_path, monkeypatch, gap_bytes, num_reads
):
    image = picture(np.random.default_rng(0))
    annotation = b'{"tags": ["red"]}'
    with tarfile.open(tmp_path / "films.tar", "w") as tar:
        for name, content in (("jpg", image), ("mp4", bytes(gap_bytes)), ("json", annotation)):
            member = tarfile.TarInfo(f"a.{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_tars(str(tmp_path))
    reads = []
    read = Storage.read

    def noted_read(storage: Storage, name: str, offset: int, size: int) -> bytes:
        reads.append(size)
        return read(storage, name, offset, size)

    monkeypatch.setattr(Storage, "read", noted_read)
    (raw,) = reader(Dataset.open(str(tmp_path))).read(np.arange(1))
    assert (raw.image, raw.annotation) == (image, annotation)
    assert len(reads) == num_reads
    assert sum(reads) < len(image) + len(annotation) + 4096


def test_members_that_are_too_large_are_refused_and_not_read(damaged):
    sizes = {1: (2, 300 << 20), 2: (6, 20 << 20)}  # sample: word of its line, bytes
    path = damaged.folder / "train-000000.idx"
    lines = path.read_text().splitlines()
    for sample_id, (word, size) in sizes.items():
        words = lines[sample_id + 1].split()
        lines[sample_id + 1] = " ".join([*words[:word], str(size), *words[word + 1 :]])
    path.write_text("\n".join([*lines, ""]))
    note_index_hashes(damaged.folder)
    image, annotation, good = load(damaged.open(), [1, 2, 3])
    for reject, sample_id, reason in (
        (image, 1, f"picture of {300 << 20} bytes is larger than {256 << 20} bytes"),
        (annotation, 2, f"annotation of {20 << 20} bytes is larger than {16 << 20} bytes"),
    ):
        assert reject == Reject(key_of(sample_id), "train-000000.tar", reason)
    assert good.sample == make_sample(("train", 3))
    assert isinstance(load(damaged.open(), [1], images=False)[0], Record)  # who needs it not
