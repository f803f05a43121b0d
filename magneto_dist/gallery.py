"""Predictions to look at: a page of pictures, each with its tags, in one file without a network.

`gallery.html` beside this file is the page, with its style and its script; `gallery` puts the items
into it as JSON. Pictures are small JPEGs, attention is 8 bits a region.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from magneto_dist.config import Config
from magneto_dist.data.augment import evaluation_augmentation
from magneto_dist.data.decode_cpu import decode_image
from magneto_dist.data.sample import BadSample
from magneto_dist.inference import ItemPrediction

MAX_ITEMS = 1000
"""Of a page: some 25 MB, which a phone can still open."""
_THUMBNAIL_PIXELS = 320  # of the longer side
_QUALITY = 80  # of its JPEG
_PAGE = Path(__file__).with_name("gallery.html")


def gallery(
    predictions: Iterable[ItemPrediction], total: int, threshold: float, config: Config
) -> str:
    """The page, HTML in UTF-8.

    Args:
        predictions: in the order of the page, at most MAX_ITEMS; with their encoded pictures and
            attention where they have any.
        total: items there are, of which these are the first.
        threshold: probability from which on a tag is predicted.
        config: of the run; larger pictures than it allows are not shown.
    """
    items = [_item(item, config) for item in predictions]
    data = {
        "total": total,
        "threshold": threshold,
        "has_alpha": any("alpha" in tag for item in items for tag in item["tags"]),
        "has_attention": any("attention" in item for item in items),
        "items": items,
    }
    # No tag, whatever it is, ends the script element that it lies in.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.read_text(encoding="utf-8").replace("@@DATA@@", text)


def _item(item: ItemPrediction, config: Config) -> dict[str, Any]:
    order = sorted(range(len(item.probability)), key=lambda slot: -item.probability[slot])
    notes = [
        f"{what}: {', '.join(tags)}"
        for what, tags in (
            ("not in the vocabulary", item.unknown_tags),
            ("beyond the longest list", item.cut_tags),
        )
        if tags
    ]
    values: dict[str, Any] = {
        "key": item.key,
        "error": item.error,
        "notes": notes,
        "tags": [_tag(item, slot) for slot in order],
    }
    small = thumbnail(item.picture, config.data.max_image_megapixels) if item.picture else None
    if small is None:
        return values
    width, height = Image.open(io.BytesIO(small)).size
    values |= {"picture": _base64(small), "size": [width, height]}
    if item.attention is not None:
        box = evaluation_augmentation(config.augment).box(height, width)
        values["attention"] = _attention(item.attention[order], box, height, width)
    return values


def _tag(item: ItemPrediction, slot: int) -> dict[str, Any]:
    tag: dict[str, Any] = {"name": item.tags[slot], "p": round(item.probability[slot], 4)}
    for name in ("alpha", "image", "tag"):
        numbers = getattr(item, name)
        if numbers is not None:
            tag[name] = round(numbers[slot], 3)
    if item.important is not None:
        tag["important"] = item.important[slot]
    return tag


def _attention(
    weights: Float32[np.ndarray, "tag region"],
    box: tuple[int, int, int, int],
    height: int,
    width: int,
) -> dict[str, Any]:
    """As shares of each tag's largest weight in 255ths; `window`: left, top, width, height."""
    most = weights.max(axis=1, keepdims=True)
    shares = np.rint(255 * weights / most).astype(np.uint8)
    top, left, box_height, box_width = box
    return {
        "side": isqrt(weights.shape[1]),
        "window": [left / width, top / height, box_width / width, box_height / height],
        "most": [round(float(value), 4) for value in most[:, 0]],
        "shares": _base64(shares.tobytes()),
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def thumbnail(content: bytes, max_megapixels: float) -> bytes | None:
    """A picture made small, as a JPEG; None: it cannot be decoded, or is larger than allowed."""
    try:
        pixels, _ = decode_image(content, max_megapixels)
    except BadSample:
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=_QUALITY)
    return jpeg.getvalue()
