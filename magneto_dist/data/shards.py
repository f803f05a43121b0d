"""What a data set holds: `dataset.json`, `vocabulary.txt`, and whether every shard is there.

They come from a disk or a URL that somebody else may have written: nothing in them is trusted.
Where the samples lie in a shard says its `ShardIndex`. The tars may have been there before the data
set, and lie elsewhere (`indexing.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from magneto_dist.data.sample import OUR_FIELDS, AnnotationFields, parse_annotation
from magneto_dist.data.shard_index import ShardIndex, index_name
from magneto_dist.data.storage import Storage
from magneto_dist.errors import FormatError, InputError
from magneto_dist.vocabulary import Vocabulary

__all__ = ["SPLITS", "Dataset", "Shard", "ShardIndex", "dataset_bytes"]

FORMAT = "magneto_dist"
VERSION = 1
SPLITS = ("train", "validation")
DATASET_FILE = "dataset.json"
VOCABULARY_FILE = "vocabulary.txt"
_CONCURRENT_REQUESTS = 32


@dataclass(frozen=True)
class Shard:
    """Samples of one tar."""

    name: str
    """<split>-<%06d>.tar; that of its index follows from it."""
    num_samples: int
    num_labelled: int
    """Samples that say which of their tags are important."""
    num_bytes: int
    """Of the tar."""
    sha256: str
    """Of the tar; "" where nobody has read it whole."""
    tar: str = ""
    """Name of the tar where it is another."""
    index_num_bytes: int = 0
    """Of the index; 0 in data sets that do not say."""
    index_sha256: str = ""
    """Of the index; "" in data sets that do not say."""

    @property
    def file(self) -> str:
        """Name of the tar."""
        return self.tar or self.name


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


def dataset_bytes(
    splits: dict[str, tuple[Shard, ...]],
    vocabulary: Vocabulary,
    has_images: bool,
    source: dict[str, Any],
    input_sha256: str,
    *,
    tars: str | None = None,
    fields: AnnotationFields = OUR_FIELDS,
    ignores_unknown_tags: bool = False,
) -> bytes:
    """The content of `dataset.json`; `tars`: the folder or URL of the tars, where it is another."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "vocabulary_sha256": vocabulary.sha256,
        "num_tags": len(vocabulary),
        "has_images": has_images,
        "source": source,
        "input_sha256": input_sha256,
        "splits": {name: list(map(_shard_fields, shards)) for name, shards in splits.items()},
    }
    if tars is not None:
        content["tars"] = tars
    if fields != OUR_FIELDS:
        content["annotation"] = asdict(fields)
    if ignores_unknown_tags:
        content["ignores_unknown_tags"] = True
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _shard_fields(shard: Shard) -> dict[str, Any]:
    optional = ("tar", "index_num_bytes", "index_sha256")
    return {name: value for name, value in asdict(shard).items() if value or name not in optional}


class _Fields(NamedTuple):
    vocabulary_sha256: str
    num_tags: int
    has_images: bool
    splits: dict[str, tuple[Shard, ...]]
    source: dict[str, Any]
    tars: str | None
    annotation: AnnotationFields
    ignores_unknown_tags: bool


def _read_dataset_file(storage: Storage) -> tuple[_Fields, str]:
    """What `dataset.json` says, and its SHA-256."""
    try:
        return storage.parse_file(
            DATASET_FILE, lambda content: (_parse(content), hashlib.sha256(content).hexdigest())
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


def _parse(content: bytes) -> _Fields:
    try:
        fields = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON in UTF-8 ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise FormatError(f"is not of the format {FORMAT!r}")
    if fields.get("version") != VERSION:
        raise FormatError(f"is of version {fields.get('version')!r}, only {VERSION} is known")
    source = fields.get("source", {})
    splits = _field(fields, "splits", dict)
    if not splits or set(splits) - set(SPLITS):
        raise FormatError(f"has the splits {sorted(splits)}, not some of {', '.join(SPLITS)}")
    return _Fields(
        _field(fields, "vocabulary_sha256", str),
        _field(fields, "num_tags", int),
        _field(fields, "has_images", bool),
        {split: _parse_shards(split, _field(splits, split, list)) for split in splits},
        source if isinstance(source, dict) else {},
        _optional(fields, "tars", None, str),
        _parse_annotation_fields(fields),
        _optional(fields, "ignores_unknown_tags", False, bool),
    )


def _parse_annotation_fields(fields: dict) -> AnnotationFields:
    if "annotation" not in fields:
        return OUR_FIELDS
    given = _field(fields, "annotation", dict)
    known = AnnotationFields.__dataclass_fields__
    if set(given) - set(known) or not all(
        isinstance(value, (str, bool, type(None))) for value in given.values()
    ):
        raise FormatError("has an 'annotation' that is not understood")
    return AnnotationFields(**given)


def _parse_shards(split: str, entries: list) -> tuple[Shard, ...]:
    shards = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise FormatError(f"has a shard of {split} that is no object")
        shard = Shard(
            name=_field(entry, "name", str),
            num_samples=_field(entry, "num_samples", int),
            num_labelled=_field(entry, "num_labelled", int),
            num_bytes=_field(entry, "num_bytes", int),
            sha256=_field(entry, "sha256", str),
            tar=_optional(entry, "tar", "", str),  # `Storage` judges it
            index_num_bytes=_optional(entry, "index_num_bytes", 0, int),
            index_sha256=_optional(entry, "index_sha256", "", str),
        )
        # The name becomes part of a path or URL: nothing but ours passes.
        if re.fullmatch(rf"{split}-[0-9]{{6}}\.tar", shard.name) is None:
            raise FormatError(f"names a shard {shard.name[:100]!r}, not {split}-<6 digits>.tar")
        sizes = (shard.num_bytes, shard.index_num_bytes)
        if not 0 <= shard.num_labelled <= shard.num_samples or min(sizes) < 0:
            raise FormatError(f"has impossible numbers for {shard.name}")
        shards.append(shard)
    if len({shard.name for shard in shards}) != len(shards):
        raise FormatError(f"names a shard of {split} twice")
    return tuple(shards)


def _field(fields: dict, name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:  # a bool is an int, but no number
        raise FormatError(f"has no {name!r} of type {kind.__name__}")
    return value


def _optional(fields: dict, name: str, default: Any, kind: type) -> Any:
    return _field(fields, name, kind) if name in fields else default


def _read_vocabulary(storage: Storage, fields: _Fields) -> Vocabulary:
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


def _index_storage(storage: Storage, fields: _Fields, version: str) -> Storage:
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


def _tar_storage(storage: Storage, fields: _Fields) -> Storage:
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
