"""A split of a data set of the `datasets` library: how it is opened, and where its files may lie.

This file alone imports the library, and late: that takes a second, and only this source needs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from magneto_dist.data.network import is_url
from magneto_dist.errors import InputError


@dataclass(frozen=True)
class HfSplit:
    """What to load."""

    path: str
    """Name on the hub, a builder ("imagefolder", "parquet"), or a folder of `save_to_disk`."""
    split: str
    """Name of the split there."""
    config: str | None = None
    """Name of the configuration, where there are several."""
    data_files: str | None = None
    """Files for a builder: a path or a pattern."""
    data_dir: str | None = None
    """Folder for a builder."""
    images: str | None = None
    """Folder of pictures that rows name by path, beside those of the data set itself."""
    streaming: bool = False
    """Read without a copy in the cache of `datasets`."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path}, split {self.split!r}"


def open_split(source: HfSplit, **options: Any) -> Any:
    """A split of the data set, mapped from disk or streamed.

    Args:
        source: which.
        options: of its builder.

    Raises:
        InputError: it cannot be loaded.
    """
    import datasets

    try:
        if (Path(source.path) / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(Path(source.path) / source.split))
        if is_saved(source.path):
            return datasets.load_from_disk(source.path)
        return datasets.load_dataset(
            source.path,
            source.config,
            data_files=source.data_files,
            data_dir=source.data_dir,
            split=source.split,
            streaming=source.streaming,
            **options,
        )
    except Exception as error:  # whatever the hub, a builder or the file system stumbled over
        raise InputError(
            f"data set {source.where}: cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def num_rows(source: HfSplit, data: Any) -> int | None:
    """For the progress bar; of a streamed split it is often unknown."""
    if not source.streaming:
        return len(data)
    known = (data.info.splits or {}).get(source.split)
    return known.num_examples if known is not None else None


def select(source: HfSplit, data: Any, columns: list[str]) -> Any:
    """Some columns of a split."""
    if source.streaming and data.info.builder_name == "parquet":
        # Selecting alone would fetch the others, too, and drop them.
        data = open_split(source, columns=columns)
    return data.select_columns(columns)


def encoded(data: Any, column: str) -> tuple[Any, bool]:
    """The split with pictures as they came, and whether the column is of the type Image."""
    from datasets import Image

    if data.features is None or not isinstance(data.features[column], Image):
        return data, False
    return data.cast_column(column, Image(decode=False)), True


def is_saved(path: str) -> bool:
    """Whether this is a folder of `save_to_disk`."""
    return any((Path(path) / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def own_folders(source: HfSplit) -> list[str | Path]:
    """Where the user says that the data set lies on this machine."""
    folders: list[str | Path] = [] if source.images is None else [source.images]
    if Path(source.path).is_dir():
        return [*folders, source.path]
    if "/" in source.path:  # on the hub: its files are no files of this machine
        return folders
    if source.data_dir is not None and not is_url(source.data_dir):
        folders.append(source.data_dir)
    if source.data_files is not None and not is_url(source.data_files):
        parts = takewhile(lambda part: not set(part) & set("*?["), Path(source.data_files).parts)
        folder = Path(*parts)
        folders.append(folder.parent if folder == Path(source.data_files) else folder)
    return folders


def cache_folders() -> list[str | Path]:
    """Where `datasets` keeps what it has downloaded."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        HF_HUB_CACHE,
        config.HF_DATASETS_CACHE,
        config.DOWNLOADED_DATASETS_PATH,
        config.EXTRACTED_DATASETS_PATH,
    ]


def own_urls(source: HfSplit) -> tuple[str, ...]:
    """Where it lies elsewhere."""
    named = [name for name in (source.data_dir, source.data_files) if name and is_url(name)]
    folders = [f"{re.split('[*?]', name)[0].rpartition('/')[0]}/" for name in named]
    return (f"hf://datasets/{source.path}@", f"hf://datasets/{source.path}/", *folders)
