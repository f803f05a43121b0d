"""Pixels -> features as they are kept: what a frozen backbone makes of batches."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from threading import Event

import torch
from jaxtyping import Float
from torch import Tensor

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.ahead import Stopwatch
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import Backbone
from magneto_dist.model.image_stream import frozen_regions
from magneto_dist.precision import HALF_DTYPES
from magneto_dist.training.feed import computed_ahead
from magneto_dist.training.session import Session


class FeatureNetwork:
    """A backbone in the precision of training, on its device.

    Args:
        config: of the run.
        backbone: left as it is, and where it is.
        session: this process among its peers.
    """

    def __init__(self, config: Config, backbone: Backbone, session: Session) -> None:
        self.dtype = HALF_DTYPES[config.data.feature_dtype]
        self._image_size = config.augment.image_size
        self._backbone, self._device = backbone, session.device
        self._config, self._session = config, session

    @torch.no_grad()
    def shape(self) -> tuple[int, int]:
        """Regions of a picture, and channels."""
        black = torch.zeros(1, 3, self._image_size, self._image_size, dtype=torch.uint8)
        _, num_regions, num_channels = frozen_regions(self._backbone, black).shape
        return num_regions, num_channels

    def features(
        self, batches: Iterator[Batch], closing: Event
    ) -> Generator[tuple[Batch, Float[Tensor, "batch region channel"]], None, None]:
        """Each batch with its features, on the CPU and zero in rows that are not valid.

        Args:
            batches: with pixels.
            closing: as for `made_ahead`.

        Raises:
            InputError: one of them is not finite in the dtype that is kept.
        """
        # A copy: the model itself goes to the device when it is prepared.
        backbone = copy.deepcopy(self._backbone).to(self._device)
        backbone.fold()
        return computed_ahead(
            lambda batch: (batch, self._of(backbone, batch)),
            self._config,
            self._session,
            batches,
            Stopwatch(),
            closing,
        )

    def _of(self, backbone: Backbone, batch: Batch) -> Float[Tensor, "batch region channel"]:
        assert batch.pixels is not None
        features = frozen_regions(backbone, batch.pixels.to(self._device))
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
