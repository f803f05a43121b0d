"""Demo data with concepts of very different frequency, and with more tags (14 an item, not 9).

1. Scenes as in the demo, but shapes, colours, tints and textures follow Zipf's law.
2. `_tags`: three to six things that are shown (important) and three to seven that are not; a place,
   often the sea, with two or three things that belong to it (important) or do not; one to three
   general tags and outliers.
3. `build` writes it, or the demo itself, with as many validation as training items.

Everything about an item comes from (seed, split, index).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from magneto_dist.data.randomness import seed_for
from magneto_dist.data.sample import Sample
from magneto_dist.data.sources.demo import (
    GENERAL_TAGS,
    OUTLIERS,
    PLACES,
    VOCABULARY,
    DemoRow,
)
from magneto_dist.data.sources.demo_pictures import (
    COLOURS,
    SHAPES,
    TEXTURES,
    TINTS,
    draw,
    encode,
    random_scene,
)
from magneto_dist.data.writer import write_dataset

_KINDS = (SHAPES, tuple(COLOURS), tuple(TINTS), TEXTURES)
_SHOWN, _NOT_SHOWN, _PLACE = 1.3, 0.6, 1.8  # powers of Zipf's law


def build(out: Path, load: Callable[[DemoRow], Sample], items: int) -> None:
    """Writes `items` training and as many validation items to the folder `out`.

    Args:
        out: folder; made if absent.
        load: draws an item: `load_item` of this file, or of the demo.
        items: of each split.
    """
    splits = {
        split: [DemoRow(0, split, index) for index in range(items)]
        for split in ("train", "validation")
    }
    source = {"builder": f"{load.__module__}.{load.__name__}", "items": items}
    write_dataset(
        out, splits, load, VOCABULARY, samples_per_shard=500, num_processes=1, source=source
    )


def load_item(row: DemoRow) -> Sample:
    """Draws one item: a picture, its tags in random order, and which of them are important."""
    rng = np.random.default_rng(seed_for("skewed demo", *row))
    scene = random_scene(rng)
    scene = replace(
        scene,
        things=tuple(
            replace(thing, shape=_pick(rng, SHAPES, _SHOWN), colour=_pick(rng, [*COLOURS], _SHOWN))
            for thing in scene.things
        ),
        tint=_pick(rng, [*TINTS], _SHOWN),
        texture=_pick(rng, TEXTURES, _SHOWN),
    )
    tags = _tags(scene.concepts(), rng)
    names = [str(name) for name in rng.permutation(list(tags))]
    return Sample(
        key=f"{row.split}-{row.index:06d}",
        image=encode(draw(scene, rng), rng),
        tags=tuple(names),
        important=tuple(tags[name] for name in names),
    )


def _tags(shown: tuple[str, ...], rng: np.random.Generator) -> dict[str, bool]:
    count = min(len(shown), _between(rng, 3, 6))
    tags = dict.fromkeys(rng.choice(shown, count, replace=False).tolist(), True)
    for kind in rng.choice(len(_KINDS), _between(rng, 3, 7)):
        absent = [name for name in _KINDS[kind] if name not in shown]
        tags[_pick(rng, absent, _NOT_SHOWN)] = False
    place = _pick(rng, [*PLACES], _PLACE)
    other = _pick(rng, [name for name in PLACES if name != place], 1.0)
    tags[place] = True
    for _ in range(_between(rng, 2, 3)):
        belongs = bool(rng.integers(2))
        tags[_pick(rng, PLACES[place if belongs else other], _SHOWN)] = belongs
    for _ in range(_between(rng, 1, 3)):
        is_general = rng.uniform() < 0.4
        tags[_pick(rng, GENERAL_TAGS, 0.0) if is_general else _pick(rng, OUTLIERS, 1.0)] = False
    return tags


def _pick(rng: np.random.Generator, names: Sequence[str], power: float) -> str:
    """One of the names; the n-th has the weight n ** -power."""
    weights = np.arange(1, len(names) + 1) ** -power
    return str(rng.choice(list(names), p=weights / weights.sum()))


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high, endpoint=True))
