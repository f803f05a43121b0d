"""JPEGs -> pixels with NVIDIA DALI, on CPU or GPU; see `encoded_images.py` for what comes before.

1. `DaliDecoder` hands the JPEGs of a batch to a pipeline of DALI.
2. The pipeline decodes only the crop, resizes, flips, and applies the operations.
3. What DALI refuses is decoded on CPU.

All parameters come from outside: nothing is drawn here. Pixels differ from those of `CpuDecoder` by
rounding, 0.2 of 255 on average; after Equalize, for which DALI has a formula of its own, by 2.
"""

# DALI makes its types and its package at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.auto_aug import core
from nvidia.dali.data_node import DataNode
from PIL import Image
from torch import Tensor

from magneto_dist.data.augment import Augmentation
from magneto_dist.data.decode_cpu import CpuDecoder, DecodedImages
from magneto_dist.data.encoded_images import EncodedImages, encoded_images
from magneto_dist.data.sample import BadSample

_MAX_OPERATIONS = 2  # of an `Augmentation`
_KEEP = "keep as it is"
_REFUSED = re.compile(r"sample #(\d+)")  # in DALI's message


class DaliDecoder:
    """Decodes a batch of pictures at once.

    Args:
        cpu: decodes what DALI refuses; knows the size of the result.
        device: cpu; gpu: the current CUDA device.
        num_threads: of DALI.
    """

    def __init__(self, cpu: CpuDecoder, *, device: Literal["cpu", "gpu"], num_threads: int) -> None:
        self._cpu = cpu
        self._num_threads = num_threads
        self._built: tuple[Pipeline, int] | None = None
        """A pipeline, and the largest batch that it takes."""
        # Asked for here and now: another thread, which may decode, has its own current device.
        self._stream = torch.cuda.Stream() if device == "gpu" else None
        self._device = self._stream.device if self._stream else torch.device("cpu")

    def __call__(self, images: EncodedImages) -> DecodedImages:
        """The pixels of a batch, each picture with its own augmentation; never raises for one.

        Raises:
            RuntimeError: DALI or the device does not work at all.
        """
        size = self._cpu.image_size
        errors = list(images.errors)
        with self._own_stream():
            # Channels last, as DALI gives them.
            shape = (len(errors), size, size, 3)
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device).permute(0, 3, 1, 2)
            if self._stream:  # used in another stream, that of the model
                pixels.record_stream(torch.cuda.default_stream(self._device))
            pixels[images.other_rows] = images.other_pixels.to(self._device)
            self._decode_jpegs(images, pixels, errors)
        return DecodedImages(pixels, tuple(errors))

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """On a GPU: copies wait for no work of the model, and are done at the end.

        DALI uses its memory again as soon as a result is dropped, and knows nothing of our copy.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _decode_jpegs(
        self,
        images: EncodedImages,
        pixels: UInt8[Tensor, "batch 3 height width"],
        errors: list[str | None],
    ) -> None:
        """Fills in the JPEGs' rows of `pixels` and `errors`.

        A picture that DALI refuses takes the whole batch down with it. Then those that are no
        better on CPU are left out, or, if there are none, the one that DALI names is decoded
        there: the pixels of a picture never depend on the others in its batch.
        """
        jpegs = list(range(len(images.rows)))
        while jpegs:
            try:
                pixels[images.rows[jpegs]] = self._run(images, jpegs)
                return
            except RuntimeError as error:
                self._built = None  # of no use after an error, says DALI
                named = _REFUSED.search(str(error))
                if named is None or int(named[1]) >= len(jpegs):
                    raise
                refused = jpegs[int(named[1])]
            on_cpu = {number: self._on_cpu(images, number) for number in jpegs}
            bad = {number: result for number, result in on_cpu.items() if isinstance(result, str)}
            for number, reason in bad.items():
                errors[images.rows[number]] = reason
            if not bad:
                pixels[images.rows[refused]] = on_cpu[refused].to(self._device)
            jpegs = [number for number in jpegs if number not in (bad or {refused})]

    def _on_cpu(self, images: EncodedImages, number: int) -> UInt8[Tensor, "3 height width"] | str:
        try:
            return self._cpu.decode(images.jpeg(number).tobytes(), images.augmentations[number])
        except BadSample as error:
            return error.reason

    def _run(
        self, images: EncodedImages, jpegs: Sequence[int]
    ) -> UInt8[Tensor, "jpeg 3 height width"]:
        """Some of the JPEGs, in memory of DALI; built at the first batch and after an error."""
        if self._built is None or self._built[1] < len(images.errors):
            self._built = self._build(len(images.errors)), len(images.errors)
        return _run(self._built[0], images, jpegs)

    def _build(self, batch_size: int) -> Pipeline:
        pipeline = _pipeline(
            self._cpu.image_size,
            self._stream is not None,
            batch_size=max(batch_size, 2),
            num_threads=self._num_threads,
            device_id=self._device.index,
            prefetch_queue_depth=1,
            enable_conditionals=True,
            exec_dynamic=True,
        )
        pipeline.build()
        # Pictures beyond doubt: if this raises, it is DALI or the device that fails.
        plain = Augmentation((), (0.0, 0.0), (0.0, 0.0), 1.0, False, ())
        _run(pipeline, encoded_images([_plain_jpeg()] * 2, [plain] * 2, self._cpu), [0, 1])
        return pipeline


@pipeline_def
def _pipeline(image_size: int, on_gpu: bool) -> DataNode:
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
    pipeline: Pipeline, images: EncodedImages, jpegs: Sequence[int]
) -> UInt8[Tensor, "jpeg 3 height width"]:
    augmentations = [images.augmentations[number] for number in jpegs]
    boxes = images.boxes[list(jpegs)]
    inputs: dict[str, object] = {
        "encoded": [images.jpeg(number) for number in jpegs],
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
    (output,) = pipeline.run(**inputs)  # without a stream: waits for the result
    return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


def _operation(augmentation: Augmentation, position: int) -> tuple[str, float]:
    if position < len(augmentation.operations):
        return augmentation.operations[position]
    return _KEEP, 0.0


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
