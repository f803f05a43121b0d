"""Checkpoints that are complete or absent.

`checkpoint_writer.py` writes under a temporary name, syncs, marks COMPLETE with the hash of every
file, and renames. Reading starts with the marker: a checkpoint with a missing or altered file is
passed over, and said so.

    step-00001000/
      model.safetensors   whole weights, running statistics included
      ema.safetensors     the same with averaged weights, where train.ema_decay is set
      optimizer.pt        momentum; read back without running any code (weights_only)
      deepspeed/          instead of optimizer.pt under DeepSpeed: its own parts, one a rank
      progress.json       Progress
      config.yaml         resolved configuration
      COMPLETE            {"sha256": {file: hash}}
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from magneto_dist.errors import InputError
from magneto_dist.files import sha256_of
from magneto_dist.training.pickles import require_no_code
from magneto_dist.training.session import Session

MARKER = "COMPLETE"
WEIGHTS, AVERAGED_WEIGHTS = "model.safetensors", "ema.safetensors"
OPTIMIZER, DEEPSPEED = "optimizer.pt", "deepspeed"
_PROGRESS = "progress.json"
_ALWAYS_THERE = {WEIGHTS, _PROGRESS, "config.yaml"}
_UNREADABLE = (
    pickle.UnpicklingError,
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError),
)
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
    vocabulary_sha256: str = ""
    """Hash of vocabulary.txt, whose line numbers are the rows of the tag embedding."""
    best_step: int = 0
    """Step of the best evaluation so far, 0: none."""
    best_f1: float = -1.0
    """Its validation F1."""
    trained_items: int = 0
    """Valid training samples of all steps so far."""
    train_s: float = 0.0
    """Seconds spent in training steps so far, evaluation and saving excluded."""
    data_wait_s: float = 0.0
    """Of these, seconds in which the loop waited for its loader."""
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
    """What is wrong with a checkpoint, in words; None: it is complete and unaltered.

    What others may have put beside the files that were written is passed over, unless it would be
    read.
    """
    if not (folder / MARKER).is_file():
        return f"{MARKER} is missing"
    try:
        hashes = dict(json.loads((folder / MARKER).read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} is damaged"
    if not hashes.keys() >= _ALWAYS_THERE or not all(map(_stays_inside, hashes)):
        return f"{MARKER} is damaged"
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{name} is not what was written"
    read = [folder / AVERAGED_WEIGHTS, folder / OPTIMIZER, *(folder / DEEPSPEED).rglob("*")]
    there = {str(p.relative_to(folder)) for p in read if os.path.lexists(p) and not p.is_dir()}
    added = sorted(there - hashes.keys())
    return f"{added[0]} was added" if added else None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def has_progress(folder: Path) -> bool:
    """Whether a folder with weights records how they came about: exported ones do not."""
    return (folder / _PROGRESS).is_file()


def read_progress(folder: Path) -> Progress:
    """The progress that a checkpoint records.

    Raises:
        InputError: it is not what this version of the program writes.
    """
    path = folder / _PROGRESS
    try:
        progress = Progress(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); use another checkpoint") from None
    for name, default in asdict(Progress()).items():
        value, kind = getattr(progress, name), type(default)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{path}: {name} is {value!r}; use another checkpoint")
    return progress


def load_weights(folder: Path, model: nn.Module) -> None:
    """Reads the weights from which training goes on into a model that is not yet prepared.

    Raises:
        InputError: the weights are damaged, or belong to a model of another shape.
    """
    load_state(model, read_tensors(folder / WEIGHTS), str(folder))


def best_weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights that a checkpoint was evaluated with: averaged ones where it has them.

    Raises:
        InputError: they are damaged.
    """
    averaged = folder / AVERAGED_WEIGHTS
    return read_tensors(averaged if averaged.exists() else folder / WEIGHTS)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on CPU.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy or write it again") from None


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
        InputError: DeepSpeed state of another number of ranks or another kind of training; or a
            file that is no such state.
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
        require_no_code(folder / DEEPSPEED)
        model.load_checkpoint(str(folder), tag=DEEPSPEED)  # type: ignore[operator]
    else:
        path = folder / OPTIMIZER
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            session.load_optimizer_state(optimizer, state)
        except _UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{path}: not the optimizer's state of this model ({reason})"
            ) from None
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    session.load_scaler_state(progress.scaler)
    return progress
