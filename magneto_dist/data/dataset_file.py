"""The content of `dataset.json`: shards, vocabulary, and where the tars are.

Somebody else may have written it: nothing in it is trusted.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from magneto_dist.data.sample import OUR_FIELDS, AnnotationFields
from magneto_dist.errors import FormatError
from magneto_dist.vocabulary import Vocabulary

FORMAT = "magneto_dist"
VERSION = 1
SPLITS = ("train", "validation")
DATASET_FILE = "dataset.json"
VOCABULARY_FILE = "vocabulary.txt"


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


class DatasetFields(NamedTuple):
    """What `dataset.json` says."""

    vocabulary_sha256: str
    num_tags: int
    has_images: bool
    splits: dict[str, tuple[Shard, ...]]
    source: dict[str, Any]
    tars: str | None
    annotation: AnnotationFields
    ignores_unknown_tags: bool


def parse_dataset_file(content: bytes) -> DatasetFields:
    """What the content of `dataset.json` says.

    Raises:
        FormatError: it is not of this format and version.
    """
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
    return DatasetFields(
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
