"""Pictures made smaller as shards are written: right in size and look, always the same bytes."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from magneto_dist.data.sample import BadSample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.shrink import Shrink
from magneto_dist.data.verify import verify
from magneto_dist.data.writer import write_dataset
from magneto_dist.errors import InputError
from pictures import encoded, turned
from small_data import VOCABULARY, make_sample


def smooth(width: int, height: int, kind: str, **options: object) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (90, 360)])
def test_shorter_side_is_as_asked_and_the_picture_the_same(kind, width, height):
    content = smooth(width, height, kind)
    small = Image.open(io.BytesIO(Shrink(shorter_side=60, quality=95)(content, 1.0)))
    scale = 60 / min(width, height)
    assert small.size == (round(width * scale), round(height * scale))
    expected = Image.open(io.BytesIO(content)).convert("RGB").resize(small.size, reducing_gap=None)
    assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 2
    assert Shrink(shorter_side=60)(content, 1.0) == Shrink(shorter_side=60)(content, 1.0)


def test_small_pictures_stay_as_they_came():
    content = encoded(40, 30, "PNG")
    assert Shrink(shorter_side=30)(content, 1.0) is content
    assert Shrink()(content, 1.0) is content


def test_turned_pictures_become_upright():
    content = turned(6, "JPEG")
    small = Image.open(io.BytesIO(Shrink(shorter_side=20)(content, 1.0)))
    assert not small.getexif()
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert (small.width < small.height) == (upright.width < upright.height)
    assert min(small.size) == 20


def test_bad_pictures_and_settings_are_refused():
    with pytest.raises(BadSample, match="larger than"):
        Shrink(shorter_side=4)(encoded(40, 30, "PNG"), 0.001)
    with pytest.raises(InputError, match=r"shrink\.quality 0"):
        Shrink(quality=0)
    with pytest.raises(InputError, match=r"shrink\.shorter_side 0"):
        Shrink(shorter_side=0)


def test_data_set_of_smaller_pictures(tmp_path):
    def write(shrink: Shrink) -> None:
        write_dataset(
            tmp_path / "data",
            {"train": [("train", number) for number in range(9)]},
            make_sample,
            VOCABULARY,
            num_processes=1,
            source={"builder": "test"},
            shrink=shrink,
        )

    write(Shrink(shorter_side=16))
    assert verify(Dataset.open(str(tmp_path / "data")), 1) == []
    with tarfile.open(tmp_path / "data" / "train-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                assert min(Image.open(tar.extractfile(member)).size) == 16
    write(Shrink(shorter_side=16))  # finds it done
    with pytest.raises(InputError, match="holds another data set"):
        write(Shrink(shorter_side=17))
