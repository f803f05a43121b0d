"""The memory of one training step, predicted on any machine or measured on a GPU.

1. `training_job` puts together what `training.loop.train_step` works with, from the real parts.
2. `predict` takes two steps of it on fake tensors (shapes and dtypes without memory), and has
   torch's `MemTracker` add up what lives at the same time.
3. `measure` takes the same steps on this machine's GPU and asks torch's allocator.

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
from magneto_dist.data.order import BatchPlan
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.backbone import Backbone, recompute_activations
from magneto_dist.model.folding import FoldedStages
from magneto_dist.model.magneto import build_model
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.loop import Counts, Job, train_step
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.session import OptimizerStep, Session
from magneto_dist.training.weight_average import WeightAverage
from magneto_dist.world import World

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
MICRO_BATCHES = (1, 2)
"""Of the two steps. The first leaves momentum behind, its successor's second micro-batch meets the
gradients of the one before; those after it would meet nothing new."""


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


def plan_of(config: Config) -> BatchPlan:
    """The global batch of `config`, cut for one process."""
    train = config.train
    return BatchPlan.derive(
        train.global_batch_size, 1, train.max_micro_batch_size, config.model.batch_norm_group_size
    )


def model_of(config: Config, num_tags: int) -> nn.Module:
    """The model that a run of `config` trains, on torch's default device."""
    model = build_model(config.model, num_tags)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.activation_checkpointing:
        recompute_activations(model)
    return model


def training_job(config: Config, session: Session, model: Any, optimizer: Any) -> Job:
    """The parts of a run that `train_step` uses; it does not look at the others.

    An average of the weights (train.ema_decay) is left out: as much as those that are trained.
    """
    others = ("schedule", "loader", "telemetry", "stop", "evaluate", "checkpoints")
    unused: dict[str, Any] = dict.fromkeys(others)
    return Job(
        config=config,
        session=session,
        model=model,
        optimizer=optimizer,
        plan=plan_of(config),
        average=WeightAverage(nn.Identity(), decay=0),
        whereabouts=Whereabouts(),
        **unused,
    )


def noise(config: Config, num_tags: int) -> list[list[Batch]]:
    """The micro-batches of each step, on CPU: random pixels and tags."""
    plan, slots, size = plan_of(config), config.tags.max_tags, config.augment.image_size
    rows = plan.micro_batch_size
    return [
        [
            Batch(
                tag_ids=torch.randint(num_tags, (rows, slots)),
                tag_mask=torch.ones(rows, slots, dtype=torch.bool),
                target=torch.rand(rows, slots) < 0.5,
                outlier=torch.zeros(rows, slots, dtype=torch.bool),
                sample_valid=torch.ones(rows, dtype=torch.bool),
                sample_ids=torch.arange(rows),
                tags_cut=torch.zeros(rows, dtype=torch.int64),
                targets_cut=torch.zeros(rows, dtype=torch.int64),
                pixels=torch.randint(256, (rows, 3, size, size), dtype=torch.uint8),
                keys=("",) * rows,
                step=step,
                micro_step=micro_step,
                epoch=0,
            )
            for micro_step in range(min(most, plan.micro_steps))
        ]
        for step, most in enumerate(MICRO_BATCHES, start=1)
    ]


def take_steps(job: Job, batches: Sequence[Sequence[Batch]]) -> None:
    """Trains on the micro-batches of each step."""
    for micro_batches in batches:
        items = len(micro_batches) * job.plan.micro_batch_size
        counts = Counts(items, items * job.config.tags.max_tags, 0, 0)
        train_step(job, micro_batches, counts, log=False)


# Predicted --------------------------------------------------------------------------------------


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

            def forward(**inputs: Tensor | None) -> object:
                tracker.reset_mod_stats()  # it takes a second forward pass for a mistake
                with autocast("cpu", config.train.precision):
                    return model(**inputs)

            job = training_job(config, BareSession(place, model), forward, optimizer)
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


class BareSession(Session):
    """One process, and any device: accelerate knows only those that are there.

    Of fp16's loss scaler it has nothing: three numbers on the device, and it unscales in place.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self.world, self._place, self._model = World(), device, model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._place

    @contextlib.contextmanager
    def micro_step(self, model: object, *, is_last: bool) -> Iterator[None]:
        """As it comes."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Without a scaler."""
        loss.backward()

    def step(
        self, model: object, optimizer: torch.optim.Optimizer, *, measures_norm: bool = False
    ) -> OptimizerStep:
        """Moves the weights and gives the gradients' memory back."""
        optimizer.step()
        optimizer.zero_grad()
        return OptimizerStep(None, skipped=False)

    def unwrap(self, model: object) -> nn.Module:
        """The model without autocast."""
        return self._model

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Of one process."""
        return tensor


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
        if precision in AUTOCAST:
            torch.set_autocast_dtype(device_type, AUTOCAST[precision])
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


# Measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """By torch's allocator, in bytes."""

    allocated: int
    """Of tensors and workspaces at the peak."""
    reserved: int
    """What the allocator had taken from the GPU for it."""
    context: int
    """What else of the GPU is in use: CUDA context, kernels, libraries, other processes."""
    ran_out: bool
    """The limit was too small; the other numbers are those until then."""


def measure(
    config: Config, num_tags: int, limit_bytes: int | None, snapshot: str | None = None
) -> Measured:
    """Two steps on this machine's GPU, through accelerate; once a process.

    Args:
        config: as for `predict`.
        num_tags: as for `predict`.
        limit_bytes: what the allocator may take from the GPU, to stand for a smaller one.
        snapshot: file for `torch.cuda.memory._dump_snapshot` (see pytorch.org/memory_viz).
    """
    total = torch.cuda.mem_get_info()[1]
    if limit_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
    if snapshot:
        torch.cuda.memory._record_memory_history()
    session = Session(config.train, config.optim.clip_norm)
    model = model_of(config, num_tags)
    optimizer = build_optimizer(model, config.optim)
    wrapped, optimizer = session.prepare(model, optimizer, plan_of(config))
    job, batches = training_job(config, session, wrapped, optimizer), noise(config, num_tags)
    ran_out = _runs_out(lambda: _train_with_momentum(job, batches))
    torch.cuda.synchronize()
    if snapshot:
        torch.cuda.memory._dump_snapshot(snapshot)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    in_use = total - torch.cuda.mem_get_info()[0]  # by everybody on this GPU
    return Measured(allocated, reserved, in_use - torch.cuda.memory_reserved(), ran_out)


def _train_with_momentum(job: Job, batches: Sequence[Sequence[Batch]]) -> None:
    """fp16 skips steps until its loss scale fits; before the first real one is no momentum."""
    for _ in range(20):
        has_momentum = bool(job.optimizer.state)
        take_steps(job, batches)
        if has_momentum:
            return


def _runs_out(call: Callable[[], object]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        return True
    return False
