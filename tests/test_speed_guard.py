"""Ratios that a change must not spoil unnoticed: CPU time of one thing against another's.

No times, which are the machine's, and no wall time, which belongs to whoever else is on it: medians
over rounds that alternate, with bounds that only a real mistake crosses. The figures themselves are
in benchmarks/results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness import Timing, compare_measured, now
from magneto_dist.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from magneto_dist.config_io import load_config
from magneto_dist.data.augment import training_augmentations
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import SampleReader
from magneto_dist.model.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from magneto_dist.world import World
from processes import REPOSITORY
from synthetic import make_synthetic
from train_step import overhead

CPU = torch.device("cpu")
ITEMS = 32


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def core_seconds(call: Callable[[], object]) -> Callable[[], float]:
    def measured() -> float:
        start = now(CPU)
        call()
        return now(CPU).core_s - start.core_s

    return measured


def taken_in_turn(rounds: int, **ways: Callable[[], object]) -> dict[str, Timing]:
    measured = {name: core_seconds(call) for name, call in ways.items()}
    return {timing.name: timing for timing in compare_measured(measured, 1, rounds)}


def test_loading_costs_little_more_than_decoding(tmp_path):
    dataset = make_synthetic(tmp_path / "data", ITEMS, (500, 375), 50, 8)
    config = Config(
        augment=AugmentConfig(policy="none"),
        data=DataConfig(num_workers=0, decoder="cpu"),
        train=TrainConfig(global_batch_size=ITEMS),
    )
    plan = BatchPlan.derive(ITEMS, 1, ITEMS, 1)
    loader = Loader(dataset, "train", config, World(), plan, training=True)
    images = [raw.image or b"" for raw in raw_samples(dataset)]
    ids = next(loader.batches(1, 1)).sample_ids.numpy()
    augmentations = training_augmentations(config.seed, 0, ids, config.augment)
    decoder = CpuDecoder(config.augment.image_size, 100.0)
    ways = taken_in_turn(
        9,
        decoding=lambda: decoder(images, augmentations),
        loading=lambda: list(loader.batches(1, 1)),
    )
    assert ways["loading"].ratio > 0.7


def raw_samples(dataset: Dataset):
    return SampleReader(dataset, "train", with_images=True).read(torch.arange(ITEMS).numpy())


def test_frozen_stages_cost_no_more_than_plain_ones_without_a_graph():
    """Folding them anew in every step, for one, takes twice as long."""
    backbone = build_backbone(ModelConfig(backbone="resnet18", frozen_stages="all"))
    pixels = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def plain() -> None:
        with torch.no_grad():
            backbone.stages((pixels / 255 - mean) / std)

    ways = taken_in_turn(11, plain=plain, frozen=lambda: backbone(pixels))
    assert ways["frozen"].ratio > 0.8


def test_the_loop_costs_little_more_than_a_bare_one(demo_shards):
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    config = replace(
        config,
        data=replace(config.data, num_workers=0),
        train=replace(config.train, global_batch_size=16),
    )
    found = overhead(config, Dataset.open(str(demo_shards)), rounds=5, num_steps=3)
    # Of a step a quarter as long as the demo's, so that the loop weighs more than there.
    assert found.cores < 0.25


def test_a_guard_notices_what_is_slower():
    def busy(count: int) -> Callable[[], object]:
        return lambda: sum(itertools.repeat(1, count))

    ways = taken_in_turn(9, plain=busy(400_000), slow=busy(800_000))
    assert ways["slow"].ratio < 0.7
