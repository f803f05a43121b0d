"""How long does training stand still for a checkpoint: written by a thread, or waited for?

python benchmarks/checkpoint.py --folder FOLDER

MAGNeto on a ResNet-50 (40 million parameters) with momentum is trained and, once a round, saved
into FOLDER, which should lie on the disk that runs lie on. A save is timed until training goes on;
with the thread, training steps follow until it is done, so that both share the cores. The note says
how long it took until the checkpoint was on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from command_line import folder_to_fill, parser
from harness import compare_measured, report
from magneto_dist.config import CheckpointConfig, Config, LogConfig, ModelConfig
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.magneto import build_model
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.checkpoint_writer import CheckpointWriter
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.session import Session
from magneto_dist.training.telemetry import Telemetry
from magneto_dist.training.weight_average import WeightAverage

BATCH = 4


def main() -> None:
    """Command line -> table, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--folder", type=folder_to_fill, help="default: a temporary one")
    given = options.parse_args()
    written_s: dict[str, list[float]] = {"waited for": [], "by a thread": []}
    with TemporaryDirectory(dir=given.folder) as folder:
        model_config = ModelConfig(frozen_stages=0, tag_layers=2)
        config = Config(str(folder), model=model_config, log=LogConfig(tensorboard=False))
        session = Session(config.train)
        dataset = Dataset.open(str(ensure_demo()))
        plan = BatchPlan(BATCH, 1, BATCH, 1)
        loader = Loader(dataset, "train", config, session.world, plan, training=False)
        model = build_model(config.model, len(dataset.vocabulary), gate=True)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        model, optimizer = session.prepare(model, build_optimizer(model, config.optim), plan)
        batch = next(loader.batches(1, 1)).to(session.device)

        def step() -> None:
            loss = ets_loss(model(**batch.inputs()), batch, count_for_loss(batch), config.loss)
            session.backward(loss.total)
            session.step(model, optimizer)

        with Telemetry(Path(folder), session, config, Progress(), 1, loader) as telemetry:
            ways, none = {}, WeightAverage(model, decay=0)
            for name, taken_s in written_s.items():
                checkpoint = CheckpointConfig(asynchronous=name == "by a thread", keep=1)
                settings = replace(config, checkpoint=checkpoint)
                writer = CheckpointWriter(session, settings, model, optimizer, none, telemetry)
                ways[name] = partial(_stall_s, writer, step, taken_s)
            timings = compare_measured(ways, 1, given.rounds)
        session.close()
    for i, timing in enumerate(timings):
        on_disk_s = median(written_s[timing.name][1:])  # the first was to warm up
        note = f"stands still {1 / timing.per_s:.3f} s, on disk after {on_disk_s:.2f} s"
        timings[i] = replace(timing, note=note)
    report(f"saves of {num_parameters / 1e6:.1f} M parameters and momentum", timings, given.out)


def _stall_s(writer: CheckpointWriter, step: Callable[[], None], written_s: list[float]) -> float:
    step()
    started_at_s = time.perf_counter()
    writer.save(Progress(step=1, num_ranks=1))
    stall_s = time.perf_counter() - started_at_s
    while writer.is_writing:
        step()
    written_s.append(time.perf_counter() - started_at_s)
    writer.wait()
    return stall_s


if __name__ == "__main__":
    exit_with_clear_errors(main)
