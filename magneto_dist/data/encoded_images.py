"""Pictures on their way to DALI: judged and measured in a loader process, decoded in another.

1. Every picture is judged exactly as `decode_cpu.py` judges it.
2. JPEGs that DALI reads lie one after the other in one piece of memory, each with its crop.
3. What DALI does not read (PNG, WebP, rare kinds of JPEG) is decoded at once.

So the training process does nothing for a single picture, and its bytes are copied once: into the
memory in which they travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from magneto_dist.data.augment import Augmentation
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.image_bytes import checked_header
from magneto_dist.data.parcels import empty
from magneto_dist.data.sample import BadSample

_JPEG_COLOURS = ("YCbCr", "Gray")  # others are rare, and DALI reads them in its own way


@dataclass(frozen=True)
class EncodedImages:
    """The pictures of a batch; its JPEGs are still to be decoded."""

    content: UInt8[Tensor, " byte"]
    """The JPEGs one after the other."""
    ends: Int64[np.ndarray, " jpeg"]
    """Where each of them ends."""
    rows: Int64[np.ndarray, " jpeg"]
    """The row of the batch that each belongs to, ascending."""
    boxes: Int32[np.ndarray, "jpeg 4"]
    """Its crop: top, left, height, width in pixels of the upright picture."""
    augmentations: tuple[Augmentation, ...]
    """Of each JPEG."""
    other_rows: Int64[np.ndarray, " other"]
    """Rows whose pictures are decoded already ..."""
    other_pixels: UInt8[Tensor, "other 3 height width"]
    """... and these pictures."""
    errors: tuple[str | None, ...]
    """One per row of the batch: why its picture cannot be used; None: it can."""

    def jpeg(self, number: int) -> UInt8[np.ndarray, " byte"]:
        """The bytes of a JPEG, where they lie."""
        start = self.ends[number - 1] if number > 0 else 0
        return self.content.numpy()[start : self.ends[number]]


def encoded_images(
    images: Sequence[bytes], augmentations: Sequence[Augmentation], cpu: CpuDecoder
) -> EncodedImages:
    """The pictures of a batch, ready for `DaliDecoder`; never raises for one.

    Args:
        images: JPEG, PNG or WebP, one per row.
        augmentations: one per row.
        cpu: decodes what DALI does not, and judges for both.
    """
    errors: list[str | None] = [None] * len(images)
    boxes: dict[int, tuple[int, int, int, int]] = {}
    others: dict[int, Tensor] = {}
    for row, (content, augmentation) in enumerate(zip(images, augmentations, strict=True)):
        try:
            header = checked_header(content, cpu.max_megapixels)
            if header.kind == "jpg" and _dali_reads(content):
                boxes[row] = augmentation.box(*header.upright_size)
            else:
                others[row] = cpu.decode(content, augmentation)
        except BadSample as error:
            errors[row] = error.reason
    content, ends = _joined([images[row] for row in boxes])
    none = torch.empty(0, 3, cpu.image_size, cpu.image_size, dtype=torch.uint8)
    return EncodedImages(
        content,
        ends,
        rows=np.array(list(boxes), dtype=np.int64),
        boxes=np.array(list(boxes.values()), dtype=np.int32).reshape(-1, 4),
        augmentations=tuple(augmentations[row] for row in boxes),
        other_rows=np.array(list(others), dtype=np.int64),
        other_pixels=torch.stack(list(others.values())) if others else none,
        errors=tuple(errors),
    )


def _dali_reads(jpeg: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(jpeg, strict=False)[2] in _JPEG_COLOURS
    except ValueError:
        return False  # the decoder for CPU will say why


def _joined(jpegs: Sequence[bytes]) -> tuple[UInt8[Tensor, " byte"], Int64[np.ndarray, " jpeg"]]:
    ends = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=np.int64)
    content = empty(int(ends[-1]) if jpegs else 0, dtype=torch.uint8)
    memory = content.numpy().data
    for jpeg, end in zip(jpegs, ends.tolist(), strict=True):
        memory[end - len(jpeg) : end] = jpeg
    return content, ends
