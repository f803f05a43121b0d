"""What is done ahead of its step is what would be done in it, to the last bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.data.loader import Loader
from magneto_dist.data.shards import Dataset
from magneto_dist.parts import derive_plan, initial_model
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.feed import Feed
from magneto_dist.training.session import Session
from processes import REPOSITORY, TINY, losses, run
from strategies import train
from training_rounds import Ready

HALF = "--model.frozen_stages=1"
FROZEN = {
    "whole": ["--model.frozen_stages=all"],
    "accumulated, averaged": [HALF, "--train.max_micro_batch_size=4", "--train.ema_decay=0.9"],
    "16 bits, contiguous": [HALF, "--model.frozen_precision=bf16", "--train.channels_last=false"],
    "mixed precision": [HALF, "--train.precision=bf16"],
}


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    given = [f"--data.path={data}", f"--output_dir={run_dir}", "--train.eval_every_epochs=1"]
    return [*TINY, "--optim.schedule=constant", *given, "--max_steps=8", *more]


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_run_is_the_same_with_and_without(demo_shards: Path, tmp_path: Path, frozen: str) -> None:
    results = []
    for overlap in ("true", "false"):
        run_dir = tmp_path / overlap
        more = [*FROZEN[frozen], f"--train.overlap={overlap}", "--data.ledger=true"]
        run("train_ls.py", *options(demo_shards, run_dir, *more))
        validation = [
            ln
            for ln in (run_dir / "metrics.jsonl").read_text().splitlines()
            if '"validation"' in ln
        ]
        results.append(
            (losses(run_dir), validation, (run_dir / "ledger/rank-00000.jsonl").read_text())
        )
    assert results[0] == results[1]
    assert len(results[0][0]) == 8
    assert len(results[0][1]) == 2


def test_a_resumed_run_is_the_uninterrupted_one_on_two_ranks(
    demo_shards: Path, tmp_path: Path
) -> None:
    def go(run_dir: Path, *more: str) -> None:
        run("train_ls.py", *options(demo_shards, run_dir, HALF, *more), ranks=2)

    go(tmp_path / "whole")
    go(tmp_path / "halves", "--max_steps=3")
    go(tmp_path / "halves")
    go(tmp_path / "in step", "--train.overlap=false")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert losses(tmp_path / "in step") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_other_ways_of_training_are_the_same_too(
    demo_shards: Path, tmp_path: Path, strategy: str
) -> None:
    for overlap in ("true", "false"):
        more = [HALF, f"--train.overlap={overlap}"]
        train(strategy, demo_shards, tmp_path / overlap, *more, steps=4)
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


class Parts:
    """A loader, a model and what a feed needs beside them."""

    def __init__(self, shards: Path, **settings: object) -> None:
        config = load_config(REPOSITORY / "configs" / "demo.yaml")
        self.config: Config = replace(
            config,
            data=replace(config.data, num_workers=0),
            augment=replace(config.augment, image_size=32),
            model=replace(config.model, **{"frozen_stages": 1, **settings}),  # type: ignore[arg-type]
            train=replace(config.train, global_batch_size=8),
        )
        self.session = Session(self.config.train, 0.0)
        dataset = Dataset.open(str(shards))
        plan = derive_plan(self.config, self.session, Progress())
        self.loader = Loader(dataset, "train", self.config, self.session.world, plan, training=True)
        self.model: nn.Module = initial_model(self.config, dataset, None)

    def feed(self, loader: Any = None, *, shows_pictures: bool = False, **training: Any) -> Feed:
        """With other settings of training."""
        config = replace(self.config, train=replace(self.config.train, **training))
        return Feed(
            loader or self.loader, config, self.session, self.model, shows_pictures=shows_pictures
        )


def has_features(feed: Feed) -> bool:
    """Whether batches come with what the frozen stages make of them."""
    with closing(feed.batches(1, 1)) as batches:
        return next(batches).features is not None


@pytest.mark.parametrize("shows_pictures", [True, False])
def test_features_are_those_of_the_frozen_stages(demo_shards: Path, shows_pictures: bool) -> None:
    parts = Parts(demo_shards)
    backbone = parts.model.image_stream.backbone  # type: ignore[union-attr]
    ahead = parts.feed(shows_pictures=shows_pictures).batches(1, 6)
    for fed, batch in zip(ahead, parts.loader.batches(1, 6), strict=True):
        assert fed.keys == batch.keys
        if shows_pictures:
            assert torch.equal(fed.pixels, batch.pixels)  # type: ignore[arg-type]
        else:
            assert fed.pixels is None
        grid = backbone.frozen_features(batch.pixels)
        assert torch.equal(fed.features, grid.flatten(2).transpose(1, 2))  # type: ignore[arg-type]
        assert not fed.features.requires_grad  # type: ignore[union-attr]


def test_nothing_is_done_ahead_where_that_would_change_something(demo_shards: Path) -> None:
    assert has_features(Parts(demo_shards).feed())
    assert not has_features(Parts(demo_shards).feed(overlap=False))
    assert not has_features(Parts(demo_shards).feed(compile=True))
    assert not has_features(Parts(demo_shards, frozen_stages=0).feed())
    assert not has_features(Parts(demo_shards, frozen_batch_norm="drifting").feed())
    assert not has_features(Parts(demo_shards, kind="tf-t").feed())
    in_parts = Parts(demo_shards)
    weight = in_parts.model.image_stream.backbone.stages[0][0].weight  # type: ignore[union-attr,index]
    weight.ds_id = 1  # as ZeRO-3 marks what it owns
    assert not has_features(in_parts.feed())


@pytest.mark.parametrize("overlap", [True, False])
def test_waiting_is_for_the_loader_alone(demo_shards: Path, overlap: bool) -> None:
    parts = Parts(demo_shards)
    (batch,) = parts.loader.batches(1, 1)

    class Slow(Ready):
        def batches(self, *steps: Any) -> Iterator[Batch]:
            for ready in super().batches(*steps):
                time.sleep(0.2)
                yield ready

    feed = parts.feed(Slow([[batch]], parts.loader), overlap=overlap)
    assert len(list(feed.batches(1, 3))) == 3
    assert 0.55 < feed.waited_s < 3


@pytest.mark.gpu
def test_pictures_are_on_the_gpu_when_their_step_comes(demo_shards: Path) -> None:
    parts = Parts(demo_shards)
    assert parts.session.device.type == "cuda"
    for fed, batch in zip(parts.feed().batches(1, 6), parts.loader.batches(1, 6), strict=True):
        assert fed.pixels is not None
        assert fed.pixels.is_cuda
        assert not fed.tag_ids.is_cuda
        assert torch.equal(fed.pixels.cpu(), batch.pixels)  # type: ignore[arg-type]
