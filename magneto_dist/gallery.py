"""Predictions to look at: a page of pictures, each with its tags, in one file without scripts.

Green tags are predicted. The bar behind a tag is its probability, the number beside it too; the
smaller one is alpha, the weight of the picture in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from magneto_dist.data.decode_cpu import decode_image
from magneto_dist.data.sample import BadSample
from magneto_dist.inference import ItemPrediction

_THUMBNAIL_PIXELS = 320  # of the longer side
_QUALITY = 80  # of its JPEG

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5rem; background: #fafafa; color: #222 }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
figure { margin: 0; padding: .75rem; background: #fff; border: 1px solid #ddd; border-radius: 6px }
img { max-width: 100%; display: block; margin: 0 auto .5rem }
figcaption { font-size: 12px; color: #666; overflow-wrap: anywhere }
ul { list-style: none; margin: .4rem 0 0; padding: 0 }
li { display: flex; gap: .5rem; padding: 1px 4px; margin: 1px 0 }
li span:first-child { flex: 1; overflow-wrap: anywhere }
li.yes { font-weight: 600; color: #14532d }
small { color: #888; min-width: 2.6rem; text-align: right }
.error { color: #b91c1c }
"""


def gallery(predictions: Sequence[ItemPrediction], threshold: float, max_megapixels: float) -> str:
    """The page, HTML in UTF-8.

    Args:
        predictions: in the order of the page; with their encoded pictures where they have one.
        threshold: probability from which on a tag is predicted.
        max_megapixels: larger pictures are not shown.
    """
    figures = "\n".join(_figure(item, threshold, max_megapixels) for item in predictions)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{len(predictions)} predictions</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{len(predictions)} predictions</h1>\n"
        f"<p>Green: important, from probability {threshold:g} on. Right of it: &alpha;, the weight"
        f" of the picture.</p>\n<main>\n{figures}\n</main>\n</html>\n"
    )


def _figure(item: ItemPrediction, threshold: float, max_megapixels: float) -> str:
    small = thumbnail(item.picture, max_megapixels) if item.picture else None
    picture = base64.b64encode(small).decode("ascii") if small else ""
    shown = f'<img alt="" src="data:image/jpeg;base64,{picture}">' if picture else ""
    order = sorted(range(len(item.tags)), key=lambda slot: -item.probability[slot])
    lines = "".join(_line(item, slot, threshold) for slot in order)
    notes = [
        f'<p class="error">{escape(item.error)}</p>' if item.error else "",
        _note("unknown", item.unknown_tags),
        _note("beyond the longest list", item.cut_tags),
    ]
    caption = f"<figcaption>{escape(item.key)}{''.join(notes)}</figcaption>"
    return f"<figure>{shown}{caption}<ul>{lines}</ul></figure>"


def _line(item: ItemPrediction, slot: int, threshold: float) -> str:
    probability = item.probability[slot]
    percent = 100 * probability
    colour = "#bbf7d0" if probability >= threshold else "#eee"
    bar = f"background:linear-gradient(to right,{colour} {percent:.1f}%,transparent {percent:.1f}%)"
    alpha = "" if item.alpha is None else f"<small>{item.alpha[slot]:.2f}</small>"
    return (
        f'<li class="{"yes" if probability >= threshold else "no"}" style="{bar}">'
        f"<span>{escape(item.tags[slot])}</span><small>{probability:.2f}</small>{alpha}</li>"
    )


def _note(what: str, tags: Sequence[str]) -> str:
    return f"<br>{what}: {escape(', '.join(tags))}" if tags else ""


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
