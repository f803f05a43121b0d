"""Pictures made smaller when shards are written: less to store, to send and to decode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from torch.nn.functional import interpolate

from magneto_dist.data.decode_cpu import decode_image
from magneto_dist.errors import InputError


@dataclass(frozen=True)
class Shrink:
    """How large pictures are made smaller."""

    shorter_side: int | None = None
    """Pixels of the shorter side of pictures where it is longer; they become JPEGs, upright and
    without metadata. Others stay as they came. None: all do."""
    quality: int = 90
    """Of these JPEGs, 1 to 100."""

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise InputError(f"shrink.shorter_side {self.shorter_side}: must be at least 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"shrink.quality {self.quality}: must be 1 to 100")

    def __call__(self, content: bytes, max_megapixels: float) -> bytes:
        """The picture as it goes to the shard.

        Raises:
            BadSample: see `decode_image`.
        """
        if self.shorter_side is None:
            return content
        image, _ = decode_image(content, max_megapixels)
        height, width = image.shape[1:]
        if min(height, width) <= self.shorter_side:
            return content
        scale = self.shorter_side / min(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        small = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        pixels = np.ascontiguousarray(small.permute(1, 2, 0).numpy())
        return simplejpeg.encode_jpeg(pixels, quality=self.quality, colorsubsampling="420")


NO_SHRINK = Shrink()
