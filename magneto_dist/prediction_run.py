"""Any number of items scored by a trained run: the first ones onto a page, all into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from magneto_dist.data.items import Items
from magneto_dist.data.parallel import progress_bar
from magneto_dist.files import write_atomically
from magneto_dist.gallery import gallery
from magneto_dist.inference import ItemPrediction, predict
from magneto_dist.prediction_file import PredictionFile
from magneto_dist.trained_run import TrainedRun
from magneto_dist.world import World

_MOST_TOLD = 20  # items on standard error that could not be scored; the file has them all


def predict_to_page(
    run: TrainedRun,
    items: Items,
    page: Path,
    *,
    threshold: float,
    temperature: float | None,
    num_items: int,
    batch_size: int,
) -> int:
    """Writes the page of the first items; how many it shows.

    Args:
        run: that scores.
        items: of which the first ones are shown.
        page: HTML, replaced.
        threshold: probability in [0, 1] from which on a tag is predicted.
        temperature: as for `predict`.
        num_items: on the page, at most `gallery.MAX_ITEMS`.
        batch_size: items per forward pass.

    Raises:
        InputError: as for `predict`.
    """
    first = range(min(len(items), num_items))
    shown = predict(
        run,
        items,
        [first],
        batch_size=batch_size,
        num_workers=0,
        to_look_at=True,
        temperature=temperature,
    )
    write_atomically(page, gallery(shown, len(items), threshold, run.config).encode())
    return len(first)


def predict_to_file(
    run: TrainedRun,
    items: Items,
    file: PredictionFile,
    world: World,
    *,
    temperature: float | None,
    batch_size: int,
    num_workers: int,
) -> None:
    """Scores this rank's share of the items, less what is there from before.

    Args:
        run: that scores.
        items: all of them.
        file: begun.
        world: this rank among those that score; they need not know of each other.
        temperature: as for `predict`.
        batch_size: items per forward pass.
        num_workers: loader processes of this rank.

    Raises:
        InputError: as for `predict`.
    """
    blocks = file.missing(world.rank, world.num_ranks)
    predictions = predict(
        run,
        items,
        blocks,
        batch_size=batch_size,
        num_workers=num_workers,
        temperature=temperature,
    )
    name = "predicting" if world.num_ranks == 1 else f"predicting, rank 0 of {world.num_ranks}"
    with progress_bar(sum(map(len, blocks)), name, shown=world.is_main) as bar:
        counted = _counted(predictions, bar)
        for block in blocks:
            file.write(block, counted)


def _counted(predictions: Iterator[ItemPrediction], bar: tqdm) -> Iterator[ItemPrediction]:
    """The same; the first ones that could not be scored are told."""
    num_failed = 0
    for item in predictions:
        if bar.n == 0:
            bar.unpause()  # the start of loader processes says nothing of the time that is left
        bar.update()
        if item.error is not None:
            num_failed += 1
            if num_failed <= _MOST_TOLD:
                tqdm.write(f"not scored: {item.key}: {item.error}", file=sys.stderr)
            elif num_failed == _MOST_TOLD + 1:
                tqdm.write("not scored: more, which --out tells of", file=sys.stderr)
        yield item
