"""What the processes tell each other before they are a group: may they form one at all?

Processes with GPUs and processes without would form groups of different kinds, and each wait for
the other until a timeout. They meet at the address that their launcher gave them, in the key-value
store that the group will use as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    PrefixStore,  # type: ignore[attr-defined]
    Store,  # type: ignore[attr-defined]
)
from torch.distributed.rendezvous import rendezvous

from magneto_dist.errors import InputError
from magneto_dist.training.ranks import joint_error, name_ranks

_JOINED_WITHIN = timedelta(minutes=10)
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_together(check: Callable[[], None]) -> Store | None:
    """Runs `check` in each process of the launch; what one of them meets stops all.

    Returns:
        What to hold on to until the group is formed: rank 0 may serve it. None: there are no
        others, or they do not meet by torchrun's variables.

    Raises:
        InputError: `check` raised it in some process; some have a GPU and others have not, or share
            one; they do not reach each other.
    """
    if any(name not in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        check()
        return None
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    message = ""
    try:
        _check_device()
        check()
    except InputError as error:
        message = str(error)
    store = _meet(rank, num_ranks)
    found = _exchange(store, rank, num_ranks, [torch.cuda.is_available(), message])
    without = [rank for rank, (has_gpu, _) in enumerate(found) if not has_gpu]
    messages = [message for _, message in found]
    if 0 < len(without) < num_ranks:
        messages = num_ranks * [
            f"{name_ranks(without)} of {num_ranks}: no CUDA device is seen there, but by the others"
            " (nvidia-smi, CUDA_VISIBLE_DEVICES): all ranks need one, or none"
        ]
    error = joint_error(messages, is_main=rank == 0)
    if error is not None:
        raise error
    return store


def _check_device() -> None:
    num_gpus, process = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and process >= num_gpus:
        raise InputError(
            f"there is no GPU for process {process} (from 0) of a node that shows {num_gpus}: start"
            f" --nproc_per_node {num_gpus} there, or see CUDA_VISIBLE_DEVICES"
        )


def _meet(rank: int, num_ranks: int) -> Store:
    try:
        store, _, _ = next(rendezvous("env://", timeout=_JOINED_WITHIN))
    except (DistNetworkError, DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"rank {rank}: the {num_ranks} processes did not all meet at {where} ({error}): look"
            " whether all were started, and docs/multi_node.md"
        ) from None
    # A store of torchrun's outlives its processes, and holds the answers of those before. Else the
    # number of restarts must not count: that of a node which has come back begins at 0 again.
    outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if outlives else "0"
    return PrefixStore(f"launch/{restarts}", store)


def _exchange(store: Store, rank: int, num_ranks: int, fact: object) -> list:
    """The facts of all ranks, by rank."""
    store.set(f"fact/{rank}", json.dumps(fact))
    names = [f"fact/{other}" for other in range(num_ranks)]
    try:
        store.wait(names, _JOINED_WITHIN)
        facts = [json.loads(store.get(name)) for name in names]
        store.set(f"read/{rank}", "")
        if rank == 0:  # it may serve the store, and end now
            store.wait([f"read/{other}" for other in range(num_ranks)], _JOINED_WITHIN)
    except (DistNetworkError, DistStoreError) as error:
        raise InputError(
            f"rank {rank} waited for the others before training and lost them ({error}): look"
            " whether all processes still run, and docs/multi_node.md"
        ) from None
    return facts
