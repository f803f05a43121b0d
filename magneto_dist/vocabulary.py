"""Tags <-> ids: a tag's id is its line in `vocabulary.txt`, from 0; padding comes after all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import compress

from magneto_dist.errors import InputError


class Vocabulary:
    """The tags of a data set in the order of their ids.

    Raises:
        InputError: a tag is empty, holds a line break, or occurs twice.
    """

    def __init__(self, tags: Iterable[str]) -> None:
        self.tags = tuple(tags)
        self._id_of = {tag: tag_id for tag_id, tag in enumerate(self.tags)}
        if len(self._id_of) != len(self.tags):
            seen: set[str] = set()
            twice = next(tag for tag in self.tags if tag in seen or seen.add(tag))
            raise InputError(f"vocabulary: the tag {twice!r} occurs twice; every tag has one line")
        for line, tag in enumerate(self.tags):
            if not tag or len(tag.splitlines()) != 1:
                raise InputError(f"vocabulary: line {line} (from 0) is empty or no single line")

    @classmethod
    def from_bytes(cls, content: bytes) -> Vocabulary:
        """Parses the UTF-8 content of a `vocabulary.txt`: one tag a line."""
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"vocabulary: not UTF-8 text ({error})") from None
        lines = text.split("\n")
        return cls(line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines))

    def to_bytes(self) -> bytes:
        """The content of `vocabulary.txt`."""
        return "".join(f"{tag}\n" for tag in self.tags).encode("utf-8")

    @cached_property
    def sha256(self) -> str:
        """Content hash: equal for two vocabularies exactly if every tag has the same id in both."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def padding_id(self) -> int:
        """The id in the empty slots of a batch: the number of tags."""
        return len(self.tags)

    def __len__(self) -> int:
        return len(self.tags)

    def __contains__(self, tag: object) -> bool:
        return tag in self._id_of

    def known(
        self, tags: Sequence[str], flags: Sequence[bool] | None
    ) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
        """The tags that are in the vocabulary, with their flags."""
        chosen = [tag in self._id_of for tag in tags]
        return tuple(compress(tags, chosen)), None if flags is None else tuple(
            compress(flags, chosen)
        )

    def difference_from(self, other: Vocabulary) -> str | None:
        """Where another vocabulary first differs, in words; None: nowhere."""
        if self.tags == other.tags:
            return None
        shorter = min(len(self), len(other))
        line = next((n for n in range(shorter) if self.tags[n] != other.tags[n]), shorter)
        here, there = (
            repr(vocabulary.tags[line]) if line < len(vocabulary) else "nothing"
            for vocabulary in (self, other)
        )
        return (
            f"{len(self)} tags, not {len(other)}; the first difference is line {line} (from 0):"
            f" {here}, not {there}"
        )

    def missing(self, tags: Sequence[str]) -> list[str]:
        """The tags that are not in the vocabulary."""
        return [tag for tag in tags if tag not in self._id_of]

    def ids(self, tags: Sequence[str]) -> list[int]:
        """The ids of an item's tags.

        Raises:
            InputError: tags outside the vocabulary; says how many and names the first.
        """
        try:
            return [self._id_of[tag] for tag in tags]
        except KeyError:
            unknown = self.missing(tags)
            raise InputError(
                f"{len(unknown)} of {len(tags)} tags are not in the vocabulary of {len(self)} tags,"
                f" the first is {unknown[0]!r}"
            ) from None
