"""Encoded pictures -> pixels on CPU (interim: Pillow)."""
from __future__ import annotations
import io
from collections.abc import Sequence
from typing import NamedTuple
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from magneto_dist.data.augment import Augmentation


class DecodedImages(NamedTuple):
    pixels: Tensor
    errors: tuple[str | None, ...]


class CpuDecoder:
    def __init__(self, image_size: int, max_megapixels: float) -> None:
        self.size = image_size

    def __call__(self, images: Sequence[bytes], augmentations: Sequence[Augmentation]) -> DecodedImages:
        out = torch.zeros(len(images), 3, self.size, self.size, dtype=torch.uint8)
        err: list[str | None] = []
        for i, (im, a) in enumerate(zip(images, augmentations, strict=True)):
            try:
                p = Image.open(io.BytesIO(im)); p.load(); p = p.convert("RGB")
                t, l, h, w = a.box(p.height, p.width)
                x = p.resize((self.size, self.size), Image.Resampling.BILINEAR, box=(l, t, l + w, t + h))
                if a.flip: x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                out[i] = torch.from_numpy(np.array(x)).permute(2, 0, 1)
                err.append(None)
            except Exception as e:
                err.append(str(e))
        return DecodedImages(out, tuple(err))
