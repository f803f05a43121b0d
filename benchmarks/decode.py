"""Which library decodes and resizes photographs fastest on a CPU core, and how exact is it?

python benchmarks/decode.py --photos FOLDER_OF_JPEGS --question decode|resize|decoders

decode: a whole JPEG to RGB. resize: the same, then random-resized crops to --size pixels.
decoders: our two decoders, without and with AutoAugment. One thread each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn.functional import interpolate

from command_line import at_least, folder_of_jpegs, parser
from harness import compare, report
from magneto_dist.config import AugmentConfig
from magneto_dist.data.augment import Augmentation, training_augmentations
from magneto_dist.data.decode_cpu import CpuDecoder, check_image_decodes
from magneto_dist.data.encoded_images import encoded_images
from magneto_dist.data.sample import BadSample
from magneto_dist.errors import InputError, exit_with_clear_errors

Pixels = np.ndarray
Box = tuple[int, int, int, int]
MAX_MEGAPIXELS = 100.0


def main() -> None:
    """Command line -> table, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--photos", type=folder_of_jpegs, required=True, help="folder with *.jpg")
    options.add_argument("--question", choices=("decode", "resize", "decoders"), required=True)
    options.add_argument("--size", type=at_least(1), default=224, help="pixels (default: 224)")
    given = options.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = [_read(path) for path in sorted(given.photos.glob("*.jpg"))]
    numbers = np.arange(len(images))
    augmentations = training_augmentations(0, 0, numbers, AugmentConfig(image_size=given.size))
    if given.question == "decode":
        ways: dict[str, Callable[[], object]] = {
            name: lambda decode=decode: _each(decode, images) for name, decode in DECODE.items()
        }
        notes: dict[str, str] = {}
    elif given.question == "resize":
        boxes = [_box(image, aug) for image, aug in zip(images, augmentations, strict=True)]
        ways, notes = {}, {}
        exact = [_pillow(image, box, given.size) for image, box in zip(images, boxes, strict=True)]
        for name, resize in RESIZE.items():
            pairs = list(zip(images, boxes, strict=True))
            made = [resize(image, box, given.size) for image, box in pairs]
            error = np.mean([np.abs(m - e.astype(float)) for m, e in zip(made, exact, strict=True)])
            notes[name] = f"differs from Pillow by {error:.2f} of 255"
            ways[name] = lambda resize=resize, pairs=pairs: _each(
                lambda pair: resize(*pair, given.size), pairs
            )
    else:
        ways, notes = _decoders(images, augmentations, given.size)
    question = f"{given.question}, {len(images)} photographs, {given.size} px, one thread"
    report(question, compare(ways, len(images), given.rounds, notes), given.out)


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        kind = check_image_decodes(content, MAX_MEGAPIXELS).kind
    except BadSample as error:
        raise InputError(f"{path}: {error}") from None
    if kind != "jpg":
        raise InputError(f"{path}: is a {kind} picture; give JPEGs")
    return content


def _each(work: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Keeps no result: fresh memory for every picture would be a third of the time."""
    for item in items:
        work(item)


def _decoders(
    images: list[bytes], augmentations: list[Augmentation], size: int
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    from magneto_dist.data.decode_dali import DaliDecoder

    cpu = CpuDecoder(size, MAX_MEGAPIXELS)
    plain = [replace(augmentation, operations=()) for augmentation in augmentations]
    ways: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for policy, chosen in (("", plain), (", AutoAugment", augmentations)):
        ways[f"cpu{policy}"] = lambda chosen=chosen: cpu(images, chosen)
        reference = cpu(images, chosen).pixels.float()
        for device in ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",):
            dali = DaliDecoder(cpu, device=device, num_threads=1)
            # What comes before is done in loader processes; the cpu decoder's time holds its share.
            encoded = encoded_images(images, chosen, cpu)
            name = f"dali_{device}{policy}"
            ways[name] = lambda dali=dali, encoded=encoded: dali(encoded)
            error = (dali(encoded).pixels.cpu().float() - reference).abs().mean()
            notes[name] = f"differs from cpu by {error:.2f} of 255"
    return ways, notes


def _decode_pillow(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _decode_opencv(content: bytes) -> Pixels:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)


def _box(content: bytes, augmentation: Augmentation) -> Box:
    height, width = simplejpeg.decode_jpeg_header(content)[:2]
    return augmentation.box(height, width)


def _crop(pixels: Pixels, box: Box) -> Pixels:
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _pillow(content: bytes, box: Box, size: int) -> Pixels:
    cropped = Image.fromarray(_crop(_decode_pillow(content), box))
    return np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))


def _torch(content: bytes, box: Box, size: int) -> Pixels:
    crop = torch.from_numpy(_crop(simplejpeg.decode_jpeg(content), box)).permute(2, 0, 1)[None]
    resized = interpolate(crop, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _opencv(interpolation: int) -> Callable[[bytes, Box, int], Pixels]:
    return lambda content, box, size: cv2.resize(
        _crop(simplejpeg.decode_jpeg(content), box), (size, size), interpolation=interpolation
    )


DECODE: dict[str, Callable[[bytes], Pixels]] = {
    "simplejpeg": simplejpeg.decode_jpeg,
    "opencv": _decode_opencv,
    "pillow": _decode_pillow,
}
RESIZE: dict[str, Callable[[bytes, Box, int], Pixels]] = {
    "simplejpeg + torch antialias": _torch,
    "simplejpeg + opencv linear": _opencv(cv2.INTER_LINEAR),
    "simplejpeg + opencv area": _opencv(cv2.INTER_AREA),
    "pillow": _pillow,
}


if __name__ == "__main__":
    exit_with_clear_errors(main)
