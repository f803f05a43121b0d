"""FSDP2: trained weights, their gradients and momentum in parts, one a rank.

torch's own `fully_shard`, and not accelerate's way to it, which a process without a GPU leaves out
without a word: so the code that GPUs run is the code that is tested without one.

1. `shard` cuts what is trained; before a unit computes its weights are gathered, after it dropped.
2. `gathered` makes whole tensors for a checkpoint, which is that of every other way of training.
3. `scattered` cuts what a checkpoint holds of the optimizer as `shard` has cut the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from magneto_dist.model.backbone import Backbone
from magneto_dist.model.tag_stream import TagEmbedding


def shard(
    model: nn.Module, optimizer: torch.optim.Optimizer, num_ranks: int, *, keep_gathered: bool
) -> None:
    """Cuts the trained weights of `model` over all ranks, and gives `optimizer` the parts.

    Units are encoder layers, the tag embedding and trained stages of the backbone; the rest goes
    together. Frozen weights stay whole: nothing of them travels, and batch norms fold into them.

    Args:
        model: on its device; becomes that of rank 0 on all ranks.
        optimizer: of its trained weights, before its first step.
        num_ranks: number of processes, at least 2.
        keep_gathered: keep a unit's weights until its backward pass, for speed.
    """
    # Of outputs that are views it warns lest somebody wrote into them; nobody here does.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
    names = {weight: name for name, weight in model.named_parameters()}
    trained = {weight for weight in names if weight.requires_grad}
    for weight in trained:
        weight.data = weight.data.contiguous()  # channels-last ones cannot be cut
    for tensor in (*model.parameters(), *model.buffers()):  # as DDP does
        of_main = tensor.detach().contiguous()
        broadcast(of_main, src=0)
        tensor.data.copy_(of_main)
    mesh = init_device_mesh(next(iter(trained)).device.type, (num_ranks,))
    for unit in (*_units(model), model):
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=not keep_gathered,
            ignored_params=names.keys() - trained,
        )
    parts = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parts[names[weight]] for weight in group["params"]]


def gathered(tree: Any, *, keep: bool) -> Any:
    """`tree` of dicts and lists with the tensors that are in parts made whole, on CPU.

    A collective; one tensor after the other, so that a GPU never holds all of them.

    Args:
        tree: without a graph, and the same on all ranks but for the parts.
        keep: False: this process has no use for it, and gets {}.
    """

    def whole(tensor: DTensor) -> Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    result = tree_map_only(DTensor, whole, tree)
    return result if keep else {}


def scattered(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, cut as the weights of `optimizer` are; no collective.

    Raises:
        KeyError: it has state of weights that are not there.
    """
    weights = dict(enumerate(w for group in optimizer.param_groups for w in group["params"]))

    def part(weight: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            return value
        # Every rank has read all of it; None: nobody sends.
        return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)

    cut = {
        index: {name: part(weights[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": cut}


def _units(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, Backbone):
            yield from list(module.stages)[module.num_frozen_stages :]
        elif isinstance(module, nn.TransformerEncoderLayer | TagEmbedding):
            yield module
