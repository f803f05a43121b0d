"""Tags and pixels -> features of the tags (paper, section 3.1).

1. The backbone makes N x N regions of features; its frozen stages may have done their part before.
   A 1x1 convolution and a batch norm bring them to d_model features.
2. Every tag looks at all regions: multi-head attention, tags as queries; beyond the paper and on
   request, what it sees is multiplied by what it is.
3. A Transformer encoder relates the results to each other.
"""

from __future__ import annotations

from math import isqrt

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from magneto_dist.config import ModelConfig
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import Backbone, build_backbone
from magneto_dist.model.encoder import TransformerEncoder
from magneto_dist.model.mapping import BilinearMapping
from magneto_dist.model.norm import GhostBatchNorm2d, share_row_validity


class ImageStream(nn.Module):
    """The visual stream of MAGNeto, and all of TF-it but embedding and head.

    What the tags see in the regions goes into the encoder as it is, as section 3.1 says: no
    residual branch, which would let tags pass by the image, and no function of its own, unless
    `mapping` is "bilinear". Dropout is that of torch's `nn.MultiheadAttention`, on the attention
    weights.

    Args:
        config: everything about backbone, attention and encoder.

    Raises:
        InputError: as for `build_backbone`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        # No bias: the batch norm takes every constant away.
        self.projection = nn.Conv2d(self.backbone.out_channels, config.d_model, 1, bias=False)
        self.projection_norm = _projection_norm(config)
        self.attention = nn.MultiheadAttention(
            config.d_model, config.num_heads, config.dropout, batch_first=True
        )
        self.product = BilinearMapping(config.d_model) if config.mapping == "bilinear" else None
        self.encoder = TransformerEncoder(config, config.image_layers)
        self._rows = share_row_validity(self)
        self._needs_gpu = any(isinstance(m, nn.SyncBatchNorm) for m in self.modules())

    def forward(
        self,
        tags: Float[Tensor, "batch slot d_model"],
        tag_mask: Bool[Tensor, "batch slot"],
        pixels: UInt8[Tensor, "batch 3 height width"] | None,
        sample_valid: Bool[Tensor, " batch"] | None,
        features: Float[Tensor, "batch region channel"] | None = None,
    ) -> Float[Tensor, "batch slot d_model"]:
        """Features of every slot, ready for the head and the gate.

        Rows that are not valid stay out of ghost batch statistics (not of "local" or "sync" ones).
        `features` are what `frozen_regions` has made of the pictures before; then the frozen stages
        of the backbone rest, and pixels are not looked at.

        Raises:
            InputError: there are neither pixels nor features, or "sync" batch norm would train on a
                CPU.
        """
        if pixels is None and features is None:
            raise InputError(
                "this model needs pictures and the data set has none; --model.kind tf-t and ff"
                " work on tags alone"
            )
        regions = self.regions(pixels, sample_valid, features)
        seen, _ = self.attention(tags, regions, regions, need_weights=False)
        if self.product is not None:
            seen = self.product(tags, seen)
        return self.encoder(seen, tag_mask)

    def regions(
        self,
        pixels: UInt8[Tensor, "batch 3 height width"] | None,
        sample_valid: Bool[Tensor, " batch"] | None,
        features: Float[Tensor, "batch region channel"] | None = None,
    ) -> Float[Tensor, "batch region d_model"]:
        """The N x N grid regions of every picture, flattened row by row."""
        if self.training:
            self._check_device(self.projection.weight.device)
            self._rows.valid = sample_valid
        if features is None:
            grid = self.backbone(pixels)
        else:
            grid = self.backbone(None, self._grid(features))
        grid = self.projection_norm(self.projection(grid))
        self._rows.valid = None
        return _regions(grid)

    def _grid(
        self, features: Float[Tensor, "batch region channel"]
    ) -> Float[Tensor, "batch channel height width"]:
        """What `frozen_regions` has flattened, in a dtype that the weights can work with."""
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.backbone.scale.dtype)
        side = isqrt(features.shape[1])  # pictures are squares
        return features.unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def _check_device(self, device: torch.device) -> None:
        if device.type == "cpu" and self._needs_gpu:
            raise InputError(
                "batch norm of kind sync trains on GPUs only; on CPU set"
                " --model.projection_batch_norm and --model.backbone_batch_norm to ghost"
            )


def frozen_regions(
    backbone: Backbone, pixels: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch region channel"]:
    """What an image stream with this backbone takes as `features` in place of the pixels."""
    return _regions(backbone.frozen_features(pixels))


def _regions(
    grid: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch region channel"]:
    return grid.flatten(2).transpose(1, 2)  # a view, whatever the memory format


def _projection_norm(config: ModelConfig) -> nn.Module:
    if config.projection_batch_norm == "ghost":
        return GhostBatchNorm2d(config.d_model, config.batch_norm_group_size)
    norms = {"local": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}
    return norms[config.projection_batch_norm](config.d_model)
