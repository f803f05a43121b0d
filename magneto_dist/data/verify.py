"""Finds what is wrong with a data set.

1. Each shard, in one of several processes: its hash, its members, its index, and every sample.
2. Over all shards: keys that occur twice.

Nothing that `dataset.json` or an index says is taken for granted: samples are read where they lie
in the tar.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from magneto_dist.data.dataset_file import DATASET_FILE, Shard
from magneto_dist.data.decode_cpu import check_image_decodes
from magneto_dist.data.image_bytes import (
    DEFAULT_MAX_MEGAPIXELS,
    IMAGE_KINDS,
    check_image_size,
)
from magneto_dist.data.parallel import Tick, run_tasks
from magneto_dist.data.sample import BadSample, check_annotation_size, valid_key
from magneto_dist.data.shard_index import Member, ShardIndex, index_bytes, index_name
from magneto_dist.data.shards import Dataset
from magneto_dist.data.tar_scan import is_plain_file, members_of
from magneto_dist.errors import FormatError, InputError
from magneto_dist.files import sha256_of


class Damage(NamedTuple):
    """One thing that is wrong."""

    shard: str
    key: str | None
    """The sample; None: the shard as a whole."""
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{f', sample {self.key}' if self.key else ''}: {self.reason}"


def verify(
    dataset: Dataset, num_processes: int, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> list[Damage]:
    """Reads the whole data set and decodes every picture.

    Args:
        dataset: opened, with `check_shards=False` to have absent shards listed too.
        num_processes: that share the shards; 1: this one.
        max_megapixels: larger pictures (1e6 pixels, by their header) are damage.

    Returns:
        What is wrong, in the order of the shards; empty: nothing.
    """
    shards = [shard for split in dataset.splits.values() for shard in split]
    checked = run_tasks(
        _ShardCheck(dataset, max_megapixels),
        shards,
        num_processes=num_processes,
        num_items=sum(shard.num_samples for shard in shards),
        description="verifying",
    )
    results = {result.shard: result for result in checked}
    damages: list[Damage] = []
    first_shard: dict[str, str] = {}
    for shard in shards:
        damages += results[shard.name].damages
        for key in results[shard.name].keys:
            first = first_shard.setdefault(key, shard.name)
            if first != shard.name:
                damages.append(Damage(shard.name, key, f"key is also in {first}"))
    return damages


class _Checked(NamedTuple):
    shard: str
    keys: list[str]
    damages: list[Damage]


@dataclass(frozen=True)
class _ShardCheck:
    """Checks a shard when called; runs in any process."""

    dataset: Dataset
    max_megapixels: float

    def __call__(self, shard: Shard, tick: Tick) -> _Checked:
        damages: list[Damage] = []
        samples: dict[str, list[Member]] = {}
        try:
            path = self.dataset.tar_storage.local_path(shard.file)
            damages += _hash_damages(path, shard)
            if shard.tar:  # others made it: what counts is where its index leads
                damages += _tar_damages(path, shard)
                index = ShardIndex.read(self.dataset.storage, shard.name)
                samples = {index.keys[row]: index.members(row) for row in range(len(index.keys))}
            else:
                samples = _read_tar(path, shard.name, damages)
                damages += self._index_damages(shard, samples)
            num_labelled = 0
            for key, members in samples.items():
                try:
                    num_labelled += self._check_sample(path, members)
                except BadSample as error:
                    damages.append(Damage(shard.name, key, error.reason))
                tick()
            damages += _count_damages(shard, len(samples), num_labelled, bool(damages))
        except FileNotFoundError:
            damages.append(Damage(shard.name, None, "does not exist"))
        except (OSError, InputError) as error:
            damages.append(Damage(shard.name, None, f"cannot be read: {error}"))
        return _Checked(shard.name, list(samples), damages)

    def _index_damages(self, shard: Shard, samples: dict[str, list[Member]]) -> Iterator[Damage]:
        name = index_name(shard.name)
        if not self.dataset.storage.exists(name):
            yield Damage(shard.name, None, f"its index {name} does not exist")
            return
        try:
            found = self.dataset.storage.read_file(name).splitlines()
        except FormatError as error:
            yield Damage(shard.name, None, f"its index {name} is no good: {error}")
            return
        expected = index_bytes([_image_first(members) for members in samples.values()]).splitlines()
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False), start=1)
            line = next((n for n, (a, b) in pairs if a != b), min(len(found), len(expected)) + 1)
            yield Damage(
                shard.name, None, f"its index {name} does not match it from line {line} on"
            )

    def _check_sample(self, path: Path, members: list[Member]) -> bool:
        """Returns whether the sample is labelled."""
        contents = _contents(path, members)
        if len(contents) != len(members):
            raise BadSample("has two members of one kind")
        if "json" not in contents:
            raise BadSample("has no annotation")
        tags, important = self.dataset.annotation(contents.pop("json"))
        unknown = [tag for tag in tags if tag not in self.dataset.vocabulary]
        if unknown:
            raise BadSample(f"{len(unknown)} tags are not in the vocabulary: {unknown[0]!r}")
        if len(contents) != self.dataset.has_images:
            expected = "one" if self.dataset.has_images else "none"
            raise BadSample(f"has {len(contents)} pictures instead of {expected}")
        for extension, content in contents.items():
            header = check_image_decodes(content, self.max_megapixels)
            if header.kind != extension:
                raise BadSample(f"picture is {header.kind}, but its member is called {extension}")
        return important is not None


def _hash_damages(path: Path, shard: Shard) -> Iterator[Damage]:
    if path.stat().st_size != shard.num_bytes:
        reason = f"has {path.stat().st_size} bytes, {DATASET_FILE} says {shard.num_bytes}"
        yield Damage(shard.name, None, reason)
    elif shard.sha256 and sha256_of(path) != shard.sha256:
        yield Damage(shard.name, None, f"its SHA-256 is not the one in {DATASET_FILE}")


def _tar_damages(path: Path, shard: Shard) -> Iterator[Damage]:
    """Also finds what was so before the hash was taken: samples that no index has ever seen."""
    try:
        for _ in members_of(path):
            pass
    except tarfile.TarError as error:
        yield _no_whole_tar(shard.name, error)


def _no_whole_tar(shard: str, error: tarfile.TarError) -> Damage:
    return Damage(shard, None, f"is no whole tar: {error}")


def _count_damages(
    shard: Shard, num_samples: int, num_labelled: int, is_damaged: bool
) -> Iterator[Damage]:
    if num_samples != shard.num_samples:
        reason = f"has {num_samples} samples, {DATASET_FILE} says {shard.num_samples}"
        yield Damage(shard.name, None, reason)
    elif num_labelled != shard.num_labelled and not is_damaged:
        reason = f"has {num_labelled} labelled samples, {DATASET_FILE} says {shard.num_labelled}"
        yield Damage(shard.name, None, reason)


def _read_tar(path: Path, shard: str, damages: list[Damage]) -> dict[str, list[Member]]:
    """The members of each sample by key, as far as the tar can be read."""
    members: list[tuple[str, Member]] = []
    try:
        for info in members_of(path):
            key, _, extension = info.name.partition(".")
            is_member = extension in (*IMAGE_KINDS, "json")
            if not is_plain_file(info) or not valid_key(key) or not is_member:
                damages.append(Damage(shard, None, f"has the odd member {info.name[:100]!r}"))
                continue
            member = Member(extension, info.offset_data, info.size, info.name)
            members.append((key, member))
    except tarfile.TarError as error:
        damages.append(_no_whole_tar(shard, error))
    samples: dict[str, list[Member]] = {}
    for key, group in groupby(members, key=lambda entry: entry[0]):
        if key in samples:
            damages.append(Damage(shard, key, "key occurs twice in this shard"))
        samples.setdefault(key, []).extend(member for _, member in group)
    return samples


def _image_first(members: list[Member]) -> list[Member]:
    return sorted(members, key=lambda member: member.extension == "json")


def _contents(path: Path, members: list[Member]) -> dict[str, bytes]:
    contents = {}
    with path.open("rb") as file:
        for member in members:
            check_size = check_annotation_size if member.extension == "json" else check_image_size
            check_size(member.size)
            file.seek(member.offset)
            contents[member.extension] = file.read(member.size)
    return contents
