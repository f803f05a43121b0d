"""Writes one shard: loads and checks its rows, writes the good ones as a tar with its index."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from webdataset.writer import TarWriter

from magneto_dist.data import build_folder
from magneto_dist.data.build_folder import FinishedShard, ShardPlan
from magneto_dist.data.build_space import clear_full_disk
from magneto_dist.data.dataset_file import Shard
from magneto_dist.data.decode_cpu import check_image_decodes
from magneto_dist.data.parallel import Tick
from magneto_dist.data.sample import (
    BadSample,
    Sample,
    annotation_bytes,
    parse_annotation,
    valid_key,
)
from magneto_dist.data.shard_index import Member, index_bytes, index_name
from magneto_dist.data.shrink import Shrink
from magneto_dist.errors import InputError
from magneto_dist.files import sha256_of, write_atomically
from magneto_dist.vocabulary import Vocabulary

Row = TypeVar("Row")
_TAR_HEADER_BYTES = 512


@dataclass(frozen=True)
class ShardWriter(Generic[Row]):
    """Writes a shard when called; runs in any process.

    Raises:
        InputError: a tag outside the vocabulary, pictures in some samples only, or a full disk.
    """

    out: Path
    load: Callable[[Row], Sample]
    vocabulary: Vocabulary
    max_image_megapixels: float
    shrink: Shrink
    load_threads: int
    """That load rows ahead; 1: none."""

    def __call__(self, plan: ShardPlan[Row], tick: Tick) -> FinishedShard:
        """Writes the shard's files, then the note that they are whole; ticks after each row."""
        with clear_full_disk(self.out):
            finished = self._write(plan, tick)
            build_folder.finish(self.out, plan, finished)
        return finished

    def _write(self, plan: ShardPlan[Row], tick: Tick) -> FinishedShard:
        path = self.out / plan.name
        skipped: list[tuple[str, str]] = []
        keys: list[str] = []
        index: list[list[Member]] = []
        unknown: list[tuple[str, str]] = []
        num_labelled = num_images = 0
        with (
            build_folder.new_file(self.out, plan.name) as file,
            # Owner, mode and time are fixed, so that equal samples give equal bytes.
            TarWriter(file, "root", "root", 0o644, encoder=False, mtime=0, compress=False) as tar,
        ):
            for sample, kind in self._samples(plan, skipped, tick):
                unknown += [(tag, sample.key) for tag in sample.tags if tag not in self.vocabulary]
                index.append(_add(tar, sample, kind))
                keys.append(sample.key)
                num_labelled += sample.important is not None
                num_images += sample.image is not None
            _refuse_unknown_tags(unknown, plan.name, self.vocabulary)
            refuse_some_images(num_images, len(keys), plan.name)
        if not keys:
            path.unlink()
            return FinishedShard(Shard(plan.name, 0, 0, 0, ""), keys, 0, skipped)
        content = index_bytes(index)
        write_atomically(path.with_name(index_name(plan.name)), content)
        shard = Shard(
            plan.name,
            len(keys),
            num_labelled,
            path.stat().st_size,
            sha256_of(path),
            index_num_bytes=len(content),
            index_sha256=hashlib.sha256(content).hexdigest(),
        )
        return FinishedShard(shard, keys, num_images, skipped)

    def _samples(
        self, plan: ShardPlan[Row], skipped: list[tuple[str, str]], tick: Tick
    ) -> Iterator[tuple[Sample, str]]:
        """The good samples of a shard and their kind of picture; bad ones go to `skipped`."""
        for number, load in enumerate(self._loads(plan.rows), start=plan.first_row):
            key = f"{plan.split} row {number}"
            try:
                sample = load()
                key = sample.key
                yield _checked(sample, self.max_image_megapixels, self.shrink)
            except BadSample as error:
                skipped.append((error.key or key, error.reason))
            tick()

    def _loads(self, rows: Sequence[Row]) -> Iterator[Callable[[], Sample]]:
        """For each row what gives or raises the result of loading it."""
        if self.load_threads == 1:
            yield from (partial(self.load, row) for row in rows)
            return
        threads = ThreadPoolExecutor(self.load_threads)
        try:
            loading: deque[Future[Sample]] = deque()
            for row in rows:
                loading.append(threads.submit(self.load, row))
                if len(loading) > 2 * self.load_threads:
                    yield loading.popleft().result
            yield from (future.result for future in loading)
        finally:
            threads.shutdown(cancel_futures=True)


def _checked(sample: Sample, max_megapixels: float, shrink: Shrink) -> tuple[Sample, str]:
    """The sample as it will be read back, and the kind of its picture ("" without one)."""
    if not valid_key(sample.key):
        raise BadSample("key is not made of 1 to 90 letters, digits, '_' and '-'")
    tags, important = parse_annotation(annotation_bytes(sample))
    checked = replace(sample, tags=tags, important=important)
    if sample.image is None:
        return checked, ""
    image = shrink(sample.image, max_megapixels)
    return replace(checked, image=image), check_image_decodes(image, max_megapixels).kind


def _add(tar: TarWriter, sample: Sample, kind: str) -> list[Member]:
    """Writes the members of a sample, the picture first; says where they are."""
    contents = {} if sample.image is None else {kind: sample.image}
    contents["json"] = annotation_bytes(sample)
    members = []
    for extension, content in contents.items():
        offset = tar.tarstream.offset + _TAR_HEADER_BYTES
        # One by one: given both, the writer would sort them, and json comes before png.
        tar.write({"__key__": sample.key, extension: content})
        members.append(Member(extension, offset, len(content), f"{sample.key}.{extension}"))
    return members


def refuse_some_images(num_images: int, num_samples: int, where: str) -> None:
    """Raises an InputError unless all samples have a picture, or none has."""
    if 0 < num_images < num_samples:
        raise InputError(
            f"{where}: {num_samples - num_images} of {num_samples} samples have no picture: give"
            " every sample one, or none"
        )


def _refuse_unknown_tags(
    unknown: list[tuple[str, str]], shard: str, vocabulary: Vocabulary
) -> None:
    if unknown:
        tag, key = unknown[0]
        raise InputError(
            f"{shard}: {len(unknown)} tags are not in the vocabulary of {len(vocabulary)} tags, the"
            f" first is {tag!r} of sample {key}"
        )
