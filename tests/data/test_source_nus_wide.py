from __future__ import annotations

import csv
import gzip
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tar_samples import TarSample, tar_samples

from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import nus_wide
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

REAL = Path(__file__).parents[3] / "shared" / "data" / "nus_wide"
CONCEPTS = ["airport", "animal", "beach", "lake", "sky"]
NUM_IMAGES = 60


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


def text_files() -> dict[str, bytes]:
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


@pytest.mark.parametrize("zipped", [False, True])
def test_annotations_follow_the_rules_of_the_paper(
    tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "root", text_files(), zipped)
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
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines == {
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


@pytest.mark.skipif(not REAL.exists(), reason=f"the distributed labels are not in {REAL}")
def test_real_ground_truth_has_the_published_figures() -> None:
    with zipfile.ZipFile(REAL / "ConceptsList.zip") as archive:
        concepts = archive.read("Concepts81.txt").decode().split()
    with gzip.open(REAL / "image_list.csv.gz", "rt") as file:
        num_images = sum(1 for _ in csv.reader(file)) - 1
    labels = nus_wide.read_ground_truth(REAL, Vocabulary(concepts), num_images)
    assert labels.shape == (269_648, 81)
    per_row = np.maximum(labels.sum(axis=1), 1)  # an empty row is counted as one label there
    assert round(per_row.mean(), 6) == 2.092168
    assert round(per_row.std(ddof=1), 6) == 1.512925
    assert per_row.max() == 13


@pytest.mark.skipif(not REAL.exists(), reason=f"the distributed labels are not in {REAL}")
def test_real_bad_value_counts_as_zero() -> None:
    lake = nus_wide._read_flags(nus_wide._Files(REAL), "Labels_lake_Train.txt", 161_789, 1)
    with zipfile.ZipFile(REAL / "Groundtruth.zip") as archive:
        lines = archive.read("TrainTestLabels/Labels_lake_Train.txt").split()
    assert lines[78_372] == b"-1130179"
    assert not lake[78_372]
    assert lake.sum() == lines.count(b"1")
