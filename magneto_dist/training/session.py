"""Processes, devices and precision: the only file that imports accelerate.

Accelerate owns the model, optimizer, precision and processes; we own the data (loaders and the
schedule are never handed to `prepare`). What differs between one process, DDP, FSDP2 and DeepSpeed
is hidden here, so that the loop reads the same for all of them:

1. `Session(...)` joins the process group.
2. `prepare` wraps model and optimizer.
3. `micro_step` + `backward` + `step` are one optimizer step.
4. `reduce_sum`, `gather`, `from_main` and `on_all` are all communication that others ask for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedType,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from magneto_dist.config import Precision, TrainConfig
from magneto_dist.data.order import BatchPlan
from magneto_dist.errors import InputError, ReportedError
from magneto_dist.training import fsdp, zero
from magneto_dist.training.joining import check_together
from magneto_dist.training.launch_flags import (
    check_launch,
    fsdp_keeps_gathered,
    refusal,
    uses_deepspeed,
    uses_fsdp,
)
from magneto_dist.training.ranks import joint_error
from magneto_dist.world import World

T = TypeVar("T")

_NO_LIMIT_MB = 1 << 20


class OptimizerStep(NamedTuple):
    """What became of an optimizer step, the same on all ranks."""

    gradient_norm: Tensor | None
    """Global norm before clipping, where it was computed."""
    skipped: bool
    """fp16: a gradient overflowed, so that the loss scale shrank and no weight moved. Gradients are
    reduced before this is decided. The samples of the step were fed all the same: they are in the
    ledger and in `trained_items`, and are not fed again in their epoch."""


class Session:
    """This process among its peers.

    Args:
        config: precision and kind of training.
        clip_norm: largest global gradient norm, 0: no clipping; None: nothing will be trained.

    Raises:
        InputError: the precision or a flag of the process launcher does not fit the machine or
            contradicts our configuration, on this rank or any other.
    """

    def __init__(self, config: TrainConfig, clip_norm: float | None = None) -> None:
        has_gpu = torch.cuda.is_available()
        # Held till the group is there, as it may serve those who still come.
        store = check_together(lambda: check_launch(config, clip_norm, has_gpu))
        # fsdp.py does it, with or without a GPU; accelerate must not do it too.
        wants_fsdp = uses_fsdp()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        wait_s = max(1800.0, 4 * config.collective_timeout_s)  # after the watchdog's patience
        if not has_gpu:  # DeepSpeed, imported by accelerate, would warn of what it guesses
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            # torchrun's and accelerate's default, too. Alone, torch would take all cores, and
            # another number of threads is another order of summation: other float32 bits.
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
        # By the older names: torch.compile asks for these, and fails where only the new are set.
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        torch.backends.cudnn.allow_tf32 = config.tf32
        handlers: list[Any] = [
            # Buffers are equal on all ranks by construction (ghost batch norm commits them).
            DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True, **_comm_hook(config, has_gpu)
            )
        ]
        if uses_deepspeed():
            zero.compile_no_operator()
        if "WORLD_SIZE" in os.environ:  # alone, accelerate would ask a group that is not there
            backend = "nccl" if has_gpu else "gloo"
            handlers.append(InitProcessGroupKwargs(backend, timeout=timedelta(seconds=wait_s)))
        self._accelerator = Accelerator(
            # DeepSpeed's own autocast, see `prepare`.
            mixed_precision="no" if uses_deepspeed() else config.precision,
            # accelerate's DeepSpeed path must not be told that it is on CPU.
            cpu=False if uses_deepspeed() else not has_gpu,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=handlers,
        )
        del store
        plugin = self._accelerator.state.deepspeed_plugin
        if (
            clip_norm is not None
            and config.ema_decay
            and plugin is not None
            and plugin.zero_stage == 3
        ):
            raise refusal(
                "--train.ema_decay needs whole weights on every process, and ZeRO-3 keeps them in"
                " parts: use ZeRO-2, or set it to 0"
            )
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or self._accelerator.num_processes)
        self.world = World(
            rank=self._accelerator.process_index,
            num_ranks=self._accelerator.num_processes,
            rank_of_node=self._accelerator.local_process_index,
            ranks_per_node=ranks_per_node,
        )
        self._is_sharded = wants_fsdp and self.world.num_ranks > 1
        self._keep_gathered = fsdp_keeps_gathered()
        self._gradient_scale = float(self.world.num_ranks)
        self._clip_norm = clip_norm or 0.0
        self._comm_hook = config.ddp_comm_hook
        self._precision: Precision = config.precision

    @property
    def device(self) -> torch.device:
        """Where the model and its batches live."""
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once a run."""
        return self.world.is_main

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds optimizer state (and, in ZeRO-3, the weights) in parts."""
        return self._accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def strategy(self) -> str:
        """How the ranks share the work, in words: the same on all, or they wait for each other."""
        if self._is_sharded:
            return "FSDP2" + (" with weights kept gathered" if self._keep_gathered else "")
        return "DeepSpeed" if self.is_deepspeed else "no FSDP2, no DeepSpeed"

    @property
    def is_ddp(self) -> bool:
        """Whether DDP adds up the gradients."""
        return self.world.num_ranks > 1 and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether weights lie whole in their modules: one process alone, or DDP."""
        return not (self.is_deepspeed or self._is_sharded)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: BatchPlan
    ) -> tuple[nn.Module, Any]:
        """Model and optimizer on this process's device, wrapped for its way of training."""
        if self._is_sharded:
            # "Evaluation": on the device and under autocast, but not wrapped in DDP.
            model = self._accelerator.prepare_model(model, evaluation_mode=True)
            num_ranks, keep_gathered = self.world.num_ranks, self._keep_gathered
            fsdp.shard(model, optimizer, num_ranks, keep_gathered=keep_gathered)
            return model, self._accelerator.prepare_optimizer(optimizer)
        if self.is_deepspeed:
            # It reads the weights as flat bytes, which channels-last ones are not.
            model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            # DeepSpeed divides by the micro-steps, DDP does not; our losses are already scaled.
            self._gradient_scale = float(self.world.num_ranks * plan.micro_steps)
            plugin = self._accelerator.state.deepspeed_plugin
            assert plugin is not None
            settings = plugin.deepspeed_config
            zero.complete_settings(settings, plan, self._precision, self._clip_norm)
        with warnings.catch_warnings():
            # The name that replaces it does not exist in torch 2.11, nor in accelerate yet.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self._accelerator.prepare(model, optimizer)

    @contextlib.contextmanager
    def micro_step(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients travel in the last one of a step."""
        self._is_last = is_last
        if self._is_sharded:
            model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        if is_last or self.is_deepspeed or self._is_sharded:
            yield
        else:
            with self._accelerator.no_sync(model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's part of the global loss.

        The parts of all ranks and micro-steps sum to the global loss; DDP, FSDP2 and DeepSpeed
        average over ranks, so that the loss is multiplied by their number first.
        """
        loss = loss * self._gradient_scale
        if self.is_deepspeed:
            engine = self._accelerator.deepspeed_engine_wrapped
            assert engine is not None, "backward comes after prepare"
            engine.backward(loss, sync_gradients=self._is_last)  # its last one also steps
        else:
            self._accelerator.backward(loss)

    def step(
        self, model: nn.Module, optimizer: Any, *, measures_norm: bool = False
    ) -> OptimizerStep:
        """Clips, moves the weights (unless fp16 gradients overflowed) and clears the gradients.

        The gradients' norm is known where they are clipped or, DeepSpeed excepted, asked for.
        """
        norm = None
        if self._clip_norm > 0 and not self.is_deepspeed:
            norm = self._accelerator.clip_grad_norm_(model.parameters(), self._clip_norm)
        elif measures_norm and not self.is_deepspeed:
            self._accelerator.unscale_gradients(optimizer)
            gradients = [w.grad for w in model.parameters() if w.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        return OptimizerStep(norm, bool(optimizer.step_was_skipped))  # known on the CPU already

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, the same on each; every rank must call it."""
        return self._accelerator.reduce(tensor.to(self.device), reduction="sum")  # type: ignore

    def from_main(self, make: Callable[[], T]) -> T:
        """Runs `make` on the main process alone and gives every rank its (picklable) result.

        Raises:
            InputError: where `make` raised anything, on every other rank, so that none waits; the
                main process raises that itself.
        """
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                box[0] = make()
            except Exception as error:
                failure, box[1] = error, str(error)
        if self.world.num_ranks > 1:
            broadcast_object_list(box)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise ReportedError(box[1])
        return box[0]

    def on_all(self, make: Callable[[], T]) -> T:
        """Runs `make`, which has no collective, on every rank and gives each its own result.

        Raises:
            InputError: where `make` raised anything on any rank, on all of them the same, so that
                none waits; a rank that met something else than an InputError raises that itself.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = make()
        except Exception as error:
            failure = error
        said = "" if failure is None else str(failure) or type(failure).__name__
        error = joint_error(self.gather(said), is_main=self.is_main)
        if failure is not None and not isinstance(failure, InputError):
            raise failure
        if error is not None:
            raise error
        return result

    def gather(self, value: T) -> list[T]:
        """The (picklable) values of all ranks, by rank; every rank must call it."""
        return gather_object([value])  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._accelerator.wait_for_everyone()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model itself, without what `prepare` put around it; takes a millisecond."""
        return self._accelerator.unwrap_model(model)  # type: ignore[return-value]

    def full_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole weights by name, where they are.

        In ZeRO-3 and FSDP2 a collective, and empty but on the main process.
        """
        if self._is_sharded:
            return fsdp.gathered(model.state_dict(), keep=self.is_main)
        state: Any = self._accelerator.get_state_dict(model, unwrap=True) or {}
        return {name: tensor.detach() for name, tensor in state.items()}

    def held_state(self, model: nn.Module) -> list[Tensor]:
        """Weights and buffers as this process holds them: in ZeRO-3 and FSDP2 its part of each."""
        weights = [zero.held_part(weight, self.world.rank) for weight in model.parameters()]
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        return [tensor.detach() for tensor in (*weights, *model.buffers())]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any] | None:
        """The whole state of the optimizer; None: DeepSpeed keeps its own.

        In FSDP2 a collective, and empty but on the main process.
        """
        if self.is_deepspeed:
            return None
        state = optimizer.state_dict()
        return fsdp.gathered(state, keep=self.is_main) if self._is_sharded else state

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Restores `optimizer_state`, of any number of ranks, to where the weights are."""
        optimizer.load_state_dict(fsdp.scattered(state, optimizer) if self._is_sharded else state)

    def scaler_state(self) -> dict[str, Any]:
        """State of the fp16 loss scaler; empty without one."""
        return {} if self._accelerator.scaler is None else self._accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restores `scaler_state`."""
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(state)

    def warn_of_lost_state(self) -> None:
        """Says what a run that goes on from a checkpoint does not find there."""
        if self.is_main and self.world.num_ranks > 1 and self._comm_hook == "power_sgd":
            print(
                "warning: checkpoints do not hold what PowerSGD has left over; this run goes on"
                " from weights and momentum, but not bit for bit as it would have without the stop",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Leaves the process group, once nobody else holds the model.

        A wrapped model holds the group. Kept until the interpreter ends, gloo's threads may then
        let go of a last tensor, and abort the process.
        """
        self._accelerator.free_memory()
        self._accelerator.end_training()


def _comm_hook(config: TrainConfig, has_gpu: bool) -> dict[str, Any]:
    """How accelerate is told of `train.ddp_comm_hook`."""
    if config.ddp_comm_hook == "none":
        return {}
    settings: dict[str, Any] = {"comm_hook": DDPCommunicationHookType(config.ddp_comm_hook)}
    if config.ddp_comm_hook == "power_sgd":
        settings["comm_state_option"] = {
            "matrix_approximation_rank": config.power_sgd_rank,
            "start_powerSGD_iter": config.power_sgd_start_step,
        }
        if not has_gpu:
            # One bucket: gloo calls back from threads of its own, so that the matrices of several
            # would be reduced in another order on each rank.
            settings["bucket_cap_mb"] = _NO_LIMIT_MB
    return settings
