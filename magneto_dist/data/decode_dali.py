"""Encoded pictures -> pixels with NVIDIA DALI, on CPU or GPU.

1. `DaliDecoder` judges the bytes exactly as `decode_cpu.py` does, and gives JPEGs to DALI.
2. The pipeline of DALI decodes only the crop, resizes, flips, and applies the operations.
3. What DALI does not read (PNG, WebP, rare kinds of JPEG) is decoded on CPU.

All parameters come from outside: nothing is drawn here. Pixels differ from those of `CpuDecoder` by
rounding, 0.2 of 255 on average; after Equalize, for which DALI has a formula of its own, by 2.
"""

# DALI makes its types and its package at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.auto_aug import core
from nvidia.dali.data_node import DataNode
from PIL import Image
from torch import Tensor

from magneto_dist.data.augment import Augmentation
from magneto_dist.data.decode_cpu import CpuDecoder, DecodedImages
from magneto_dist.data.image_bytes import checked_header, image_header
from magneto_dist.data.sample import BadSample

_MAX_OPERATIONS = 2  # of an `Augmentation`
_LARGEST_BATCH = 1 << 16  # only a bound
_KEEP = "keep as it is"
_JPEG_COLOURS = ("YCbCr", "Gray")  # others are rare, and DALI reads them in its own way


class DaliDecoder:
    """Decodes a batch of pictures at once.

    Args:
        image_size: height and width of the result, pixels.
        max_megapixels: larger pictures (1e6 pixels, by their header) are refused.
        device: cpu; gpu: the current CUDA device.
        num_threads: of DALI.
    """

    def __init__(
        self,
        image_size: int,
        max_megapixels: float,
        *,
        device: Literal["cpu", "gpu"],
        num_threads: int,
    ) -> None:
        self._cpu = CpuDecoder(image_size, max_megapixels)
        self._num_threads = num_threads
        # Asked for here and now: another thread, which may decode, has its own current device.
        self._device = (
            torch.device("cuda", torch.cuda.current_device())
            if device == "gpu"
            else torch.device("cpu")
        )

    def __call__(
        self, images: Sequence[bytes], augmentations: Sequence[Augmentation]
    ) -> DecodedImages:
        """Decodes JPEGs, PNGs and WebPs, each with its own augmentation; never raises for one.

        Raises:
            RuntimeError: DALI does not work at all.
        """
        size = self._cpu.image_size
        shape = (len(images), 3, size, size)
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        errors: list[str | None] = [None] * len(images)
        for_dali: list[int] = []
        for row, content in enumerate(images):
            try:
                if _dali_reads(content, self._cpu.max_megapixels):
                    for_dali.append(row)
                else:
                    pixels[row] = self._cpu.decode(content, augmentations[row])
            except BadSample as error:
                errors[row] = error.reason
        self._decode_rows(for_dali, images, augmentations, pixels, errors)
        return DecodedImages(pixels, tuple(errors))

    def _decode_rows(
        self,
        rows: Sequence[int],
        images: Sequence[bytes],
        augmentations: Sequence[Augmentation],
        pixels: UInt8[Tensor, "batch 3 height width"],
        errors: list[str | None],
    ) -> None:
        """Fills in `rows` of `pixels` and `errors`; what DALI refuses is decoded on CPU.

        A picture that DALI refuses takes the whole batch down with it: then each is tried alone, so
        that the pixels of a picture never depend on the others in its batch.
        """
        if not rows:
            return
        pipeline = self._pipeline
        try:
            pixels[list(rows)] = _run(
                pipeline, [images[row] for row in rows], [augmentations[row] for row in rows]
            )
        except RuntimeError:
            del self._pipeline  # it is of no use after an error
            if len(rows) > 1:
                for row in rows:
                    self._decode_rows([row], images, augmentations, pixels, errors)
                return
            (row,) = rows
            try:
                pixels[row] = self._cpu.decode(images[row], augmentations[row])
            except BadSample as error:
                errors[row] = error.reason

    @cached_property
    def _pipeline(self) -> Pipeline:
        """Built at the first batch, and again after a picture that it stumbled over."""
        pipeline = _pipeline(
            self._cpu.image_size,
            self._device.type == "cuda",
            batch_size=_LARGEST_BATCH,
            num_threads=self._num_threads,
            device_id=self._device.index,
            prefetch_queue_depth=1,
            enable_conditionals=True,
            exec_dynamic=True,
        )
        pipeline.build()
        # Pictures beyond doubt: if this raises, it is DALI or the device that fails.
        plain = Augmentation((), (0.0, 0.0), (0.0, 0.0), 1.0, False, ())
        _run(pipeline, [_plain_jpeg()] * 2, [plain] * 2)
        return pipeline


@pipeline_def
def _pipeline(image_size: int, on_gpu: bool) -> DataNode:
    """Pictures of (image_size, image_size, 3), uint8."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    image = fn.decoders.image_slice(
        encoded,
        fn.external_source(name="crop_start", dtype=types.INT32, ndim=1),
        fn.external_source(name="crop_shape", dtype=types.INT32, ndim=1),
        axis_names="HW",
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=True,
    )
    image = fn.resize(
        image, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True
    )
    image = fn.flip(image, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
    for position in range(_MAX_OPERATIONS):
        image = core.select(
            list(_OPERATIONS.values()),
            fn.external_source(name=f"operation_{position}", dtype=types.INT32, ndim=0),
            image,
            fn.external_source(name=f"magnitude_{position}", dtype=types.FLOAT, ndim=0),
        )
    return image


def _run(
    pipeline: Pipeline, images: Sequence[bytes], augmentations: Sequence[Augmentation]
) -> UInt8[Tensor, "batch 3 height width"]:
    sizes = [image_header(content).upright_size for content in images]
    boxes = np.array(
        [
            augmentation.box(height, width)
            for augmentation, (height, width) in zip(augmentations, sizes, strict=True)
        ],
        dtype=np.int32,
    )
    inputs: dict[str, object] = {
        "encoded": [np.frombuffer(content, dtype=np.uint8) for content in images],
        "crop_start": boxes[:, :2].copy(),
        "crop_shape": boxes[:, 2:].copy(),
        "flip": np.array([augmentation.flip for augmentation in augmentations], dtype=np.int32),
    }
    names = list(_OPERATIONS)
    for position in range(_MAX_OPERATIONS):
        chosen = [_operation(augmentation, position) for augmentation in augmentations]
        inputs[f"operation_{position}"] = np.array(
            [names.index(name) for name, _ in chosen], dtype=np.int32
        )
        inputs[f"magnitude_{position}"] = np.array(
            [magnitude for _, magnitude in chosen], dtype=np.float32
        )
    (output,) = pipeline.run(**inputs)
    return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


def _operation(augmentation: Augmentation, position: int) -> tuple[str, float]:
    if position < len(augmentation.operations):
        return augmentation.operations[position]
    return _KEEP, 0.0


def _dali_reads(content: bytes, max_megapixels: float) -> bool:
    """Raises a BadSample for what no decoder should see."""
    if checked_header(content, max_megapixels).kind != "jpg":
        return False
    try:
        return simplejpeg.decode_jpeg_header(content, strict=False)[2] in _JPEG_COLOURS
    except ValueError:
        return False  # the decoder for CPU will say why


def _plain_jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    return content.getvalue()


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
_OPERATIONS: dict[str, Callable[[DataNode, DataNode], DataNode]] = {
    _KEEP: lambda image, _: image,
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
