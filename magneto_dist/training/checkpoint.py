"""Checkpoints that are complete or absent.

A checkpoint is written under a temporary name, synced, marked COMPLETE with the hash of every file
in it, and renamed. Reading starts with the marker: a checkpoint with a missing or altered file is
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
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from magneto_dist.config import Config
from magneto_dist.config_io import config_to_yaml
from magneto_dist.errors import InputError
from magneto_dist.files import require_space, sha256_of, sync_file, sync_folder, write_atomically
from magneto_dist.training.session import Session

_MARKER = "COMPLETE"
_REPLACED = ".replaced"
DEEPSPEED = "deepspeed"


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


def save_checkpoint(
    session: Session,
    run_dir: Path,
    model: nn.Module,
    optimizer: Any,
    progress: Progress,
    config: Config,
) -> None:
    """Writes the checkpoint of `progress.step` and drops the ones no longer kept; all ranks call.

    Raises:
        InputError: the disk is too full, or fails; nothing is left half-written.
    """
    final = folder_of(run_dir, progress.step)
    temporary = final.with_name(f".{final.name}.tmp")
    state = session.full_state(model)  # a collective in ZeRO-3: before anything rank-dependent
    session.from_main(_removing_what_failed(temporary, lambda: _start_folder(temporary, state)))
    if session.is_deepspeed:
        model.save_checkpoint(str(temporary), tag=DEEPSPEED)  # type: ignore[operator]
    session.barrier()
    session.from_main(
        _removing_what_failed(
            temporary,
            lambda: _finish(temporary, final, session, state, optimizer, progress, config),
        )
    )


def set_aside_later(run_dir: Path, step: int) -> None:
    """Clears the way for a run that goes on from `step`: later checkpoints get another name.

    They are damaged, or belong to a future that the user has left by resuming before it; kept under
    their names they would be taken for this run's. What a kill left half-written is removed.
    """
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        if folder.name > folder_of(run_dir, step).name:
            aside = folder.with_name(f"aside-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            print(f"checkpoint {folder} is set aside as {aside.name}", file=sys.stderr, flush=True)
    for half_written in (run_dir / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(half_written)


def put_back_replaced(run_dir: Path) -> None:
    """Undoes what a kill left of replacing a checkpoint by one of the same step."""
    for replaced in (run_dir / "checkpoints").glob(f".step-*{_REPLACED}"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(_REPLACED))
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


def newest_complete(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None: there is none."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
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
        hashes = json.loads((folder / _MARKER).read_bytes())["sha256"]
        for name, expected in hashes.items():
            if sha256_of(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{_MARKER} is damaged"
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


def _removing_what_failed(temporary: Path, write: Callable[[], None]) -> Callable[[], None]:
    def attempt() -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{temporary.parent}: a checkpoint cannot be written ({reason}); make room there,"
                " then start the same command again: the run goes on from the one before"
            ) from None

    return attempt


def _start_folder(temporary: Path, state: dict[str, Tensor]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    require_space(temporary, 2 * num_bytes + 10_000_000, "a checkpoint (weights and momentum)")


def _finish(
    temporary: Path,
    final: Path,
    session: Session,
    state: dict[str, Tensor],
    optimizer: Any,
    progress: Progress,
    config: Config,
) -> None:
    save_file(state, temporary / "model.safetensors")
    if not session.is_deepspeed:
        try:
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        except RuntimeError as error:  # what torch makes of an OSError
            raise OSError(str(error)) from None
    progress = replace(progress, scaler=session.scaler_state())
    (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2))
    (temporary / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(temporary)): sha256_of(path) for path in files}
    for path in files:
        sync_file(path)
    write_atomically(temporary / _MARKER, json.dumps({"sha256": hashes}, indent=2).encode())
    _replace(final, temporary)
    sync_folder(final.parent)
    _drop_old(final.parent, config.checkpoint.keep, progress.best_step)


def _replace(final: Path, temporary: Path) -> None:
    """Renames; one of that step (evaluation not done, or damaged) is whole until it is replaced."""
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # killed here, `put_back_replaced` undoes it
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _drop_old(checkpoints: Path, keep: int, best_step: int) -> None:
    folders = sorted(checkpoints.glob("step-*"))
    for folder in folders[:-keep]:
        if folder.name != folder_of(Path(), best_step).name:
            shutil.rmtree(folder)
