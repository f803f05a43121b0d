"""Checkpoints written while training goes on.

1. `save` waits for the save before it, so that one is under way at most, and copies the state of a
   step to CPU memory of the main process: the only time for which training stands still.
2. A thread writes, hashes, syncs and renames. It takes part in no collective.
3. `failed` tells of an error in the thread; the next `wait` raises it, on all ranks.

DeepSpeed writes its own files on every rank before `save` returns; the thread writes the rest, and
hashes and syncs all.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent import futures
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from magneto_dist.config import Config
from magneto_dist.config_io import config_to_yaml
from magneto_dist.errors import InputError
from magneto_dist.files import require_space, sha256_of, sync_file, sync_folder, write_atomically
from magneto_dist.training.checkpoint import (
    AVERAGED_WEIGHTS,
    DEEPSPEED,
    MARKER,
    OPTIMIZER,
    WEIGHTS,
    Progress,
    folder_of,
    remove,
    steps,
)
from magneto_dist.training.session import Session
from magneto_dist.training.telemetry import Telemetry
from magneto_dist.training.weight_average import WeightAverage

_SMALL_FILES_BYTES = 10_000_000


class Snapshot:
    """Copies of tensors in CPU memory, pinned for those of a GPU, which the next copies reuse."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tree: Any) -> Any:
        """`tree` of dicts and lists with its tensors copied; what `take` gave before is no more."""
        copied = self._copy_tree(tree, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from a GPU to pinned memory are under way till then
        return copied

    def _copy_tree(self, tree: Any, name: str) -> Any:
        if isinstance(tree, Tensor):
            return self._copy(tree.detach(), name)
        if isinstance(tree, dict):
            return {key: self._copy_tree(part, f"{name}/{key}") for key, part in tree.items()}
        if isinstance(tree, list):
            return [self._copy_tree(part, f"{name}/{i}") for i, part in enumerate(tree)]
        return tree

    def _copy(self, tensor: Tensor, name: str) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _Contents:
    """What the thread writes; nothing in it changes while it does."""

    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    """Of the trained weights; empty: no average is kept."""
    optimizer: dict[str, Any] | None
    """None: DeepSpeed has written its own."""
    progress: Progress

    def num_bytes(self) -> int:
        """Size of the checkpoint; with DeepSpeed's momentum, which takes as much as the weights."""
        momentum = self.weights if self.optimizer is None else self.optimizer
        averaged = self.weights if self.averages else {}
        return sum(map(_num_bytes, (self.weights, averaged, momentum))) + _SMALL_FILES_BYTES


class CheckpointWriter:
    """Saves a run, one checkpoint at a time; `save` and `wait` are collectives.

    Leave its `with` block before the run folder is let go: it ends what is under way.

    Args:
        session: this process among its peers.
        config: settings of the run; `checkpoint` says whether to write while training goes on.
        model: as `prepare` gave it.
        optimizer: likewise.
        average: of the model's weights.
        telemetry: on disk before a checkpoint is marked complete.
        when_complete: called with the step of a checkpoint that is in its place, by the thread.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        model: nn.Module,
        optimizer: Any,
        average: WeightAverage,
        telemetry: Telemetry,
        when_complete: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._session, self._config, self._telemetry = session, config, telemetry
        self._model, self._optimizer, self._average = model, optimizer, average
        self._when_complete = when_complete
        self._snapshot = Snapshot()
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: futures.Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if self._under_way is not None and (error := self._under_way.exception()):
            print(error, file=sys.stderr, flush=True)  # beside the one that ends the run

    @property
    def is_writing(self) -> bool:
        """Whether the thread of this process is at work."""
        return self._under_way is not None and not self._under_way.done()

    @property
    def failed(self) -> bool:
        """Whether the thread of this process has met an error, which `wait` will raise."""
        under_way = self._under_way
        return under_way is not None and under_way.done() and under_way.exception() is not None

    def save(self, progress: Progress) -> None:
        """Begins to write the checkpoint of `progress.step`, and to drop those no longer kept.

        Log and ledger are on disk when it returns; a checkpoint never runs ahead of them.

        Raises:
            InputError: as `wait`, of the save before; of this one, where it can be told already.
        """
        with self._telemetry.saving():
            self._session.from_main(self._finish_one_under_way)
            self._telemetry.flush()
            self._session.barrier()
            final = folder_of(Path(self._config.output_dir), progress.step)
            temporary = final.with_name(f".{final.name}.tmp")
            # Collectives where they are in parts.
            weights = self._session.full_state(self._model)
            optimizer = self._session.optimizer_state(self._optimizer)
            if self._session.is_deepspeed:
                self._session.from_main(lambda: _named_errors(temporary, _start, temporary))
                self._model.save_checkpoint(str(temporary), tag=DEEPSPEED)  # type: ignore[operator]
                self._session.barrier()
            self._session.from_main(
                lambda: self._begin(weights, optimizer, progress, temporary, final)
            )
            if not self._config.checkpoint.asynchronous:
                self._session.from_main(self._finish_one_under_way)

    def wait(self) -> None:
        """Waits until what was saved is in its place.

        Raises:
            InputError: the disk is too full, or fails; nothing is left half-written.
        """
        with self._telemetry.saving():
            self._session.from_main(self._finish_one_under_way)

    def _finish_one_under_way(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _begin(
        self,
        weights: dict[str, Tensor],
        optimizer: dict[str, Any] | None,
        progress: Progress,
        temporary: Path,
        final: Path,
    ) -> None:
        progress = replace(progress, scaler=self._session.scaler_state())
        state = {
            "weights": weights,
            "averages": self._average.averages,
            "optimizer": optimizer,
        }
        contents = _Contents(**state, progress=progress)
        if optimizer is not None:
            _named_errors(temporary, _start, temporary)
        _named_errors(temporary, _require_space, temporary, contents)
        if self._config.checkpoint.asynchronous:
            contents = _Contents(**self._snapshot.take(state), progress=progress)
        self._under_way = self._pool.submit(self._write, contents, temporary, final)

    def _write(self, contents: _Contents, temporary: Path, final: Path) -> None:
        _named_errors(temporary, _write_files, temporary, contents, self._config)
        _named_errors(temporary, _put_in_place, temporary, final)
        _named_errors(temporary, self._when_complete, contents.progress.step)
        _named_errors(
            temporary,
            _drop_old,
            final.parent,
            self._config.checkpoint.keep,
            contents.progress.best_step,
        )


def _named_errors(temporary: Path, write: Callable[..., None], *arguments: Any) -> None:
    try:
        write(*arguments)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{temporary.parent}: a checkpoint cannot be written ({reason}); make room there,"
            " then start the same command again: the run goes on from the one before"
        ) from None


def _start(temporary: Path) -> None:
    remove(temporary)
    temporary.mkdir(parents=True)


def _require_space(temporary: Path, contents: _Contents) -> None:
    try:
        require_space(temporary, contents.num_bytes(), "a checkpoint (weights and momentum)")
    except InputError:
        remove(temporary)
        raise


def _num_bytes(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.nbytes
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return sum(map(_num_bytes, parts))


def _write_files(temporary: Path, contents: _Contents, config: Config) -> None:
    _save_tensors(contents.weights, temporary / WEIGHTS)
    if contents.averages:  # whole, so that the file serves without the other
        _save_tensors(contents.weights | contents.averages, temporary / AVERAGED_WEIGHTS)
    if contents.optimizer is not None:
        try:
            torch.save(contents.optimizer, temporary / OPTIMIZER)
        except RuntimeError as error:  # what torch makes of an OSError
            raise OSError(str(error)) from None
    progress = json.dumps(asdict(contents.progress), indent=2)
    (temporary / "progress.json").write_text(progress)
    (temporary / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(temporary)): sha256_of(path) for path in files}
    for path in files:
        sync_file(path)
    for folder in {path.parent for path in files}:
        sync_folder(folder)
    write_atomically(temporary / MARKER, json.dumps({"sha256": hashes}, indent=2).encode())


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Renames; a checkpoint of the same step (without its evaluation) is there till the last.

    A kill between both renames leaves the new one complete: `finish_renames` finds it.
    """
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():
        remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    remove(replaced)


def _drop_old(checkpoints: Path, keep: int, best_step: int) -> None:
    for folder in steps(checkpoints.parent)[:-keep]:
        if folder.name != folder_of(Path(), best_step).name:
            remove(folder)
