"""The tars are plain WebDataset: three other readers find the same bytes in them."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.writer import write_dataset
from magneto_dist.vocabulary import Vocabulary

TAGS = ("sea", "sky", "été", "dog")


def load(row: int) -> Sample:
    noise = np.random.default_rng(row).integers(0, 256, (24 + row, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    tags = tuple(TAGS[(row + k) % 4] for k in range(1 + row % 3))
    important = None if row % 5 == 0 else tuple((row + k) % 2 == 0 for k in range(len(tags)))
    return Sample(f"photo_{row:02d}", buffer.getvalue(), tags, important)


SAMPLES = [load(row) for row in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    vocabulary = Vocabulary(TAGS)
    write_dataset(folder, {"train": range(20)}, load, vocabulary, num_processes=1, source={})
    return folder


def assert_same(key: str, image: bytes, annotation: dict, expected: Sample) -> None:
    assert key == expected.key
    assert image == expected.image
    assert tuple(annotation["tags"]) == expected.tags
    important = annotation.get("important")
    assert (important and tuple(map(bool, important))) == expected.important


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset(folder):
    import webdataset

    dataset = webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False)
    found = list(dataset)
    del dataset
    gc.collect()  # here, and not in another test: webdataset leaves the tar open
    assert len(found) == 20
    for sample, expected in zip(found, SAMPLES, strict=True):
        assert_same(sample["__key__"], sample["jpg"], json.loads(sample["json"]), expected)


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets(folder, streaming, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        "webdataset",
        data_files={"train": str(folder / "train-000000.tar")},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path),
    ).cast_column("jpg", datasets.Image(decode=False))
    found = list(found)
    assert len(found) == 20
    for sample, expected in zip(found, SAMPLES, strict=True):
        assert_same(sample["__key__"], sample["jpg"]["bytes"], sample["json"], expected)


def dali_samples(folder: Path) -> list[tuple[bytes, dict]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DALI's own, on import
        pipeline_def = pytest.importorskip("nvidia.dali").pipeline_def
        from nvidia.dali import fn

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            fn.readers.webdataset(
                paths=[str(folder / "train-000000.tar")],
                index_paths=[str(folder / "train-000000.idx")],
                ext=["jpg", "json"],
                missing_component_behavior="error",
            )
        )

    pipe = pipeline()
    pipe.build()
    found = []
    for _ in range(4):
        images, annotations = pipe.run()
        for k in range(5):
            annotation = np.asarray(annotations.at(k)).tobytes()
            found.append((np.asarray(images.at(k)).tobytes(), json.loads(annotation)))
    return found


def test_dali_with_our_index(folder):
    found = dali_samples(folder)
    for (image, annotation), expected in zip(found, SAMPLES, strict=True):
        assert_same(expected.key, image, annotation, expected)


def test_index_is_the_one_that_dali_would_make(folder, tmp_path):
    pytest.importorskip("wds2idx")
    index = tmp_path / "train.idx"
    command = [sys.executable, "-m", "wds2idx", str(folder / "train-000000.tar"), str(index)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert index.read_bytes() == (folder / "train-000000.idx").read_bytes()


def test_our_own_reader(folder):
    from magneto_dist.data.stream import SampleReader

    reader = SampleReader(Dataset.open(str(folder)), "train", with_images=True)
    for raw, expected in zip(reader.read(np.arange(20)), SAMPLES, strict=True):
        assert raw.image
        assert_same(raw.key, raw.image, json.loads(raw.annotation), expected)
