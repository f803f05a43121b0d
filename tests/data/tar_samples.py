"""Reads a data set's samples with nothing but the standard library."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class TarSample(NamedTuple):
    image: bytes | None
    tags: list[str]
    important: list[str] | None


def tar_samples(folder: Path, split: str) -> dict[str, TarSample]:
    """Key -> picture, tags, important tags; in the order of the shards."""
    contents = tar_contents(sorted(folder.glob(f"{split}-*.tar")))
    return {key: _sample(members) for key, members in contents.items()}


def tar_contents(paths: Iterable[Path]) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content of each member; in the order of the tars."""
    contents: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                contents.setdefault(key, {})[extension] = file.read()
    return contents


def _sample(members: dict[str, bytes]) -> TarSample:
    annotation = json.loads(members.pop("json"))
    tags, flags = annotation["tags"], annotation.get("important")
    chosen = None if flags is None else [t for t, f in zip(tags, flags, strict=True) if f == 1]
    return TarSample(next(iter(members.values()), None), tags, chosen)
