"""Where a run starts or goes on from, and whether it may."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from magneto_dist.config import Config, Precision
from magneto_dist.config_io import load_config
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import frozen_precision
from magneto_dist.model.magneto import PRETRAINED_PARTS
from magneto_dist.training.checkpoint import (
    DEEPSPEED,
    best_or_newest,
    best_weights,
    find_damage,
    finish_renames,
    load_state,
    newest_complete,
    read_progress,
)
from magneto_dist.vocabulary import Vocabulary

_FIXED_SECTIONS = ("model", "tags", "augment", "loss")
_FREE_SETTINGS = {"model.frozen_precision"}  # as train.precision is
_FIXED_TRAIN_SETTINGS = ("global_batch_size", "objective", "param_dtype", "ema_decay")
_FIXED_DATA_SETTINGS = (
    "num_streams",
    "shuffle_window",
    "constant_image",
    "stages",
    "feature_views",
    "feature_dtype",
    "feature_seed",
)


def checkpoint_to_resume(config: Config, dataset: Dataset) -> Path | None:
    """The checkpoint that `--resume` means; None: start from the beginning.

    Raises:
        InputError: it is damaged, belongs to a run with other settings or data, or would be lost.
    """
    run_dir = Path(config.output_dir)
    finish_renames(run_dir)
    if config.resume == "never":
        if newest_complete(run_dir):
            raise InputError(
                f"{run_dir} holds a run that --resume never would overwrite: choose another"
                " --output_dir, or remove it"
            )
        return None
    if config.resume == "auto":
        checkpoint = newest_complete(run_dir)
    else:
        checkpoint = Path(config.resume)
        damage = find_damage(checkpoint)
        if damage:
            raise InputError(
                f"--resume {checkpoint}: {damage}; give RUN_DIR/checkpoints/step-N of a complete"
                " one, or auto"
            )
        is_ours = checkpoint.resolve().is_relative_to(run_dir.resolve())
        if (checkpoint / DEEPSPEED).exists() and not is_ours:
            raise InputError(
                f"--resume {checkpoint}: DeepSpeed keeps its state in pickles, which are read from"
                " the run's own folder alone; take the weights with --init_from"
            )
    if checkpoint:
        _check_same_run(config, dataset, checkpoint)
    return checkpoint


def _check_same_run(config: Config, dataset: Dataset, checkpoint: Path) -> None:
    """A run that goes on must mean what it meant: same order, same model, same data."""
    recorded = load_config(checkpoint / "config.yaml")
    before, now = _meaning(recorded), _meaning(config)
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        key = changed[0]
        raise InputError(
            f"{checkpoint} was trained with --{key} {before.get(key)}, this run says {now[key]}"
            f" ({len(changed)} settings differ): set them back, or choose another --output_dir"
        )
    if read_progress(checkpoint).data_fingerprint != fingerprint(dataset):
        raise InputError(
            f"{checkpoint} was trained on other data than {dataset.root}: use that, or choose"
            " another --output_dir (--init_from keeps the weights)"
        )
    _warn_of_mended_loss(recorded, checkpoint)


def _warn_of_mended_loss(recorded: Config, checkpoint: Path) -> None:
    """Where padding is trimmed BCE was once averaged over the slots that were left.

    Checkpoints of that time are told by a setting that they lack: it came right after the mend.
    """
    trims = recorded.tags.trim_padding and not recorded.train.compile
    is_older = "\n  mapping:" not in (checkpoint / "config.yaml").read_text(encoding="utf-8")
    if trims and recorded.loss.normalisation == "slots" and is_older:
        print(
            f"warning: {checkpoint.name} was trained when --tags.trim_padding true still averaged"
            " BCE over the slots that were left; from here on it is averaged over all of"
            " --tags.max_tags, which is less: a new --output_dir trains on one scale throughout",
            file=sys.stderr,
        )


def _meaning(config: Config) -> dict[str, Any]:
    """The settings that may not change in the middle of a run, flat."""
    settings = asdict(config)
    meaning: dict[str, Any] = {"seed": settings["seed"]}
    for section in _FIXED_SECTIONS:
        meaning |= {f"{section}.{key}": value for key, value in settings[section].items()}
    meaning = {k: v for k, v in meaning.items() if k not in _FREE_SETTINGS}
    for section, keys in (("train", _FIXED_TRAIN_SETTINGS), ("data", _FIXED_DATA_SETTINGS)):
        meaning |= {f"{section}.{key}": settings[section][key] for key in keys}
    return meaning


def settled_precision(config: Config, checkpoint: Path | None) -> Precision:
    """What `model.frozen_precision` means for this run, which keeps to it on whatever machine.

    Raises:
        InputError: fp16 without a GPU.
    """
    precision: Precision = frozen_precision(config.model)
    if config.model.frozen_precision == "auto":
        if checkpoint:
            return frozen_precision(load_config(checkpoint / "config.yaml").model)
        if config.train.param_dtype == "float64" or precision == "no":
            return "no"
        return precision if config.train.precision == "no" else config.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--model.frozen_precision fp16 needs a GPU; on CPU use auto, bf16 or no")
    return precision


def with_precision(config: Config, precision: Precision) -> Config:
    """`config` with this in place of "auto"; what was said otherwise the ranks are to agree on."""
    if config.model.frozen_precision != "auto":
        return config
    return replace(config, model=replace(config.model, frozen_precision=precision))


def fingerprint(dataset: Dataset) -> str:
    """Identity of the training data: vocabulary and shards."""
    shards = [(shard.name, shard.num_bytes, shard.sha256) for shard in dataset.splits["train"]]
    return hashlib.sha256(repr((dataset.vocabulary.sha256, shards)).encode()).hexdigest()


def initialise_from(
    model: nn.Module, run_dir: Path, config: Config, vocabulary: Vocabulary
) -> None:
    """Copies weights of another run (`--init_from`) into a fresh model.

    From a run with the same objective all weights are copied; from pre-training to fine-tuning
    image feature extractor, tag embedder, multi-head attention and both encoders (section 5.2).

    Raises:
        InputError: no complete checkpoint there, a model of another shape, or another vocabulary:
            the vector of a tag would become that of another one.
    """
    checkpoint = best_or_newest(run_dir)
    if checkpoint is None:
        raise InputError(f"--init_from {run_dir}: no complete checkpoint there")
    theirs = Vocabulary.from_bytes((run_dir / "vocabulary.txt").read_bytes())
    difference = theirs.difference_from(vocabulary)
    if difference is not None:
        raise InputError(
            f"--init_from {run_dir}: its vocabulary is not that of the data: {difference}; build"
            " the data set with the run's vocabulary.txt"
        )
    state = best_weights(checkpoint)
    if load_config(checkpoint / "config.yaml").train.objective != config.train.objective:
        own = {k: v for k, v in model.state_dict().items() if not k.startswith(PRETRAINED_PARTS)}
        state = {k: v for k, v in state.items() if k.startswith(PRETRAINED_PARTS)} | own
    load_state(model, state, str(checkpoint))
