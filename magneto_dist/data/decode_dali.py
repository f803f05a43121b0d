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
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from nvidia.dali import Pipeline
from PIL import Image
from torch import Tensor

from magneto_dist.data.augment import Augmentation
from magneto_dist.data.dali_pipeline import (
    KEEP,
    MAX_OPERATIONS,
    OPERATIONS,
    decoding_and_augmenting,
)
from magneto_dist.data.decode_cpu import CpuDecoder, DecodedImages
from magneto_dist.data.encoded_images import EncodedImages, encoded_images
from magneto_dist.data.sample import BadSample

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
        self._batch_size = 1
        """Of the largest batch so far."""
        self._definition: bytes | None = None
        self._pipeline: Pipeline | None = None
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
                self._pipeline = None  # of no use after an error, says DALI
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
        """Some of the JPEGs, in memory of DALI."""
        if len(images.errors) > self._batch_size:
            self._batch_size, self._definition, self._pipeline = len(images.errors), None, None
        if self._pipeline is None:
            self._pipeline = self._build()
        return _run(self._pipeline, images, jpegs)

    def _build(self) -> Pipeline:
        """At the first batch, and after an error."""
        options: dict[str, Any] = {
            "batch_size": self._batch_size,
            "num_threads": self._num_threads,
            "device_id": self._device.index,
            "prefetch_queue_depth": 1,
            "exec_dynamic": True,
        }
        if self._definition is None:  # writing it takes ten times as long as building from it
            written = decoding_and_augmenting(
                self._cpu.image_size, self._stream is not None, **options
            )
            self._definition = written.serialize()
        pipeline = Pipeline(**options)
        pipeline.deserialize_and_build(self._definition)
        # A picture beyond doubt: if this raises, it is DALI or the device that fails.
        plain = Augmentation((), (0.0, 0.0), (0.0, 0.0), 1.0, False, ())
        _run(pipeline, encoded_images([_plain_jpeg()], [plain], self._cpu), [0])
        return pipeline


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
    names = list(OPERATIONS)
    for position in range(MAX_OPERATIONS):
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
    return KEEP, 0.0


def _plain_jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    return content.getvalue()
