"""How each picture is cropped, flipped and recoloured: parameters only, no pixels.

1. `training_augmentations` draws for every sample of a batch; `evaluation_augmentation` draws
   nothing.
2. A decoder asks `Augmentation.box` for the crop as soon as it knows the picture's size, resizes it
   to the square that the model sees, flips it, and applies the `operations` to that square.

The draws belong to (seed, epoch, sample): every decoder, worker and rank uses the same parameters.
Paper, appendix A.5: flipping, cropping, and the ImageNet policy of AutoAugment (reference 68).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from magneto_dist.config import AugmentConfig
from magneto_dist.data.auto_augment import imagenet_operations
from magneto_dist.data.randomness import uniforms

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to one picture, independent of its size."""

    crops: Sequence[Sequence[float]]
    """Of the crops to try in turn: areas as fractions of the picture's, and log(width / height)."""
    position: tuple[float, float]
    """Where the crop lies: fractions in [0, 1) of the free way down and to the right."""
    centre_log_aspects: tuple[float, float]
    """If no crop fits: the largest one at the centre with log(width / height) in this range ..."""
    centre_fraction: float
    """... with both sides multiplied by this."""
    flip: bool
    """Mirror left and right after the crop."""
    operations: tuple[tuple[str, float], ...]
    """At most two operations of torchvision's AutoAugment by name, with signed magnitudes in its
    units (Rotate: degrees; Posterize: bits kept; Solarize: threshold in 0 to 255; Color: change of
    the factor 1; ShearX: tangent; 0 where an operation has none), in the order of application."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The crop of a picture of this size: top, left, height, width in pixels.

        It lies inside the picture and is at least 1 pixel high and wide. Follows torchvision's
        RandomResizedCrop.
        """
        for area_fraction, log_aspect in zip(*self.crops, strict=True):
            side = math.sqrt(height * width * area_fraction)
            crop_height = round(side * math.exp(-log_aspect / 2))
            crop_width = round(side * math.exp(log_aspect / 2))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(self.position[0] * (height - crop_height + 1))
                left = int(self.position[1] * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        return self._centre_box(height, width)

    def _centre_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        narrowest, widest = (math.exp(log_aspect) for log_aspect in self.centre_log_aspects)
        crop_height = _side(min(height, width / narrowest), self.centre_fraction)
        crop_width = _side(min(width, height * widest), self.centre_fraction)
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def training_augmentations(
    seed: int, epoch: int, sample_ids: Int64[np.ndarray, " batch"], config: AugmentConfig
) -> list[Augmentation]:
    """One augmentation per sample: random-resized crop, flip, AutoAugment's ImageNet policy.

    The area of the crop is uniform in [crop_scale_min, crop_scale_max] of the picture's, its aspect
    ratio log-uniform in [1 / crop_aspect_max, crop_aspect_max]; up to ten draws, until one fits.
    """
    max_log_aspect = math.log(config.crop_aspect_max)
    low = np.array([config.crop_scale_min, -max_log_aspect])
    high = np.array([config.crop_scale_max, max_log_aspect])
    purposes = {"crop": 2 * _CROP_TRIES, "crop position": 2, "flip": 1, "policy": 5}
    crop_draws, positions, flip_draws, policy_draws = uniforms(seed, epoch, sample_ids, purposes)
    crops = low + (high - low) * crop_draws.reshape(-1, _CROP_TRIES, 2)
    crops = crops.swapaxes(1, 2).tolist()
    flips = flip_draws[:, 0] < config.flip_probability
    has_policy = config.policy != "none"
    operations = imagenet_operations(policy_draws) if has_policy else [()] * len(sample_ids)
    return [
        Augmentation(
            crops=crops_of_sample,
            position=(top, left),
            centre_log_aspects=(-max_log_aspect, max_log_aspect),
            centre_fraction=1.0,
            flip=flip,
            operations=operations_of_sample,
        )
        for crops_of_sample, (top, left), flip, operations_of_sample in zip(
            crops, positions.tolist(), flips.tolist(), operations, strict=True
        )
    ]


def evaluation_augmentation(config: AugmentConfig) -> Augmentation:
    """The square at the centre, with eval_crop_fraction of the shorter side; nothing random."""
    return Augmentation(
        crops=(),
        position=(0.0, 0.0),
        centre_log_aspects=(0.0, 0.0),
        centre_fraction=config.eval_crop_fraction,
        flip=False,
        operations=(),
    )


def _side(length: float, fraction: float) -> int:
    return max(1, round(length * fraction))
