"""What do exported models say of photographs that the network does not, and how fast are they?

python benchmarks/export.py --photos TABLE.csv --backbone mobilenet_v2 --backbone_weights PATH

1. `--photos`, a table with important tags, becomes a data set, and a MAGNeto with the frozen
   backbone is trained on it at 224 px: weights that mean something.
2. That model, and the paper's large-scale one (`configs/ls.yaml`, ResNet-50; random weights, the
   work is the same), are exported as `export.py` does. Largest difference of any probability, over
   all photographs, in batches of several sizes.
3. Photographs per second from pixels to probabilities, float32, one thread of a CPU: the network as
   `predict.py` runs it (batch norms of frozen stages folded), torch.export, ONNX Runtime, in turn.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from command_line import at_least, parser
from harness import Timing, compare, save
from magneto_dist.config_io import load_config
from magneto_dist.data.items import Items, open_items
from magneto_dist.data.sources import table
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.export import (
    Call,
    Inputs,
    Probabilities,
    batches_of,
    export_graph,
    inputs_of,
    largest_difference,
    open_onnx,
    write_onnx,
    write_pt2,
)
from magneto_dist.model.magneto import build_model
from magneto_dist.recipe import run_training
from magneto_dist.trained_run import TrainedRun, load_run

CONFIGS = Path(__file__).parent.parent / "configs"
BATCH_SIZES = (1, 32)


def main() -> None:
    """Command line -> tables, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--photos", required=True, help="table of pictures and important tags")
    options.add_argument("--epochs", type=at_least(1), default=20, help="of training (default: 20)")
    options.add_argument("--backbone", default="resnet18", help="frozen whole, all its stages")
    options.add_argument("--backbone_weights", default="none")
    options.add_argument("--skip_ls", action="store_true", help="the trained model alone")
    given = options.parse_args()
    torch.set_num_threads(1)
    photos = Path(given.photos)
    with tempfile.TemporaryDirectory() as folder:
        items = _open(photos, Path(folder))
        trained = _trained(photos, Path(folder), given)
        runs = {f"{given.backbone}, trained": trained}
        if not given.skip_ls:
            runs["configs/ls.yaml, random weights"] = _large_scale(trained)
        measured = [
            _measured(name, run, items, Path(folder), given.rounds) for name, run in runs.items()
        ]
    if given.out:
        with photos.open(newline="", encoding="utf-8") as file:
            names = [row["file_name"] for row in csv.DictReader(file)]
        save(given.out, {"photographs": names, "epochs": given.epochs, "models": measured})


def _open(photos: Path, folder: Path) -> Items:
    return open_items(
        str(photos),
        folder,
        with_images=True,
        split="validation",
        images=None,
        columns=TableColumns(),
    )


def _trained(photos: Path, folder: Path, given: Any) -> TrainedRun:
    table.build(folder / "data", photos, validation_fraction=0.2)
    config = load_config(CONFIGS / "demo.yaml")
    config = replace(
        config,
        data=replace(config.data, path=str(folder / "data"), decoder="cpu", num_workers=0),
        augment=replace(config.augment, image_size=224),
        model=replace(
            config.model,
            backbone=given.backbone,
            backbone_weights=given.backbone_weights,
            backbone_stages=None,
            frozen_stages="all",
        ),
        optim=replace(config.optim, warmup_steps=0),
        train=replace(config.train, epochs=given.epochs, global_batch_size=16),
        log=replace(config.log, tensorboard=False),
        output_dir=str(folder / "run"),
    )
    run_training(config)
    return load_run(folder / "run")


def _large_scale(like: TrainedRun) -> TrainedRun:
    config = load_config(CONFIGS / "ls.yaml")
    config = replace(config, model=replace(config.model, backbone_weights="none"))
    torch.manual_seed(0)
    model = build_model(config.model, len(like.vocabulary)).eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainedRun(config, like.vocabulary, model, like.checkpoint, like.decision)


def _measured(
    name: str, run: TrainedRun, items: Items, folder: Path, rounds: int
) -> dict[str, Any]:
    inputs = inputs_of(run, items)
    network = Probabilities(run.model)
    graph = export_graph(network, run)
    path = folder / "model.onnx"
    forms = {"torch.export": write_pt2(graph, folder / "model.pt2", run.decision)}
    write_onnx(graph, path, run.decision)
    forms["ONNX Runtime"] = open_onnx(path, num_threads=1)
    batches = batches_of(inputs)
    differences = {form: largest_difference(network, call, batches) for form, call in forms.items()}
    photographs = len(inputs["tag_ids"])
    print(f"\n{name}: {photographs} photographs, batches of {[len(b['tag_ids']) for b in batches]}")
    for form, difference in differences.items():
        print(f"  {form}: off by at most {difference:.2g}")
    calls: dict[str, Call] = {"eager": partial(_eager, run), **forms}
    speed = {size: _speed(calls, inputs, size, rounds) for size in BATCH_SIZES}
    for size, timings in speed.items():
        for t in timings:
            spread = f"({t.slowest_per_s:.1f} - {t.fastest_per_s:.1f})"
            print(f"  batch {size}, {t.name}: {t.per_s:.1f} photographs/s {spread}, {t.ratio:.2f}")
    return {
        "model": name,
        "compared_photographs": photographs,
        "batch_sizes": [len(batch["tag_ids"]) for batch in batches],
        "largest_difference": differences,
        "photographs_per_s": {size: [asdict(t) for t in each] for size, each in speed.items()},
    }


def _eager(run: TrainedRun, inputs: Inputs) -> dict[str, Any]:
    return {"probability": run.model(**inputs).probability("final")}


@torch.no_grad()
def _speed(calls: dict[str, Call], inputs: Inputs, size: int, rounds: int) -> list[Timing]:
    photographs = len(inputs["tag_ids"]) // size * size
    batches = [
        {name: tensor[first : first + size] for name, tensor in inputs.items()}
        for first in range(0, photographs, size)
    ]

    def through(call: Call) -> Callable[[], object]:
        return lambda: [call(batch) for batch in batches]

    return compare({name: through(call) for name, call in calls.items()}, photographs, rounds)


if __name__ == "__main__":
    exit_with_clear_errors(main)
