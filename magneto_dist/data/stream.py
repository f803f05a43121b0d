"""The samples of a micro-batch: from sample ids to parsed records, bad ones named.

1. `SampleReader` finds each sample in its shard and reads its bytes.
2. `parse` makes records of them; a bad sample becomes a Reject.
3. The user's stages change records or leave some out.
4. `usable` rejects what the model cannot be trained on.

Steps 2 to 4 are plain generators, composed in `load_rows`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from magneto_dist.batch import LEFT_OUT, Reject
from magneto_dist.data.dataset_file import Shard
from magneto_dist.data.image_bytes import check_image_size
from magneto_dist.data.sample import BadSample, Sample, check_annotation_size
from magneto_dist.data.shard_index import ShardIndex, index_name
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

_MAX_GAP_BYTES = 1 << 20  # between members that are read at once: it is read, too


class RawSample(NamedTuple):
    """The bytes of a sample, not yet looked at."""

    sample_id: int
    key: str
    shard: str
    image: bytes | None
    annotation: bytes
    refused: str | None = None
    """Why its bytes were not even read; None: they were."""


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed sample on its way into a batch."""

    sample_id: int
    """Position in the split."""
    shard: str
    sample: Sample


Stage = Callable[[Iterator[Record]], Iterator[Record]]
"""A user's step between parsing and batching, as a generator over the records of one micro-batch.

It may change a record's sample or leave it out (it then trains nothing), but not add any. It runs
in loader processes: a function of a module, the same for the same record."""


class SampleReader:
    """Reads samples of one split by their ids; indexes of shards are read when first needed.

    Args:
        dataset: where the shards are.
        split: which of them.
        with_images: False: read annotations only; "sizes": these too, but samples with a picture
            that may be read have b"" for it, and others say that they have none, or why not.
        max_indexed_samples: whose places are kept in memory, at some 60 bytes each.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        with_images: bool | Literal["sizes"],
        max_indexed_samples: int = 1_000_000,
    ) -> None:
        self.dataset, self._shards = dataset, dataset.shards(split)
        self._with_images, self._max_indexed_samples = with_images, max_indexed_samples
        self._ends = np.cumsum(dataset.shard_sizes(split), dtype=np.int64)
        self._indexes: OrderedDict[str, ShardIndex] = OrderedDict()
        self._num_indexed = 0

    def read(self, sample_ids: Int64[np.ndarray, " sample"]) -> Iterator[RawSample]:
        """The samples in the order of their ids, which is that of their bytes on disk.

        Raises:
            InputError: a shard or its index cannot be read.
        """
        for sample_id, shard, index, row in self.locate(sample_ids):
            try:
                yield self._read(sample_id, shard, index, row)
            except OSError as error:
                raise InputError(
                    f"{self.dataset.tar_storage.where(shard.file)}: sample {row} cannot be read"
                    f" ({error}); check the data set with `shards.py verify`"
                ) from None

    def locate(
        self, sample_ids: Int64[np.ndarray, " sample"]
    ) -> Iterator[tuple[int, Shard, ShardIndex, int]]:
        """Id, shard, index of the shard and row in it, in the order of the ids; reads no tar.

        Raises:
            InputError: an index cannot be read.
        """
        sample_ids = np.sort(sample_ids)
        shard_of_sample = np.searchsorted(self._ends, sample_ids, side="right")
        for sample_id, k in zip(sample_ids.tolist(), shard_of_sample.tolist(), strict=True):
            shard = self._shards[k]
            row = sample_id - int(self._ends[k]) + shard.num_samples
            yield sample_id, shard, self._index(shard), row

    def files(self, sample_ids: Int64[np.ndarray, " sample"]) -> list[str]:
        """The tars that these samples lie in."""
        shard_of_sample = np.searchsorted(self._ends, sample_ids[sample_ids >= 0], side="right")
        return [self._shards[k].file for k in np.unique(shard_of_sample).tolist()]

    def _read(self, sample_id: int, shard: Shard, index: ShardIndex, row: int) -> RawSample:
        annotation = index.annotation_offset.item(row), index.annotation_size.item(row)
        image = index.image_offset.item(row), index.image_size.item(row)
        has_image = bool(self._with_images) and image[1] > 0
        try:
            check_annotation_size(annotation[1])
            if has_image:
                check_image_size(image[1])
        except BadSample as error:
            return RawSample(sample_id, index.keys[row], shard.name, None, b"", error.reason)
        picture: bytes | None = b"" if has_image else None
        if has_image and self._with_images is True:
            content, picture = self._both(shard.file, annotation, image)
        else:
            content = self.dataset.tar_storage.read(shard.file, *annotation)
        return RawSample(sample_id, index.keys[row], shard.name, picture, content)

    def _both(self, file: str, one: tuple[int, int], other: tuple[int, int]) -> tuple[bytes, bytes]:
        """Two members (offset, size): by one read where they are neighbours, as in most tars."""
        (offset, size), (other_offset, other_size) = one, other
        storage = self.dataset.tar_storage
        start = min(offset, other_offset)
        end = max(offset + size, other_offset + other_size)
        if end - start - size - other_size > _MAX_GAP_BYTES:
            return storage.read(file, *one), storage.read(file, *other)
        content = storage.read(file, start, end - start)
        offset, other_offset = offset - start, other_offset - start
        return content[offset : offset + size], content[other_offset : other_offset + other_size]

    def _index(self, shard: Shard) -> ShardIndex:
        if shard.name not in self._indexes:
            try:
                index = ShardIndex.read(self.dataset.storage, shard.name)
            except OSError as error:
                raise InputError(
                    f"{self.dataset.root}/{index_name(shard.name)}: cannot be read ({error})"
                ) from None
            if index.num_samples != shard.num_samples:
                raise InputError(
                    f"{self.dataset.root}/{shard.name}: its index has {index.num_samples} samples,"
                    f" dataset.json says {shard.num_samples}; build the data set again"
                )
            self._indexes[shard.name] = index
            self._num_indexed += index.num_samples
            while self._num_indexed > self._max_indexed_samples and len(self._indexes) > 1:
                self._num_indexed -= self._indexes.popitem(last=False)[1].num_samples
        self._indexes.move_to_end(shard.name)
        return self._indexes[shard.name]


def load_rows(
    sample_ids: Int64[np.ndarray, " row"],
    reader: SampleReader,
    stages: Sequence[Stage] = (),
    *,
    needs_images: bool,
    needs_labels: bool,
    vocabulary: Vocabulary | None = None,
) -> list[Record | Reject | None]:
    """What stands in each row of a micro-batch: a record, why there is none, or padding (id -1).

    Args:
        sample_ids: of the rows, -1 for padding.
        reader: of the split.
        stages: of the user, in order.
        needs_images: reject samples without a picture.
        needs_labels: reject samples that do not say which tags are important.
        vocabulary: reject samples with a tag outside it.

    Raises:
        InputError: a shard cannot be read, or a stage adds records.
    """
    raw = {sample.sample_id: sample for sample in reader.read(sample_ids[sample_ids >= 0])}
    rejects: dict[int, Reject] = {}
    records = parse(raw.values(), reader.dataset.annotation, rejects)
    for stage in stages:
        records = stage(records)
    records = usable(
        records,
        rejects,
        needs_images=needs_images,
        needs_labels=needs_labels,
        vocabulary=vocabulary,
    )
    rows: dict[int, Record | Reject | None] = {-1: None}
    for record in records:
        if record.sample_id not in raw or record.sample_id in rows:
            raise InputError(
                f"a stage made a second record of sample {record.sample_id}, or one of its own;"
                " stages may change records and leave some out"
            )
        rows[record.sample_id] = record
    for sample_id in raw.keys() - rows.keys():
        sample = raw[sample_id]
        rows[sample_id] = rejects.get(sample_id) or Reject(sample.key, sample.shard, LEFT_OUT)
    return [rows[sample_id] for sample_id in sample_ids.tolist()]


def parse(
    samples: Iterable[RawSample],
    read_annotation: Callable[[bytes], tuple[tuple[str, ...], tuple[bool, ...] | None]],
    rejects: dict[int, Reject],
) -> Iterator[Record]:
    """Records of samples that were read and have a sound annotation; others go to `rejects`."""
    for raw in samples:
        try:
            if raw.refused is not None:
                raise BadSample(raw.refused)
            tags, important = read_annotation(raw.annotation)
        except BadSample as error:
            rejects[raw.sample_id] = Reject(raw.key, raw.shard, str(error))
        else:
            yield Record(raw.sample_id, raw.shard, Sample(raw.key, raw.image, tags, important))


def usable(
    records: Iterable[Record],
    rejects: dict[int, Reject],
    *,
    needs_images: bool,
    needs_labels: bool,
    vocabulary: Vocabulary | None,
) -> Iterator[Record]:
    """The records with everything that is needed; the others go to `rejects` by id."""
    for record in records:
        sample = record.sample
        reason = None
        if needs_images and sample.image is None:
            reason = "has no picture"
        elif not sample.tags:
            reason = "has no tags"
        elif needs_labels and sample.important is None:
            reason = "has no 'important' labels"
        elif vocabulary is not None and (unknown := vocabulary.missing(sample.tags)):
            reason = (
                f"{len(unknown)} of {len(sample.tags)} tags are not in the vocabulary, the first is"
                f" {unknown[0]!r}"
            )
        if reason is None:
            yield record
        else:
            rejects[record.sample_id] = Reject(sample.key, record.shard, reason)
