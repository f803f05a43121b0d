"""Checkpoints that are complete or absent.

`checkpoint_writer.py` writes under a temporary name, syncs, marks COMPLETE with the hash of every
file, and renames. Reading starts with the marker: a checkpoint with a missing or altered file is
passed over, and said so.

    step-00001000/
      model.safetensors   whole weights, running statistics included
      optimizer.pt        momentum; read back without running any code (weights_only)
      deepspeed/          instead of optimizer.pt under DeepSpeed: its own parts, one a rank
      progress.json       Progress
      config.yaml         resolved configuration
      COMPLETE            {"sha256": {file: hash}}
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from magneto_dist.errors import InputError
from magneto_dist.files import sha256_of
from magneto_dist.training.session import Session

MARKER = "COMPLETE"
DEEPSPEED = "deepspeed"
_STEP_FOLDER = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all of its state that is not weights or momentum."""

    step: int = 0
    """Last optimizer step that was completed, from 1; 0: none."""
    evaluated: bool = False
    """Whether the evaluation that belongs to `step`, if any, is done."""
    num_ranks: int = 1
    """Processes that wrote this."""
    micro_batch_size: int = 0
    """Derived micro-batch per rank; reused at this number of ranks."""
    micro_steps: int = 0
    """Derived micro-batches per step and rank."""
    deepspeed: bool = False
    """Whether the optimizer state is DeepSpeed's."""
    data_fingerprint: str = ""
    """Identity of the training data: vocabulary and shards."""
    best_step: int = 0
    """Step of the best evaluation so far, 0: none."""
    best_f1: float = -1.0
    """Its validation F1."""
    trained_items: int = 0
    """Valid training samples of all steps so far."""
    train_s: float = 0.0
    """Seconds spent in training steps so far, evaluation and saving excluded."""
    data_wait_s: float = 0.0
    """Of these, seconds in which the loop waited for data."""
    tags_cut: int = 0
    """Tags of trained items that found no slot."""
    targets_cut: int = 0
    """Important ones among them."""
    skipped_steps: int = 0
    """fp16 steps whose gradients overflowed: counted as steps, but no weight moved."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    schedule: dict[str, float] = field(default_factory=dict)
    """State of the learning-rate schedule."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 loss scaler."""


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[Path]:
    """Folders of checkpoints, complete or damaged, by step."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if _STEP_FOLDER.fullmatch(path.name) and path.is_dir())


def remove(folder: Path) -> None:
    """Removes a folder, or the link that stands for one, where it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def finish_renames(run_dir: Path) -> None:
    """Puts a checkpoint in its place that a kill left complete under its temporary name."""
    for temporary in sorted((run_dir / "checkpoints").glob(".step-*.tmp")):
        final = temporary.with_name(temporary.name[1:].removesuffix(".tmp"))
        if not final.exists() and find_damage(temporary) is None:
            temporary.rename(final)


def set_aside_later(run_dir: Path, step: int) -> None:
    """Clears the way for a run that goes on from `step`: later checkpoints get another name.

    They are damaged, or belong to a future that the user has left by resuming before it; kept under
    their names they would be taken for this run's. What a kill left half-written is removed.
    """
    for folder in steps(run_dir):
        if folder.name > folder_of(run_dir, step).name:
            aside = folder.with_name(f"aside-{folder.name}")
            remove(aside)
            folder.rename(aside)
            print(f"checkpoint {folder} is set aside as {aside.name}", file=sys.stderr, flush=True)
    for pattern in (".step-*.tmp", ".step-*.old"):
        for half_written in (run_dir / "checkpoints").glob(pattern):
            remove(half_written)


def newest_complete(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None: there is none."""
    for folder in reversed(steps(run_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"checkpoint {folder} is passed over: {damage}", file=sys.stderr, flush=True)
    return None


def best_or_newest(run_dir: Path) -> Path | None:
    """The checkpoint with the best validation F1 where it is kept, else the newest."""
    newest = newest_complete(run_dir)
    if newest is None:
        return None
    best = folder_of(run_dir, read_progress(newest).best_step)
    return best if best.is_dir() and find_damage(best) is None else newest


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None: it is complete and unaltered."""
    try:
        hashes = json.loads((folder / MARKER).read_bytes())["sha256"]
        for name, expected in hashes.items():
            if sha256_of(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} is damaged"
    return None


def read_progress(folder: Path) -> Progress:
    """The progress that a checkpoint records."""
    return Progress(**json.loads((folder / "progress.json").read_bytes()))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Reads the weights of a checkpoint into a model that is not yet prepared.

    Raises:
        InputError: the weights are damaged, or belong to a model of another shape.
    """
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy or write it again") from None
    load_state(model, state, str(folder))


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copies a full state into a model.

    Raises:
        InputError: a name or shape differs; says how many do and names the first.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    different = sorted(n for n in own.keys() | given.keys() if own.get(n) != given.get(n))
    if different:
        name = different[0]
        raise InputError(
            f"{where} holds another model: {len(different)} tensors differ, the first is {name}"
            f" with shape {given.get(name)} there and {own.get(name)} here; use the settings it was"
            " trained with, or another --output_dir"
        )
    model.load_state_dict(state)


def load_optimizer(session: Session, folder: Path, model: nn.Module, optimizer: Any) -> Progress:
    """Restores optimizer, scaler and (under DeepSpeed) weights; `model` is prepared.

    Raises:
        InputError: DeepSpeed state of another number of ranks or another kind of training.
    """
    progress = read_progress(folder)
    # Those of this run: what was saved may be older than a changed setting.
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    same_ranks = progress.num_ranks == session.world.num_ranks
    if progress.deepspeed != session.is_deepspeed or (progress.deepspeed and not same_ranks):
        kind = "DeepSpeed" if progress.deepspeed else "no DeepSpeed"
        raise InputError(
            f"{folder} was written by {progress.num_ranks} processes with {kind}, whose optimizer"
            " state fits no other way of training: start it so again, or start a new run from its"
            " weights with --init_from"
        )
    if session.is_deepspeed:
        model.load_checkpoint(str(folder), tag=DEEPSPEED)  # type: ignore[operator]
    else:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)  # moves it to where the weights are
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    session.load_scaler_state(progress.scaler)
    return progress
