"""Pixels -> features as they are kept: what a frozen backbone makes of a batch."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import Backbone
from magneto_dist.model.image_stream import region_features
from magneto_dist.precision import HALF_DTYPES


class FeatureNetwork:
    """A backbone in the precision of training, on its device.

    Args:
        config: of the run.
        backbone: left as it is, and where it is.
        device: where features are computed.
    """

    def __init__(self, config: Config, backbone: Backbone, device: torch.device) -> None:
        self.dtype = HALF_DTYPES[config.data.feature_dtype]
        self._image_size = config.augment.image_size
        self._stages, self._device = backbone, device
        precision = HALF_DTYPES.get(config.train.precision)
        self._autocast = torch.autocast(device.type, precision, enabled=precision is not None)

    @torch.no_grad()
    def shape(self) -> tuple[int, int]:
        """Regions of a picture, and channels."""
        black = torch.zeros(1, 3, self._image_size, self._image_size, dtype=torch.uint8)
        _, num_regions, num_channels = region_features(self._stages, black).shape
        return num_regions, num_channels

    @cached_property
    def _backbone(self) -> Backbone:
        """A copy: the model itself goes to the device when it is prepared."""
        return copy.deepcopy(self._stages).to(self._device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Float[Tensor, "batch region channel"]:
        """On the CPU, zero in rows that are not valid.

        Raises:
            InputError: one of them is not finite in the dtype that is kept.
        """
        assert batch.pixels is not None
        with self._autocast:
            features = region_features(self._backbone, batch.pixels.to(self._device))
        features = features.to(self.dtype).cpu()
        features[~batch.sample_valid] = 0
        finite = features.isfinite().flatten(1).all(1)
        if not finite.all():
            key = batch.keys[int((~finite).nonzero()[0])]
            raise InputError(
                f"the features of {key} are not finite numbers in {self.dtype}: set"
                " --data.feature_dtype bf16, or look at --model.backbone_weights"
            )
        return features
