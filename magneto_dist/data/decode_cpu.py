"""Encoded pictures -> pixels on CPU.

1. `decode_image` checks a picture's bytes and decodes it whole.
2. `CpuDecoder` crops, resizes, flips and recolours a batch of them as their `Augmentation` says.

Libraries chosen by measurement (`benchmarks/decode.py`): simplejpeg decodes JPEGs fastest, Pillow
reads the other types; torch's antialiased resize of 8-bit pixels is the fastest of those that agree
with Pillow and DALI. The operations of AutoAugment are Pillow's, for which the policy was made:
faster than those on tensors.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from magneto_dist.data.augment import Augmentation
from magneto_dist.data.image_bytes import ImageHeader, checked_header
from magneto_dist.data.parcels import empty
from magneto_dist.data.sample import BadSample

OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "ShearX": lambda image, tangent: image.transform(
        image.size, Image.Transform.AFFINE, (1, tangent, 0, 0, 1, 0)
    ),
    "Rotate": lambda image, degrees: image.rotate(degrees),
    "Color": lambda image, change: ImageEnhance.Color(image).enhance(1 + change),
    "Contrast": lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change),
    "Sharpness": lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change),
    "Posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "Solarize": lambda image, threshold: ImageOps.solarize(image, math.ceil(threshold)),
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
}
"""What `Augmentation.operations` names: all of AutoAugment's ImageNet policy, nearest-neighbour and
with black beyond the edges, pixel for pixel as torchvision's AutoAugment applies them."""


class DecodedImages(NamedTuple):
    """A batch of pictures as the model sees them."""

    pixels: UInt8[Tensor, "batch 3 height width"]
    """On the device of the decoder; black where there is an error."""
    errors: tuple[str | None, ...]
    """Why a picture cannot be used; None: it can."""


class CpuDecoder:
    """Decodes one picture after the other in this thread.

    Args:
        image_size: height and width of the result, pixels.
        max_megapixels: larger pictures (1e6 pixels, by their header) are refused.
    """

    def __init__(self, image_size: int, max_megapixels: float) -> None:
        self.image_size, self.max_megapixels = image_size, max_megapixels

    def __call__(
        self, images: Sequence[bytes], augmentations: Sequence[Augmentation]
    ) -> DecodedImages:
        """Decodes JPEGs, PNGs and WebPs, each with its own augmentation; never raises for one."""
        size = self.image_size
        # Channels last, as pictures come and as Pillow and convolutions want them.
        pixels = empty(len(images), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        errors: list[str | None] = [None] * len(images)
        for row, (content, augmentation) in enumerate(zip(images, augmentations, strict=True)):
            try:
                pixels[row] = self.decode(content, augmentation)
            except BadSample as error:
                pixels[row], errors[row] = 0, error.reason
        return DecodedImages(pixels, tuple(errors))

    def decode(self, content: bytes, augmentation: Augmentation) -> UInt8[Tensor, "3 height width"]:
        """One picture, cropped, resized, flipped and recoloured.

        Raises:
            BadSample: see `decode_image`.
        """
        return self.augment(decode_image(content, self.max_megapixels)[0], augmentation)

    def augment(
        self, image: UInt8[Tensor, "3 _ _"], augmentation: Augmentation
    ) -> UInt8[Tensor, "3 height width"]:
        """What `decode` does after decoding."""
        top, left, height, width = augmentation.box(*image.shape[1:])
        crop = image[None, :, top : top + height, left : left + width]
        crop = crop.contiguous(memory_format=torch.channels_last)  # else the result would not be so
        size = (self.image_size, self.image_size)
        # On 8 bits and not on floats: torch has a faster kernel for them.
        resized = interpolate(crop, size, mode="bilinear", antialias=True)[0]
        flipped = resized.flip(2) if augmentation.flip else resized
        return _recoloured(flipped, augmentation) if augmentation.operations else flipped


def decode_image(
    content: bytes, max_megapixels: float
) -> tuple[UInt8[Tensor, "3 height width"], ImageHeader]:
    """The whole picture in RGB, and what its header says.

    It is upright, as its EXIF orientation says; grey becomes RGB, transparency is dropped, 16 bits
    become 8. Damaged data inside a whole JPEG is decoded as well as it can be, as everywhere else.

    Raises:
        BadSample: not a picture, too large, cut off or broken.
    """
    header = checked_header(content, max_megapixels)
    try:
        array = _decode_jpeg(content) if header.kind == "jpg" else _decode_other(content, header)
    except Exception as error:  # broken pictures raise whatever the decoder stumbled over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadSample(f"{header.kind} picture does not decode: {reason}") from None
    if array.shape != (header.height, header.width, 3):
        raise BadSample(f"{header.kind} picture is not of the size that its header gives")
    return torch.from_numpy(_upright(array, header.orientation)).permute(2, 0, 1), header


def check_image_decodes(content: bytes, max_megapixels: float) -> ImageHeader:
    """Decodes the whole picture once and throws the pixels away.

    Raises:
        BadSample: see `decode_image`.
    """
    return decode_image(content, max_megapixels)[1]


def _decode_jpeg(content: bytes) -> UInt8[np.ndarray, "height width 3"]:
    return simplejpeg.decode_jpeg(content, strict=False)


def _decode_other(content: bytes, header: ImageHeader) -> UInt8[np.ndarray, "height width 3"]:
    # Not `Image.open`, which warns of, or refuses, sizes that our own limit has already judged.
    reader = {"png": PngImageFile, "webp": WebPImageFile}[header.kind]
    with reader(io.BytesIO(content)) as image:
        if image.size != (header.width, header.height):  # a PNG can have a second header, of a bomb
            raise ValueError("it has two sizes")
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if image.mode == "P" and "transparency" in image.info:
            return np.array(image.convert("RGBA").convert("RGB"))  # else Pillow warns
        return np.array(image.convert("RGB"))


def _upright(
    array: UInt8[np.ndarray, "height width 3"], orientation: int
) -> UInt8[np.ndarray, "height width 3"]:
    if orientation == 1:
        return array
    if orientation >= 5:
        array = array.transpose(1, 0, 2)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(array[::down, ::right])


def _recoloured(
    pixels: UInt8[Tensor, "3 height width"], augmentation: Augmentation
) -> UInt8[Tensor, "3 height width"]:
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    for name, magnitude in augmentation.operations:
        image = OPERATIONS[name](image, magnitude)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
