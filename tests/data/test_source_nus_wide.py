from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import nus_wide_tags
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import nus_wide, nus_wide_files
from magneto_dist.data.sources.nus_wide_files import read_distribution
from magneto_dist.errors import InputError
from tar_samples import TarSample, tar_samples

REAL = Path(__file__).parents[3] / "shared" / "data" / "nus_wide"
CONCEPTS = ["airport", "animal", "beach", "lake", "sky"]
NUM_IMAGES = 60
SPLITS = {"train": "train", "test": "validation"}


def paths() -> list[str]:
    """Backslashes as distributed; image 7 shows the item of image 3 once more."""
    names = [f"{'actor' if i < 30 else 'zebra'}\\{i:04}_{1000 + i}.jpg" for i in range(NUM_IMAGES)]
    names[7] = "actor\\0007_1003.jpg"
    return names


def labels_and_tags() -> tuple[list[list[int]], list[list[int]]]:
    """(labels, tags) of all images; half of the tag lists cover the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (NUM_IMAGES, 5)) * rng.integers(0, 2, (NUM_IMAGES, 5))
    tags = rng.integers(0, 2, (NUM_IMAGES, 5))
    tags[::2] |= labels[::2]
    for image in (3, 7):
        labels[image] = tags[image] = [0, 1, 0, 0, 1]
    labels[12] = [0, 0, 0, 0, 1]
    return labels.tolist(), tags.tolist()


def text_files(by_split: bool = False) -> dict[str, bytes]:
    """`by_split`: tags and labels in a file for each list, instead of one for all images."""
    labels, tags = labels_and_tags()
    in_test = [i % 3 == 0 for i in range(NUM_IMAGES)]
    files = {
        "ConceptsList/Concepts81.txt": "".join(f"{concept}\r\n" for concept in CONCEPTS),
        "NUS_WID_Tags/AllTags81.txt": "".join(" ".join(map(str, row)) + " \r\n" for row in tags),
        "ImageList/Imagelist.txt": "".join(f"{path} \r\n" for path in paths()),
    }
    for name, wanted in (("Train", False), ("Test", True)):
        part = [path for path, test in zip(paths(), in_test, strict=True) if test == wanted]
        files[f"ImageList/{name}Imagelist.txt"] = "".join(f"{path}\n" for path in part)
    for number, concept in enumerate(CONCEPTS):
        column = [str(row[number]) for row in labels]
        if concept == "lake":
            assert column[12] == "0"
            column[12] = "-1130179"
        files[f"Groundtruth/AllLabels/Labels_{concept}.txt"] = "\n".join(column) + "\n"
    if by_split:
        for path in [path for path in files if "AllLabels/" in path or "AllTags81" in path]:
            lines = files.pop(path).splitlines(keepends=True)
            for name, wanted in (("Train", False), ("Test", True)):
                part = path.replace("AllLabels", "TrainTestLabels").replace("All", f"{name}_")
                part = part.replace(".txt", f"_{name}.txt") if "Labels_" in part else part
                chosen = [line for line, test in zip(lines, in_test, strict=True) if test == wanted]
                files[part] = "".join(chosen)
    return {name: content.encode() for name, content in files.items()}


def write_root(root: Path, files: dict[str, bytes], zipped: bool = False) -> Path:
    for name, content in files.items():
        if zipped:
            archive, _, member = name.partition("/")
            root.mkdir(exist_ok=True)
            with zipfile.ZipFile(root / f"{archive}.zip", "a") as file:
                file.writestr(member, content)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


def expected() -> dict[str, dict[str, TarSample]]:
    """The rules of the paper in plain loops."""
    labels, tags = labels_and_tags()
    splits: dict[str, dict[str, TarSample]] = {"train": {}, "validation": {}}
    seen = set()
    for image in range(NUM_IMAGES):
        key = paths()[image].split("_")[1].removesuffix(".jpg")
        truth = [c for c, flag in zip(CONCEPTS, labels[image], strict=True) if flag]
        words = [c for c, flag in zip(CONCEPTS, tags[image], strict=True) if flag]
        if truth and words and set(truth) <= set(words) and key not in seen:
            seen.add(key)
            split = "validation" if image % 3 == 0 else "train"
            splits[split][key] = TarSample(None, words, truth)
    return splits


@pytest.mark.parametrize(("zipped", "by_split"), [(False, False), (True, False), (False, True)])
def test_annotations_follow_the_rules_of_the_paper(
    tmp_path: Path, zipped: bool, by_split: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "root", text_files(by_split), zipped)
    out = tmp_path / "out"
    report = nus_wide.build(out, root, annotations_only=True)
    labels, tags = labels_and_tags()
    both = [any(row) and any(other) for row, other in zip(labels, tags, strict=True)]
    for split, samples in expected().items():
        assert tar_samples(out, split) == samples
        assert len(samples) >= 5
    dataset = Dataset.open(str(out))
    assert list(dataset.vocabulary.tags) == CONCEPTS
    assert not dataset.has_images
    unique = sum(map(len, expected().values()))
    assert report == (unique, [])
    header, *lines, verdict = capsys.readouterr().out.splitlines()
    assert header.split() == ["here", "published"]
    assert verdict == "differs from the published counts, first in listed"
    assert "listed 60 269,648" in [" ".join(line.split()) for line in lines]
    assert {line.split()[0]: line.split()[1] for line in lines} == {
        "listed": "60",
        "with_tags": str(sum(map(any, tags))),
        "with_ground_truth": str(sum(map(any, labels))),
        "with_both": str(sum(both)),
        "covered": str(unique + 1),
        "unique": str(unique),
        "train": str(len(expected()["train"])),
        "validation": str(len(expected()["validation"])),
    }


def test_pictures_in_folders_and_flat(tmp_path: Path, monkeypatch) -> None:
    root = write_root(tmp_path / "root", text_files())
    rows = [(path.replace("\\", "/"), path.split("_")[1]) for path in paths()]
    for number, (path, flat) in enumerate(rows):
        # One picture is missing; the item that is listed twice lies at its first place.
        place = root / "Flickr" / (flat if number % 2 else path)
        place.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "JPEG")
        if flat != "1012.jpg" and number != 7:
            place.write_bytes(buffer.getvalue())
    report = nus_wide.build(tmp_path / "out", root, samples_per_shard=10)
    with monkeypatch.context() as full:
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match="the data set needs"):
            nus_wide.build(tmp_path / "full", root)
    nus_wide.build(tmp_path / "one each", root, shard_megabytes=1e-6)
    sizes = Dataset.open(str(tmp_path / "one each")).shard_sizes("train")
    assert set(sizes) == {1}
    assert len(sizes) == len(tar_samples(tmp_path / "out", "train"))
    assert report.skipped == [("1012", "there is neither actor/0012_1012.jpg nor 1012.jpg")]
    for split, wanted in expected().items():
        samples = tar_samples(tmp_path / "out", split)
        assert list(samples) == [key for key in wanted if key != "1012"]
        for key, sample in samples.items():
            assert sample[1:] == wanted[key][1:]
            red = Image.open(io.BytesIO(sample.image or b"")).convert("RGB").getpixel((4, 4))
            assert isinstance(red, tuple)
            assert abs(red[0] - (int(key) - 1000)) <= 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("NUS_WID_Tags/AllTags81.txt", None, "has no AllTags81.txt, neither unpacked nor in a zip"),
        ("NUS_WID_Tags/AllTags81.txt", b"0 1 0 1 0 \n" * 59, "60 lines of 5 values, but has 59"),
        ("NUS_WID_Tags/AllTags81.txt", b"0 1 0 1\n0 1 0 1 0 1\n" * 30, "60 lines of 5 values"),
        ("NUS_WID_Tags/AllTags81.txt", b"0 10 1 0 \n" * 60, "60 lines of 5 values"),
        ("NUS_WID_Tags/AllTags81.txt", b"0 2 1 0 0\n" * 60, "holds '2', not only 0 and 1"),
        ("Groundtruth/AllLabels/Labels_sky.txt", None, "has no Labels_sky.txt"),
        ("ImageList/TestImagelist.txt", b"actor\\0000_1000.jpg\n", "is neither in Train"),
        ("ImageList/TestImagelist.txt", b"actor\\0001_1001.jpg\n", "is in TrainImagelist.txt, too"),
        ("ImageList/Imagelist.txt", b"..\\..\\0001_1001.jpg\n", "leaves the folder of pictures"),
        ("ImageList/Imagelist.txt", b"actor\\portrait.jpg\n", "with the number of an item"),
        ("broken.zip", b"PK", "broken.zip: cannot be read"),
    ],
)
def test_broken_distribution(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    files = text_files()
    files.pop(name, None)
    if content is not None:
        files[name] = content
    root = write_root(tmp_path / "root", files)
    with pytest.raises(InputError, match=message):
        nus_wide.build(tmp_path / "out", root, annotations_only=True)


def test_pictures_are_looked_for_first(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", text_files())
    with pytest.raises(InputError, match=r"no folder .*Flickr or .*--annotations-only"):
        nus_wide.build(tmp_path / "out", root)
    with pytest.raises(InputError, match=r"no folder .*pictures: give"):
        nus_wide.build(tmp_path / "out", root, tmp_path / "pictures")


def test_parts_that_leave_an_image_out_are_refused(tmp_path: Path) -> None:
    files = text_files(by_split=True)
    listed = files["ImageList/TestImagelist.txt"].splitlines(keepends=True)
    files["ImageList/TestImagelist.txt"] = b"".join(listed[1:])
    root = write_root(tmp_path / "root", files)
    with pytest.raises(InputError, match=r"need every image in a list; use Labels_airport\.txt"):
        nus_wide.build(tmp_path / "out", root, annotations_only=True)


# The whole distribution -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real labels and lists, simulated tags but for twenty images whose tags are published."""
    if not REAL.exists():
        pytest.skip(f"the distributed labels are not in {REAL}")
    root = tmp_path_factory.mktemp("real")
    known = {row.key: row.tags for row in printed_rows()}
    zips = (REAL / "Groundtruth.zip", REAL / "ConceptsList.zip")
    nus_wide_tags.write_root(root, *zips, REAL / "image_list.csv.gz", known)
    return root


class Printed(NamedTuple):
    key: str
    tags: tuple[str, ...]
    important: set[str]
    split: str


def printed_rows() -> list[Printed]:
    """The rows that the authors' notebook shows."""
    lines = [line.strip() for line in (REAL / "README.md").read_text().splitlines()]
    rows = csv.reader(line for line in lines if re.match(r"\d{5,},", line))
    return [
        Printed(key, tuple(tags.split(",")), set(important.split(",")), SPLITS[split])
        for key, tags, important, split in rows
    ]


def read_slowly(root: Path) -> dict[str, dict[str, tuple[set[str], set[str]]]]:
    """Split -> item id -> (tags, labels): the rules of the paper once more, line by line."""
    with zipfile.ZipFile(root / "ConceptsList.zip") as archive:
        concepts = archive.read("Concepts81.txt").decode().split()
    images = (root / "ImageList/Imagelist.txt").read_text().split()
    test = set((root / "ImageList/TestImagelist.txt").read_text().split())
    labels: list[set[str]] = [set() for _ in images]
    with zipfile.ZipFile(root / "Groundtruth.zip") as archive:
        for concept in concepts:
            words = archive.read(f"AllLabels/Labels_{concept}.txt").split()
            for image, word in enumerate(words):
                if word == b"1":
                    labels[image].add(concept)
    found: dict[str, dict[str, tuple[set[str], set[str]]]] = {"train": {}, "validation": {}}
    with (root / "NUS_WID_Tags/AllTags81.txt").open() as file:
        for image, line in enumerate(file):
            flags = zip(concepts, line.split(), strict=True)
            tags = {concept for concept, flag in flags if flag == "1"}
            if labels[image] and labels[image] <= tags:
                split = "validation" if images[image] in test else "train"
                key = images[image].split("_")[-1].removesuffix(".jpg")
                if not any(key in other for other in found.values()):
                    found[split][key] = (tags, labels[image])
    return found


@pytest.mark.slow
def test_the_whole_distribution(real_root: Path) -> None:
    distribution = read_distribution(real_root)
    labels_a_row = np.maximum(distribution.ground_truth.sum(axis=1), 1)  # as counted there
    assert round(labels_a_row.mean(), 6) == 2.092168
    assert round(labels_a_row.std(ddof=1), 6) == 1.512925
    assert labels_a_row.max() == 13
    tags_a_row = distribution.tags.sum(axis=1)
    assert round(tags_a_row.mean(), 6) == nus_wide_tags.TAGS_MEAN
    assert tags_a_row.std() == pytest.approx(nus_wide_tags.TAGS_STD, rel=2e-3)
    assert tags_a_row.max() == nus_wide_tags.TAGS_MAX

    splits, funnel = nus_wide.select(distribution)
    assert funnel.verdict == "matches the published counts"
    published = nus_wide.PUBLISHED
    for stage in ("listed", "with_tags", "with_both", "covered", "train"):
        assert getattr(funnel, stage) == published[stage], stage
    assert funnel.validation == published["validation"] - 1  # one image is in both there
    slow = read_slowly(real_root)
    for split, rows in splits.items():
        named = {
            row.key: (
                set(row.tags),
                {tag for tag, flag in zip(row.tags, row.important, strict=True) if flag},
            )
            for row in rows
        }
        assert named == slow[split]
    for row in printed_rows():
        assert slow[row.split][row.key] == (set(row.tags), row.important)
    assert len(printed_rows()) == 20

    rows = [row for split in splits.values() for row in split]
    share = np.array([np.mean(row.important) for row in rows])
    assert share.mean() == pytest.approx(nus_wide_tags.SHARE_MEAN, rel=2e-3)
    assert share.std() == pytest.approx(nus_wide_tags.SHARE_STD, rel=2e-3)
    assert round(share.min(), 6) == 0.090909
    assert max(len(row.tags) for row in rows) == nus_wide_tags.COVERED_MAX


@pytest.mark.slow
def test_the_whole_distribution_takes_seconds_and_little_memory(
    real_root: Path, tmp_path: Path
) -> None:
    launcher = Path(__file__).parents[2] / "launchers" / "shards.py"
    out = tmp_path / "out"
    options = [f"--root={real_root}", f"--out={out}", "--annotations_only=true"]
    command = [sys.executable, str(launcher), "build", "nus-wide", *options]
    _, status, usage = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    # Of all cores together, which does not depend on what else the machine has to do.
    assert usage.ru_utime + usage.ru_stime < 20
    assert usage.ru_maxrss * 1024 < 2e9
    dataset = Dataset.open(str(out))
    assert dataset.num_samples("train") + dataset.num_samples("validation") == 26_559


@pytest.mark.skipif(not REAL.exists(), reason=f"the distributed labels are not in {REAL}")
def test_real_bad_value_counts_as_zero() -> None:
    files = nus_wide_files._Files(REAL)
    lake = nus_wide_files._read_flags(files, "Labels_lake_Train.txt", 161_789, 1)
    with zipfile.ZipFile(REAL / "Groundtruth.zip") as archive:
        lines = archive.read("TrainTestLabels/Labels_lake_Train.txt").split()
    assert lines[78_372] == b"-1130179"
    assert not lake[78_372]
    assert lake.sum() == lines.count(b"1")
