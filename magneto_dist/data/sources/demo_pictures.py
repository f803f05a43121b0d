"""The pictures of the demo data: vivid shapes on pale textures, drawn from a random generator.

1. `random_scene` decides what is shown: a tint and a texture, one to three objects.
2. `draw` paints it, with light and noise that mean nothing.
3. `encode` makes a JPEG of it.

Shapes are large, stay clear of the border and look the same mirrored, so that a flip or a crop of
70 % of the area shows the same things.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

COLOURS = {
    "red": (215, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 40),
    "green": (40, 165, 50),
    "cyan": (50, 215, 225),
    "blue": (35, 65, 215),
    "purple": (150, 40, 190),
    "black": (15, 15, 15),
}
"""Of objects: name -> RGB."""
TINTS = {
    "grey": (150, 150, 150),
    "rose": (205, 140, 155),
    "mint": (135, 200, 165),
    "azure": (135, 175, 220),
    "beige": (205, 185, 135),
    "lilac": (175, 145, 210),
}
"""Of backgrounds: name -> mean RGB."""
SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "moon")
TEXTURES = ("plain", "stripes", "checks", "dots", "grid", "waves", "clouds", "speckles")

_SIDES = (72, 140)  # pixels
_QUALITIES = (75, 95)  # JPEG
_RADII = {1: (0.25, 0.36), 2: (0.18, 0.21), 3: (0.17, 0.195)}  # by number of objects
_BORDER = 0.07  # of the shorter side; what a centre crop may take away
_FRACTION_BITS = 4  # of the coordinates that OpenCV draws at

Polygon = Float32[np.ndarray, "point 2"]


@dataclass(frozen=True)
class Thing:
    """One object of a scene; lengths in units of the picture's shorter side, from its centre."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    tint: str
    texture: str
    things: tuple[Thing, ...]

    def concepts(self) -> tuple[str, ...]:
        """Every shape, colour, tint and texture that is shown, once."""
        names = [name for thing in self.things for name in (thing.shape, thing.colour)]
        return tuple(dict.fromkeys([*names, self.tint, self.texture]))


def random_scene(rng: np.random.Generator) -> Scene:
    """One background and one to three objects that do not overlap."""
    side, other = rng.integers(_SIDES[0], _SIDES[1], endpoint=True, size=2)
    other = np.clip(other, int(side * 0.8), int(side * 1.25))
    width, height = np.clip((side, other), *_SIDES).tolist()
    count = int(rng.integers(1, 3, endpoint=True))
    things = tuple(
        Thing(
            shape=str(rng.choice(SHAPES)),
            colour=str(rng.choice(list(COLOURS))),
            x=x,
            y=y,
            radius=radius,
        )
        for x, y, radius in _places(rng, count)
    )
    tint, texture = str(rng.choice(list(TINTS))), str(rng.choice(TEXTURES))
    return Scene(width, height, tint, texture, things)


def draw(scene: Scene, rng: np.random.Generator) -> UInt8[np.ndarray, "height width 3"]:
    """Paints a scene, RGB."""
    canvas = _background(scene, rng)
    unit = min(scene.width, scene.height)
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour]) + rng.uniform(-18, 18, 3)
        centre = (scene.width / 2 + thing.x * unit, scene.height / 2 + thing.y * unit)
        outlines = _outlines(thing.shape, float(rng.uniform(-0.2, 0.2)))
        cv2.fillPoly(
            canvas,
            [_fixed_point(outline * thing.radius * unit + centre) for outline in outlines],
            np.clip(colour, 0, 255).tolist(),
            cv2.LINE_AA,
            _FRACTION_BITS,
        )
    light = rng.uniform(0.85, 1.1)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 8))
    return np.clip(canvas * np.float32(light) + noise, 0, 255).astype(np.uint8)


def encode(picture: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator) -> bytes:
    """A JPEG of random quality."""
    quality = int(rng.integers(*_QUALITIES, endpoint=True))
    _, content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return content.tobytes()


def _places(rng: np.random.Generator, count: int) -> Iterator[tuple[float, float, float]]:
    """(x, y, radius) of `count` objects side by side, as a group away from the border."""
    radius = float(rng.uniform(*_RADII[count]))
    # Equal discs around a point touch at this distance from it; their group reaches that far.
    distance = 0.0 if count == 1 else radius / np.sin(np.pi / count)
    reach = 0.5 - _BORDER - radius - distance
    centre_x, centre_y = rng.uniform(-reach, reach, 2)
    for angle in rng.uniform(0, 2 * np.pi) + 2 * np.pi / count * np.arange(count):
        x, y = centre_x + distance * np.cos(angle), centre_y + distance * np.sin(angle)
        yield float(x), float(y), radius * float(rng.uniform(0.92, 1.0))


def _background(scene: Scene, rng: np.random.Generator) -> Float32[np.ndarray, "height width 3"]:
    """The texture in two shades of the tint."""
    mean = np.array(TINTS[scene.tint]) + rng.uniform(-8, 8, 3)
    contrast = rng.uniform(75, 95)
    shade = (_texture(scene, rng) - 0.5) * contrast
    return (mean + shade[..., None]).astype(np.float32)


def _texture(scene: Scene, rng: np.random.Generator) -> Float32[np.ndarray, "height width"]:
    """How light each pixel is, 0 to 1."""
    unit = min(scene.width, scene.height)
    period = float(rng.uniform(0.16, 0.21))
    start_y, start_x = rng.uniform(0, 1, 2)
    y = (np.arange(scene.height) / unit / period + start_y).astype(np.float32)[:, None]
    x = (np.arange(scene.width) / unit / period + start_x).astype(np.float32)[None, :]
    # A wave through `_edges` has edges one or two pixels wide, whatever the size of the picture.
    steepness = unit * period / 3
    match scene.texture:
        case "plain":
            return np.full((scene.height, scene.width), rng.uniform(0, 1), np.float32)
        case "stripes":
            return _edges(_wave(y + np.zeros_like(x)), steepness)
        case "checks":
            return _edges(_wave(x / 2) * _wave(y / 2), steepness)
        case "dots":
            return _edges(0.35 - np.maximum(-_wave(x), 0) * np.maximum(-_wave(y), 0), steepness)
        case "grid":
            return _edges(np.maximum(_wave(x), _wave(y)) - 0.8, steepness)
        case "waves":
            return _edges(_wave(y + 0.45 * _wave(x / 2.5)), steepness)
        case "clouds":
            return _smooth_noise(scene, rng, cells=4)
        case _:
            return _smooth_noise(scene, rng, cells=16)


def _wave(turns: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    return np.sin(2 * np.pi * turns)


def _edges(height: Float32[np.ndarray, "..."], steepness: float) -> Float32[np.ndarray, "..."]:
    return np.clip(0.5 + height * steepness, 0, 1)


def _smooth_noise(
    scene: Scene, rng: np.random.Generator, cells: int
) -> Float32[np.ndarray, "height width"]:
    coarse = rng.uniform(-0.3, 1.3, (cells, cells)).astype(np.float32)
    return np.clip(
        cv2.resize(coarse, (scene.width, scene.height), interpolation=cv2.INTER_CUBIC), 0, 1
    )


def _fixed_point(points: Polygon) -> np.ndarray:
    return np.round(points * 2**_FRACTION_BITS).astype(np.int32)


def _outlines(shape: str, turn: float) -> list[Polygon]:
    """The closed outlines of a shape of radius 1, turned by `turn` radians; a hole is one more."""
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]], np.float32)
    return [outline @ rotation for outline in _upright(shape)]


def _upright(shape: str) -> list[Polygon]:
    match shape:
        case "circle":
            return [_regular(40)]
        case "ring":
            return [_regular(40), _regular(40) * np.float32(0.58)]
        case "square":
            return [_points([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])]
        case "triangle":
            return [_points([(0, -1), (0.98, 0.78), (-0.98, 0.78)])]
        case "star":
            radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.44)[:, None]
            return [_regular(10) * radii.astype(np.float32)]
        case "cross":
            a, b = 0.32, 1.0
            corner = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            return [_points(corner + [(-x, -y) for x, y in corner])]
        case "heart":
            t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
            x = np.sin(t) ** 3
            y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
            return [np.stack([x, y], axis=1).astype(np.float32)]
        case _:  # moon: a disc without a smaller one, its horns up
            outer = np.linspace(-0.15, 1.15, 30) * np.pi
            inner = np.linspace(1, 0, 30) * np.pi
            arcs = [
                np.stack([np.cos(outer), np.sin(outer)], axis=1),
                np.stack([0.89 * np.cos(inner), 0.75 * np.sin(inner) - 0.45], axis=1),
            ]
            return [np.concatenate(arcs).astype(np.float32)]


def _regular(corners: int) -> Polygon:
    angles = np.arange(corners) * (2 * np.pi / corners) - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _points(corners: list[tuple[float, float]]) -> Polygon:
    return np.array(corners, np.float32)
