"""Where does the time of a training step go: model alone, or model and loader together?

python benchmarks/train_step.py --config configs/demo.yaml --steps 40

Trains on the demo data with the given settings, once on one batch that never changes (what the
model could do) and once on batches from the loader; the ratio says what the data costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from harness import compare, parser, report
from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.magneto import build_model
from magneto_dist.world import World


def main() -> None:
    """Command line -> table, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    options.add_argument("--steps", type=int, default=20, help="of a round (default: 20)")
    options.add_argument("--decoder", choices=("cpu", "dali_cpu", "dali_gpu"), default="cpu")
    given = options.parse_args()
    config = load_config(given.config)
    config = replace(config, data=replace(config.data, decoder=given.decoder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = Dataset.open(config.data.path or str(ensure_demo()))
    size = config.train.global_batch_size
    plan = BatchPlan.derive(size, 1, size, group_size=config.model.batch_norm_group_size)
    loader = Loader(dataset, "train", config, World(), plan, training=True)
    model = build_model(config.model, len(dataset.vocabulary), gate=True).to(device)
    fixed = next(loader.batches(1, 1)).to(device)
    stream = _endless(loader)
    ways: dict[str, Callable[[], object]] = {
        "model alone": lambda: _train(model, [fixed] * given.steps, config, device),
        "loader alone": lambda: list(islice(stream, given.steps)),
        "model and loader": lambda: _train(model, islice(stream, given.steps), config, device),
    }
    question = f"training step of {given.config}, batch {size}, {given.decoder}, {device}"
    report(question, compare(ways, size * given.steps, given.rounds), given.out)


def _endless(loader: Loader) -> Iterator[Batch]:
    yield from loader.batches(1, 10**9)


def _train(
    model: nn.Module, batches: Iterator[Batch] | list[Batch], config: Config, device: torch.device
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for batch in batches:
        on_device = batch.to(device)
        prediction = model(**on_device.inputs())
        counts = count_for_loss(on_device)
        loss = ets_loss(prediction, on_device, counts, config.loss)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
