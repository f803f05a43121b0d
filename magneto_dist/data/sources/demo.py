"""Demo data: generated pictures on which it can be seen in minutes what each stream is good for.

1. `demo_pictures` draws a scene of vivid shapes on a pale background.
2. `_visual_tags`: some of what is shown (important) and as much of the same kinds that is not. Only
   the picture tells them apart.
3. `_context_tags`: a place, and things that are important exactly if their place is among the tags.
   Only the tags tell; the picture shows none of it.
4. `_extra_tags`: general tags that are never important, and outliers from a long tail.
5. `build` writes it all as shards; `ensure_demo` does so once and keeps them in a cache.

Everything about an item comes from (seed, split, index).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from magneto_dist.data.randomness import seed_for
from magneto_dist.data.sample import Sample
from magneto_dist.data.sources.demo_pictures import (
    COLOURS,
    SHAPES,
    TEXTURES,
    TINTS,
    draw,
    encode,
    random_scene,
)
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

CONTENT_VERSION = 1
"""Goes up whenever the same (seed, split, index) gives another item."""
PLACES = {
    "sea": ("harbour", "sail", "lighthouse"),
    "forest": ("trail", "moss", "cabin"),
    "city": ("tram", "market", "skyline"),
    "mountain": ("summit", "glacier", "hut"),
}
"""Place (always important) -> things that are important only with it."""
GENERAL_TAGS = ("photo", "picture", "camera", "wallpaper")
"""Never important."""
_OUTLIERS = """
    abacus accordion algebra almanac anvil apron asphalt auction audit axiom badge bagpipe ballot
    bamboo banjo barcode bazaar beret bingo biscuit bishop blender bonus bracket broom budget bugle
    bulletin bureau cactus calendar candle canteen caravan carbon cashew census chisel chord clause
    coupon crayon credit cuisine cymbal dentist deposit diary diploma doorbell drawer dynamo easel
    eclipse elbow embassy enamel enzyme essay factory faucet fiddle formula fossil fungus gazette
    ginger goggles gossip granite hammock helium hiccup igloo insomnia invoice jigsaw kazoo kettle
    ladle lecture lottery magnet mailbox mortgage napkin noodle novel oboe origami paperclip parsnip
    pension piston plumber proverb quorum receipt rhubarb saxophone senate sneeze spatula sponsor
    stapler syntax tariff teapot toaster trombone tuesday turnip umpire vaccine vinegar waffle
    warranty yogurt zipper
"""
OUTLIERS = tuple(_OUTLIERS.split())
"""Never important, and rare: falling frequency."""
_KINDS = (SHAPES, tuple(COLOURS), tuple(TINTS), TEXTURES)
_KIND_SHARES = (1 / 3, 1 / 3, 1 / 6, 1 / 6)  # of tags not shown; about those of tags that are
VOCABULARY = Vocabulary(
    [tag for kind in _KINDS for tag in kind]
    + [tag for place, things in PLACES.items() for tag in (place, *things)]
    + [*GENERAL_TAGS, *OUTLIERS]
)
_SAMPLES_PER_SHARD = 500


class DemoRow(NamedTuple):
    """All that an item is made from."""

    seed: int
    split: str
    index: int
    """From 0 within the split."""


def build(
    out: Path,
    items: int = 4000,
    seed: int = 0,
    num_processes: int | None = None,
    shard_megabytes: float | None = None,
) -> WriteReport:
    """Writes `items` training and `items // 4` validation items to the folder `out`.

    Args:
        out: folder; made if absent.
        items: training items, at least 4.
        seed: of every drawn thing.
        num_processes: that draw and write; None: one per core, at most 8.
        shard_megabytes: of pictures per shard (1e6 bytes), at most; to know their sizes, all are
            drawn once more. None: no such limit.

    Raises:
        InputError: fewer than 4 items; or as for `write_dataset`.
    """
    if items < 4:
        raise InputError(f"demo data of {items} items: must be at least 4, to validate on one")
    splits = {
        split: [DemoRow(seed, split, index) for index in range(count)]
        for split, count in (("train", items), ("validation", items // 4))
    }
    return write_dataset(
        out,
        splits,
        load_item,
        VOCABULARY,
        samples_per_shard=_SAMPLES_PER_SHARD,
        shard_megabytes=shard_megabytes,
        image_bytes=None if shard_megabytes is None else _drawn_bytes,
        num_processes=num_processes or min(8, os.cpu_count() or 1),
        source={"builder": "demo", "version": CONTENT_VERSION, "items": items, "seed": seed},
    )


def ensure_demo(items: int = 4000) -> Path:
    """The folder of the demo data in the user's cache; builds what is not there yet.

    Any number of processes may call this at once: one builds, the others wait. Building that was
    interrupted goes on where it stopped.

    Raises:
        InputError: the cache cannot be written.
    """
    cache = _cache_folder()
    folder = cache / f"demo-{CONTENT_VERSION}-{items}"
    if (folder / "dataset.json").exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{folder.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it should the holder die
            if not (folder / "dataset.json").exists():
                build(folder, items)
    except OSError as error:
        raise InputError(
            f"demo data cannot be written to {folder}: {error}; set XDG_CACHE_HOME to a folder"
            " that can"
        ) from error
    return folder


def load_item(row: DemoRow) -> Sample:
    """Draws one item: a picture, its tags in random order, and which of them are important."""
    rng = np.random.default_rng(seed_for("demo", CONTENT_VERSION, *row))
    scene = random_scene(rng)
    tags = {
        **_visual_tags(scene.concepts(), rng),
        **_context_tags(rng),
        **_extra_tags(rng),
    }
    order = rng.permutation(len(tags))
    names, flags = list(tags), list(tags.values())
    return Sample(
        key=f"{row.split}-{row.index:06d}",
        image=encode(draw(scene, rng), rng),
        tags=tuple(names[i] for i in order),
        important=tuple(flags[i] for i in order),
    )


def _drawn_bytes(row: DemoRow) -> int:
    return len(load_item(row).image or b"")


def _visual_tags(shown: tuple[str, ...], rng: np.random.Generator) -> dict[str, bool]:
    """2 to 4 concepts that are shown (important), and 2 to 4 that are not.

    The kinds of the latter are drawn without a look at the former: from the names alone, each is as
    likely to be shown as not.
    """
    count = min(len(shown), int(rng.integers(2, 4, endpoint=True)))
    tags = dict.fromkeys(rng.choice(shown, count, replace=False).tolist(), True)
    for kind in rng.choice(4, int(rng.integers(2, 4, endpoint=True)), p=_KIND_SHARES):
        absent = [name for name in _KINDS[kind] if name not in shown]
        tags[str(rng.choice(absent))] = False
    return tags


def _context_tags(rng: np.random.Generator) -> dict[str, bool]:
    """A place, and one or two things: of that place (important), or of another (not)."""
    place, other = rng.choice(list(PLACES), 2, replace=False).tolist()
    tags = {place: True}
    for _ in range(rng.integers(1, 2, endpoint=True)):
        belongs = bool(rng.integers(2))
        tags[str(rng.choice(PLACES[place if belongs else other]))] = belongs
    return tags


def _extra_tags(rng: np.random.Generator) -> dict[str, bool]:
    """Nothing, a general tag, or a tag that makes no sense here; never important."""
    chance = rng.uniform()
    if chance < 0.35:
        return {str(rng.choice(GENERAL_TAGS)): False}
    if chance < 0.75:
        # Zipf's law, flattened so that the rarest outliers still occur.
        weights = 1 / np.arange(8, 8 + len(OUTLIERS))
        return {str(rng.choice(OUTLIERS, p=weights / weights.sum())): False}
    return {}


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: a relative path counts for nothing.
    return (base if base.is_absolute() else Path.home() / ".cache") / "magneto_dist"
