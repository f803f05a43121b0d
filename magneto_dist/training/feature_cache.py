"""The features of a frozen backbone, computed once: found in the cache, or made before training.

1. `feature_key.py` names all that the features depend on, and their folder by a hash of that; no
   other run removes it while this one lives (`feature_room.py`).
2. The ranks find out which of them see the same folder. Those of one machine share the work; on
   storage that several machines share, those of the first of them make all, for two machines that
   write into one file may spoil each other's blocks; a machine with a folder of its own fills that.
3. Round by round each rank makes a chunk: the live loader, with the views' seed and the view as its
   epoch, gives the pixels, and the backbone their features (`feature_network.py`). What is finished
   before a kill is kept.
4. The loaders of training and evaluation read them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor, nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.feature_files import FeatureViews, FeatureWriter
from magneto_dist.data.feature_room import InUse, room_for
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.parallel import progress_bar
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError, PreemptedError
from magneto_dist.model.backbone import Backbone
from magneto_dist.training.feature_key import cache_folder, ingredients, require_same
from magneto_dist.training.feature_network import FeatureNetwork
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.session import Session
from magneto_dist.world import World

_BATCH = 64
"""Pictures at once: part of what a feature's last bits depend on, so the same everywhere."""
_CHUNK_BATCHES = 8


@dataclass(frozen=True)
class CachedFeatures:
    """The features of both splits."""

    train: FeatureViews
    """In all views."""
    validation: FeatureViews
    """As evaluation crops pictures: one view."""
    in_use: InUse
    """To be kept as long as they are read."""


def cached_features(
    config: Config,
    session: Session,
    dataset: Dataset,
    decoder: str,
    model: nn.Module,
    stopped: Callable[[], bool],
    whereabouts: Whereabouts,
) -> CachedFeatures:
    """The features that `config` asks for, made now where they are not there; every rank calls.

    Args:
        config: with `data.feature_views` above 0.
        session: this process among its peers.
        dataset: whose pictures are looked at.
        decoder: what `data.decoder` has become.
        model: with the weights that it trains from; not prepared yet, and left as it is.
        stopped: whether this process was asked to stop; called between two chunks.
        whereabouts: noted in every round.

    Raises:
        InputError: the backbone is not frozen; the ranks differ in what features depend on; no
            room for them; a shard cannot be read; features are not finite. On all ranks the same.
        PreemptedError: stopped by a signal; finished chunks are kept.
    """
    backbone: Backbone = model.image_stream.backbone  # type: ignore[union-attr,assignment]
    made_of = session.on_all(lambda: ingredients(config, dataset, decoder, backbone))
    session.on_all(partial(require_same, session.gather(made_of)))
    folder = cache_folder(config, made_of)
    in_use = session.on_all(lambda: _use(folder))
    place = _place(session, folder)
    network = FeatureNetwork(config, backbone, session)
    views = session.on_all(lambda: _views(config, session.world, dataset, network, made_of, folder))
    session.on_all(lambda: _begin(views, config) if place.index == 0 else None)
    _fill(network, views, place, session, stopped, whereabouts)
    train, validation = (
        FeatureViews(
            tuple(view.writer.path for view in views if view.split == split),
            config.data.feature_seed,
        )
        for split in ("train", "validation")
    )
    return CachedFeatures(train, validation, in_use)


def _use(folder: Path) -> InUse:
    with _clear_errors(folder):
        return InUse(folder)


@dataclass(frozen=True)
class _Place:
    """This rank among those that fill its folder."""

    index: int
    """-1: others do."""
    count: int


def _place(session: Session, folder: Path) -> _Place:
    """Whether this rank fills the folder, and with how many others."""
    token = folder / f".rank-{uuid.uuid4().hex}"
    session.on_all(lambda: _leave_token(token))
    tokens = session.gather((token.name, session.world.node))
    sees = [(folder / name).exists() for name, _ in tokens]
    session.barrier()  # all have looked
    token.unlink(missing_ok=True)
    ranks, mine = ranks_that_fill([node for _, node in tokens], sees), session.world.rank
    return _Place(ranks.index(mine) if mine in ranks else -1, len(ranks))


def ranks_that_fill(nodes: Sequence[int], sees: Sequence[bool]) -> list[int]:
    """Those of the first machine of which some rank sees a folder.

    Args:
        nodes: of all ranks.
        sees: which of them see the folder.
    """
    first = min(node for node, sees_it in zip(nodes, sees, strict=True) if sees_it)
    return [rank for rank, node in enumerate(nodes) if node == first and sees[rank]]


def _leave_token(token: Path) -> None:
    with _clear_errors(token.parent):
        token.touch()


@dataclass(frozen=True)
class _View:
    """One file to fill."""

    split: str
    number: int
    """Epoch of the augmentation."""
    loader: Loader
    """Of the split, in order, with pixels."""
    writer: FeatureWriter

    def micro_batches(self, chunk: int) -> range:
        """The numbers of the batches in a chunk."""
        first = chunk * _CHUNK_BATCHES
        end = min(first + _CHUNK_BATCHES, self.loader.steps_per_epoch)
        start = 1 + self.number * self.loader.steps_per_epoch  # steps count from 1
        return range(start + first, start + end)


def _views(
    config: Config,
    world: World,
    dataset: Dataset,
    network: FeatureNetwork,
    made_of: dict[str, Any],
    folder: Path,
) -> list[_View]:
    """The files of all views of both splits."""
    shape, views = network.shape(), []
    for split, count in (("train", config.data.feature_views), ("validation", 1)):
        loader = _loader_of_pixels(config, world, dataset, split)
        for number in range(count):
            name = f"{split}-{number:04}.npy" if split == "train" else f"{split}.npy"
            writer = FeatureWriter(
                folder / name,
                (loader.num_samples, *shape),
                network.dtype,
                chunk_samples=_batch_size(dataset, split) * _CHUNK_BATCHES,
                made_of=made_of,
            )
            views.append(_View(split, number, loader, writer))
    return views


def _loader_of_pixels(config: Config, world: World, dataset: Dataset, split: str) -> Loader:
    """A split in order, each epoch of which is a view; every picture that is sound is valid."""
    settings = replace(
        config,
        seed=config.data.feature_seed,
        train=replace(config.train, objective="relevance"),  # needs no labels
    )
    size = _batch_size(dataset, split)
    alone = World(rank_of_node=world.rank_of_node, ranks_per_node=world.ranks_per_node)
    plan = BatchPlan(size, num_ranks=1, micro_batch_size=size, micro_steps=1)
    augments = split == "train"
    return Loader(dataset, split, settings, alone, plan, training=False, augments=augments)


def _batch_size(dataset: Dataset, split: str) -> int:
    return min(_BATCH, dataset.num_samples(split))


def _begin(views: Sequence[_View], config: Config) -> None:
    """Makes the files that are not there yet, where there is room for what will fill them."""
    writers = [view.writer for view in views]
    folder, num_bytes = writers[0].path.parent, sum(writer.missing_bytes for writer in writers)
    with _clear_errors(folder):
        room = room_for(folder, num_bytes, config.data.feature_cache_gb)
        with room if num_bytes else nullcontext():
            for writer in writers:
                writer.begin()


def _fill(
    network: FeatureNetwork,
    views: list[_View],
    place: _Place,
    session: Session,
    stopped: Callable[[], bool],
    whereabouts: Whereabouts,
) -> None:
    """Completes the files of all views; every rank calls.

    All ranks go through as many rounds, so that none waits for long, and an error of one is that
    of all.
    """
    writers = [view.writer for view in views]
    chunks = session.on_all(lambda: _missing_chunks(views, place))
    num_rounds = max(session.gather(len(chunks)))
    num_pictures = sum(session.gather(sum(_num_pictures(view, chunk) for view, chunk in chunks)))
    made = session.on_all(lambda: _features(network, chunks))
    shows_bar = session.is_main and num_rounds > 0
    bar_or_none = progress_bar(num_pictures, "features") if shows_bar else nullcontext()
    with closing(made), bar_or_none as bar:
        for number in range(num_rounds):
            whereabouts.at("start")
            mine = chunks[number] if number < len(chunks) else None
            num_made = session.on_all(lambda: _write(made, mine) if mine else 0)  # noqa: B023
            num_made = sum(session.gather(num_made))
            if bar is not None:
                bar.update(num_made)
            if any(session.gather(stopped())):
                raise PreemptedError(
                    "stopped by a signal while features were made; those that are finished are kept"
                )
    session.on_all(lambda: [writer.finish() for writer in writers] if place.index == 0 else None)


def _missing_chunks(views: Sequence[_View], place: _Place) -> list[tuple[_View, int]]:
    """This rank's share: of all chunks in turn, also where some are done."""
    if place.index < 0:
        return []
    missing = {view.writer.path: {*view.writer.missing_chunks()} for view in views}
    chunks = [(view, chunk) for view in views for chunk in range(view.writer.num_chunks)]
    return [
        (view, chunk)
        for view, chunk in chunks[place.index :: place.count]
        if chunk in missing[view.writer.path]
    ]


def _num_pictures(view: _View, chunk: int) -> int:
    return view.writer.rows(chunk).stop - view.writer.rows(chunk).start


def _features(
    network: FeatureNetwork, chunks: Sequence[tuple[_View, int]]
) -> Generator[tuple[Batch, Tensor], None, None]:
    """The batches of the chunks with their features, by few starts of loader processes."""
    is_closed = Event()

    def pixels() -> Iterator[Batch]:
        for loader, group in groupby(chunks, key=lambda each: each[0].loader):
            numbers = [n for view, chunk in group for n in view.micro_batches(chunk)]
            yield from loader.numbered(numbers, is_closed)

    return network.features(pixels(), is_closed) if chunks else (each for each in ())


def _write(made: Iterator[tuple[Batch, Tensor]], mine: tuple[_View, int]) -> int:
    """Writes one chunk; the number of its pictures."""
    view, chunk = mine
    bad: dict[int, str] = {}
    with _clear_errors(view.writer.path.parent):
        for batch, features in islice(made, len(view.micro_batches(chunk))):
            num_rows = int((batch.sample_ids >= 0).sum())
            view.writer.write(int(batch.sample_ids[0]), features[:num_rows])
            reasons = {reject.key: reject.reason for reject in batch.rejects}
            for row in (~batch.sample_valid[:num_rows]).nonzero().flatten().tolist():
                bad[int(batch.sample_ids[row])] = reasons[batch.keys[row]]
        view.writer.finish_chunk(chunk, bad)
    return _num_pictures(view, chunk)


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """InputError of what the system refuses, at the place that it names, which may be another run's
    folder that was to make room, else at `folder`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror}: cached features cannot be written or"
            " removed there; make room, or choose another --data.cache_dir; chunks that are"
            " finished are kept"
        ) from None
