from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magneto_dist.data.sample import BadSample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import hf
from magneto_dist.data.sources.hf import HfColumns, HfRow
from magneto_dist.data.sources.hf_split import HfSplit
from magneto_dist.errors import InputError
from tar_samples import tar_samples

pytestmark = pytest.mark.usefixtures("datasets_offline")


def picture(number: int) -> bytes:
    pixels = np.full((8, 8, 3), number * 20, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if number % 2 else "JPEG")
    return buffer.getvalue()


def table(count: int = 8, as_text: bool = False) -> Any:  # datasets is slow to import
    import datasets

    tags = [["sky", f"tag {number}"] for number in range(count)]
    important = [None if number == 3 else ["sky"] for number in range(count)]
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in range(count)],
        "tags": [";".join(words) for words in tags] if as_text else tags,
        "important_tags": [words and ";".join(words) for words in important]
        if as_text
        else important,
    }
    data = datasets.Dataset.from_dict(columns)
    return data.cast_column("image", datasets.Image())


def check(folder: Path, count: int = 8) -> None:
    samples = tar_samples(folder, "train") | tar_samples(folder, "validation")
    assert len(samples) == count
    for number in range(count):
        image, tags, important = samples[f"train-{number:08d}"]
        assert image == picture(number)
        assert tags == ["sky", f"tag {number}"]
        assert important == (None if number == 3 else ["sky"])
    assert Dataset.open(str(folder)).vocabulary.tags[0] == "sky"


def test_saved_to_disk(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    report = hf.build(tmp_path / "out", str(tmp_path / "saved"), validation_fraction=0.3)
    assert report == (8, [])
    check(tmp_path / "out")
    assert tar_samples(tmp_path / "out", "validation")


def test_full_disk_is_noticed_before_it_is_full(tmp_path: Path, monkeypatch) -> None:
    table().save_to_disk(tmp_path / "saved")
    needed = sum(len(picture(number)) for number in range(8))

    def with_free(num_bytes: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=num_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with_free(needed - 1)
    with pytest.raises(InputError, match="the data set needs"):
        hf.build(tmp_path / "out", str(tmp_path / "saved"))
    with_free(needed)
    assert hf.build(tmp_path / "out", str(tmp_path / "saved")).written == 8


def test_splits_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict({"train": table(), "test": table(3)})
    both.save_to_disk(tmp_path / "saved")
    hf.build(tmp_path / "out", str(tmp_path / "saved"), validation_split="test")
    assert list(tar_samples(tmp_path / "out", "validation")) == [f"test-{i:08d}" for i in range(3)]
    assert len(tar_samples(tmp_path / "out", "train")) == 8


def test_parquet_files_with_tags_in_a_string_in_two_processes(tmp_path: Path) -> None:
    table(as_text=True).to_parquet(tmp_path / "part-0.parquet")
    report = hf.build(
        tmp_path / "out",
        "parquet",
        data_files=str(tmp_path / "part-*.parquet"),
        columns=HfColumns(separator=";"),
        validation_fraction=0,
        samples_per_shard=4,
        num_processes=2,
    )
    assert report == (8, [])
    check(tmp_path / "out")


def test_columns_of_bytes_by_other_names(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"jpg": [picture(0), None], "words": [["a"], ["b", "a"]]})
    data.save_to_disk(tmp_path / "saved")
    report = hf.build(
        tmp_path / "out",
        str(tmp_path / "saved"),
        columns=HfColumns("jpg", "words", None),
        validation_fraction=0,
    )
    assert report == (1, [("train-00000001", "column 'jpg' has no picture")])
    assert tar_samples(tmp_path / "out", "train")["train-00000000"] == (picture(0), ["a"], None)


def test_pictures_that_lie_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(2):
        (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "tags": "a,b"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    report = hf.build(
        tmp_path / "out",
        "imagefolder",
        data_dir=str(folder),
        columns=HfColumns(important=None),
        validation_fraction=0,
    )
    assert report == (2, [])
    samples = tar_samples(tmp_path / "out", "train")
    assert [sample[:2] for sample in samples.values()] == [
        (picture(number), ["a", "b"]) for number in range(2)
    ]
    source = HfSplit("imagefolder", "train", data_dir=str(folder))
    (folder / "1.png").unlink()
    with pytest.raises(BadSample, match=r"1.png' cannot be read: No such file"):
        hf.PictureReader("image")(HfRow("key", source, 1, ("a",), None))


def test_wrong_input(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    table().save_to_disk(saved)
    with pytest.raises(InputError, match=r"no column 'words'; the columns are 'image', 'tags',"):
        hf.build(tmp_path / "out", saved, columns=HfColumns(tags="words"))
    columns = HfColumns(tags="important_tags", important="tags")
    with pytest.raises(InputError, match=r"8 rows have important .* the first is 'tag 0' in"):
        hf.build(tmp_path / "out", saved, columns=columns)
    with pytest.raises(InputError, match=r"split 'train': cannot be loaded"):
        hf.build(tmp_path / "out", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"validation_fraction -1: must"):
        hf.build(tmp_path / "out", saved, validation_fraction=-1)
