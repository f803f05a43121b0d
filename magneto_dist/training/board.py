"""RUN_DIR/tensorboard: how a run goes, and, when it has ended, how it compares with others.

1. `Board` writes what a run tells while it goes on. A run that goes on from a checkpoint writes
   from there; TensorBoard drops what came after it.
2. `write_hparams` adds the settings of a finished run, in a file of their own beside the rest: of
   settings TensorBoard believes what it has read first, and a run that has ended may be trained on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from magneto_dist.binning import NUM_BINS, Curves
from magneto_dist.config import Config
from magneto_dist.training.checkpoint import Progress

_LAYOUT = {
    "How good": {
        "F1 of the heads, validation": ["Multiline", ["validation/(final|image|tag)/paper/f1$"]],
        "loss": ["Multiline", ["(train|validation)/loss$"]],
    },
    "How fast": {
        "images per second": ["Multiline", ["train/images_per_second$"]],
        "fraction of the time spent waiting for data": [
            "Multiline",
            ["train/data_wait_fraction$"],
        ],
    },
    "Optimisation": {
        "learning rate": ["Multiline", ["train/lr$"]],
        "norm of the gradients, before clipping": ["Multiline", ["train/gradient_norm$"]],
    },
}
"""Charts of the tab CUSTOM SCALARS: category, title, and which scalars by regular expression."""

_COMPARED_SECTIONS = ("model", "loss", "optim", "train", "augment", "tags")
_COMPARED_METRICS = (
    *(f"validation/{head}/paper/f1" for head in ("final", "image", "tag")),
    "validation/loss",
)
_SHOWN_FIRST = {"model.kind", "optim.lr", "seed", "train.epochs", "train.global_batch_size"}
_HPARAMS = ".hparams"  # how the name of their file ends
_CLOCKS_DIFFER_S = 10.0  # between machines that a run was on; not waited for any longer


class Board:
    """What a run shows in TensorBoard; main process alone.

    Args:
        folder: RUN_DIR/tensorboard.
        start: where the run goes on from.
        last_lines: of metrics.jsonl, those of the step `start.step`.
    """

    def __init__(
        self, folder: Path, start: Progress, last_lines: Sequence[Mapping[str, Any]]
    ) -> None:
        # A kill may have left the evaluation of the last step without its checkpoint: it will come
        # again. TensorBoard drops whole steps, so that the training line of this one is shown anew.
        purge_step = start.step + 1 if start.evaluated else start.step
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._writer.add_custom_scalars(_LAYOUT)
        if not start.evaluated:
            for line in last_lines:
                values = {k: v for k, v in line.items() if k not in ("step", "epoch", "split")}
                self.scalars(line["step"], line["split"], values)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Shows the values of a line of metrics.jsonl, each as `split/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def curves(self, step: int, curves: Curves) -> None:
        """Shows precision-recall curves of the heads and the histogram of alpha."""
        for head, curve in curves.precision_recall.items():
            self._writer.add_pr_curve_raw(
                f"validation/precision_recall/{head}",
                curve.true_positives.numpy(),
                curve.false_positives.numpy(),
                curve.true_negatives.numpy(),
                curve.false_negatives.numpy(),
                curve.precision.numpy(),
                curve.recall.numpy(),
                global_step=step,
                num_thresholds=NUM_BINS + 1,
            )
        if curves.alpha is not None:
            counts = curves.alpha.counts
            self._writer.add_histogram_raw(
                "validation/alpha_of_tags",  # validation/alpha is their mean: one kind a name
                min=0.0,
                max=1.0,
                num=int(counts.sum()),
                sum=curves.alpha.sum,
                sum_squares=curves.alpha.sum_of_squares,
                bucket_limits=[(place + 1) / NUM_BINS for place in range(NUM_BINS)],
                bucket_counts=counts.tolist(),
                global_step=step,
            )

    def pictures(self, step: int, figure: Any) -> None:
        """Shows a matplotlib figure of validation pictures."""
        self._writer.add_figure("validation/pictures", figure, step)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Ends writing."""
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Waits until the name of a new event file sorts after those of the files that are there.

    TensorBoard reads them in that order. They begin with the time in whole seconds; within one
    second the number of the process decides, which may be smaller, or even the same on another
    machine or in a container, and then the earlier file would be written over.
    """
    numbers = (path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*"))
    newest_s = max((int(number) for number in numbers if number.isdecimal()), default=0)
    later_s = newest_s + 1.01 - time.time()  # a clock that is being set may be slower than sleep
    time.sleep(min(max(later_s, 0), _CLOCKS_DIFFER_S))


def write_hparams(folder: Path, config: Config) -> None:
    """Lists a finished run in the tab HPARAMS, once, by its settings, F1 and validation loss.

    Args:
        folder: RUN_DIR/tensorboard, that nobody writes any more: TensorBoard goes from one file to
            the next and does not come back.
        config: of the run.
    """
    earlier = list(folder.glob(f"*{_HPARAMS}"))
    writer = SummaryWriter(str(folder), filename_suffix=_HPARAMS)
    # Metrics are names of scalars that are there; `SummaryWriter.add_hparams` would show copies.
    summaries = hparams(compared_settings(config), dict.fromkeys(_COMPARED_METRICS))
    _show_first(summaries[0].value[0].metadata.plugin_data)
    for summary in summaries:
        writer.file_writer.add_summary(summary)  # type: ignore[union-attr]
    writer.close()
    for path in earlier:
        path.unlink()


def _show_first(experiment: Any) -> None:
    """Of all settings TensorBoard shows five columns unasked, those first that are said to differ
    from run to run; one run does not know which do."""
    content = HParamsPluginData.FromString(experiment.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in _SHOWN_FIRST
    experiment.content = content.SerializeToString()


def compared_settings(config: Config) -> dict[str, float | str]:
    """The settings by which runs are compared: numbers, and words for all that may be none."""
    settings: dict[str, float | str] = {"seed": config.seed}
    for section in _COMPARED_SECTIONS:
        of_section = getattr(config, section)
        is_number = {field.name: field.type in ("int", "float") for field in fields(of_section)}
        for name, value in asdict(of_section).items():
            settings[f"{section}.{name}"] = value if is_number[name] else str(value)
    return settings
