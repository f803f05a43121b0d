"""Another split of a data set that is there, and no copies."""

from __future__ import annotations

from pathlib import Path

from magneto_dist.data.dataset_file import Shard
from magneto_dist.data.existing_tars import (
    Entry,
    Part,
    place_of,
    refuse_other_data,
    split_part,
    write_dataset,
)
from magneto_dist.data.sample import BadSample
from magneto_dist.data.shard_index import ShardIndex
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.columns import check_fraction
from magneto_dist.data.writer import WriteReport


def split_dataset(data_set: str, out: Path, *, validation_fraction: float = 0.1) -> WriteReport:
    """Cuts a data set into training and validation samples anew, by the hashes of their keys.

    What is written to `out` leads to the tars where they are.

    Args:
        data_set: folder or URL with dataset.json; its own splits are put together first.
        out: another folder.
        validation_fraction: share of the samples to validate on.

    Raises:
        InputError: no data set, or another one in `out`; a key that two samples have.
    """
    check_fraction(validation_fraction)
    dataset = Dataset.open(data_set)
    source = {"builder": "split", "data_set": data_set, "validation_fraction": validation_fraction}
    refuse_other_data(out, source)
    parts: list[Part] = []
    for shards in dataset.splits.values():
        for shard in shards:
            index = ShardIndex.read(dataset.storage, shard.name)
            entries = [
                Entry(
                    index.keys[row],
                    tuple(index.members(row)),
                    _is_labelled(dataset, shard, index, row),
                )
                for row in range(index.num_samples)
            ]
            parts += split_part(shard, entries, validation_fraction)
    write_dataset(
        out,
        parts,
        dataset.vocabulary,
        dataset.has_images,
        source=source,
        tars=place_of(out, dataset.tar_storage),
        fields=dataset.fields,
        ignores_unknown_tags=dataset.ignores_unknown_tags,
    )
    return WriteReport(sum(len(part.entries) for part in parts), [])


def _is_labelled(dataset: Dataset, shard: Shard, index: ShardIndex, row: int) -> bool:
    if shard.num_labelled in (0, shard.num_samples):
        return shard.num_labelled > 0
    _, offset, size, _ = index.members(row)[-1]
    try:
        content = dataset.tar_storage.read(shard.file, offset, size)
        return dataset.annotation(content)[1] is not None
    except BadSample:
        return False
