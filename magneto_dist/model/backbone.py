"""The convolutional network that turns pixels into a grid of features (paper, section 3.1).

1. `build_backbone` takes a torchvision classification model and loads weights into it, if wanted.
2. It drops pooling and head and cuts the rest into stages.
3. The first stages may be frozen; the batch norms of the others get the kind that is asked for.
4. `Backbone` normalises uint8 pixels and runs the stages.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import OrderedDict
from pathlib import Path

import torch
import torchvision
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from magneto_dist.config import ModelConfig, Precision
from magneto_dist.errors import InputError
from magneto_dist.model.folding import FoldedStages, fast_precision
from magneto_dist.model.norm import GhostBatchNorm2d, replace_batch_norms, row_validity_of
from magneto_dist.precision import HALF_DTYPES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_HEADS = ("fc.", "classifier.")
_RESNET_STEM = ("conv1", "bn1", "relu", "maxpool")
_RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_SUPPORTED = (
    "the families resnet, resnext, wide_resnet, regnet, mobilenet, efficientnet, convnext,"
    " densenet, vgg, squeezenet and alexnet"
)
_PROBE_SIZE = 64  # pixels: large enough for every supported network, and quick


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone that `config` describes, with its weights.

    Raises:
        InputError: no such network, one that cannot be cut into stages, more stages wanted than
            there are, or weights that cannot be read, downloaded or do not fit.
    """
    network = _network(config.backbone)
    _load_weights(network, config.backbone, config.backbone_weights)
    stages = _stages(network, config.backbone)
    kept = len(stages) if config.backbone_stages is None else config.backbone_stages
    if kept > len(stages):
        raise InputError(
            f"--model.backbone_stages {kept}: {config.backbone} has {len(stages)} stages:"
            f" {', '.join(stages)}"
        )
    num_frozen = kept if config.frozen_stages == "all" else config.frozen_stages
    chosen = OrderedDict(list(stages.items())[:kept])
    for index, (name, stage) in enumerate(chosen.items()):
        kind = config.backbone_batch_norm
        if index < num_frozen:
            kind = "ghost" if config.frozen_batch_norm == "drifting" else "frozen"
        chosen[name] = _convert_batch_norms(stage, kind, config.batch_norm_group_size)
    out_channels = _probe_channels(nn.Sequential(chosen), config.backbone)
    return Backbone(
        nn.Sequential(chosen),
        out_channels,
        num_frozen,
        batch_norms_frozen=config.backbone_batch_norm == "frozen",
        frozen_norms_drift=config.frozen_batch_norm == "drifting",
        frozen_dtype=HALF_DTYPES.get(frozen_precision(config)),
    )


def frozen_precision(config: ModelConfig) -> Precision:
    """What `config.frozen_precision` means on this machine."""
    if config.frozen_precision != "auto":
        return config.frozen_precision
    stays_as_it_is = config.frozen_stages == 0 or config.frozen_batch_norm == "drifting"
    return "no" if stays_as_it_is else fast_precision()


def recompute_activations(model: nn.Module) -> None:
    """Activation checkpointing for the trained stages of the backbone of `model`, if it has one.

    Its batch norms must be ghost or frozen ones: others would move their statistics twice.
    """
    for module in model.modules():
        if isinstance(module, Backbone):
            module.recomputes = True


class Backbone(nn.Module):
    """Stages of a convolutional network without pooling and head.

    The first `num_frozen_stages` are really frozen: their parameters need no gradient, they run
    without a graph and with batch norms folded, and they are in evaluation mode even in `train()`,
    so that no batch-norm statistic of theirs ever moves. Where `batch_norms_frozen`, the batch
    norms of the other stages stand still too, scale and shift included. Where `frozen_norms_drift`,
    the batch norms of the frozen stages (ghost ones, so that ranks agree) stay in training mode and
    are not folded: they have no fixed statistics to fold.

    Args:
        stages: named stages, first to last; the state_dict calls them `stages.NAME`.
        out_channels: channels of the last stage.
        num_frozen_stages: stages that are never trained; more than there are: all.
        batch_norms_frozen: fix the batch norms of trained stages.
        frozen_norms_drift: let the statistics of the frozen stages' batch norms move.
        frozen_dtype: what the frozen stages compute in, on a CPU bfloat16 alone; None: as the rest.
    """

    scale: Tensor
    shift: Tensor
    recomputes: bool
    """Whether trained stages run again in the backward pass (activation checkpointing)."""
    frozen_dtype: torch.dtype | None
    """What the frozen stages compute in; None: as the rest."""

    def __init__(
        self,
        stages: nn.Sequential,
        out_channels: int,
        num_frozen_stages: int,
        *,
        batch_norms_frozen: bool,
        frozen_norms_drift: bool,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.out_channels = out_channels
        self.num_frozen_stages = num_frozen_stages
        self.batch_norms_frozen = batch_norms_frozen
        self.frozen_norms_drift = frozen_norms_drift
        self.frozen_dtype = frozen_dtype
        self.recomputes = False
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self._folded = FoldedStages()
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train()

    def forward(
        self,
        pixels: UInt8[Tensor, "batch 3 height width"] | None,
        frozen: Float[Tensor, "batch channel frozen_height frozen_width"] | None = None,
    ) -> Float[Tensor, "batch out_channels grid_height grid_width"]:
        """Features of RGB pixels of 0 to 255, in the dtype of the parameters (or autocast's).

        `frozen` is what `frozen_features` has made of the pixels before: they are not looked at.
        """
        if frozen is None:
            assert pixels is not None, "a backbone needs pixels or what it has made of them"
            frozen = self.frozen_features(pixels)
        x = frozen
        for stage in list(self.stages)[self.num_frozen_stages :]:
            x = self._recomputed(stage, x) if self.recomputes else stage(x)
        return x

    def frozen_features(
        self, pixels: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channel frozen_height frozen_width"]:
        """What the frozen stages make of pixels; without any of these, normalised pixels."""
        x = pixels.to(self.scale.dtype) * self.scale + self.shift
        if not self.frozen_norms_drift:
            return self._folded(self._frozen_stages(), x, self._dtype_on(x.device))
        for stage in self._frozen_stages():  # no parameter of theirs needs a gradient: no graph
            x = stage(x)
        return x

    def fold(self) -> bool:
        """Makes the folded copy of the frozen stages now, if there can be one, and says whether.

        Then what they make of a picture depends on it alone, and `frozen_features` may run in any
        thread. (Folding traces, which changes every module of the process while it lasts.)
        """
        has_fixed_stages = self.num_frozen_stages > 0 and not self.frozen_norms_drift
        dtype = self._dtype_on(self.scale.device)
        return has_fixed_stages and self._folded.fold(self._frozen_stages(), dtype)

    def _recomputed(self, stage: nn.Module, x: Tensor) -> Tensor:
        """`stage(x)` without keeping its activations; batch norms count its rows once."""
        if not torch.is_grad_enabled():
            return stage(x)
        rows = row_validity_of(stage)
        valid = rows.valid  # the owner takes it back before the backward pass
        return checkpoint(  # type: ignore[return-value]
            stage,
            x,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), rows.repeating(valid)),
        )

    def train(self, mode: bool = True) -> Backbone:
        """Training mode for what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.frozen_norms_drift:
            for norm in (m for s in self._frozen_stages() for m in _batch_norms(s)):
                norm.train(mode)
        return self

    def _dtype_on(self, device: torch.device) -> torch.dtype | None:
        """Processors are slow at float16: what a GPU has trained in it they do in float32."""
        is_slow = device.type == "cpu" and self.frozen_dtype == torch.float16
        return None if is_slow else self.frozen_dtype

    def _frozen_stages(self) -> list[nn.Module]:
        return list(self.stages)[: self.num_frozen_stages]

    def _frozen_modules(self) -> list[nn.Module]:
        modules = self._frozen_stages()
        if self.batch_norms_frozen:
            modules += _batch_norms(self.stages)
        return modules


def _batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def _network(name: str) -> nn.Module:
    available = models.list_models(module=torchvision.models)
    if name not in available:
        raise InputError(
            f"--model.backbone {name}: torchvision has no such classification model;"
            f" supported are {_SUPPORTED}"
        )
    return models.get_model(name, weights=None)


def _stages(network: nn.Module, name: str) -> OrderedDict[str, nn.Module]:
    """Named stages of a network without pooling and head."""
    parts = dict(network.named_children())
    if all(part in parts for part in (*_RESNET_STEM, *_RESNET_LAYERS)):
        stem = nn.Sequential(OrderedDict((part, parts[part]) for part in _RESNET_STEM))
        return OrderedDict(stem=stem, **{layer: parts[layer] for layer in _RESNET_LAYERS})
    if "stem" in parts and "trunk_output" in parts:
        return OrderedDict(stem=parts["stem"], **dict(parts["trunk_output"].named_children()))
    if isinstance(parts.get("features"), nn.Sequential):
        return OrderedDict(parts["features"].named_children())
    raise InputError(f"--model.backbone {name} has no stages to keep; supported are {_SUPPORTED}")


def _convert_batch_norms(stage: nn.Module, kind: str, group_size: int) -> nn.Module:
    if kind == "ghost":
        return replace_batch_norms(stage, lambda norm: GhostBatchNorm2d.like(norm, group_size))
    if kind == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(stage)
    return stage  # "local" as it is; Backbone itself fixes "frozen"


@torch.no_grad()
def _probe_channels(stages: nn.Sequential, name: str) -> int:
    """Channels that come out of `stages`, found by running them once on a small picture."""
    features = stages.eval()(torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE))
    # Some networks (swin) have a `features` part that puts the channels last.
    if features.ndim != 4 or features.shape[2] != features.shape[3]:
        raise InputError(f"--model.backbone {name} gives no grid of features; take {_SUPPORTED}")
    return features.shape[1]


def _load_weights(network: nn.Module, name: str, weights: str) -> None:
    """Loads everything but the classification head, which may have any number of classes."""
    if weights == "none":
        return
    state = _download_imagenet(name) if weights == "imagenet" else _read_state_dict(Path(weights))
    state = {key: value for key, value in state.items() if not key.startswith(_HEADS)}
    expected = {key for key in network.state_dict() if not key.startswith(_HEADS)}
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise InputError(
            f"--model.backbone_weights {weights} does not fit {name}: {_some('missing', missing)},"
            f" {_some('unexpected', unexpected)}"
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--model.backbone_weights {weights} does not fit {name}: {reason}"
        ) from None


def _download_imagenet(name: str) -> dict[str, Tensor]:
    try:
        weights = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        raise InputError(
            f"--model.backbone_weights imagenet: cannot download the weights of {name} ({error});"
            " offline, pass the path of a state_dict (.pth or .safetensors) instead"
        ) from None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f"--model.backbone_weights {path}: no such file (none, imagenet or a path)"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"--model.backbone_weights {path}: no plain state_dict ({reason})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"--model.backbone_weights {path}: not a dictionary of tensors by name")
    return state


def _some(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}" + (f" (first {keys[0]})" if keys else "")
