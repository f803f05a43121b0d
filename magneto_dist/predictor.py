"""A trained model in Python: pictures and their tags -> which tags are the important ones.

    predictor = Predictor.from_pretrained("runs/mine")
    predictor.predict("a.jpg", ["sea", "dog", "2019"])["predicted"]

1. `_Given` makes items of what is given: files as they are, what is decoded already as PNG, so that
   one way leads to the pixels, that of `launchers/predict.py`.
2. `inference.predict` scores them; the model's decision says which tags are predicted.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from magneto_dist.hub import Magneto
from magneto_dist.inference import predict
from magneto_dist.trained_run import TrainedRun

Picture: TypeAlias = (
    "str | os.PathLike[str] | bytes | Image.Image | UInt8[np.ndarray, 'height width 3']"
)
"""A path, the content of a JPEG, PNG or WebP file, or a decoded picture (arrays in RGB)."""
_PICTURES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Predictor:
    """Says of each tag of a picture how likely it is an important one.

    Vocabulary, preprocessing, precision, threshold and temperature are the model's. The rule for
    tags: those that are not in its vocabulary, letter by letter, are not scored but reported as
    "unknown_tags"; those beyond its longest list as "cut_tags"; a picture without a known tag has
    an "error".

    Args:
        run: from `load_run` or `load_exported`.
        threshold: probability in [0, 1] of a predicted tag, the network's own, before any
            temperature; None: the run's.
        temperature: what log-odds are divided by, above 0, for the probabilities that are given
            back; 1: none; None: the run's. It changes no predicted tag.

    Raises:
        InputError: no probability, or no temperature above 0.
    """

    def __init__(
        self, run: TrainedRun, threshold: float | None = None, temperature: float | None = None
    ) -> None:
        self.run = run
        self.decision = Decision(
            run.decision.threshold if threshold is None else threshold,
            run.decision.temperature if temperature is None else temperature,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        threshold: float | None = None,
        temperature: float | None = None,
        **download: Any,
    ) -> Predictor:
        """Reads a run folder, an exported folder, or a model of the Hub.

        Args:
            path_or_hub_id: see `Magneto.from_pretrained`, also for what it raises.
            device: to compute on; None: the first GPU, if there is one.
            threshold: as above.
            temperature: as above.
            download: as there.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        run = Magneto.from_pretrained(path_or_hub_id, device=device, **download).run
        return cls(run, threshold, temperature)

    def predict(
        self,
        images: Picture | Sequence[Picture] | None,
        tags: Sequence[str] | Sequence[Sequence[str]],
        *,
        batch_size: int = 64,
    ) -> Any:
        """What the model says of one picture, or of many.

        Args:
            images: one picture, or a sequence of them; None for a model that looks at none.
            tags: those of the one picture, or of each.
            batch_size: pictures per forward pass; the others wait as they were given.

        Returns:
            For one picture a dictionary, for many a list of them in their order. Each is what
            `launchers/predict.py` writes of an item: "key" (the path, else the number from 0),
            "predicted" (tags from the threshold on, best first), "tags" (those that were scored)
            and along them "probability", and where the model has them "image", "tag" (both streams)
            and "alpha" (weight of the picture); "unknown_tags" and "cut_tags" where there are some.
            Or "key" and "error": a picture that cannot be read keeps no other from being scored.

        Raises:
            InputError: something else than pictures and lists of tags, or not as many of both.
        """
        is_one = isinstance(images, _PICTURES) or (images is None and _is_list_of_tags(tags))
        sees_pictures = self.run.config.model.sees_pictures
        if images is None and sees_pictures:
            raise InputError("this model looks at pictures: give one for each list of tags")
        items = _given([images] if is_one else images, [tags] if is_one else tags, sees_pictures)
        everything = [range(len(items))]
        scored = predict(
            self.run,
            items,
            everything,
            batch_size=batch_size,
            num_workers=0,
            temperature=self.decision.temperature,
        )
        lines = [item.as_json(self.decision.calibrated_threshold) for item in scored]
        return lines[0] if is_one else lines


@dataclass(frozen=True)
class _Given:
    """Pictures and tags as `Items`."""

    images: Sequence[Any]
    tags: Sequence[Sequence[str]]
    with_images: bool

    def __len__(self) -> int:
        return len(self.tags)

    def read(self, numbers: Sequence[int]) -> list[Sample | BadSample]:
        """See `Items`."""
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> Sample | BadSample:
        image = self.images[number]
        key = os.fspath(image) if isinstance(image, str | os.PathLike) else str(number)
        try:
            content = _content(image) if self.with_images else None
        except (OSError, ValueError) as error:  # as other pictures that cannot be used
            reason = getattr(error, "strerror", None) or str(error)
            return BadSample(f"picture cannot be read: {reason}", key)
        return Sample(key, content, tuple(dict.fromkeys(self.tags[number])), None)


def _given(images: Any, tags: Any, with_images: bool) -> _Given:
    """Checks what can be checked before anything is read."""
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise InputError("tags: give a list of strings for one picture, or one such list for each")
    for number, each in enumerate(tags):
        if not _is_list_of_tags(each):
            raise InputError(f"tags of picture {number}: {each!r} is no list of strings")
    images = [None] * len(tags) if images is None else images
    if not isinstance(images, Sequence):
        raise InputError(f"images: {type(images).__name__} is neither a picture nor a list of them")
    if len(images) != len(tags):
        raise InputError(f"{len(images)} pictures and {len(tags)} lists of tags: give one for each")
    for number, image in enumerate(images):
        _require_picture(image, number)
    return _Given(images, tags, with_images)


def _is_list_of_tags(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_list and all(isinstance(tag, str) for tag in value)


def _require_picture(image: Any, number: int) -> None:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(
                f"picture {number}: an array of {image.dtype} {list(image.shape)}; give uint8"
                " [height, width, 3] in RGB, several of them as a list"
            )
    elif image is not None and not isinstance(image, _PICTURES):
        raise InputError(
            f"picture {number}: {type(image).__name__} is no path, bytes, PIL image or array"
        )


def _content(image: Any) -> bytes:
    """The picture as a file holds it."""
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = ImageOps.exif_transpose(image)
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
