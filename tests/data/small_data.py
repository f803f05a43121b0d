"""The small data set of these tests: how it is made, and how it is damaged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from magneto_dist.data.sample import Sample
from magneto_dist.data.shard_index import ShardIndex
from magneto_dist.data.shards import Dataset
from magneto_dist.data.writer import write_dataset
from magneto_dist.vocabulary import Vocabulary
from shard_edits import note_index_hashes

NUM_SAMPLES = {"train": 60, "validation": 15}
SAMPLES_PER_SHARD = 7
VOCABULARY = Vocabulary(f"tag-{number:02}" for number in range(40))


def make_sample(row: tuple[str, int], with_image: bool = True) -> Sample:
    """Sample `row`: smooth picture, 1 to 6 tags, some of them important."""
    split, number = row
    generator = np.random.default_rng([number, len(split)])
    tags = generator.choice(len(VOCABULARY), size=generator.integers(1, 7), replace=False)
    important = generator.random(len(tags)) < 0.4
    return Sample(
        key=f"{split}_{number:03}",
        image=picture(generator) if with_image else None,
        tags=tuple(VOCABULARY.tags[tag] for tag in tags),
        important=tuple(important.tolist()),
    )


def make_text_sample(row: tuple[str, int]) -> Sample:
    """The same without its picture."""
    return make_sample(row, with_image=False)


def picture(generator: np.random.Generator) -> bytes:
    """A JPEG of 50 to 90 pixels a side with soft colours."""
    coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    height, width = generator.integers(50, 91, 2).tolist()
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    soft.save(content, "JPEG", quality=95)
    return content.getvalue()


def write_small(out: Path, load: Callable[[tuple[str, int]], Sample]) -> Path:
    rows = {name: [(name, i) for i in range(count)] for name, count in NUM_SAMPLES.items()}
    write_dataset(
        out,
        rows,
        load,
        VOCABULARY,
        samples_per_shard=SAMPLES_PER_SHARD,
        num_processes=1,
        source={"builder": "test"},
    )
    return out


@dataclass(frozen=True)
class Damager:
    """A copy of the small data set whose samples can be damaged where they lie."""

    folder: Path

    def open(self) -> Dataset:
        return Dataset.open(str(self.folder))

    def cut_picture(self, sample_id: int, split: str = "train") -> None:
        """Cuts a picture to half its bytes, in the index as well as in the tar's header."""
        shard, row = self._place(sample_id, split)
        path = self.folder / f"{shard}.idx"
        lines = path.read_text().split("\n")
        words = lines[row + 1].split(" ")
        words[2] = str(int(words[2]) // 2)
        lines[row + 1] = " ".join(words)
        path.write_text("\n".join(lines))
        note_index_hashes(self.folder)

    def replace_picture(self, sample_id: int, content: bytes, split: str = "train") -> None:
        shard, row = self._place(sample_id, split)
        index = self._index(shard)
        size = int(index.image_size[row])
        self._write(shard, int(index.image_offset[row]), content.ljust(size, b"\0")[:size])

    def edit_annotation(
        self, sample_id: int, edit: Callable[[bytes], bytes], split: str = "train"
    ) -> None:
        """`edit` keeps the number of bytes."""
        shard, row = self._place(sample_id, split)
        index = self._index(shard)
        offset, size = int(index.annotation_offset[row]), int(index.annotation_size[row])
        with (self.folder / f"{shard}.tar").open("rb") as file:
            file.seek(offset)
            content = edit(file.read(size))
        assert len(content) == size
        self._write(shard, offset, content)

    def _place(self, sample_id: int, split: str) -> tuple[str, int]:
        shard, row = divmod(sample_id, SAMPLES_PER_SHARD)
        return f"{split}-{shard:06}", row

    def _index(self, shard: str) -> ShardIndex:
        return ShardIndex.from_bytes((self.folder / f"{shard}.idx").read_bytes())

    def _write(self, shard: str, offset: int, content: bytes) -> None:
        with (self.folder / f"{shard}.tar").open("r+b") as file:
            file.seek(offset)
            file.write(content)


def key_of(sample_id: int, split: str = "train") -> str:
    return f"{split}_{sample_id:03}"


def tags_of(sample_id: int, split: str = "train") -> tuple[str, ...]:
    return make_sample((split, sample_id)).tags


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
