"""NUS-WIDE's user tags, simulated: for trying its importer where the real ones are not at hand.

    python benchmarks/nus_wide_tags.py --groundtruth Groundtruth.zip --concepts ConceptsList.zip \
        --images image_list.csv.gz --out ROOT
    python launchers/shards.py build nus-wide --root ROOT --out DIR --annotations_only true

`ROOT` becomes a distribution in which labels and image lists are real and `AllTags81.txt` is drawn:

1. As many images as published have tags, have tags and labels, and have tags that cover all labels
   (`nus_wide.PUBLISHED`), in each split; images with few labels are covered more often.
2. A covered image has its labels, and further tags; the share of labels among its tags gets the
   published mean and deviation. See `_fit`.
3. Any other image has tags of which one label is missing; the number of tags of an image gets the
   published mean and deviation over all images.
4. Which tags: frequent concepts more often, labels of the image ten times as often.

Only numbers are calibrated: no conclusion about people's tags can be drawn from these.
"""

from __future__ import annotations

import csv
import gzip
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from command_line import Parser, at_least, folder_to_fill
from magneto_dist.data.sources.nus_wide import PUBLISHED
from magneto_dist.data.sources.nus_wide_files import Distribution, item_id, read_distribution
from magneto_dist.errors import InputError, exit_with_clear_errors

TAGS_MEAN, TAGS_STD, TAGS_MAX = 0.871469, 1.213628, 20
"""Tags of an image, over all images; as published."""
SHARE_MEAN, SHARE_STD, SHARE_MIN, COVERED_MAX = 0.850118, 0.232185, 1 / 11, 13
"""Labels among the tags of a covered image; most tags of one."""


def write_root(
    out: Path,
    groundtruth: Path,
    concepts: Path,
    images: Path,
    known: Mapping[str, tuple[str, ...]] | None = None,
    seed: int = 0,
) -> None:
    """Writes a distribution with simulated tags.

    Args:
        out: folder; made if absent.
        groundtruth: `Groundtruth.zip` as distributed.
        concepts: `ConceptsList.zip` as distributed.
        images: compressed CSV with a header, and columns path and split ("train" or "test").
        known: item id -> the tags that it really has, which cover its labels.
        seed: of all that is drawn.

    Raises:
        InputError: a file is not there, or not what it should be.
    """
    out.mkdir(parents=True, exist_ok=True)
    for source in (groundtruth, concepts):
        if not source.is_file():
            raise InputError(f"{source}: there is no such file")
        shutil.copyfile(source, out / source.name)
    _write_lists(out / "ImageList", images)
    num_images = (out / "ImageList/Imagelist.txt").read_bytes().count(b"\n")
    # Read once with no tags at all, for the real labels.
    tags_file = out / "NUS_WID_Tags" / "AllTags81.txt"
    tags_file.parent.mkdir(exist_ok=True)
    _write_flags(tags_file, np.zeros((num_images, 81), dtype=bool))
    tags = draw_tags(read_distribution(out), known or {}, np.random.default_rng(seed))
    _write_flags(tags_file, tags)


def draw_tags(
    real: Distribution, known: Mapping[str, tuple[str, ...]], rng: np.random.Generator
) -> np.ndarray:
    """[image, concept] bool: see above."""
    labels, num_labels = real.ground_truth, real.ground_truth.sum(axis=1)
    ids = np.array([item_id(path) for path in real.paths])
    known_rows = np.flatnonzero(np.isin(ids, list(known)))
    covered = _covered(real, num_labels, ids, known_rows, rng)
    is_free = ~np.isin(np.arange(len(ids)), np.concatenate([covered, known_rows]))
    partly = rng.choice(
        np.flatnonzero(is_free & (num_labels > 0)),
        PUBLISHED["with_both"] - PUBLISHED["covered"],
        replace=False,
    )
    unlabelled = rng.choice(
        np.flatnonzero(num_labels == 0),
        PUBLISHED["with_tags"] - PUBLISHED["with_both"],
        replace=False,
    )
    other = np.concatenate([partly, unlabelled])

    num_tags = np.zeros(len(ids), dtype=np.int64)
    num_tags[known_rows] = [len(known[ids[row]]) for row in known_rows]
    num_tags[covered] = num_labels[covered] + _further_of_covered(num_labels[covered], rng)
    num_tags[other] = 1 + _further_of_others(num_tags, len(other), rng)
    tags = _which(labels, num_tags, partly, covered, rng)
    for row in known_rows:
        tags[row] = [concept in known[ids[row]] for concept in real.vocabulary.tags]
    return tags


def _covered(
    real: Distribution,
    num_labels: np.ndarray,
    ids: np.ndarray,
    known_rows: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The rows whose tags cover their labels, besides those that are known to."""
    _, first, times = np.unique(ids, return_index=True, return_counts=True)
    is_once = np.zeros(len(ids), dtype=bool)
    is_once[first[times == 1]] = True
    # One image of the published count is in both splits there.
    wanted = {"train": PUBLISHED["train"], "validation": PUBLISHED["covered"] - PUBLISHED["train"]}
    chosen = []
    for split, rows in real.rows.items():
        known_here = np.intersect1d(rows, known_rows)
        rows = rows[is_once[rows] & (num_labels[rows] > 0) & ~np.isin(rows, known_rows)]
        rows = rows[num_labels[rows] < COVERED_MAX]
        weight = 0.4 ** num_labels[rows]
        number = wanted[split] - len(known_here)
        chosen.append(rng.choice(rows, number, replace=False, p=weight / weight.sum()))
    return np.concatenate(chosen)


def _further_of_covered(num_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many tags that are no labels; two images have the least share, and the most tags."""
    most = np.minimum(COVERED_MAX - num_labels, round(1 / SHARE_MIN - 1) * num_labels)

    def error(further: np.ndarray) -> tuple[float, float]:
        share = num_labels / (num_labels + further)
        return SHARE_MEAN - share.mean(), share.std() - SHARE_STD

    further = _fit(error, most, rng)
    further[np.flatnonzero(num_labels == 1)[0]] = round(1 / SHARE_MIN - 1)
    further[np.flatnonzero(num_labels == 2)[0]] = COVERED_MAX - 2
    return further


def _further_of_others(num_tags: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """How many tags besides the first, so that mean and deviation over all images come out."""
    total = round(TAGS_MEAN * len(num_tags)) - num_tags.sum() - number
    squares = len(num_tags) * (TAGS_STD**2 + TAGS_MEAN**2) - (num_tags**2).sum()
    most = np.full(number, TAGS_MAX - 1)

    def error(further: np.ndarray) -> tuple[float, float]:
        return float(further.sum() - total), float(((1 + further) ** 2).sum() - squares)

    further = _fit(error, most, rng)
    further[0] = TAGS_MAX - 1
    # To the last tag: the sum is published with six digits.
    while (over := int(further.sum() - total)) != 0:
        rows = 1 + np.flatnonzero((further[1:] > 0) if over > 0 else (further[1:] < TAGS_MAX - 1))
        further[rng.choice(rows, min(abs(over), len(rows)), replace=False)] -= np.sign(over)
    return further


def _fit(
    error: Callable[[np.ndarray], tuple[float, float]], most: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Numbers that are 0 with a chance p, else 1 + geometric(q), at most `most`.

    p and q are found by bisection, so that both errors vanish: the first falls with p, and the
    second rises with q where p keeps the first at nothing.
    """
    first, second = rng.random(len(most)), rng.random(len(most))

    def numbers(p: float, q: float) -> np.ndarray:
        tail = 1 + np.floor(np.log(second) / np.log(q)).astype(np.int64)
        return np.where(first < p, 0, np.minimum(tail, most))

    def p_for(q: float) -> float:
        return _bisect(lambda p: -error(numbers(p, q))[0])

    q = _bisect(lambda q: error(numbers(p_for(q), q))[1])
    return numbers(p_for(q), q)


def _bisect(rising: Callable[[float], float]) -> float:
    """Where a rising function of (0, 1) crosses 0."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _which(
    labels: np.ndarray,
    num_tags: np.ndarray,
    partly: np.ndarray,
    covered: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """[image, concept] bool: the tags that a weighted draw without repetition gives."""
    frequency = labels.mean(axis=0) + 1e-4
    # Efraimidis & Spirakis: the k smallest of exponential variables with these rates.
    order = rng.exponential(size=labels.shape).astype(np.float32) / frequency
    order[labels] /= 10
    order[covered] = np.where(labels[covered], -1, order[covered])
    # One label is no tag of an image that is not covered.
    chance = np.where(labels[partly], rng.random((len(partly), labels.shape[1])), -1)
    order[partly, chance.argmax(axis=1)] = np.inf
    rank = order.argsort(axis=1).argsort(axis=1)
    return rank < num_tags[:, None]


def _write_lists(folder: Path, images: Path) -> None:
    folder.mkdir(exist_ok=True)
    try:
        with gzip.open(images, "rt", newline="") as file:
            rows = [(row["path"].replace("/", "\\"), row["split"]) for row in csv.DictReader(file)]
    except (OSError, EOFError, ValueError, KeyError, csv.Error) as error:
        raise InputError(f"{images}: no list of images can be read ({error!r})") from None
    if len(rows) != PUBLISHED["listed"]:
        raise InputError(f"{images}: lists {len(rows)} images, not {PUBLISHED['listed']}")
    for name, splits in (("Image", ("train", "test")), ("Train", ("train",)), ("Test", ("test",))):
        listed = "".join(f"{path}\r\n" for path, split in rows if split in splits)
        file_name = "Imagelist.txt" if name == "Image" else f"{name}Imagelist.txt"
        (folder / file_name).write_bytes(listed.encode())


def _write_flags(path: Path, flags: np.ndarray) -> None:
    """As distributed: values between blanks, and one more blank at the end of a line."""
    lines = np.full((len(flags), 2 * flags.shape[1] + 1), ord(" "), dtype=np.uint8)
    lines[:, :-1:2] = flags + ord("0")
    lines[:, -1] = ord("\n")
    path.write_bytes(lines.tobytes())


def main() -> None:
    """Command line -> a distribution."""
    parser = Parser(__doc__)
    parser.add_argument("--groundtruth", type=Path, required=True, help="Groundtruth.zip")
    parser.add_argument("--concepts", type=Path, required=True, help="ConceptsList.zip")
    parser.add_argument("--images", type=Path, required=True, help=".csv.gz with path and split")
    parser.add_argument("--out", type=folder_to_fill, required=True, help="folder to write")
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args()
    write_root(
        options.out, options.groundtruth, options.concepts, options.images, None, options.seed
    )


if __name__ == "__main__":
    exit_with_clear_errors(main)
