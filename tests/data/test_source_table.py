from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from faulty_server import serving
from magneto_dist.data.sample import valid_key
from magneto_dist.data.shards import Dataset
from magneto_dist.data.shrink import Shrink
from magneto_dist.data.sources import table
from magneto_dist.data.sources.columns import unique_keys
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.errors import InputError
from tar_samples import tar_samples

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
ROWS = [
    {"file_name": "b.jpg", "tags": ["sky", "sea"], "important_tags": ["sea"]},
    {"file_name": "a.png", "tags": ["sky", "harbour", "boat"], "important_tags": ["boat", "sky"]},
    {"file_name": "c.jpg", "tags": ["sea"], "important_tags": None},
]


def picture(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def write_table(path: Path, rows: list[dict], separator: str = ",") -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: separator.join(v) if isinstance(v, list) else v for k, v in row.items()}
                )
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "c.jpg"):
        (folder / name).write_bytes(picture("PNG" if name.endswith("png") else "JPEG"))
    return folder


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_samples(tmp_path: Path, images: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"t.{suffix}", ROWS)
    report = table.build(tmp_path / "out", path, images, validation_fraction=0)
    assert report == (3, [])
    samples = tar_samples(tmp_path / "out", "train")
    assert {key: sample[1:] for key, sample in samples.items()} == {
        "b": (["sky", "sea"], ["sea"]),
        "a": (["sky", "harbour", "boat"], ["sky", "boat"]),
        "c": (["sea"], None),
    }
    assert samples["a"].image == (images / "a.png").read_bytes()
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.num_labelled("train") == 2
    # By frequency, then by name.
    assert dataset.vocabulary.tags == ("sea", "sky", "boat", "harbour")


def test_columns_can_be_named_and_tags_separated_otherwise(tmp_path: Path, images: Path) -> None:
    rows = [
        {"path": "b.jpg", "words": "sky ;  dining\ntable;;sky", "good": "", "part": "train"},
        {"path": "c.jpg", "words": "sky", "good": "sky", "part": "val"},
    ]
    columns = TableColumns("path", "words", "good", "part", ";")
    table.build(tmp_path / "out", write_table(tmp_path / "t.csv", rows), images, columns=columns)
    assert tar_samples(tmp_path / "out", "train")["b"][1:] == (["sky", "dining table"], None)
    assert tar_samples(tmp_path / "out", "validation")["c"][1:] == (["sky"], ["sky"])


def test_empty_list_means_that_nothing_is_important(tmp_path: Path, images: Path) -> None:
    rows = [ROWS[0] | {"important_tags": []}, {"file_name": "c.jpg", "tags": ["sea"]}]
    path = write_table(tmp_path / "t.jsonl", rows)
    table.build(tmp_path / "out", path, images, validation_fraction=0)
    samples = tar_samples(tmp_path / "out", "train")
    assert samples["b"].important == []
    assert samples["c"].important is None


def test_pictures_come_from_urls_too(tmp_path: Path, images: Path) -> None:
    for number in range(70):  # more than are fetched at once
        (images / f"n {number}.jpg").write_bytes(picture() + bytes([number]))
    (images / "huge.jpg").write_bytes(bytes(10_000))
    with serving(images) as server:
        server.faults, server.probability = ("503", "reset", "cut off", "slow"), 0.2
        names = [*(f"{server.url}/n%20{number}.jpg?size=big" for number in range(70)), "b.jpg"]
        bad = [f"{server.url}/dead.jpg", f"{server.url}/huge.jpg", "http://127.0.0.1:9/closed.jpg"]
        rows = [{"file_name": name, "tags": ["sea"]} for name in (*names, *bad)]
        path = write_table(tmp_path / "t.jsonl", rows)
        written, skipped = table.build(tmp_path / "out", path, images, validation_fraction=0)
    assert written == 71
    samples = list(tar_samples(tmp_path / "out", "train").values())
    contents = [(images / f"n {number}.jpg").read_bytes() for number in range(70)]
    assert [sample.image for sample in samples] == [*contents, (images / "b.jpg").read_bytes()]
    reasons = [reason for _, reason in skipped]
    assert "dead.jpg: does not exist" in reasons[0]
    assert "neither JPEG, PNG nor WebP" in reasons[1]
    assert "cannot be fetched" in reasons[2]


def test_full_disk_is_noticed_before_it_is_full(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = images / "b.jpg"
    big.write_bytes(picture() + bytes(2_000_000))
    needed = sum(path.stat().st_size for path in images.iterdir())
    rows = [*ROWS, {"file_name": "absent.jpg", "tags": ["sea"], "important_tags": None}]
    path = write_table(tmp_path / "t.jsonl", rows)

    def with_free(num_bytes: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=num_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with_free(needed - 1)
    with pytest.raises(InputError, match=r"the data set needs 0\.00 GB in .* make room"):
        table.build(tmp_path / "out", path, images)
    assert not list((tmp_path / "out").rglob("*.tar"))
    # How small the pictures become is not known, nor how large those behind URLs are.
    table.build(tmp_path / "small", path, images, shrink=Shrink(4))
    rows[-1]["file_name"] = "http://127.0.0.1:9/closed.jpg"
    table.build(tmp_path / "urls", write_table(tmp_path / "u.jsonl", rows), images)
    with_free(needed)
    assert table.build(tmp_path / "out", path, images).written == 3


def test_unlabelled_table(tmp_path: Path, images: Path) -> None:
    rows = [{"file_name": row["file_name"], "tags": row["tags"]} for row in ROWS]
    path = write_table(tmp_path / "t.csv", rows)
    table.build(tmp_path / "out", path, images, columns=TableColumns(important=None))
    dataset = Dataset.open(str(tmp_path / "out"))
    assert sum(map(dataset.num_labelled, dataset.splits)) == 0


def test_vocabulary_of_the_user(tmp_path: Path, images: Path) -> None:
    path = write_table(tmp_path / "t.csv", ROWS)
    words = tmp_path / "words.txt"
    words.write_text("zebra\nboat\nharbour\nsea\nsky\n", encoding="utf-8")
    table.build(tmp_path / "out", path, images, vocabulary=words)
    assert Dataset.open(str(tmp_path / "out")).vocabulary.tags[0] == "zebra"
    words.write_text("zebra\nsea\nsky\n", encoding="utf-8")
    with pytest.raises(InputError, match="not in the vocabulary of 3 tags, the first is 'harbour'"):
        table.build(tmp_path / "other", path, images, vocabulary=words)
    with pytest.raises(InputError, match=r"vocabulary .*absent.txt: cannot be read"):
        table.build(tmp_path / "other", path, images, vocabulary=tmp_path / "absent.txt")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_missing_column_names_those_that_exist(tmp_path: Path, images: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"t.{suffix}", [{"file_name": "b.jpg", "labels": "sky"}])
    with pytest.raises(
        InputError, match=r"no column 'tags'; the columns are 'file_name', 'labels'"
    ):
        table.build(tmp_path / "out", path, images)


def test_important_tags_outside_the_tags_are_counted(tmp_path: Path, images: Path) -> None:
    rows = [*ROWS, ROWS[0] | {"important_tags": ["see"]}, ROWS[0] | {"important_tags": ["dog"]}]
    path = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match=r"2 rows have .* the first is 'see' in .*t.csv, line 5"):
        table.build(tmp_path / "out", path, images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"file_name,tags,important_tags\nb.jpg,sky,sea,sea\n", "line 2: 4 fields, but 3"),
        ("t.csv", b'file_name,tags,important_tags\nb.jpg,"sky,sea', "line 2: unexpected end"),
        ("t.csv", b"file_name,tags,important_tags\nb.jpg,sk\xff,\n", "is not UTF-8"),
        ("t.csv", b"file_name,tags,important_tags\n,sky,\n", "has no path of a picture"),
        ("t.csv", b"", "no rows"),
        ("t.jsonl", b'{"file_name": "b.jpg", "tags": 3}\n', "3 is neither a list of strings"),
        ("t.jsonl", b'{"file_name": "b.jpg"\n', "line 1: is not JSON"),
        ("t.jsonl", b'\n["b.jpg"]\n', "line 2: is no JSON object"),
        ("t.jsonl", b'{"tags": ["sky"]}\n', "no column 'file_name'; the columns are 'tags'"),
        ("t.parquet", b"PAR1", "is no Parquet file"),
        ("t.xlsx", b"", "must be one of .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_broken_table(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        table.build(tmp_path / "out", tmp_path / name)


def test_bad_settings(tmp_path: Path, images: Path) -> None:
    path = write_table(tmp_path / "t.csv", ROWS)
    with pytest.raises(InputError, match=r"t2.csv: cannot be read: No such file"):
        table.build(tmp_path / "out", tmp_path / "t2.csv")
    with pytest.raises(InputError, match=r"validation_fraction 1: must be"):
        table.build(tmp_path / "out", path, images, validation_fraction=1)
    with pytest.raises(InputError, match=r"column 'tags': 'sky,sea' is none of train, validation"):
        table.build(tmp_path / "out", path, images, columns=TableColumns(split="tags"))


def test_missing_pictures_are_skipped_with_a_reason(tmp_path: Path, images: Path) -> None:
    path = write_table(tmp_path / "t.csv", [*ROWS, ROWS[0] | {"file_name": "gone.jpg"}])
    report = table.build(tmp_path / "out", path, images)
    assert report == (3, [("gone", "picture 'gone.jpg' cannot be read: No such file or directory")])


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_pictures_outside_the_folder_are_refused(tmp_path: Path, images: Path, way: str) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture())
    (images / "link.jpg").symlink_to(secret)
    name = {"parent": "../secret.jpg", "absolute": str(secret), "link": "link.jpg"}[way]
    path = write_table(tmp_path / "t.csv", [*ROWS, ROWS[0] | {"file_name": name}])
    report = table.build(tmp_path / "out", path, images)
    assert report.written == 3
    assert "lies outside" in report.skipped[0][1]


@pytest.mark.parametrize("way", ["parent", "absolute", "link", "nul"])
def test_odd_paths_into_the_folder(tmp_path: Path, images: Path, way: str) -> None:
    (images / "link.jpg").symlink_to("b.jpg")
    names = {
        "parent": "x/../../images/b.jpg",
        "absolute": str(images / "b.jpg"),
        "link": "link.jpg",
        "nul": "b\0.jpg",
    }
    rows = [ROWS[1], ROWS[0] | {"file_name": names[way]}]
    path = write_table(tmp_path / "t.jsonl", rows)
    report = table.build(tmp_path / "out", path, images)
    assert report.written == (1 if way == "nul" else 2)


def test_rows_without_tags_are_skipped(tmp_path: Path, images: Path) -> None:
    path = write_table(tmp_path / "t.csv", [*ROWS[:2], ROWS[2] | {"tags": " , "}])
    assert table.build(tmp_path / "out", path, images).skipped == [("c", "annotation has no tags")]


def test_paths_and_tags_in_any_script(tmp_path: Path, images: Path) -> None:
    names = ["猫.jpg", "犬.jpg", "été 1.jpg", f"{'long' * 30}.jpg"]
    for name in names:
        (images / name).write_bytes(picture())
    rows = [{"file_name": n, "tags": ["Köln", "猫"], "important_tags": ["猫"]} for n in names]
    for suffix in ("csv", "jsonl"):
        path = write_table(tmp_path / f"t.{suffix}", rows)
        report = table.build(tmp_path / suffix, path, images, validation_fraction=0)
        assert report == (4, [])
    samples = tar_samples(tmp_path / "csv", "train")
    assert all(sample[1:] == (["Köln", "猫"], ["猫"]) for sample in samples.values())
    assert samples == tar_samples(tmp_path / "jsonl", "train")


def test_spreadsheet_csv_with_byte_order_mark_and_crlf(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefffile_name,tags,important_tags\r\nb.jpg,"a,b",a\r\n\r\n'.encode())
    table.build(tmp_path / "out", path, images, validation_fraction=0)
    assert tar_samples(tmp_path / "out", "train")["b"][1:] == (["a", "b"], ["a"])


def test_same_name_in_two_folders_and_same_picture_twice(tmp_path: Path, images: Path) -> None:
    for folder in ("x", "y"):
        (images / folder).mkdir()
        (images / folder / "1.jpg").write_bytes(picture())
    rows = [
        {"file_name": name, "tags": tag, "important_tags": tag}
        for name, tag in [("x/1.jpg", "p"), ("y/1.jpg", "q"), ("b.jpg", "r"), ("b.jpg", "s")]
    ]
    table.build(tmp_path / "out", write_table(tmp_path / "t.csv", rows), images)
    keys = {
        key: (split, sample.tags)
        for split in ("train", "validation")
        for key, sample in tar_samples(tmp_path / "out", split).items()
    }
    assert {"b", "b-2"} < set(keys)
    assert sorted(key[:2] for key in keys) == ["1-", "1-", "b", "b-"]
    assert keys["b"][0] == keys["b-2"][0]  # never on both sides


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=20))
@example(["/", ".", "_"])
@example(["b", "b", "b-2", "b", "b-2"])
def test_keys_are_valid_and_unique(paths: list[str]) -> None:
    keys = unique_keys(paths)
    assert len(set(keys)) == len(paths)
    assert all(map(valid_key, keys))


@given(st.permutations(["a/1.jpg", "b/1.jpg", "1.png", "2.jpg", "ä.jpg", "ö.jpg", "_.jpg"]))
def test_keys_do_not_depend_on_the_order_of_rows(paths: list[str]) -> None:
    keys = dict(zip(paths, unique_keys(paths), strict=True))
    ordered = sorted(paths)
    assert [keys[path] for path in ordered] == unique_keys(ordered)


def test_split_by_hash_has_its_share_and_ignores_other_rows(tmp_path: Path, images: Path) -> None:
    names = [f"{number:04}.jpg" for number in range(400)]
    for name in names:
        os.link(images / "b.jpg", images / name)
    rows = [{"file_name": name, "tags": "a", "important_tags": "a"} for name in names]
    for out, some in (("all", rows), ("odd", rows[::-2])):
        path = write_table(tmp_path / f"{out}.csv", some)
        table.build(tmp_path / out, path, images, validation_fraction=0.25, samples_per_shard=200)
    validated = set(tar_samples(tmp_path / "all", "validation"))
    assert 70 <= len(validated) <= 130  # 100 expected, standard deviation 9
    odd = {name.removesuffix(".jpg") for name in names[1::2]}
    assert set(tar_samples(tmp_path / "odd", "validation")) == validated & odd


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"the photographs of {PHOTOS} are not here")
def test_real_photographs(tmp_path: Path) -> None:
    report = table.build(tmp_path, PHOTOS / "photos.csv", num_processes=2, samples_per_shard=20)
    assert report == (44, [])
    samples = tar_samples(tmp_path, "train") | tar_samples(tmp_path, "validation")
    with (PHOTOS / "photos.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sample = samples[Path(row["file_name"]).stem]
            assert sample.image == (PHOTOS / row["file_name"]).read_bytes()
            assert sample.tags == row["tags"].split(",")
            assert sorted(sample.important or ()) == sorted(row["important_tags"].split(","))


def test_shards_of_limited_size(tmp_path: Path, images: Path) -> None:
    names = []
    for number, num_bytes in enumerate((900, 5_000, 900, 900, 900, 700, 900)):
        names.append(f"n{number}.jpg")
        (images / names[-1]).write_bytes(picture().ljust(num_bytes, b"\0"))
    rows = [{"file_name": name, "tags": ["sea"]} for name in (*names, "absent.jpg", "../t.jsonl")]
    path = write_table(tmp_path / "t.jsonl", rows)
    options = {"validation_fraction": 0, "shard_megabytes": 0.0018, "max_skipped_fraction": 0.5}
    report = table.build(tmp_path / "out", path, images, **options)
    assert report.written == 7
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.shard_sizes("train") == (1, 1, 2, 2, 1)
    assert table.build(tmp_path / "out", path, images, **options) == report


def test_sizes_of_pictures_behind_urls_are_not_known(tmp_path: Path, images: Path) -> None:
    rows = [{"file_name": name, "tags": ["sea"]} for name in ("b.jpg", "http://127.0.0.1:9/x.jpg")]
    path = write_table(tmp_path / "t.jsonl", rows)
    with pytest.raises(InputError, match=r"x\.jpg: sizes .* use samples_per_shard instead"):
        table.build(tmp_path / "out", path, images, shard_megabytes=1)
