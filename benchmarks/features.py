"""What do cached features of a frozen backbone save, and what do few views cost in F1?

python benchmarks/features.py --backbone mobilenet_v2 --backbone_weights PATH --backbone_stages 7

On demo data, in one process without loader processes, whose start would be half of so short a run:

1. `configs/nuswide.yaml` (ResNet-18 at 112 px, frozen whole; random weights, the work is the same):
   the features of one view are made in an empty cache: time and bytes. Then an epoch of training,
   from pictures (live) and from features, in turn.
2. `configs/demo.yaml`, but for the given backbone, frozen whole: trainings through the recipe, live
   and with each number of views, over a few seeds, all with as many epochs: F1 of the gated output
   on the validation split after the last one.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from command_line import at_least, parser
from harness import Timing, compare, save
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import demo
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.backbone import build_backbone
from magneto_dist.model.encoder import pack_tags
from magneto_dist.model.magneto import build_model
from magneto_dist.recipe import run_training
from magneto_dist.training.feature_cache import CachedFeatures, cached_features
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.session import Session

LIVE = 0  # views


@dataclass(frozen=True)
class Built:
    """What it took to make the features of one view."""

    pictures: int
    """Validation included."""
    seconds: float
    num_bytes: int
    bytes_per_picture: int


def main() -> None:
    """Command line -> tables, and a file with --out."""
    options = parser(__doc__)
    options.add_argument(
        "--items", type=at_least(4), default=600, help="for training (default: 600)"
    )
    options.add_argument("--views", type=at_least(1), nargs="+", default=[1, 2, 4, 8])
    options.add_argument(
        "--seeds", type=at_least(1), default=3, help="runs of each kind (default: 3)"
    )
    options.add_argument("--epochs", type=at_least(1), default=16, help="of each run (default: 16)")
    options.add_argument("--backbone", default="resnet18")
    options.add_argument("--backbone_weights", default="none")
    options.add_argument("--backbone_stages", type=at_least(1), default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        nus_wide = demo_config("nuswide.yaml", Path(folder), given.epochs, backbone_weights="none")
        config = demo_config(
            "demo.yaml",
            Path(folder),
            given.epochs,
            backbone=given.backbone,
            backbone_weights=given.backbone_weights,
            backbone_stages=given.backbone_stages,
        )
        build_backbone(config.model)  # shows what is wrong with it
        demo.build(Path(folder, "demo"), given.items)
        built, timings = _speed(nus_wide, given.rounds)
        f1 = {views: _f1(config, views, given.seeds) for views in (LIVE, *given.views)}
    _print(built, timings, f1)
    if given.out:
        measured = {
            "built_for_nuswide": asdict(built),
            "epoch_of_nuswide": [asdict(t) for t in timings],
        }
        runs = {"live" if views == LIVE else str(views): each for views, each in f1.items()}
        settings = {"items": given.items, "epochs": given.epochs, "model": asdict(config.model)}
        if given.backbone_weights not in ("none", "imagenet"):
            settings["model"]["backbone_weights"] = Path(given.backbone_weights).name
        save(given.out, {**measured, "f1_by_views_and_seed": runs, "settings": settings})


def demo_config(name: str, folder: Path, epochs: int, **model: Any) -> Config:
    """A shipped configuration for the demo in `folder`, its backbone frozen whole."""
    config = load_config(Path(__file__).parent.parent / "configs" / name)
    return replace(
        config,
        data=replace(
            config.data,
            path=str(folder / "demo"),
            cache_dir=str(folder / "cache"),
            decoder="cpu",
            num_workers=0,
        ),
        model=replace(config.model, frozen_stages="all", **model),
        train=replace(config.train, epochs=epochs, eval_every_epochs=epochs, global_batch_size=32),
        log=replace(config.log, tensorboard=False),
        output_dir=str(folder / "runs"),
    )


def _speed(config: Config, rounds: int) -> tuple[Built, list[Timing]]:
    config = replace(config, data=replace(config.data, feature_views=1))
    session = Session(config.train, config.optim.clip_norm)
    dataset = Dataset.open(str(config.data.path))
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(dataset.vocabulary))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.tags.trim_padding:
        pack_tags(model)  # as training does
    started_at_s = time.perf_counter()
    cached = cached_features(config, session, dataset, "cpu", model, lambda: False, Whereabouts())
    seconds = time.perf_counter() - started_at_s
    files = [*Path(str(config.data.cache_dir)).rglob("*.npy")]
    num_bytes = sum(path.stat().st_size for path in files)
    pictures = dataset.num_samples("train") + dataset.num_samples("validation")
    built = Built(pictures, seconds, num_bytes, round(num_bytes / pictures))
    ways: dict[str, Callable[[], object]] = {
        "live": partial(_epoch, config, session, dataset, model, None),
        "cached": partial(_epoch, config, session, dataset, model, cached),
    }
    timings = compare(ways, dataset.num_samples("train"), rounds)
    session.close()
    return built, timings


def _epoch(
    config: Config,
    session: Session,
    dataset: Dataset,
    model: nn.Module,
    cached: CachedFeatures | None,
) -> None:
    """Trains for an epoch."""
    size = config.train.global_batch_size
    plan = BatchPlan.derive(size, 1, size, group_size=config.model.batch_norm_group_size)
    features = None if cached is None else cached.train
    loader = Loader(dataset, "train", config, session.world, plan, training=True, features=features)
    model = model.to(session.device).train()
    optimizer = torch.optim.SGD(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1e-4
    )
    for batch in loader.batches(1, loader.steps_per_epoch):
        on_device = batch.to(session.device)
        loss = ets_loss(
            model(**on_device.inputs()), on_device, count_for_loss(on_device), config.loss
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    if session.device.type == "cuda":
        torch.cuda.synchronize()


def _f1(config: Config, views: int, seeds: int) -> list[float]:
    """Of the gated output, by the paper's protocol, one for each seed."""
    data, folder = replace(config.data, feature_views=views), f"{config.output_dir}/{views}"
    config = replace(config, data=data, output_dir=folder)
    return [f1_after_training(config, seed) for seed in range(seeds)]


def f1_after_training(config: Config, seed: int) -> float:
    """Of the gated output, by the paper's protocol, in a subfolder of `config.output_dir`."""
    output_dir = f"{config.output_dir}/{seed}"
    run_training(replace(config, seed=seed, output_dir=output_dir))
    summary = json.loads(Path(output_dir, "summary.json").read_text())
    return summary["validation"]["final"]["paper"]["f1"]


def _print(built: Built, timings: Sequence[Timing], f1: dict[int, list[float]]) -> None:
    print(
        f"\nfeatures of {built.pictures} pictures: {built.seconds:.1f} s,"
        f" {built.num_bytes / 1e6:.0f} MB"
    )
    for timing in timings:
        print(f"epoch, {timing.name}: {timing.per_s:.0f} items/s, ratio {timing.ratio:.2f}")
    for views, each in f1.items():
        gain = [ours - live for ours, live in zip(each, f1[LIVE], strict=True)]
        spread = f" +- {stdev(gain):.2%}" if len(gain) > 1 else ""
        name = "live" if views == LIVE else f"{views} views"
        print(f"{name:<8}  F1 {mean(each):.1%}, against live {mean(gain):+.2%}{spread}")


if __name__ == "__main__":
    exit_with_clear_errors(main)
