"""Crop, flip and policy parameters: inside the picture, distributed as published, per sample."""

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import AutoAugment, RandomResizedCrop

from magneto_dist.config import AugmentConfig
from magneto_dist.data.augment import evaluation_augmentation, training_augmentations
from magneto_dist.data.auto_augment import IMAGENET_POLICY, imagenet_operations

SIDES = st.integers(1, 12) | st.integers(1, 20_000)
CONFIGS = st.builds(
    lambda low, share, aspect, fraction: AugmentConfig(
        crop_scale_min=low,
        crop_scale_max=low + (1 - low) * share,
        crop_aspect_max=aspect,
        eval_crop_fraction=fraction,
    ),
    low=st.floats(0.001, 1),
    share=st.floats(0, 1),
    aspect=st.floats(1, 10),
    fraction=st.floats(0.001, 1),
)
NUM = 20_000
AUTO_AUGMENT = AutoAugment()
SPACE = AUTO_AUGMENT._augmentation_space(10, (224, 224))


def assert_uniform(values: np.ndarray) -> None:
    """Kolmogorov-Smirnov against the uniform distribution on [0, 1], at its 1e-5 quantile."""
    distance = np.abs(np.sort(values) - np.arange(1, len(values) + 1) / len(values)).max()
    assert distance < 2.47 / math.sqrt(len(values))


def assert_probability(successes: int, trials: int, probability: float) -> None:
    deviation = math.sqrt(trials * probability * (1 - probability))
    quantile = NormalDist().inv_cdf(1 - 1e-6)
    assert abs(successes - trials * probability) <= quantile * deviation


def assert_inside(box: tuple[int, int, int, int], height: int, width: int) -> None:
    top, left, crop_height, crop_width = box
    assert all(type(number) is int for number in box)
    assert 0 <= top < top + crop_height <= height
    assert 0 <= left < left + crop_width <= width


@given(CONFIGS, SIDES, SIDES, st.integers(0, 1000))
def test_the_box_lies_inside_the_picture(
    config: AugmentConfig, height: int, width: int, sample: int
) -> None:
    for augmentation in training_augmentations(0, 0, np.arange(sample, sample + 3), config):
        assert_inside(augmentation.box(height, width), height, width)
    assert_inside(evaluation_augmentation(config).box(height, width), height, width)


def test_area_aspect_and_position_are_uniform() -> None:
    # In so large a picture, and with at most half of its area, the first try always fits.
    config = AugmentConfig(
        crop_scale_min=0.1, crop_scale_max=0.5, crop_aspect_max=1.9, policy="none"
    )
    side = 100_000
    boxes = [a.box(side, side) for a in training_augmentations(0, 0, np.arange(NUM), config)]
    top, left, height, width = np.array(boxes, dtype=np.float64).T
    draws = np.stack(
        [
            (height * width / side**2 - 0.1) / 0.4,
            (np.log(width / height) / math.log(1.9) + 1) / 2,
            top / (side - height),
            left / (side - width),
        ]
    )
    for values in draws:
        assert_uniform(values)
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 5 / math.sqrt(NUM)


def test_a_crop_takes_every_place_equally_often() -> None:
    # A quarter of 6 x 8 pixels at aspect 1 is sqrt(12) pixels high and wide, rounded to 3.
    config = AugmentConfig(
        crop_scale_min=0.25, crop_scale_max=0.25, crop_aspect_max=1.0, policy="none"
    )
    boxes = Counter(a.box(6, 8) for a in training_augmentations(0, 0, np.arange(NUM), config))
    assert set(boxes) == {(top, left, 3, 3) for top in range(4) for left in range(6)}
    for count in boxes.values():
        assert_probability(count, NUM, 1 / 24)


def test_crops_are_distributed_as_in_torchvision() -> None:
    # A wide picture: many tries fail, so that the whole loop takes part.
    height, width, num = 60, 240, 5000
    config = AugmentConfig(crop_scale_min=0.3, crop_scale_max=1.0, crop_aspect_max=4 / 3)
    ours = [a.box(height, width) for a in training_augmentations(0, 0, np.arange(num), config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        picture = torch.empty(3, height, width)
        theirs = [
            RandomResizedCrop.get_params(picture, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(num)
        ]
    for mine, reference in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        # Two-sample Kolmogorov-Smirnov at its 1e-5 quantile.
        points = np.arange(width + 1)
        distance = [
            abs(
                np.searchsorted(np.sort(mine), p, "right")
                - np.searchsorted(np.sort(reference), p, "right")
            )
            for p in points
        ]
        assert max(distance) / num < 2.47 * math.sqrt(2 / num)


@pytest.mark.parametrize("size", [(30, 1000), (1000, 30), (7, 1), (1, 7), (333, 3)])
def test_where_no_crop_fits_the_centre_is_taken_as_in_torchvision(size: tuple[int, int]) -> None:
    config = AugmentConfig(crop_scale_min=0.5, crop_scale_max=1.0, crop_aspect_max=1.3)
    (augmentation,) = training_augmentations(0, 0, np.arange(1), config)
    reference = RandomResizedCrop.get_params(torch.empty(3, *size), [0.5, 1.0], [1 / 1.3, 1.3])
    assert augmentation.box(*size) == tuple(reference)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((375, 500), (23, 86, 328, 328)),
        ((500, 375), (86, 23, 328, 328)),
        ((256, 256), (16, 16, 224, 224)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 9), (0, 4, 1, 1)),
    ],
)
def test_evaluation_takes_the_centre_square(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    augmentation = evaluation_augmentation(AugmentConfig(eval_crop_fraction=0.875))
    assert augmentation.box(*size) == box
    assert not augmentation.flip
    assert augmentation.operations == ()


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_flips_are_as_frequent_as_asked(probability: float) -> None:
    config = AugmentConfig(flip_probability=probability, policy="none")
    flips = [a.flip for a in training_augmentations(0, 0, np.arange(NUM), config)]
    assert all(type(flip) is bool for flip in flips)
    assert_probability(sum(flips), NUM, probability)


def test_the_policy_is_that_of_torchvision() -> None:
    for ours, theirs in zip(IMAGENET_POLICY, AUTO_AUGMENT.policies, strict=True):
        for operation, (name, probability, magnitude_bin) in zip(ours, theirs, strict=True):
            magnitudes, signed = SPACE[name]
            magnitude = 0.0 if magnitude_bin is None else magnitudes[magnitude_bin].item()
            assert operation[:2] == (name, probability)
            assert operation.magnitude == pytest.approx(magnitude, rel=1e-6)
            assert operation.signed == signed


def test_operations_are_what_a_plain_loop_makes_of_the_draws() -> None:
    draws = np.random.default_rng(0).random((3000, 5))
    for row, operations in zip(draws.tolist(), imagenet_operations(draws), strict=True):
        expected = []
        for number, operation in enumerate(IMAGENET_POLICY[math.floor(row[0] * 25)]):
            if row[1 + number] < operation.probability:
                sign = -1 if operation.signed and row[3 + number] < 0.5 else 1
                expected.append((operation.name, sign * operation.magnitude))
        assert operations == tuple(expected)


def test_policies_are_as_frequent_as_published() -> None:
    table = AUTO_AUGMENT.policies
    assert len(table) == 25
    expected: Counter = Counter()
    for first, second in table:
        for apply_first in (True, False):
            for apply_second in (True, False):
                chance = (first[1] if apply_first else 1 - first[1]) / len(table)
                chance *= second[1] if apply_second else 1 - second[1]
                operations = [op for op, on in ((first, apply_first), (second, apply_second)) if on]
                expected[tuple(operation_key(name, bin_) for name, _, bin_ in operations)] += chance
    drawn = Counter(
        tuple((name, round(abs(magnitude), 4)) for name, magnitude in a.operations)
        for a in training_augmentations(0, 0, np.arange(NUM), AugmentConfig())
    )
    assert set(drawn) <= {key for key, chance in expected.items() if chance > 0}
    for key, chance in expected.items():
        assert_probability(drawn[key], NUM, min(chance, 1.0))


def operation_key(name: str, magnitude_bin: int | None) -> tuple[str, float]:
    return name, 0.0 if magnitude_bin is None else round(SPACE[name][0][magnitude_bin].item(), 4)


def test_signs_are_symmetric() -> None:
    signs: dict[str, list[bool]] = {}
    for augmentation in training_augmentations(0, 0, np.arange(NUM), AugmentConfig()):
        for name, magnitude in augmentation.operations:
            if magnitude:
                signs.setdefault(name, []).append(magnitude < 0)
    assert len(signs) == 7
    for name, negative in signs.items():
        assert_probability(sum(negative), len(negative), 0.5 if SPACE[name][1] else 0.0)


def test_without_a_policy_no_operation_is_applied() -> None:
    config = AugmentConfig(policy="none")
    plain = training_augmentations(0, 0, np.arange(100), config)
    assert all(a.operations == () for a in plain)
    coloured = training_augmentations(0, 0, np.arange(100), AugmentConfig())
    assert [(a.crops, a.flip) for a in plain] == [(a.crops, a.flip) for a in coloured]


@given(st.lists(st.integers(0, 10**9), max_size=8), st.integers(0, 3), st.integers(0, 8))
def test_a_sample_does_not_see_its_batch(ids: list[int], epoch: int, cut: int) -> None:
    config, sample_ids = AugmentConfig(), np.array(ids, dtype=np.int64)
    whole = training_augmentations(5, epoch, sample_ids, config)
    parts = [
        training_augmentations(5, epoch, p, config) for p in (sample_ids[:cut], sample_ids[cut:])
    ]
    assert whole == parts[0] + parts[1]


def test_draws_change_with_sample_epoch_and_seed() -> None:
    variants = [
        training_augmentations(seed, epoch, np.array([sample]), AugmentConfig())[0].crops
        for seed, epoch, sample in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len(set(map(str, variants))) == 4


def test_the_random_state_of_torch_is_left_alone() -> None:
    before = torch.get_rng_state()
    training_augmentations(0, 0, np.arange(10), AugmentConfig(image_size=97))
    assert torch.equal(torch.get_rng_state(), before)
