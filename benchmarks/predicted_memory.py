"""The memory of one training step, predicted on any machine.

`predict` takes two steps (`step_memory.py`) on fake tensors, which have shapes and dtypes but no
memory, and has torch's `MemTracker` add up what lives at the same time.

What the tracker sees are the tensors that enter and leave an operator. It does not see what a
kernel takes for itself while it runs (workspaces of cuDNN and cuBLAS), nor what the allocator holds
beyond its tensors, nor the CUDA context.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _ModState
from torch.fx.experimental.optimization import fuse
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.backbone import Backbone
from magneto_dist.model.folding import FoldedStages
from magneto_dist.precision import HALF_DTYPES
from magneto_dist.training.optim import build_optimizer
from step_memory import BareSession, model_of, noise, take_steps, training_job


@dataclass(frozen=True)
class StepMemory:
    """What lives at the peak of a training step, in bytes."""

    frozen_parameters: int
    """Weights that are never trained, and buffers."""
    folded_copy: int
    """Of the frozen stages, with batch norms folded into their convolutions."""
    trained_parameters: int
    gradients: int
    """Those that are there at the peak."""
    momentum: int
    batch: int
    """As it came: uint8 pixels, tags."""
    activations: int
    """Kept for the backward pass, or alive in the forward one (pixels as floats among them)."""
    temporaries: int
    """Of the backward pass: gradients of activations."""
    all_gradients: int
    """Of all trained weights: what DDP's buckets hold throughout (not part of the peak)."""
    peak_at: str
    """The innermost module at work, and in which pass."""

    @property
    def peak(self) -> int:
        """All of them, bytes."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """What adds up to the peak, bytes by name."""
        others = ("all_gradients", "peak_at")
        return {name: value for name, value in asdict(self).items() if name not in others}


def predict(config: Config, num_tags: int, *, as_gpu: bool = True) -> StepMemory:
    """The memory of a step on fake tensors; needs no GPU, and little memory.

    The fakes are on "cpu", because torch's backward pass asks for a GPU where fakes say that they
    are on one. Operators that keep other tensors on a GPU are replaced (`_operators_of_a_gpu`);
    that the forward pass then keeps what it keeps on fakes of "cuda" is tested.

    Args:
        config: whose step.
        num_tags: size of the vocabulary.
        as_gpu: False: what a CPU would take, without autocast.
    """
    tracker, model = _Tracker(), _ready_to_fake(config, num_tags)
    with FakeTensorMode(), _operators_of_a_gpu() if as_gpu else contextlib.nullcontext():
        batches = noise(config, num_tags)  # in the memory of the CPU
        with tracker:
            place = torch.device("cpu")
            _become_fakes(model, place)
            optimizer = build_optimizer(model, config.optim)
            wrapped = _Wrapped(tracker, model, config.train.precision)
            job = training_job(config, BareSession(place, model), wrapped, optimizer)
            take_steps(job, batches)
        return _sort(tracker, place, model, batches[0][0])


def kept_by_forward(config: Config, num_tags: int, device: str) -> int:
    """Bytes that live after a forward pass and its loss, on fakes of "cpu" as in `predict`, or of
    "cuda", where torch itself chooses the operators (but for attention)."""
    tracker, model, place = _Tracker(), _ready_to_fake(config, num_tags), torch.device(device, 0)
    place = torch.device("cpu") if device == "cpu" else place
    patches = _operators_of_a_gpu() if device == "cpu" else _attention_of_a_gpu()
    with FakeTensorMode(), patches:
        batch = noise(config, num_tags)[0][0].to(place)
        with tracker:
            _become_fakes(model, place)
            with autocast(device, config.train.precision):
                prediction = model(**batch.inputs())
            loss = ets_loss(prediction, batch, count_for_loss(batch), config.loss)
            kept = tracker.get_tracker_snapshot("current")[place]
            del loss
    return _total(kept)


class _Tracker(MemTracker):
    """torch's tracker for models with frozen weights: it hooks on to the gradients of all.

    It follows the peak of the whole alone, which is several times as fast as that of all modules.
    """

    peak_at = ""
    """The innermost module at the peak, and in which pass."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            total = _total(snapshot)
            if total > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = total, dict(snapshot)
                name = max(self._mod_tracker.parents, key=lambda name: name.count("."))
                is_backward = peak_state is _ModState.PEAK_BW
                self.peak_at = f"{'backward' if is_backward else 'forward'} of {name}"

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        for weight in module.parameters():
            if not weight.requires_grad:  # it has its hooks already, as far as torch can tell
                nothing = (RemovableHandle(OrderedDict()), RemovableHandle(OrderedDict()))
                self._param_to_grad_hook_handles.setdefault(weight, nothing)
        return super()._track_module_params_and_buffers(module, install_grad_hooks)


class _Wrapped:
    """The model under autocast, as `train_step` takes it; a module would be tracked, too."""

    def __init__(self, tracker: _Tracker, model: nn.Module, precision: str) -> None:
        self._tracker, self._model, self._precision = tracker, model, precision
        self.modules = model.modules

    def __call__(self, **inputs: Tensor | None) -> object:
        self._tracker.reset_mod_stats()  # it takes a second forward pass for a mistake
        with autocast("cpu", self._precision):
            return self._model(**inputs)


class _Folded(FoldedStages):
    """Folded once; nothing changes here."""

    def __init__(self, stages: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        self._copy = fuse(nn.Sequential(*stages).eval()).to(dtype=dtype)

    def _folded(self, stages: Sequence[nn.Module], dtype: torch.dtype | None) -> nn.Module:
        return self._copy


def _ready_to_fake(config: Config, num_tags: int) -> nn.Module:
    """The real model, folded: fakes have neither values to fold nor addresses."""
    model = model_of(config, num_tags)
    for module in model.modules():
        if isinstance(module, Backbone) and not module.frozen_norms_drift:
            module._folded = _Folded(module._frozen_stages(), module.frozen_dtype)
    return model


def _become_fakes(model: nn.Module, device: torch.device) -> None:
    """Replaces all weights and buffers by fakes on `device`, of the same shapes and strides."""

    def fake(tensor: Tensor) -> Tensor:
        size, stride = tensor.size(), tensor.stride()
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)

    folded = [m._folded._copy for m in model.modules() if isinstance(m, Backbone)]
    for module in (m for root in (model, *folded) for m in root.modules()):
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(fake(weight), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def autocast(device_type: str, precision: str) -> Iterator[None]:
    """`torch.autocast`, which itself would be off on "cuda" where there is no GPU."""
    with torch.autocast(device_type, enabled=False):  # puts everything back
        if precision in HALF_DTYPES:
            torch.set_autocast_dtype(device_type, HALF_DTYPES[precision])
            torch.set_autocast_enabled(device_type, True)
        yield


@contextlib.contextmanager
def _operators_of_a_gpu() -> Iterator[None]:
    """Those that keep other tensors on a GPU than on a CPU: attention, dropout and layer norm."""
    with (
        _attention_of_a_gpu(),
        patch.object(functional, "dropout", _fused_dropout),
        patch.object(functional, "layer_norm", partial(_float_layer_norm, functional.layer_norm)),
    ):
        yield


def _attention_of_a_gpu() -> contextlib.AbstractContextManager[object]:
    return patch.object(functional, "scaled_dot_product_attention", _efficient_attention)


def _fused_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Keeps a byte for each element; on a CPU it keeps a number."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _float_layer_norm(layer_norm: Callable[..., Tensor], input: Tensor, *rest: Any) -> Tensor:
    """In float32 under the autocast of a GPU; on a CPU in the dtype of its input."""
    if not torch.is_autocast_enabled("cpu"):
        return layer_norm(input, *rest)
    with torch.autocast("cpu", enabled=False):
        return layer_norm(input.float(), *rest)


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """The memory-efficient attention, which an RTX 2080 Ti has: it keeps no weights.

    torch chooses by the GPU that it finds; flash attention, of newer ones, keeps as much.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal)[0]


def _sort(tracker: _Tracker, device: torch.device, model: nn.Module, batch: Batch) -> StepMemory:
    snapshot = tracker.get_tracker_snapshot("peak")[device]
    found = {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(_size(p) for p in model.parameters() if not p.requires_grad)
    frozen += sum(_size(buffer) for buffer in model.buffers())
    in_batch = sum(_size(tensor) for tensor in batch._tensors().values())  # not tracked
    return StepMemory(
        frozen_parameters=frozen,
        folded_copy=found["Parameter"] + found["Buffer"] - frozen - trained,
        trained_parameters=trained,
        gradients=found["Gradient"],
        momentum=found["Optstate"],
        batch=in_batch,
        activations=found["Activation"] + found["Other"],
        temporaries=found["Temp"],
        all_gradients=trained,
        peak_at=tracker.peak_at,
    )


def _total(snapshot: Mapping[Any, int]) -> int:
    return snapshot["Total"]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
