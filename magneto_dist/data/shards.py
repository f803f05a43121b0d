"""A data set that was opened: its shards, its vocabulary, and whether all of them are there.

They come from a disk or a URL that somebody else may have written: nothing in them is trusted. What
`dataset.json` says: `dataset_file.py`; where the samples lie in a shard: its `ShardIndex`. The tars
may have been there before the data set, and lie elsewhere (`indexing.py`).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magneto_dist.data.dataset_file import (
    DATASET_FILE,
    VOCABULARY_FILE,
    DatasetFields,
    Shard,
    parse_dataset_file,
)
from magneto_dist.data.sample import OUR_FIELDS, AnnotationFields, parse_annotation
from magneto_dist.data.shard_index import ShardIndex, index_name
from magneto_dist.data.storage import Storage
from magneto_dist.errors import FormatError, InputError
from magneto_dist.vocabulary import Vocabulary

__all__ = ["Dataset", "Shard", "ShardIndex"]

_CONCURRENT_REQUESTS = 32


@dataclass(frozen=True)
class Dataset:
    """A data set that was opened: what it holds, and how to get at it."""

    root: str
    """Folder or URL prefix."""
    splits: dict[str, tuple[Shard, ...]]
    vocabulary: Vocabulary
    has_images: bool
    """False: text-only."""
    storage: Storage
    """Where `dataset.json` and the indexes are."""
    tar_storage: Storage
    """Where the tars are."""
    source: dict[str, Any]
    """The builder and its parameters, for people."""
    fields: AnnotationFields = OUR_FIELDS
    """Where annotations hold what."""
    ignores_unknown_tags: bool = False
    """Tags outside the vocabulary are left out; False: they are errors."""

    @classmethod
    def open(
        cls,
        root: str,
        cache_dir: str | None = None,
        cache_gb: float = 200.0,
        *,
        check_shards: bool = True,
    ) -> Dataset:
        """Opens the data set in a folder or under a URL prefix.

        Args:
            root: folder or URL prefix.
            cache_dir: for shards of a remote data set; None: ~/.cache/magneto_dist/shards.
            cache_gb: most disk space of that cache, in 1e9 bytes.
            check_shards: look whether every shard is there and of the size it should have.

        Raises:
            InputError: the folder, a file or a shard is absent; `dataset.json` is not of this
                format and version; another vocabulary; a shard of another size.
        """
        storage = Storage(str(root), cache_dir, cache_gb)
        fields, version = _read_dataset_file(storage)
        storage = _index_storage(storage, fields, version)
        dataset = cls(
            str(root),
            fields.splits,
            _read_vocabulary(storage, fields),
            fields.has_images,
            storage,
            _tar_storage(storage, fields),
            fields.source,
            fields.annotation,
            fields.ignores_unknown_tags,
        )
        if check_shards:
            _check_sizes(dataset)
        return dataset

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split in the order of its samples.

        Raises:
            InputError: no such split.
        """
        if split not in self.splits:
            raise InputError(f"{self.root}: has no split {split!r}, only {', '.join(self.splits)}")
        return self.splits[split]

    def annotation(self, content: bytes) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
        """A sample's tags and which are important, of the JSON in its shard.

        Raises:
            BadSample: see `parse_annotation`; or it has no tag of the vocabulary.
        """
        tags, important = parse_annotation(content, self.fields)
        if not self.ignores_unknown_tags or all(tag in self.vocabulary for tag in tags):
            return tags, important
        return self.vocabulary.known(tags, important)

    def shard_sizes(self, split: str) -> tuple[int, ...]:
        """Samples in each shard of a split."""
        return tuple(shard.num_samples for shard in self.shards(split))

    def num_samples(self, split: str) -> int:
        """Samples of a split."""
        return sum(self.shard_sizes(split))

    def num_labelled(self, split: str) -> int:
        """Samples of a split that say which of their tags are important."""
        return sum(shard.num_labelled for shard in self.shards(split))


def _read_dataset_file(storage: Storage) -> tuple[DatasetFields, str]:
    """What `dataset.json` says, and its SHA-256."""
    try:
        return storage.parse_file(
            DATASET_FILE,
            lambda content: (parse_dataset_file(content), hashlib.sha256(content).hexdigest()),
        )
    except FormatError as error:
        raise InputError(
            f"{storage.where(DATASET_FILE)}: {error}; build the data set again"
        ) from None
    except InputError:
        raise InputError(
            f"{storage.root}: no data set there (no {DATASET_FILE}); give the folder or URL that"
            " `launchers/shards.py build` wrote, and finish a build that was interrupted"
        ) from None
    except OSError as error:
        raise InputError(
            f"{storage.root}: cannot be read: {error}; check the address and whether it answers"
        ) from None


def _read_vocabulary(storage: Storage, fields: DatasetFields) -> Vocabulary:
    def parse(content: bytes) -> Vocabulary:
        try:
            vocabulary = Vocabulary.from_bytes(content)
        except InputError as error:
            raise FormatError(str(error)) from None
        if (vocabulary.sha256, len(vocabulary)) != (fields.vocabulary_sha256, fields.num_tags):
            raise FormatError(
                f"is not the vocabulary that the data set was built with ({fields.num_tags} tags,"
                f" SHA-256 {fields.vocabulary_sha256[:12]}...)"
            )
        return vocabulary

    where = storage.where(VOCABULARY_FILE)
    try:
        return storage.parse_file(VOCABULARY_FILE, parse)
    except FormatError as error:
        raise InputError(
            f"{where}: {error}; put that one back, or build the data set again"
        ) from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error}") from None


def _index_storage(storage: Storage, fields: DatasetFields, version: str) -> Storage:
    """The storage of a data set with that hash of `dataset.json`, once its indexes are known."""
    # An index without a hash is not kept in the cache: what is wrong with it would stay.
    shards = [s for shards in fields.splits.values() for s in shards if s.index_sha256]
    return Storage(
        storage.root,
        storage.cache_dir,
        storage.cache_gb,
        version,  # shards of another version must never come out of the cache
        {index_name(shard.name): shard.index_sha256 for shard in shards},
        {index_name(shard.name): shard.index_num_bytes for shard in shards},
    )


def _tar_storage(storage: Storage, fields: DatasetFields) -> Storage:
    root = storage.root
    if fields.tars is not None:
        is_url = "://" in fields.tars or fields.tars.startswith("pipe:")
        if storage.is_remote and not is_url:
            raise InputError(
                f"{root}/{DATASET_FILE}: says that its tars lie in {fields.tars[:100]!r} on this"
                " machine: a data set under a URL may only have them under a URL"
            )
        root = fields.tars if is_url else str(Path(root) / fields.tars)
    sha256 = {shard.file: shard.sha256 for shards in fields.splits.values() for shard in shards}
    return Storage(root, storage.cache_dir, storage.cache_gb, storage.version, sha256)


def _check_sizes(dataset: Dataset) -> None:
    shards = [shard for split in dataset.splits.values() for shard in split]
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as threads:
        sizes = threads.map(lambda shard: dataset.tar_storage.size(shard.file), shards)
        try:
            for shard, size in zip(shards, sizes, strict=True):
                if size != shard.num_bytes:
                    raise InputError(
                        f"{dataset.tar_storage.where(shard.file)}: has {size} bytes,"
                        f" {DATASET_FILE} says {shard.num_bytes}; copy or build it again"
                    )
        except OSError as error:
            raise InputError(f"{dataset.root}: cannot be read: {error}") from None
