"""What `training_rate.py` trains on: the paper's two set-ups, pictures, as many tags as it says.

`SetUp` is what the paper says of a data set and a configuration cannot; `Case` is a set-up with the
settings and the folder of this run. Tags have no meaning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from magneto_dist.config import Config
from magneto_dist.config_io import parse_command_line
from magneto_dist.data.sample import Sample
from magneto_dist.data.writer import write_dataset
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary
from photographs import make_photographs, write_files
from training_rounds import LR

REPOSITORY = Path(__file__).parent.parent
LEAST_STEPS = 4
_MOST_WARM_STEPS = 8


@dataclass(frozen=True)
class SetUp:
    """One of the paper's."""

    num_tags: int
    """Of the vocabulary."""
    draw_number: Callable[[np.random.Generator], int]
    """Tags of an item."""
    is_important: Callable[[int], bool]
    """Whether the n-th tag of an item is, n from 0."""
    items: int
    """Of an epoch here, unless told otherwise."""
    tried: tuple[tuple[int, int], ...]
    """Loader processes and threads of one training process."""
    log_steps: int
    """Steps from one line of our log to the next, between which time is taken."""
    repeats: int
    """Of each stage, one after the other in turn."""
    lowered: tuple[str, ...] = ()
    """Settings for a machine without a GPU."""


SET_UPS = {
    # Most items have one tag or two, 13 at most, and most of them are important (section 5.1).
    "nuswide": SetUp(
        num_tags=81,
        draw_number=lambda rng: min(rng.geometric(0.55), 13),
        is_important=lambda number: number != 1,
        items=1024,
        tried=((1, 1), (2, 1), (1, 2)),
        log_steps=50,  # as in configs/nuswide.yaml
        repeats=15,
    ),
    # About 43 tags; five of fifty important, as in the example of section 5.1. A second loader
    # process would have nothing to do: decoding is a hundredth of the work.
    "ls": SetUp(
        num_tags=24_056,
        draw_number=lambda rng: int(rng.integers(22, 65)),
        is_important=lambda number: number % 10 == 0,
        items=96,
        tried=((1, 1), (1, 2)),
        log_steps=3,
        repeats=5,
        lowered=("--train.global_batch_size=16", "--model.batch_norm_group_size=8"),
    ),
}


@dataclass(frozen=True)
class Case:
    """What all ways have in common."""

    name: str
    """Of the set-up, of configs/NAME.yaml and of launchers/train_NAME.py."""
    folder: Path
    """With the pictures, as files and as shards."""
    steps: int
    """Of an epoch."""
    options: tuple[str, ...]
    """Of the launcher."""
    config: Config
    """The same, read."""

    @classmethod
    def of(cls, name: str, folder: Path, items: int | None, overrides: Sequence[str]) -> Case:
        """A set-up with further settings.

        Raises:
            InputError: bad settings, or fewer items than some steps need.
        """
        path = REPOSITORY / "configs" / f"{name}.yaml"
        options = [f"--config={path}", "--model.backbone_weights=none", f"--optim.lr={LR}"]
        options += [*SET_UPS[name].lowered, *overrides]
        config = parse_command_line("", path, options)
        batch, items = config.train.global_batch_size, items or SET_UPS[name].items
        steps = items // batch
        if steps < LEAST_STEPS:
            raise InputError(f"--items {items}: at least {LEAST_STEPS} batches of {batch}")
        if config.train.max_micro_batch_size < batch:
            raise InputError("--train.max_micro_batch_size: stages are measured without")
        return cls(name, folder / f"{name}-{steps * batch}", steps, tuple(options), config)

    @property
    def set_up(self) -> SetUp:
        """What it is a case of."""
        return SET_UPS[self.name]

    @property
    def batch(self) -> int:
        """Items of a step, over all ranks."""
        return self.config.train.global_batch_size

    @property
    def warm_steps(self) -> int:
        """Before and after those whose time is taken."""
        return min(_MOST_WARM_STEPS, self.steps // 3)

    @property
    def shards(self) -> str:
        """The data set."""
        return str(self.folder / "shards")

    def make(self, photos: Path) -> None:
        """The same pictures as files and as shards, unless they are there.

        Args:
            photos: folder with the JPEGs that they are parts of.
        """
        if (self.folder / "shards/dataset.json").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        num_items = self.steps * self.batch
        photographs = make_photographs(photos, num_items + self.batch)
        write_files(self.folder, dict(list(photographs.items())[:num_items]))
        rng, num_tags = np.random.default_rng(0), self.set_up.num_tags
        tags = {
            key: [
                (tag, self.set_up.is_important(number))
                for number, tag in enumerate(
                    rng.choice(num_tags, self.set_up.draw_number(rng), replace=False).tolist()
                )
            ]
            for key in photographs
        }
        (self.folder / "tags.json").write_text(json.dumps(tags))
        vocabulary = Vocabulary([f"tag-{number:05}" for number in range(num_tags)])
        rows = [
            Sample(
                key,
                content,
                tuple(vocabulary.tags[tag] for tag, _ in tags[key]),
                tuple(important for _, important in tags[key]),
            )
            for key, content in photographs.items()
        ]
        write_dataset(
            self.folder / "shards",
            {"train": rows[:num_items], "validation": rows[num_items:]},
            lambda row: row,
            vocabulary,
            num_processes=1,
            source={"builder": "benchmark"},
        )
