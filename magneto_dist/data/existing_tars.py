"""What makes a data set of tars that are there already: indexes, vocabulary, `dataset.json`.

`indexing.py` takes tars of anybody, `splitting.py` those of another data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from magneto_dist.data.dataset_file import DATASET_FILE, VOCABULARY_FILE, Shard, dataset_bytes
from magneto_dist.data.sample import AnnotationFields
from magneto_dist.data.shard_index import Member, index_bytes, index_name
from magneto_dist.data.sources.columns import is_validation
from magneto_dist.data.storage import Storage
from magneto_dist.data.unique_keys import UniqueKeys
from magneto_dist.errors import InputError
from magneto_dist.files import write_atomically
from magneto_dist.vocabulary import Vocabulary


class Entry(NamedTuple):
    """A sample of an index that is about to be written."""

    key: str
    members: tuple[Member, ...]
    is_labelled: bool


class Part(NamedTuple):
    """The samples of one tar that go to one split."""

    split: str
    shard: Shard
    """Its tar; the numbers of samples are still to be filled in."""
    entries: list[Entry]


def split_part(shard: Shard, entries: list[Entry], validation_fraction: float) -> list[Part]:
    """The samples of a tar, some of them to validate on, by the hashes of their keys."""
    chosen = [is_validation(entry.key, validation_fraction) for entry in entries]
    train = [entry for entry, is_chosen in zip(entries, chosen, strict=True) if not is_chosen]
    return [
        Part("train", shard, train),
        Part("validation", shard, list(compress(entries, chosen))),
    ]


def write_dataset(
    out: Path,
    parts: Sequence[Part],
    vocabulary: Vocabulary,
    has_images: bool,
    *,
    source: dict[str, Any],
    tars: str | None,
    fields: AnnotationFields,
    ignores_unknown_tags: bool,
) -> None:
    """The indexes, the vocabulary, and `dataset.json` at last.

    Raises:
        InputError: a key occurs twice.
    """
    keys = UniqueKeys()
    for _, shard, entries in parts:
        keys.add((entry.key for entry in entries), shard.file)
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Shard]] = {}
    for split, shard, entries in parts:
        if not entries:
            continue
        shards = splits.setdefault(split, [])
        name = f"{split}-{len(shards):06}.tar"
        members = [[m._replace(name=f"{e.key}.{m.extension}") for m in e.members] for e in entries]
        index = index_bytes(members)
        write_atomically(out / index_name(name), index)
        num_labelled = sum(entry.is_labelled for entry in entries)
        shards.append(
            replace(
                shard,
                name=name,
                num_samples=len(entries),
                num_labelled=num_labelled,
                tar=shard.file,
                index_num_bytes=len(index),
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
    write_atomically(out / VOCABULARY_FILE, vocabulary.to_bytes())
    content = dataset_bytes(
        {split: tuple(shards) for split, shards in splits.items()},
        vocabulary,
        has_images,
        source,
        "",
        tars=tars,
        fields=fields,
        ignores_unknown_tags=ignores_unknown_tags,
    )
    write_atomically(out / DATASET_FILE, content)


def refuse_other_data(out: Path, source: dict[str, Any]) -> None:
    """Looks whether `out` may be written.

    Raises:
        InputError: it holds a data set of another source.
    """
    try:
        content = json.loads((out / DATASET_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("source") != source:
        raise InputError(f"{out}: holds another data set: choose another folder with --out")


def place_of(out: Path, tars: Storage) -> str | None:
    """How `dataset.json` in `out` calls the place of the tars; None: they are beside it."""
    if tars.is_remote:
        return tars.root
    folder = Path(tars.root).resolve()
    return None if folder == out.resolve() else str(folder)
