from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import demo, demo_pictures
from magneto_dist.data.sources.demo import DemoRow
from magneto_dist.errors import InputError
from tar_samples import tar_samples
from warm import PATIENCE_S

VISUAL = {*demo_pictures.SHAPES, *demo_pictures.COLOURS, *demo_pictures.TINTS}
VISUAL |= set(demo_pictures.TEXTURES)
PLACE_OF = {thing: place for place, things in demo.PLACES.items() for thing in things}


@pytest.fixture(scope="module")
def items() -> list[Sample]:
    return [demo.load_item(DemoRow(0, "train", index)) for index in range(600)]


def importance(item: Sample) -> dict[str, bool]:
    return dict(zip(item.tags, item.important or (), strict=True))


def scenes(count: int) -> list[demo_pictures.Scene]:
    return [demo_pictures.random_scene(np.random.default_rng(seed)) for seed in range(count)]


def test_an_item_belongs_to_seed_split_and_index() -> None:
    row = DemoRow(1, "train", 5)
    assert demo.load_item(row) == demo.load_item(row)
    others = [row._replace(seed=2), row._replace(split="validation"), row._replace(index=6)]
    images = {demo.load_item(other).image for other in [row, *others]}
    assert len(images) == 4


def test_shards_hold_the_items(demo_shards: Path) -> None:
    dataset = Dataset.open(str(demo_shards))
    assert dataset.vocabulary.tags == demo.VOCABULARY.tags
    for split, count in (("train", 90), ("validation", 22)):
        samples = tar_samples(demo_shards, split)
        assert len(samples) == dataset.num_labelled(split) == count
        for index, (key, sample) in enumerate(samples.items()):
            item = demo.load_item(DemoRow(0, split, index))
            flags = importance(item)
            assert key == item.key
            assert sample.image == item.image
            assert sample.tags == list(item.tags)
            assert sample.important == [tag for tag in item.tags if flags[tag]]


def test_number_of_tags(items: list[Sample]) -> None:
    for item in items:
        flags = importance(item)
        assert len(flags) == len(item.tags)
        assert 5 <= len(flags) <= 12
        assert 3 <= sum(flags.values()) <= 7
        assert not all(flags.values())
    assert 8 <= np.mean([len(item.tags) for item in items]) <= 10
    assert 4 <= np.mean([sum(item.important or ()) for item in items]) <= 5


def test_visual_tags_are_important_exactly_if_shown(items: list[Sample]) -> None:
    flags = [pair for item in items for pair in importance(item).items() if pair[0] in VISUAL]
    for index, item in enumerate(items[:50]):
        rng = np.random.default_rng(demo.seed_for("demo", demo.CONTENT_VERSION, 0, "train", index))
        shown = demo_pictures.random_scene(rng).concepts()
        for tag, flag in importance(item).items():
            if tag in VISUAL:
                assert flag == (tag in shown)
    # Names alone say little: every one is there about as often without being shown.
    total, important = Counter(tag for tag, _ in flags), Counter(tag for tag, f in flags if f)
    assert set(total) == VISUAL
    for tag in VISUAL:
        assert total[tag] >= 60
        assert 0.3 <= important[tag] / total[tag] <= 0.7


def test_context_tags_are_important_exactly_with_their_place(items: list[Sample]) -> None:
    seen: Counter[tuple[str, bool]] = Counter()
    for item in items:
        for tag, flag in importance(item).items():
            if tag in PLACE_OF:
                assert flag == (PLACE_OF[tag] in item.tags)
                seen[tag, flag] += 1
            elif tag in demo.PLACES:
                assert flag
    assert len(seen) == 2 * len(PLACE_OF)
    assert min(seen.values()) >= 15


def test_general_tags_and_outliers_are_never_important(items: list[Sample]) -> None:
    counts = Counter()
    for item in items:
        for tag, flag in importance(item).items():
            if tag in demo.GENERAL_TAGS or tag in demo.OUTLIERS:
                assert not flag
                counts[tag] += 1
    assert len(demo.OUTLIERS) >= 100
    assert sum(counts[tag] for tag in demo.OUTLIERS) >= 0.3 * len(items)
    assert max(counts[tag] for tag in demo.OUTLIERS) <= 0.03 * len(items)


def test_order_of_tags_says_nothing(items: list[Sample]) -> None:
    """The mean relative position of important tags is that of all: the middle."""
    places = [
        slot / (len(item.tags) - 1)
        for item in items
        for slot, flag in enumerate(item.important or ())
        if flag
    ]
    assert abs(np.mean(places) - 0.5) < 0.03  # standard error 0.006


def test_best_answer_from_tags_alone_leaves_room_for_the_picture(items: list[Sample]) -> None:
    """All rules of the context, and every visual tag: no better answer ignores the picture."""
    scores = []
    for item in items:
        flags = importance(item)
        predicted = {tag for tag, flag in flags.items() if tag in VISUAL or flag}
        wanted = {tag for tag, flag in flags.items() if flag}
        scores.append(2 * len(predicted & wanted) / (len(predicted) + len(wanted)))
    assert 0.70 <= np.mean(scores) <= 0.80


def test_pictures_are_jpegs_of_many_sizes_and_qualities(items: list[Sample]) -> None:
    pictures = [Image.open(io.BytesIO(item.image or b"")) for item in items[:100]]
    sides = np.array([picture.size for picture in pictures])
    assert {picture.format for picture in pictures} == {"JPEG"}
    assert sides.min() >= 72
    assert sides.max() <= 140
    assert np.ptp(sides) > 55
    assert len({str(picture.quantization) for picture in pictures}) >= 15  # type: ignore[attr-defined]


def test_objects_have_their_colour_and_a_good_part_of_the_picture() -> None:
    for seed, scene in enumerate(scenes(100)):
        picture = demo_pictures.draw(scene, np.random.default_rng(seed))
        assert picture.shape == (scene.height, scene.width, 3)
        assert picture.dtype == np.uint8
        for colour in {thing.colour for thing in scene.things}:
            # Hue and saturation stay under any light: compare directions, not lengths.
            wanted = np.array(demo_pictures.COLOURS[colour], float)
            pixels = picture.reshape(-1, 3).astype(float)
            if colour == "black":
                alike = pixels.max(axis=1) < 60
            else:
                cosine = pixels @ wanted / np.linalg.norm(wanted)
                alike = cosine / np.linalg.norm(pixels + 1e-9, axis=1) > 0.97
            assert alike.mean() > 0.025, (seed, scene, colour)


def test_objects_stay_inside_what_a_centre_crop_keeps() -> None:
    for scene in scenes(300):
        for thing in scene.things:
            assert max(abs(thing.x), abs(thing.y)) + thing.radius <= 0.875 / 2 + 0.01
        for a, b in itertools.combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius - 1e-9


def mask(shape: str) -> np.ndarray:
    canvas = np.zeros((200, 200), np.uint8)
    outlines = [np.round(p * 80 + 99.5).astype(np.int32) for p in demo_pictures._upright(shape)]
    cv2.fillPoly(canvas, outlines, (1,))
    return canvas.astype(bool)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_shapes_are_their_own_mirror_images_and_no_others() -> None:
    masks = {shape: mask(shape) for shape in demo_pictures.SHAPES}
    for shape, pixels in masks.items():
        assert overlap(pixels, pixels[:, ::-1]) > 0.95, shape
    for (a, pixels_a), (b, pixels_b) in itertools.combinations(masks.items(), 2):
        assert overlap(pixels_a, pixels_b) < 0.85, (a, b)


@pytest.mark.parametrize("items", [3, 0, -1])
def test_too_few_items(tmp_path: Path, items: int) -> None:
    with pytest.raises(InputError, match=f"demo data of {items} items: must be at least 4"):
        demo.build(tmp_path / "out", items=items)


# The cache --------------------------------------------------------------------------------------


def start(items: int, cache: Path) -> subprocess.Popen[str]:
    code = (
        "from magneto_dist.data.sources.demo import ensure_demo\n"
        f"if __name__ == '__main__': print(ensure_demo({items}))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_several_processes_make_the_demo_once(tmp_path: Path) -> None:
    processes = [start(8, tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    folder = tmp_path / "magneto_dist" / f"demo-{demo.CONTENT_VERSION}-8"
    assert [out for out, _ in outputs] == [f"{folder}\n"] * 3
    assert sum("writing demo" in errors for _, errors in outputs) == 1
    assert len(tar_samples(folder, "train")) == 8


def test_killed_build_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(1200, tmp_path)
    folder = tmp_path / "magneto_dist" / f"demo-{demo.CONTENT_VERSION}-1200"
    first = folder / "train-000000.tar"
    deadline_s = time.monotonic() + 60
    while not list(folder.glob("train-*.tar")) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "dataset.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.tar")}
    assert finished
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.ensure_demo(1200) == folder
    assert Dataset.open(str(folder)).num_samples("train") == 1200
    assert first.exists()


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache" / "magneto_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert demo._cache_folder() == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo._cache_folder() == expected


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    with pytest.raises(InputError, match=r"demo data cannot be written .* set XDG_CACHE_HOME"):
        demo.ensure_demo(8)


def test_shards_of_so_many_megabytes(tmp_path: Path) -> None:
    demo.build(tmp_path, 40, num_processes=1, shard_megabytes=0.03)
    for split, count in (("train", 40), ("validation", 10)):
        shards = Dataset.open(str(tmp_path)).splits[split]
        pictures = iter(
            len(demo.load_item(DemoRow(0, split, i)).image or b"") for i in range(count)
        )
        sizes = [sum(itertools.islice(pictures, shard.num_samples)) for shard in shards]
        assert len(sizes) > 1
        assert all(15_000 < size <= 30_000 for size in sizes[:-1])
