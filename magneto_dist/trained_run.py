"""A trained run in use: its model, its vocabulary and its settings, read back from a run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from magneto_dist.files import sha256_of
from magneto_dist.model.magneto import build_model
from magneto_dist.precision import HALF_DTYPES
from magneto_dist.training.checkpoint import (
    MARKER,
    best_or_newest,
    best_weights,
    load_state,
    read_progress,
)
from magneto_dist.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrainedRun:
    """What a run folder holds for those who use it."""

    config: Config
    """As the run resolved it."""
    vocabulary: Vocabulary
    """The tags that the model knows."""
    model: nn.Module
    """In evaluation mode, on the chosen device, in the run's memory format and dtype."""
    checkpoint: Path
    """Where the weights came from."""
    decision: Decision
    """From which probability a tag is predicted: as it was trained, or as was chosen since."""

    @property
    def checkpoint_sha256(self) -> str:
        """Tells checkpoints apart wherever they lie: the hash of what lists their files' hashes."""
        return sha256_of(self.checkpoint / MARKER)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision that the run was trained in; fp16 on a GPU alone."""
        dtype = HALF_DTYPES.get(self.config.train.precision)
        enabled = dtype is not None and (dtype == torch.bfloat16 or device.type == "cuda")
        return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> TrainedRun:
    """Reads the checkpoint with the best validation F1 (where it is kept, else the newest).

    Nothing is unpickled, and no pre-trained backbone is looked for: all weights are in the run.

    Raises:
        InputError: no run there, no complete checkpoint in it, or another vocabulary beside it.
    """
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: no run there (it has no config.yaml)")
    checkpoint = best_or_newest(run_dir)
    if checkpoint is None:
        raise InputError(f"{run_dir}: no complete checkpoint there; has the run saved one yet?")
    config = load_config(checkpoint / "config.yaml")
    try:
        vocabulary = Vocabulary.from_bytes((run_dir / "vocabulary.txt").read_bytes())
    except OSError as error:
        raise InputError(
            f"{run_dir}/vocabulary.txt: {error.strerror}; copy the whole run folder"
        ) from None
    if read_progress(checkpoint).vocabulary_sha256 not in ("", vocabulary.sha256):
        raise InputError(
            f"{run_dir}/vocabulary.txt is not the vocabulary that {checkpoint.name} was trained"
            " with, and every tag would be taken for another: put the run's own back"
        )
    model = load_model(checkpoint, config, len(vocabulary), device)
    return TrainedRun(config, vocabulary, model, checkpoint, Decision(config.train.threshold))


def load_model(
    folder: Path, config: Config, num_tags: int, device: torch.device | str
) -> nn.Module:
    """The model with the weights in `folder`, in evaluation mode.

    Raises:
        InputError: the weights are damaged, or belong to a model of another shape.
    """
    # No pre-trained backbone or embedding is looked for: all weights are in the folder.
    bare = replace(config.model, backbone_weights="none", tag_embedding_init=None)
    model = build_model(bare, num_tags, gate=config.train.objective == "important")
    if config.train.param_dtype == "float64":
        model = model.double()
    load_state(model, best_weights(folder), str(folder))
    model = model.eval().to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
