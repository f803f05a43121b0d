"""How much faster than the paper's way is an epoch of its NUS-WIDE set-up?

python benchmarks/nus_wide_epoch.py --photos FOLDER_OF_JPEGS

The paper's way, written from its text (section 4 and appendix A) as one would with torch alone:
files decoded by Pillow and augmented by torchvision's first transforms, ResNet-18 frozen by
`requires_grad` with its batch norms in training mode, float32, every item padded to 16 tags. Ours
is `launchers/train_nuswide.py` as it is, live and with cached features (made before). All see the
same pictures (500 x 375 pixels) and tags; most items have one tag or two. Each is tried with 1 and
2 loader processes, for the cores are shared by loader and model; what counts is the better of them.
The parts alone, in one process, say where the time goes.

Weights are random here: they cost the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from harness import compare_measured, parser, report
from loader import Setting, make_photographs, write_files
from magneto_dist.batch import Prediction
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.writer import write_dataset
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.magneto import build_model
from magneto_dist.vocabulary import Vocabulary
from magneto_dist.world import World
from other_loaders import PictureFiles

REPOSITORY = Path(__file__).parent.parent
CONFIG = load_config(REPOSITORY / "configs" / "nuswide.yaml")
BATCH = CONFIG.train.global_batch_size
WARM_STEPS = 8
NUM_CONCEPTS = 81
CONCEPTS = tuple(f"concept-{number:02}" for number in range(NUM_CONCEPTS))


def main() -> None:
    """Command line -> table, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--photos", type=Path, required=True, help="folder with *.jpg")
    options.add_argument("--items", type=int, default=1024, help="of an epoch (default: 1024)")
    options.add_argument("--folder", type=Path, help="keeps the pictures (default: does not)")
    options.add_argument("--alone", help=argparse.SUPPRESS)  # one way, in this process
    options.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.alone:
        print(WAYS[given.alone](given.folder, given.workers), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        _make(folder, given.photos, given.items)
        _compare(folder, given)


def _compare(folder: Path, given: argparse.Namespace) -> None:
    ways = [(way, workers) for way in ("the paper's way", "this system") for workers in (1, 2)]
    ways += [("cached features", 1), *((name, 0) for name in WAYS if "alone" in name)]
    names = {f"{way}, {n} loader processes" if n else way: (way, n) for way, n in ways}
    timings = compare_measured(
        {name: lambda way=way: _start(*way, folder) for name, way in names.items()},
        1,
        given.rounds,
    )
    best = {
        way: max(t.per_s for t in timings if t.name.startswith(f"{way},"))
        for way in ("the paper's way", "this system", "cached features")
    }
    live, cached = (best[way] / best["the paper's way"] for way in list(best)[1:])
    report(
        f"an epoch of NUS-WIDE's set-up: {live:.2f} times as fast as the paper's way, and"
        f" {cached:.2f} times with cached features",
        timings,
        given.out,
    )


def _start(way: str, workers: int, folder: Path) -> float:
    """Seconds an image, after warming up, in a process of its own with one thread."""
    command = [sys.executable, __file__, "--photos", ".", "--folder", str(folder), "--alone", way]
    done = subprocess.run(
        [*command, "--workers", str(workers)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )
    if done.returncode != 0:
        raise SystemExit(f"{way} failed: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


# Pictures ---------------------------------------------------------------------------------------


def _make(folder: Path, photos: Path, num_items: int) -> None:
    """The same pictures as files and as shards, with tags as many as NUS-WIDE's items have."""
    if (folder / "shards/dataset.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    photographs = make_photographs(photos, num_items + BATCH)
    write_files(folder, dict(list(photographs.items())[:num_items]))
    rng = np.random.default_rng(0)
    tags = {
        key: rng.choice(NUM_CONCEPTS, min(rng.geometric(0.55), 13), replace=False).tolist()
        for key in photographs
    }
    (folder / "tags.json").write_text(json.dumps(tags))
    rows = [
        Sample(key, content, tuple(CONCEPTS[t] for t in tags[key]), _important(len(tags[key])))
        for key, content in photographs.items()
    ]
    write_dataset(
        folder / "shards",
        {"train": rows[:-BATCH], "validation": rows[-BATCH:]},
        lambda row: row,
        Vocabulary(CONCEPTS),
        num_processes=1,
        source={"builder": "benchmark"},
    )


def _important(num_tags: int) -> tuple[bool, ...]:
    """Most tags of NUS-WIDE's items are important ones."""
    return tuple(number != 1 for number in range(num_tags))


# The paper's way --------------------------------------------------------------------------------


class Items(PictureFiles):
    """Pictures with their tags, added and dropped (section 5.1), in 16 slots."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Setting(folder, CONFIG.augment.image_size, True, BATCH, 0, ""))
        tags = json.loads((folder / "tags.json").read_text())
        self.tags = [tags[path.stem] for path in self.paths]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Pixels, tag ids and targets."""
        pairs = list(zip(self.tags[index], _important(len(self.tags[index])), strict=True))
        dropped = np.random.randint(0, len(pairs) // 2 + 1)
        for _ in range(dropped):
            if rest := [pair for pair in pairs if not pair[1]]:
                pairs.remove(rest[0])
        added = np.random.choice(NUM_CONCEPTS, np.random.randint(0, len(pairs) // 2 + 1), False)
        present = {tag for tag, _ in pairs}
        pairs += [(tag, False) for tag in added.tolist() if tag not in present]
        ids, targets = torch.full((16,), NUM_CONCEPTS), torch.zeros(16)
        ids[: len(pairs)] = torch.tensor([tag for tag, _ in pairs])
        targets[: len(pairs)] = torch.tensor([float(flag) for _, flag in pairs])
        return super().__getitem__(index), ids, targets


def _network() -> nn.Module:
    """Figure 2 (d), the convolutional part as torchvision gives it."""
    plain = replace(CONFIG.model, backbone_weights="none", projection_batch_norm="local")
    network = build_model(plain, NUM_CONCEPTS)
    backbone = nn.Sequential(*list(resnet18().children())[:-2])
    network.image_stream.backbone = backbone.requires_grad_(False)
    return network.train()


def _loss(prediction: Prediction, targets: Tensor, mask: Tensor) -> Tensor:
    """BCE and Dice of the mixture and of both streams (section 3.2)."""
    total = torch.zeros(())
    for head in prediction.heads:
        p = prediction.probability(head) * mask
        bce = functional.binary_cross_entropy(p, targets, reduction="none")
        dice = 1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)
        total = total + (bce * mask).sum() / mask.sum() + dice.mean()
    return total


def _paper_step(network: nn.Module, optimizer: torch.optim.Optimizer, item: list[Tensor]) -> float:
    pixels, ids, targets = item
    mask = ids != NUM_CONCEPTS
    loss = _loss(network(ids, mask, pixels), targets, mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _paper_loader(folder: Path, workers: int) -> DataLoader:
    items = Items(folder)
    return DataLoader(items, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def _paper(folder: Path, workers: int) -> float:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    return _seconds_an_image(
        _paper_step(network, optimizer, item) for item in _paper_loader(folder, workers)
    )


def _paper_model(folder: Path, workers: int) -> float:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    item = next(iter(_paper_loader(folder, workers)))
    return _seconds_an_image(_paper_step(network, optimizer, item) for _ in range(24))


def _paper_data(folder: Path, workers: int) -> float:
    return _seconds_an_image(iter(_paper_loader(folder, workers)))


# Ours -------------------------------------------------------------------------------------------


def _config(folder: Path, workers: int) -> Config:
    return replace(
        CONFIG,
        data=replace(CONFIG.data, path=str(folder / "shards"), num_workers=workers),
        model=replace(CONFIG.model, backbone_weights="none"),
    )


def _ours(folder: Path, workers: int, *more: str) -> float:
    num_steps = Dataset.open(str(folder / "shards")).num_samples("train") // BATCH
    with tempfile.TemporaryDirectory() as run_dir:
        subprocess.run(
            [
                sys.executable,
                str(REPOSITORY / "launchers" / "train_nuswide.py"),
                f"--data.path={folder / 'shards'}",
                f"--data.num_workers={workers}",
                "--model.backbone_weights=none",
                f"--output_dir={run_dir}",
                f"--max_steps={num_steps}",
                f"--log.every_steps={WARM_STEPS}",
                *more,
            ],
            check=True,
            capture_output=True,
        )
        lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
        speeds = [line["images_per_second"] for line in lines if line["split"] == "train"]
    return sum(1 / speed for speed in speeds[1:]) / len(speeds[1:])


def _cached(folder: Path, workers: int) -> float:
    cache = f"--data.cache_dir={folder / 'cache'}"
    return _ours(folder, workers, "--data.feature_views=1", cache)


def _ours_model(folder: Path, workers: int) -> float:
    loader, dataset = _our_loader(folder, workers)
    batch = next(loader.batches(1, 1))
    network = build_model(_config(folder, 0).model, len(dataset.vocabulary)).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        total = ets_loss(network(**batch.inputs()), batch, count_for_loss(batch), CONFIG.loss).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return _seconds_an_image(step() for _ in range(24))


def _ours_data(folder: Path, workers: int) -> float:
    loader, _ = _our_loader(folder, workers)
    return _seconds_an_image(loader.batches(1, loader.steps_per_epoch))


def _our_loader(folder: Path, workers: int) -> tuple[Loader, Dataset]:
    dataset = Dataset.open(str(folder / "shards"))
    plan = BatchPlan.derive(BATCH, 1, BATCH, 1)
    config = _config(folder, workers)
    return Loader(dataset, "train", config, World(), plan, training=True), dataset


def _seconds_an_image(steps: Iterator[object]) -> float:
    """Time of what follows the first `WARM_STEPS`, each a batch."""
    for _ in range(WARM_STEPS):
        next(steps)
    started_at_s = time.perf_counter()
    num_steps = sum(1 for _ in steps)
    return (time.perf_counter() - started_at_s) / (num_steps * BATCH)


WAYS = {
    "the paper's way": _paper,
    "this system": _ours,
    "cached features": _cached,
    "the paper's data alone": _paper_data,
    "our data alone": _ours_data,
    "the paper's model alone": _paper_model,
    "our model alone": _ours_model,
}

if __name__ == "__main__":
    main()
