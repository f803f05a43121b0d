"""Tars of other people as data sets: written with `tarfile` here, trained on where they are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magneto_dist.config import AugmentConfig, Config, DataConfig, TagsConfig, TrainConfig
from magneto_dist.data.indexing import index_tars
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.sample import AnnotationFields
from magneto_dist.data.shards import Dataset
from magneto_dist.data.splitting import split_dataset
from magneto_dist.data.storage import Storage
from magneto_dist.data.stream import Record, SampleReader, load_rows
from magneto_dist.data.tar_scan import ScannedTar, TarScan
from magneto_dist.data.verify import verify
from magneto_dist.errors import InputError
from magneto_dist.world import World
from pictures import encoded
from shard_edits import note_index_hashes
from small_data import key_of, read_jsonl

PICTURE = encoded(60, 50, "JPEG")
PNG = encoded(20, 30, "PNG")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(name: str, image: bytes = PICTURE, extension: str = "jpg", **fields) -> dict:
    return {f"{name}.{extension}": image, f"{name}.json": json.dumps(fields).encode()}


@pytest.fixture
def tars(tmp_path) -> Path:
    """Eight samples in two tars for training, three in one for validation."""
    folder = tmp_path / "Bilder 2024"
    for shard, start in enumerate((0, 4)):
        members: dict[str, bytes] = {}
        for i in range(start, start + 4):
            members |= {f"img/{i:03}.txt": b"a caption"}
            members |= sample(f"img/{i:03}", tags=["cat", f"tag {i}"], main=["cat"], id=i)
        write_tar(folder / f"web-{shard:05}.tar", members)
    members = {}
    for i in range(3):
        members |= sample(f"v{i}", PNG, "jpg", tags=["cat", "tag 1"], main=[])
    write_tar(folder / "val-0.tar", members)
    return folder


def records(dataset: Dataset, split: str) -> list[Record]:
    reader = SampleReader(dataset, split, with_images=True)
    rows = load_rows(
        np.arange(dataset.num_samples(split)), reader, needs_images=False, needs_labels=False
    )
    assert all(isinstance(row, Record) for row in rows)
    return rows


def test_existing_tars_become_a_data_set_without_a_copy(tars):
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    written, skipped = index_tars(str(tars), important_field="main")
    assert (written, skipped) == (11, [])
    for name, content in before.items():
        assert (tars / name).read_bytes() == content
    assert sum(path.stat().st_size for path in tars.glob("*.idx")) < 1500
    dataset = Dataset.open(str(tars))
    assert (dataset.num_samples("train"), dataset.num_samples("validation")) == (8, 3)
    assert dataset.vocabulary.tags[:2] == ("cat", "tag 1")  # by frequency
    train = records(dataset, "train")
    assert [record.sample.key for record in train] == [f"{i:03}" for i in range(8)]
    assert train[5].sample.tags == ("cat", "tag 5")
    assert train[5].sample.important == (True, False)
    assert {record.sample.image for record in train} == {PICTURE}
    assert {record.sample.image for record in records(dataset, "validation")} == {PNG}
    assert verify(dataset, 1) == []


def test_index_elsewhere_leads_to_the_tars_and_is_trained_on(tars, tmp_path):
    out = tmp_path / "index"
    index_tars(str(tars), out, important_field="main", num_processes=2)
    assert sorted(path.suffix for path in tars.iterdir()) == [".tar"] * 3
    dataset = Dataset.open(str(out))
    config = Config(
        augment=AugmentConfig(image_size=16),
        data=DataConfig(num_workers=1, decoder="cpu"),
        tags=TagsConfig(max_tags=4),
        train=TrainConfig(global_batch_size=4),
    )
    plan = BatchPlan.derive(4, 1, 4, 1)
    loader = Loader(dataset, "train", config, World(), plan, training=True)
    batches = list(loader.batches(1, 2))
    assert sorted(key for batch in batches for key in batch.keys) == [f"{i:03}" for i in range(8)]
    assert all(batch.all_valid for batch in batches)


def test_names_that_are_no_keys_or_occur_twice(tmp_path):
    for number in range(2):
        members = sample("001", tags=["a"]) | sample("träumerei 1", tags=["a"])
        write_tar(tmp_path / f"{number}.tar", members)
    index_tars(str(tmp_path))
    keys = [record.sample.key for record in records(Dataset.open(str(tmp_path)), "train")]
    assert len(set(keys)) == 4
    assert keys[0].startswith("001-")
    assert keys[1].startswith("tr_umerei_1-")


def test_forms_of_annotations(tmp_path):
    write_tar(tmp_path / "1.tar", sample("a", keywords="red; blue ;", flags=[1, 0]))
    index_tars(
        str(tmp_path),
        tags_field="keywords",
        separator=";",
        important_field="flags",
        important_as="flags",
    )
    (record,) = records(Dataset.open(str(tmp_path)), "train")
    assert (record.sample.tags, record.sample.important) == (("red", "blue"), (True, False))


def test_rare_tags_are_left_out_of_vocabulary_and_samples(tmp_path):
    members = sample("a", tags=["x", "rare"]) | sample("b", tags=["x"]) | sample("c", tags=["odd"])
    write_tar(tmp_path / "1.tar", members)
    written, skipped = index_tars(str(tmp_path), min_count=2, max_skipped_fraction=0.5)
    assert (written, skipped) == (2, [("1.tar/c", "has no tag of the vocabulary")])
    dataset = Dataset.open(str(tmp_path))
    assert dataset.vocabulary.tags == ("x",)
    assert [record.sample.tags for record in records(dataset, "train")] == [("x",), ("x",)]


def test_bad_samples_are_listed_and_too_many_are_an_error(tmp_path):
    members = (
        sample("good", tags=["x"])
        | {"no-annotation.jpg": PICTURE}
        | {"no-picture.json": b'{"tags": ["x"]}'}
        | {"broken.jpg": PICTURE, "broken.json": b'{"tags": '}
        | sample("bomb", PICTURE[:100], tags=["x"])
        | {"code.pkl": b"cos\nsystem\n", "code.jpg": PICTURE, "code.json": b'{"tags": ["x"]}'}
        | {"README": b"no extension"}
        | {"../evil.jpg": PICTURE, "../evil.json": b'{"tags": ["x"]}'}
    )
    path = write_tar(tmp_path / "1.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("good.json"))
    with pytest.raises(InputError, match="3 good samples, but 7 bad ones"):
        index_tars(str(tmp_path))
    assert not (tmp_path / "dataset.json").exists()
    written, skipped = index_tars(str(tmp_path), max_skipped_fraction=0.9)
    assert written == 3
    reasons = {entry["key"]: entry["reason"] for entry in read_jsonl(tmp_path / "skipped.jsonl")}
    assert reasons == dict(skipped)
    assert set(reasons) == {
        f"1.tar/{name}"
        for name in (
            "no-annotation", "no-picture", "broken", "bomb", "README", "link.jpg", "good"
        )
    }  # fmt: skip
    keys = {record.sample.key for record in records(Dataset.open(str(tmp_path)), "train")}
    assert keys == {"good", "code", "evil"}


def test_sparse_members_are_left_out_by_name(tmp_path):
    # In the tar a sparse file is a map of its parts, then the parts: no offset leads to its bytes.
    path = write_tar(tmp_path / "1.tar", sample("good", tags=["x"]))
    contents = {"image.jpg": PICTURE, "image.json": b'{"tags": ["x"]}'}
    contents |= {"annotation.jpg": PICTURE, "annotation.json": b'{"tags": ["y"]}'}
    with tarfile.open(path, "a") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            if name in ("image.jpg", "annotation.json"):
                info.pax_headers = {
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.name": name,
                    "GNU.sparse.realsize": str(len(content)),
                }
                content = f"1\n0\n{len(content)}\n".encode().ljust(512, b"\0") + content
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    written, skipped = index_tars(str(tmp_path), max_skipped_fraction=0.9)
    assert written == 1
    assert dict(skipped) == {
        "1.tar/image.jpg": "is a sparse file",
        "1.tar/image": "has no picture",
        "1.tar/annotation.json": "is a sparse file",
        "1.tar/annotation": "has 1 pictures and 0 annotations",
    }
    assert Dataset.open(str(tmp_path)).vocabulary.tags == ("x",)


@pytest.mark.parametrize("keep", [700, 1500, 3333])
def test_cut_off_tar_is_an_error_that_names_it(tars, keep):
    path = tars / "web-00001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"web-00001.tar: is no whole tar"):
        index_tars(str(tars))


def scan(path: Path) -> ScannedTar:
    scan = TarScan(Storage(str(path.parent)), ("jpg",), "json", AnnotationFields(), 1.0)
    return scan(path.name, lambda: None)


@pytest.fixture(scope="module")
def three_samples(tmp_path_factory) -> tuple[Path, ScannedTar, list[int]]:
    """A tar of old and new kinds of headers, what is in it, and where its headers lie."""
    members = sample("a", tags=["x"]) | sample("b" * 120, tags=["y"]) | sample("ü", tags=["z"])
    path = write_tar(tmp_path_factory.mktemp("flips") / "3.tar", members)
    with tarfile.open(path) as tar:
        starts = [info.offset for info in tar]
        starts += [info.offset_data - 512 for info in tar.getmembers()]
    return path, scan(path), [*sorted(set(starts)), tar.offset]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_bit_in_a_header_never_loses_samples_in_silence(three_samples, data):
    path, before, starts = three_samples
    content = bytearray(path.read_bytes())
    content[data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 511))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    path.with_name("flipped.tar").write_bytes(content)
    try:
        after = scan(path.with_name("flipped.tar"))
    except InputError:
        return
    assert (after.samples, after.skipped) == (before.samples, before.skipped)


def flip_bit_of_second_sample(path: Path) -> int:
    """Returns where the damaged header is."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    content = bytearray(path.read_bytes())
    content[offset + 100] ^= 1
    path.write_bytes(content)
    return offset


def test_damaged_header_is_an_error_that_says_where(tars):
    offset = flip_bit_of_second_sample(tars / "web-00001.tar")
    with pytest.raises(InputError, match=rf"web-00001\.tar: is no whole tar .* {offset}.* damaged"):
        index_tars(str(tars))
    assert not (tars / "dataset.json").exists()


def test_verify_finds_damage_that_was_there_when_the_index_was_made(tars, monkeypatch):
    offset = flip_bit_of_second_sample(tars / "web-00001.tar")
    with monkeypatch.context() as earlier:  # as an index was made before such damage was noticed
        earlier.setattr("magneto_dist.data.tar_scan.check_end", lambda *_: None)
        assert index_tars(str(tars)).written == 8
    (damage,) = verify(Dataset.open(str(tars)), 1)
    assert damage.shard == "train-000001.tar"
    assert f"no header is readable at byte {offset}" in damage.reason


def test_tars_put_one_after_another_are_not_indexed_by_half(tmp_path):
    whole = write_tar(tmp_path / "1.tar", sample("a", tags=["x"])).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole + whole)
    with pytest.raises(InputError, match="data goes on there"):
        index_tars(str(tmp_path))


def test_tar_cut_off_between_members_is_an_error(tmp_path):
    path = write_tar(tmp_path / "1.tar", sample("a", tags=["x"]) | {"b.txt": bytes(1024)})
    with tarfile.open(path) as tar:
        tar.getmembers()
    path.write_bytes(path.read_bytes()[: tar.offset])
    with pytest.raises(InputError, match=f"nothing marks its end at byte {tar.offset}"):
        index_tars(str(tmp_path))


@pytest.mark.parametrize(
    ("tars", "reason"),
    [
        ("{folder}/empty", "no files"),
        ("{folder}/absent", "cannot be listed"),
        ("{folder}/x-{{0..3}}.tar", "x-0.tar: does not exist"),
        ("pipe:ls", "must be a folder or a URL"),
        ("http://127.0.0.1:9/{{0..3}}.tar", "--out must say"),
    ],
)
def test_what_is_no_place_of_tars_is_refused(tmp_path, tars, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=reason):
        index_tars(tars.format(folder=tmp_path))


def test_other_data_sets_are_not_overwritten_but_an_index_is_renewed(tars, tmp_path):
    index_tars(str(tars))
    write_tar(tars / "web-00002.tar", sample("new", tags=["cat"]))
    assert index_tars(str(tars)).written == 12
    assert Dataset.open(str(tars)).num_samples("train") == 9
    with pytest.raises(InputError, match="holds another data set"):
        split_dataset(str(tars), tars)


def test_split_by_keys_leads_to_the_same_tars(small_dataset_dir, tmp_path):
    out = tmp_path / "cut anew"
    written, _ = split_dataset(str(small_dataset_dir), out, validation_fraction=0.3)
    before, after = Dataset.open(str(small_dataset_dir)), Dataset.open(str(out))
    samples_before = {record.sample for split in before.splits for record in records(before, split)}
    train = {record.sample for record in records(after, "train")}
    validation = {record.sample for record in records(after, "validation")}
    assert train | validation == samples_before
    assert len(train) + len(validation) == written == 75
    assert 10 < len(validation) < 35
    assert verify(after, 1) == []
    assert after.num_labelled("train") == len(train)


def test_a_remote_data_set_may_not_lead_to_files_of_this_machine(tars, tmp_path):
    index_tars(str(tars), tmp_path / "index")
    content = json.loads((tmp_path / "index" / "dataset.json").read_text())
    assert content["tars"] == str(tars)
    content["tars"] = "pipe:cat"
    (tmp_path / "index" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="must be a folder or a URL"):
        Dataset.open(str(tmp_path / "index"))


def test_a_key_in_two_shards_is_refused_before_anything_is_written(damaged, tmp_path):
    index = damaged.folder / "train-000003.idx"
    index.write_text(index.read_text().replace(f"{key_of(22)}.", f"{key_of(2)}."))
    note_index_hashes(damaged.folder)
    where = "in train-000000.tar and in train-000003.tar"
    with pytest.raises(
        InputError, match=f"key '{key_of(2)}' occurs twice in the data set, {where}"
    ):
        split_dataset(str(damaged.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
