"""A small data set, made by the real writer from pictures that are drawn in `small_data.py`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from magneto_dist.data.shards import Dataset
from small_data import Damager, make_sample, make_text_sample, write_small


@pytest.fixture(scope="session")
def small_dataset_dir(tmp_path_factory) -> Path:
    """60 training and 15 validation samples in shards of 7; not to be changed."""
    return write_small(tmp_path_factory.mktemp("small"), make_sample)


@pytest.fixture(scope="session")
def small_dataset(small_dataset_dir) -> Dataset:
    return Dataset.open(str(small_dataset_dir))


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory) -> Dataset:
    """The same tags without pictures."""
    return Dataset.open(str(write_small(tmp_path_factory.mktemp("text"), make_text_sample)))


@pytest.fixture
def damaged(small_dataset_dir, tmp_path) -> Damager:
    folder = tmp_path / "damaged"
    shutil.copytree(small_dataset_dir, folder)
    return Damager(folder)


@pytest.fixture
def datasets_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The `datasets` library with a cache of its own, and without the hub."""
    import datasets.config

    from magneto_dist.data.sources import hf

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hf._pictures.cache_clear()
    yield
    hf._pictures.cache_clear()
