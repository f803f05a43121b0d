"""A data set of tars that are there already, of anybody, and no copies.

1. The tars are read (`tar_scan.py`); samples that could never be trained on are left out.
2. They are cut into training and validation samples.
3. What makes a data set of them is written (`existing_tars.py`).
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from braceexpand import braceexpand

from magneto_dist.data.dataset_file import Shard
from magneto_dist.data.existing_tars import (
    Entry,
    Part,
    place_of,
    refuse_other_data,
    split_part,
    write_dataset,
)
from magneto_dist.data.image_bytes import DEFAULT_MAX_MEGAPIXELS
from magneto_dist.data.parallel import run_tasks
from magneto_dist.data.sample import AnnotationFields
from magneto_dist.data.sources.columns import check_fraction, unique_keys, vocabulary_of
from magneto_dist.data.storage import Storage
from magneto_dist.data.tar_scan import ScannedTar, TarScan
from magneto_dist.data.writer import SKIPPED_FILE, WriteReport, write_skipped
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary


def index_tars(
    tars: str,
    out: Path | None = None,
    *,
    image_key: str = "jpg,jpeg,png,webp",
    annotation_key: str = "json",
    tags_field: str = "tags",
    important_field: str | None = None,
    important_as: str = "tags",
    separator: str | None = None,
    validation: str = "val*",
    validation_fraction: float = 0.0,
    vocabulary: Path | None = None,
    min_count: int = 1,
    max_skipped_fraction: float = 0.05,
    num_processes: int = 1,
    read_twice: bool = False,
) -> WriteReport:
    """Makes a data set of the WebDataset tars in a folder or under a URL; copies none of them.

    Each tar is read once. Samples are listed in `skipped.jsonl` and left out where the annotation
    or the header of the picture is broken, where the picture is absent though others have one, or
    where no tag is in the vocabulary.

    Args:
        tars: folder or URL; behind its last slash may stand a name with braces ({000..123}.tar),
            which a server that lists no folders needs.
        out: folder for what is written; None: the one of the tars.
        image_key: extensions of pictures, with commas between them.
        annotation_key: extension of the JSON with the tags.
        tags_field: its field with the tags: a list, or a string (see separator).
        important_field: its field that says which tags are important; None: all are unlabelled.
        important_as: tags: it names them, like the field of tags; flags: it has a 0 or 1 for each.
        separator: between the tags of a string; None: they are a list.
        validation: pattern (* and ?) of the names of tars with validation samples.
        validation_fraction: share of the samples of the other tars to validate on, by hash.
        vocabulary: file with one tag a line; None: all tags by falling frequency, ties by name.
        min_count: tags of fewer samples do not get into the vocabulary. Tags that are not in it are
            left out of samples in training, too.
        max_skipped_fraction: samples skipped, as a fraction of all, above which it fails.
        num_processes: that read tars.
        read_twice: read tars under a URL until two readings agree, where the server tells no
            checksum of theirs (gs and hf do, S3 not of large ones that were uploaded in parts), so
            that a bit that the network flips is found.

    Raises:
        InputError: no tars, or one that is not whole; too many bad samples; another data set in
            `out`.
    """
    check_fraction(validation_fraction)
    if important_as not in ("tags", "flags"):
        raise InputError(f"important_as {important_as!r}: must be tags or flags")
    storage, names = _list(tars)
    if out is None and storage.is_remote:
        raise InputError(f"{tars}: --out must say where to write, for the tars lie under a URL")
    out = Path(storage.root) if out is None else out
    source = {"builder": "index", "tars": tars}
    refuse_other_data(out, source)
    fields = AnnotationFields(tags_field, important_field, separator, important_as == "tags")
    scan = TarScan(
        storage,
        tuple(image_key.split(",")),
        annotation_key,
        fields,
        DEFAULT_MAX_MEGAPIXELS,
        read_twice,
    )
    scanned = _scan(scan, names, num_processes)
    known = _vocabulary(scanned, vocabulary, min_count)
    has_images = any(len(sample.members) == 2 for tar in scanned for sample in tar.samples)
    scanned = [_usable(tar, known, has_images) for tar in scanned]
    report = _report(out, tars, scanned, max_skipped_fraction)
    write_dataset(
        out,
        _cut(scanned, validation, validation_fraction),
        known,
        has_images,
        source=source,
        tars=place_of(out, storage),
        fields=fields,
        ignores_unknown_tags=True,
    )
    return report


def _list(tars: str) -> tuple[Storage, list[str]]:
    """Where the tars are, and their names."""
    folder, _, pattern = tars.rpartition("/")
    if pattern.endswith(".tar"):
        return Storage(folder or "."), list(dict.fromkeys(braceexpand(pattern)))
    storage = Storage(tars)
    names = [name for name in storage.names() if name.endswith(".tar")]
    if not names:
        raise InputError(f"{tars}: there are no files *.tar")
    return storage, names


def _scan(scan: TarScan, names: list[str], num_processes: int) -> list[ScannedTar]:
    done = run_tasks(
        scan,
        names,
        num_processes=num_processes,
        num_items=len(names),
        description="reading tars",
    )
    scanned = {tar.name: tar for tar in done}
    return [scanned[name] for name in names]


def _vocabulary(scanned: Sequence[ScannedTar], path: Path | None, min_count: int) -> Vocabulary:
    counts = Counter(tag for tar in scanned for sample in tar.samples for tag in sample.tags)
    return vocabulary_of(
        (
            [tag for tag in sample.tags if counts[tag] >= min_count]
            for tar in scanned
            for sample in tar.samples
        ),
        path,
    )


def _usable(tar: ScannedTar, vocabulary: Vocabulary, has_images: bool) -> ScannedTar:
    """The tar without the samples that could never be trained on."""
    samples, skipped = [], list(tar.skipped)
    for sample in tar.samples:
        if has_images and len(sample.members) == 1:
            skipped.append((f"{tar.name}/{sample.name}", "has no picture"))
        elif not any(tag in vocabulary for tag in sample.tags):
            skipped.append((f"{tar.name}/{sample.name}", "has no tag of the vocabulary"))
        else:
            samples.append(sample)
    return replace(tar, samples=samples, skipped=skipped)


def _report(
    out: Path, tars: str, scanned: Sequence[ScannedTar], max_skipped_fraction: float
) -> WriteReport:
    """Writes down what was skipped, and raises where it is too much."""
    skipped = [entry for tar in scanned for entry in tar.skipped]
    num_samples = sum(len(tar.samples) for tar in scanned)
    out.mkdir(parents=True, exist_ok=True)
    write_skipped(out, skipped)
    max_skipped = max(1, int((num_samples + len(skipped)) * max_skipped_fraction))
    if num_samples == 0 or len(skipped) > max_skipped:
        first = f"; the first is {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise InputError(
            f"{tars}: {num_samples} good samples, but {len(skipped)} bad ones{first}; see"
            f" {out / SKIPPED_FILE}"
        )
    return WriteReport(num_samples, skipped)


def _cut(scanned: Sequence[ScannedTar], validation: str, fraction: float) -> list[Part]:
    keys = iter(
        unique_keys([f"{tar.name}/{sample.name}.x" for tar in scanned for sample in tar.samples])
    )
    parts: list[Part] = []
    for tar in scanned:
        entries = [
            Entry(next(keys), sample.members, sample.important is not None)
            for sample in tar.samples
        ]
        shard = Shard("", 0, 0, tar.num_bytes, tar.sha256, tar.name)
        if fnmatch.fnmatchcase(tar.name, validation):
            parts.append(Part("validation", shard, entries))
        else:
            parts += split_part(shard, entries, fraction)
    return parts
