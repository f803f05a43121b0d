"""Ranks that train as those of a launcher do, on gloo, and count what they send.

1. `run_ranks` forks processes with the environment that torchrun or `accelerate launch` gives.
2. `traffic_of` runs the real training in them (`recipe.run_training`).
3. `Recorder` listens to the process groups (every collective, whoever issues it, with its tensors),
   and asks the kernel how many bytes went out through this process's sockets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from communication_model import Shapes
from magneto_dist.config import Config
from magneto_dist.errors import PreemptedError
from magneto_dist.model.norm import GhostBatchNorm2d
from magneto_dist.recipe import run_training
from magneto_dist.training import loop
from magneto_dist.training.telemetry import Telemetry

FIRST_STEP, LAST_STEP = 4, 5
"""The steps that are counted: DDP has made its buckets, ZeRO-3 knows the order of the modules."""
_REPOSITORY = Path(__file__).parent.parent
_TCP_INFO_BYTES, _BYTES_SENT = 256, 200  # struct tcp_info of linux/tcp.h; tcpi_bytes_sent in it
# Imported once, before ranks fork. Accelerate and DeepSpeed import the last two where they need
# them, which takes seconds.
_PRELOAD = [
    "communication", "deepspeed", "transformers", "deepspeed.runtime.zero.muon.muon_optimizer",
]  # fmt: skip
_SCALARS = 64  # bytes up to which an all-reduce of DeepSpeed is a norm or a flag, no gradient
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Traffic:
    """What one rank sent, per optimizer step."""

    payload: dict[tuple[str, str], float]
    """(purpose, kind of collective) -> bytes handed to it; see `communication_model`."""
    calls: dict[tuple[str, str], float]
    dtypes: dict[tuple[str, str], str]
    socket_bytes: float
    """That the kernel sent for this process, but to the store where ranks meet."""


def traffic_of(strategy: str, num_ranks: int, config: Config) -> list[Traffic]:
    """Trains for a few steps and returns what each rank sent in a step.

    Args:
        strategy: one of `communication_model.STRATEGIES`.
        num_ranks: processes on this machine.
        config: of the run; its communication hook, length and log are set here.

    Raises:
        RuntimeError: a rank failed; with what it printed.
    """
    hook = strategy.removeprefix("ddp").strip() or "none" if strategy.startswith("ddp") else "none"
    settings = replace(
        config,
        max_steps=LAST_STEP + 1,
        data=replace(config.data, num_workers=0, num_streams=4),
        train=replace(
            config.train,
            epochs=1000,
            eval_every_epochs=1000,
            ddp_comm_hook=hook,
            power_sgd_start_step=2,
        ),
        checkpoint=replace(config.checkpoint, every_steps=1000),
        log=replace(config.log, every_steps=1, tensorboard=False),
    )
    environment = {} if strategy.startswith("ddp") else _deepspeed(strategy)
    with TemporaryDirectory() as folder:
        settings = replace(settings, output_dir=folder)
        found = run_ranks(num_ranks, _record, settings, environment=environment)
    return [
        Traffic(
            **{
                name: {tuple(key.split("/")): value for key, value in of_rank[name].items()}
                for name in ("payload", "calls", "dtypes")
            },
            socket_bytes=of_rank["socket_bytes"],
        )
        for of_rank in found
    ]


def run_ranks(
    num_ranks: int,
    work: Callable[..., Any],
    *args: Any,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Calls `work(*args)` in `num_ranks` processes that find each other as those of torchrun do.

    Args:
        num_ranks: processes.
        work: a function of a module; what it returns goes through JSON.
        args: can be pickled.
        environment: variables besides those of torchrun.

    Raises:
        RuntimeError: a process failed or took too long; with what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    paths = [str(Path(__file__).parent), str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # all that the fork server is told
    places = _places(num_ranks)
    with TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank,
                args=(work, args, {**place, **(environment or {})}, Path(folder, str(rank))),
            )
            for rank, place in enumerate(places)
        ]
        for process in processes:
            process.start()
        try:
            running = {process.sentinel: process for process in processes}
            while running:
                ended = [running.pop(key) for key in wait(list(running), timeout=_TIMEOUT_S)]
                if not ended or any(process.exitcode for process in ended):
                    printed = [Path(folder, f"{rank}.log") for rank in range(num_ranks)]
                    raise RuntimeError("\n".join(p.read_text()[-4000:] for p in printed))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _rank(work: Callable[..., Any], args: tuple, environment: Mapping[str, str], out: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    result = work(*args)
    out.with_suffix(".json").write_text(json.dumps(result))


def _places(num_ranks: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    size = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    ranks = range(num_ranks)
    return [{**meeting, **size, "RANK": str(r), "LOCAL_RANK": str(r)} for r in ranks]


def _deepspeed(strategy: str) -> dict[str, str]:
    """What `accelerate launch` makes of our file for this stage."""
    file = _REPOSITORY / "configs" / "accelerate" / f"{strategy}_cpu_2.yaml"
    given = yaml.safe_load(file.read_text())
    of_deepspeed = given["deepspeed_config"]
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": given["mixed_precision"],
        "ACCELERATE_CONFIG_DS_FIELDS": ",".join([*of_deepspeed, "mixed_precision"]),
        **{f"ACCELERATE_DEEPSPEED_{k.upper()}": str(value) for k, value in of_deepspeed.items()},
    }


def _record(config: Config) -> dict[str, Any]:
    powerSGD_hook.powerSGD_hook = _one_bucket_at_a_time(powerSGD_hook.powerSGD_hook)
    recorder = Recorder()
    recorder.install()
    try:
        run_training(config)
    except PreemptedError:  # how the recorder ends the run, on all ranks
        return recorder.result()
    raise AssertionError("the run ended before it was measured")


def _one_bucket_at_a_time(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A communication hook that has done its work when it returns.

    PowerSGD reduces P and Q in callbacks, which gloo runs in threads of its own: those of two
    buckets come in another order on each rank, and gloo aborts. What is sent stays the same.
    """

    @wraps(hook)
    def call(state: Any, bucket: Any) -> Any:
        future = hook(state, bucket)
        future.wait()
        return future

    return call


class Recorder:
    """Counts the collectives of the steps `FIRST_STEP` to `LAST_STEP` of the training loop.

    What the loop itself reduces is known by the function that asks for it; all else is the
    strategy's: gathers bring weights, reductions gradients, but for scalars.
    """

    def __init__(self) -> None:
        self._step, self._purpose, self._is_counting = 0, "", False
        self._payload: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._dtypes: dict[str, set[str]] = {}
        self._socket_bytes = 0

    def install(self) -> None:
        """Has the loop tell this recorder of its steps and of what its reductions are for."""
        reduce_counts = loop._reduce_counts

        @wraps(reduce_counts)
        def at_the_beginning_of_a_step(*args: Any) -> Any:
            self._begin_step()
            with self._purpose_is("counts"):
                return reduce_counts(*args)

        loop._reduce_counts = at_the_beginning_of_a_step
        loop.settle_batch_norms = self._labelled("batch norm", loop.settle_batch_norms)
        Telemetry._log_step = self._labelled("metrics", Telemetry._log_step)

    def result(self) -> dict[str, Any]:
        """`Traffic` as JSON."""
        steps = LAST_STEP - FIRST_STEP + 1
        return {
            "payload": {key: count / steps for key, count in self._payload.items()},
            "calls": {key: count / steps for key, count in self._calls.items()},
            "dtypes": {key: " ".join(sorted(names)) for key, names in self._dtypes.items()},
            "socket_bytes": self._socket_bytes / steps,
        }

    def _begin_step(self) -> None:
        self._step += 1
        if self._step == 1:  # all groups are there
            for group in distributed_c10d._world.pg_map:
                group.register_pre_hook(1, self._note)
        if self._step == FIRST_STEP:
            self._socket_bytes -= bytes_sent()
            self._is_counting = True
        elif self._step == LAST_STEP + 1:
            self._is_counting = False
            end = bytes_sent()
            self._socket_bytes += end - (bytes_sent() - end)  # without what the barrier took
            raise PreemptedError("measured")

    def _note(self, collective: Any) -> None:
        """Called before each collective, in whatever thread issues it."""
        if not self._is_counting:
            return
        kind = {"ALLREDUCE": "all_reduce", "ALLGATHER": "all_gather"}.get(
            collective.name.name, collective.name.name.lower()
        )
        tensors = collective.input_tensors
        if kind == "all_gather":
            tensors = collective.output_tensors
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        key = f"{self._purpose or _purpose_of(kind, size)}/{kind}"
        self._payload[key] += size
        self._calls[key] += 1
        names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        self._dtypes[key] = self._dtypes.get(key, set()) | names

    def _labelled(self, purpose: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._purpose_is(purpose):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def _purpose_is(self, purpose: str) -> Iterator[None]:
        self._purpose = purpose
        yield
        self._purpose = ""


def _purpose_of(kind: str, size: int) -> str:
    if kind == "all_gather":
        return "weights"
    return "scalars" if size <= _SCALARS else "gradients"


def bytes_sent() -> int:
    """Bytes that this process has sent to its peers, once all of them are here.

    Of all TCP connections but those to the store where ranks meet. Linux alone.
    """
    dist.barrier()
    store = int(os.environ["MASTER_PORT"])
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                ends = connection.getsockname(), connection.getpeername()
                if store in (end[1] for end in ends):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except (OSError, IndexError):  # gone by now, listening, or no TCP
            continue
        sent, sent_again = struct.unpack_from("<QQ", info, _BYTES_SENT)
        total += sent - sent_again
    return total


def shapes_of(model: torch.nn.Module, sums: int) -> Shapes:
    """What travels of a model that is whole, as `build_model` makes it."""
    every = [(tuple(weight.shape), weight.requires_grad) for weight in model.parameters()]
    norms = [m.num_features for m in model.modules() if isinstance(m, GhostBatchNorm2d)]
    return Shapes(
        trained=[shape for shape, is_trained in every if is_trained],
        frozen=[shape for shape, is_trained in every if not is_trained],
        norm_channels=norms,
        sums=sums,
    )
