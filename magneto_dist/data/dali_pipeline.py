"""What DALI is asked to do with a JPEG, and the operations of AutoAugment in its own terms.

All parameters come from outside: nothing is drawn here.
"""

# DALI makes its types and its package at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import core
from nvidia.dali.data_node import DataNode

MAX_OPERATIONS = 2
"""Of an `Augmentation`."""
KEEP = "keep as it is"
"""The operation that does nothing."""


@pipeline_def(enable_conditionals=True)
def decoding_and_augmenting(image_size: int, on_gpu: bool) -> DataNode:
    """Pictures of (image_size, image_size, 3), uint8."""
    # Not copied: the caller holds the bytes until the result is there.
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    image = fn.decoders.image_slice(
        encoded,
        fn.external_source(name="crop_start", dtype=types.INT32, ndim=1),
        fn.external_source(name="crop_shape", dtype=types.INT32, ndim=1),
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
        jpeg_fancy_upsampling=True,  # on a GPU, too, colours between samples as libjpeg makes them
    )
    image = fn.resize(
        image, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True
    )
    image = fn.flip(image, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
    for position in range(MAX_OPERATIONS):
        image = core.select(
            list(OPERATIONS.values()),
            fn.external_source(name=f"operation_{position}", dtype=types.INT32, ndim=0),
            image,
            fn.external_source(name=f"magnitude_{position}", dtype=types.FLOAT, ndim=0),
        )
    return image


# Operations, on (height, width, 3); the magnitude is a scalar a picture, in CPU memory -----------


def _shear_x(image: DataNode, tangent: DataNode) -> DataNode:
    matrix = fn.transforms.shear(shear=fn.stack(tangent, tangent * 0))
    return fn.warp_affine(image, matrix=matrix, fill_value=0, interp_type=types.INTERP_NN)


def _rotate(image: DataNode, degrees: DataNode) -> DataNode:
    return fn.rotate(
        image, angle=degrees, keep_size=True, fill_value=0, interp_type=types.INTERP_NN
    )


def _color(image: DataNode, change: DataNode) -> DataNode:
    return fn.saturation(image, saturation=1 + change)


def _contrast(image: DataNode, change: DataNode) -> DataNode:
    mean = fn.reductions.mean(image, axis_names="HW", keep_dims=True)
    grey_mean = fn.reductions.sum(mean * _constant(_LUMA), axis_names="C", keep_dims=True)
    return fn.cast_like(grey_mean + (image - grey_mean) * (1 + change), image)


def _sharpness(image: DataNode, change: DataNode) -> DataNode:
    kernel = _constant(_NO_BLUR) * (1 + change) - _constant(_BLUR) * change
    return fn.filter(image, kernel.gpu() if image.device == "gpu" else kernel)


def _posterize(image: DataNode, bits: DataNode) -> DataNode:
    step = fn.cast(2.0 ** (8.0 - bits), dtype=types.UINT8)
    return (image // step) * step


def _solarize(image: DataNode, threshold: DataNode) -> DataNode:
    dark = image < threshold
    return image * dark + _invert(image, threshold) * (dark ^ True)


def _auto_contrast(image: DataNode, _: DataNode) -> DataNode:
    low = fn.reductions.min(image, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(image, axis_names="HW", keep_dims=True) - low
    flat = span == 0  # such a channel is left alone
    return fn.cast_like((image - low * (flat ^ True)) * (255 / (span + flat * 255.0)), image)


def _equalize(image: DataNode, _: DataNode) -> DataNode:
    return fn.equalize(image)


def _invert(image: DataNode, _: DataNode) -> DataNode:
    return types.Constant(255, dtype=types.UINT8) - image


def _constant(values: np.ndarray) -> object:
    return types.Constant(values.astype(np.float32))


_LUMA = np.array([0.299, 0.587, 0.114])
_NO_BLUR = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
_BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's "smooth"
OPERATIONS: dict[str, Callable[[DataNode, DataNode], DataNode]] = {
    KEEP: lambda image, _: image,
    "ShearX": _shear_x,
    "Rotate": _rotate,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
}
"""As `OPERATIONS` of `decode_cpu.py`."""
