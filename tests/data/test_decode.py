"""Both decoders on the same pictures: against independent arithmetic, and against each other."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from magneto_dist.config import AugmentConfig
from magneto_dist.data.augment import (
    Augmentation,
    evaluation_augmentation,
    training_augmentations,
)
from magneto_dist.data.auto_augment import IMAGENET_POLICY
from magneto_dist.data.decode_cpu import OPERATIONS, CpuDecoder, DecodedImages, decode_image
from magneto_dist.data.encoded_images import encoded_images
from magneto_dist.data.sample import BadSample
from pictures import (
    PICTURES,
    encoded,
    jpeg_that_claims,
    jpeg_with_scans,
    png_that_claims,
    png_with_two_headers,
    turned,
    webp_that_claims,
)

SIZE = 48
WHOLE = evaluation_augmentation(AugmentConfig(image_size=SIZE, eval_crop_fraction=1.0))
MAGNITUDES = sorted(
    {
        (operation.name, sign * operation.magnitude)
        for pair in IMAGENET_POLICY
        for operation in pair
        for sign in ((1, -1) if operation.signed else (1,))
    }
)


def photo(seed: int, width: int = 160, height: int = 120, **options: object) -> bytes:
    """Soft colours, with edges: as smooth and as contrasty as a photograph."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    soft = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    top, left = generator.integers(0, 60, 2)
    soft[top : top + 40, left : left + 50] = generator.integers(0, 256, 3)
    content = io.BytesIO()
    Image.fromarray(soft).save(content, "JPEG", quality=92, **options)
    return content.getvalue()


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [photo(seed, 100 + 9 * seed, 170 - 7 * seed) for seed in range(12)]


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def dali(request):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from magneto_dist.data.decode_dali import DaliDecoder

    cpu = CpuDecoder(SIZE, 100.0)
    decode = DaliDecoder(cpu, device=request.param, num_threads=2)
    return lambda images, augmentations: decode(encoded_images(images, augmentations, cpu))


@pytest.fixture
def cpu() -> CpuDecoder:
    return CpuDecoder(SIZE, 100.0)


def training(count: int, size: int = SIZE) -> list[Augmentation]:
    return training_augmentations(3, 1, np.arange(count), AugmentConfig(image_size=size))


def difference(left: DecodedImages, right: DecodedImages) -> torch.Tensor:
    """Mean absolute difference of each picture, of 255."""
    assert left.errors == right.errors
    return (left.pixels.cpu().float() - right.pixels.cpu().float()).abs().flatten(1).mean(1)


# On CPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(PICTURES) - {"png 16 bit"}))  # Pillow clips those
def test_whole_picture_agrees_with_pillow(name):
    _, content = PICTURES[name]
    image, header = decode_image(content, 1.0)
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (3, header.height, header.width)
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.array(opened.convert("RGB"), dtype=np.int32)
    # CMYK is the one that is not exact: another order of the same arithmetic.
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= (name == "jpg CMYK")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_upright_as_pillow_turns_it(orientation, kind):
    content = turned(orientation, kind)
    image, header = decode_image(content, 1.0)
    assert header.upright_size == tuple(image.shape[1:])
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_16_bits_become_8():
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    image, _ = decode_image(content.getvalue(), 1.0)
    assert image[1].flatten().tolist() == list(range(256))


def test_transparent_palette_is_read_without_a_warning():
    content = io.BytesIO()
    image = Image.open(io.BytesIO(encoded(20, 20, "PNG", "P")))
    image.save(content, "PNG", transparency=bytes(range(256)))
    assert decode_image(content.getvalue(), 1.0)[0].float().std() > 30


def test_crop_resize_and_flip_agree_with_pillow(cpu, photos):
    plain = [replace(augmentation, operations=()) for augmentation in training(len(photos))]
    assert {augmentation.flip for augmentation in plain} == {False, True}
    decoded = cpu(photos, plain)
    assert decoded.errors == (None,) * len(photos)
    for content, augmentation, pixels in zip(photos, plain, decoded.pixels, strict=True):
        image = Image.open(io.BytesIO(content))
        top, left, height, width = augmentation.box(image.height, image.width)
        # No margin beyond the crop: a resize with `box` would look over its edges.
        crop = image.crop((left, top, left + width, top + height))
        expected = crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if augmentation.flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        error = np.abs(pixels.permute(1, 2, 0).numpy() - np.array(expected, dtype=np.float64))
        assert error.max() <= 2
        assert error.mean() < 0.5


@pytest.mark.parametrize(("name", "magnitude"), MAGNITUDES)
def test_operations_are_those_of_torchvision(name, magnitude):
    image = Image.open(io.BytesIO(photo(1)))
    ours = OPERATIONS[name](image, magnitude)
    theirs = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
    assert np.array_equal(np.array(ours), np.array(theirs))


def test_policy_has_no_other_operations():
    assert {name for name, _ in MAGNITUDES} == set(OPERATIONS)


def test_operations_come_after_the_flip_and_in_their_order(cpu):
    operations = (("Rotate", 30.0), ("Posterize", 4.0))
    plain, flipped = replace(WHOLE, flip=False), replace(WHOLE, flip=True)
    content = photo(2)
    base = cpu.decode(content, flipped)
    assert torch.equal(base, cpu.decode(content, plain).flip(2))
    image = Image.fromarray(base.permute(1, 2, 0).numpy().copy())
    for name, magnitude in operations:
        image = OPERATIONS[name](image, magnitude)
    decoded = cpu.decode(content, replace(flipped, operations=operations))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.array(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2), (SIZE, SIZE)])
def test_small_and_narrow_pictures(cpu, size):
    decoded = cpu([encoded(*size, "PNG")] * 8, training(8))
    assert decoded.errors == (None,) * 8
    if size == (SIZE, SIZE):
        exact = cpu.decode(encoded(*size, "PNG"), WHOLE)
        assert torch.equal(exact, decode_image(encoded(*size, "PNG"), 1.0)[0])


# What both decoders say of damage ---------------------------------------------------------------

GOOD = photo(4)
MIDDLE = len(GOOD) // 2
BAD = {
    "nothing": b"",
    "no picture": b"no picture",
    "half": GOOD[:MIDDLE],
    "no end": GOOD[:-2],
    "half progressive": photo(4, progressive=True)[:MIDDLE],
    "bomb": jpeg_that_claims(65_500, 65_500),
    "scans": jpeg_with_scans(3000),
    "two sizes": png_with_two_headers(40, 40),
    "other canvas": webp_that_claims(40, 40),
    "header only": png_that_claims(50, 50),
    "no tables": GOOD.replace(b"\xff\xdb", b"\xff\xfe"),
    "half a png": encoded(40, 40, "PNG")[:2000],
    "half a webp": encoded(40, 40, "WEBP")[:500],
}
USABLE = {
    "scrambled in the middle": GOOD[:MIDDLE] + bytes(60) + GOOD[MIDDLE + 60 :],
    "junk behind": GOOD + b"junk" * 5,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_picture_has_a_reason_and_black_pixels(cpu, name):
    decoded = cpu([GOOD, BAD[name], GOOD], [WHOLE] * 3)
    assert decoded.errors[0] is decoded.errors[2] is None
    assert decoded.errors[1]
    assert "\n" not in decoded.errors[1]
    assert not decoded.pixels[1].any()
    assert torch.equal(decoded.pixels[0], decoded.pixels[2])
    with pytest.raises(BadSample):
        decode_image(BAD[name], 100.0)


def test_dali_gives_the_same_reasons_and_leaves_the_others_alone(cpu, dali):
    images = [GOOD, *BAD.values(), *USABLE.values(), GOOD]
    augmentations = [WHOLE] * len(images)
    decoded = dali(images, augmentations)
    assert difference(decoded, cpu(images, augmentations)).max() < 1.5
    alone = dali([GOOD], [WHOLE]).pixels[0]
    assert torch.equal(decoded.pixels[0], alone)
    assert torch.equal(decoded.pixels[-1], alone)
    good = dali([GOOD, GOOD], [WHOLE] * 2)
    assert good.errors == (None, None)
    assert torch.equal(good.pixels[1], alone)


def test_pictures_that_dali_refuses_cost_no_other(cpu, dali, photos):
    augmentations = training(len(photos))
    sound = dali(photos, augmentations)
    images = [BAD["no tables"] if row in (0, 5, 6, 11) else p for row, p in enumerate(photos)]
    decoded = dali(images, augmentations)
    for row in range(len(photos)):
        if row in (0, 5, 6, 11):
            assert decoded.errors[row] == cpu([images[row]], [WHOLE]).errors[0]
            assert not decoded.pixels[row].any()
        else:
            assert decoded.errors[row] is None
            assert torch.equal(decoded.pixels[row], sound.pixels[row])


def test_larger_batch_follows_a_smaller_one_and_an_empty_one(dali, photos):
    for count in (0, 1, 3, 12, 2):
        decoded = dali(photos[:count], training(count))
        assert decoded.pixels.shape == (count, 3, SIZE, SIZE)
        assert decoded.errors == (None,) * count


# DALI against CPU -------------------------------------------------------------------------------


def test_dali_crops_resizes_and_flips_alike(cpu, dali, photos):
    plain = [replace(augmentation, operations=()) for augmentation in training(len(photos))]
    assert difference(dali(photos, plain), cpu(photos, plain)).max() < 0.5
    whole = [WHOLE] * len(photos)
    assert difference(dali(photos, whole), cpu(photos, whole)).max() < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_dali_turns_pictures_upright_before_it_crops(cpu, dali, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photos = [photo(seed, exif=exif) for seed in range(6)]
    plain = [replace(augmentation, operations=()) for augmentation in training(len(photos))]
    assert difference(dali(photos, plain), cpu(photos, plain)).max() < 0.5


@pytest.mark.parametrize(("name", "magnitude"), MAGNITUDES)
def test_dali_operations_are_alike(cpu, dali, photos, name, magnitude):
    plain = [WHOLE] * len(photos)
    recoloured = [replace(WHOLE, operations=((name, magnitude),))] * len(photos)
    ours = dali(photos, recoloured)
    # DALI equalises by OpenCV's formula, which differs from Pillow's in flat histograms.
    assert difference(ours, cpu(photos, recoloured)).mean() < (6 if name == "Equalize" else 1)
    if magnitude or name in ("AutoContrast", "Equalize", "Invert"):
        assert difference(ours, dali(photos, plain)).mean() > 0.3  # it did something


def test_dali_applies_two_operations_in_their_order(cpu, dali, photos):
    pair = (("Invert", 0.0), ("Solarize", 85.0))
    for operations in (pair, pair[::-1]):
        both = [replace(WHOLE, operations=operations)] * len(photos)
        assert difference(dali(photos, both), cpu(photos, both)).mean() < 1
    swapped = [replace(WHOLE, operations=pair[::-1])] * len(photos)
    assert difference(dali(photos, both), dali(photos, swapped)).max() == 0
    first = [replace(WHOLE, operations=pair)] * len(photos)
    assert difference(dali(photos, first), dali(photos, swapped)).mean() > 10


@pytest.mark.parametrize("name", PICTURES)
def test_dali_decodes_every_kind(cpu, dali, name):
    _, content = PICTURES[name]
    images, whole = [content, GOOD], [WHOLE] * 2
    assert difference(dali(images, whole), cpu(images, whole)).max() < 1


def test_dali_result_does_not_depend_on_the_batch(dali, photos):
    augmentations = training(len(photos))
    together = dali(photos, augmentations)
    for row in (0, 5, 11):
        alone = dali([photos[row]], [augmentations[row]])
        assert torch.equal(alone.pixels[0], together.pixels[row])
