"""What table and data-set sources share: columns of tags become samples' tags, splits, vocabulary.

1. `parse_tags` reads one cell; `importance` says which of the tags are important.
2. `Labels` collects what is wrong with the labels of all rows, to be told at once.
3. `is_validation` splits by hash; `vocabulary_of` orders tags by frequency, or reads a file.
4. `unique_keys` names samples after their files.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

VALIDATION_NAMES = ("validation", "valid", "val")
"""What a split column may call the rows to validate on."""
_MAX_STEM = 70  # characters of a file's name in a key; a hash and a number have to fit, too


def parse_tags(cell: object, separator: str, where: str) -> tuple[str, ...] | None:
    """The tags of a cell: a list of strings, or one string with separators.

    Blanks around a tag go, blanks and line breaks inside it become one blank, an empty tag is none,
    and a tag that is listed twice is kept once.

    Args:
        cell: as read from the table; None: nothing is given.
        separator: between the tags of a string.
        where: row and column, for the message.

    Returns:
        None where nothing is given.

    Raises:
        InputError: the cell holds something else.
    """
    if cell is None:
        return None
    parts = cell.split(separator) if isinstance(cell, str) else cell
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"{where}: {cell!r:.80} is neither a list of strings nor a string")
    tags = (" ".join(part.split()) for part in parts)
    return tuple(dict.fromkeys(tag for tag in tags if tag))


class Labels:
    """Which tags are important, row by row; remembers the rows where that makes no sense."""

    def __init__(self) -> None:
        self._num_bad = 0
        self._first = ""

    def importance(
        self, tags: tuple[str, ...], important: tuple[str, ...] | None, where: str
    ) -> tuple[bool, ...] | None:
        """One flag for each tag; None where the row is unlabelled (`important` is None)."""
        if important is None:
            return None
        chosen = set(important)
        unknown = [tag for tag in important if tag not in tags]
        if unknown:
            self._num_bad += 1
            self._first = self._first or f"{unknown[0]!r} in {where}"
        return tuple(tag in chosen for tag in tags)

    def check(self, source: str) -> None:
        """To be called after the last row.

        Raises:
            InputError: rows had important tags that are not among their tags.
        """
        if self._num_bad:
            raise InputError(
                f"{source}: {self._num_bad} rows have important tags that are not among their tags,"
                f" the first is {self._first}: add them to the tags, or fix the spelling"
            )


def check_fraction(validation_fraction: float) -> None:
    """Checks that a split leaves rows to train on.

    Raises:
        InputError: not in [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(
            f"validation_fraction {validation_fraction}: must be at least 0 and below 1"
        )


def is_validation(name: str, validation_fraction: float) -> bool:
    """Whether the row `name` is validated on: decided by its hash, so never by other rows."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < validation_fraction * 2**64


def vocabulary_of(rows: Iterable[Iterable[str]], path: Path | None) -> Vocabulary:
    """The vocabulary in the file `path`; None: all tags, the most frequent first, ties by name.

    Raises:
        InputError: the file cannot be read or is no vocabulary.
    """
    if path is None:
        counts = Counter(tag for tags in rows for tag in tags)
        return Vocabulary(sorted(counts, key=lambda tag: (-counts[tag], tag)))
    try:
        return Vocabulary.from_bytes(path.read_bytes())
    except OSError as error:
        raise InputError(f"vocabulary {path}: cannot be read: {error.strerror}") from None


def unique_keys(paths: Sequence[str]) -> list[str]:
    """A key for each path, the same in any order of the rows as long as no path occurs twice.

    The stem of the file name where that is a valid key and no other picture has it; else with a
    hash of the whole path. A path's second row gets "-2", and so on.
    """
    # A path such as "/" has no stem.
    stems = [re.sub(r"[^A-Za-z0-9_-]", "_", _stem(path) or "_")[:_MAX_STEM] for path in paths]
    pictures_with_stem = Counter(stem for stem, _ in set(zip(stems, paths, strict=True)))
    seen: Counter[str] = Counter()
    keys = []
    for stem, path in zip(stems, paths, strict=True):
        key = stem
        if stem != _stem(path) or pictures_with_stem[stem] > 1:
            digest = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=5)
            key = f"{stem}-{digest.hexdigest()}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys


def _stem(path: str) -> str:
    return Path(path).stem
