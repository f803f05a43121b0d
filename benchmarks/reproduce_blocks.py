"""A report in blocks: headings, text, tables, pictures; as Markdown, and as one page of HTML.

The HTML holds its pictures, and asks nothing of a network.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG."""

    name: str
    """File beside the Markdown."""
    content: bytes
    alt: str
    width: int | None = None
    """On a page, in CSS pixels; None: as the style has it."""


Cell = str | Picture


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Heading:
    """Of level 1 or 2."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Figure:
    """Pictures side by side, where there is room, above a caption."""

    pictures: Sequence[Picture]
    caption: str


Block = Heading | Table | Figure | str


_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .875rem }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top }
th, td { border-bottom: 1px solid #8884 }
td.number, td.yes, td.no { white-space: nowrap }
td.number { font-variant-numeric: tabular-nums }
td.long { min-width: 11rem }
td.yes { color: light-dark(#15803d, #4ade80); font-weight: 600 }
td.no { color: light-dark(#b91c1c, #fca5a5); font-weight: 600 }
td.code { font: .75rem ui-monospace, monospace; min-width: 30rem; overflow-wrap: anywhere }
figure { display: flex; flex-wrap: wrap; gap: .5rem; margin: .8rem 0 }
figcaption { flex-basis: 100%; font-size: .875rem; opacity: .8 }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
td img { width: 8rem; max-width: none }
"""
_LONG_CELL = 24  # characters; cells of more are not squeezed into columns of single words


def as_html(blocks: Sequence[Block], classes: Mapping[str, str]) -> str:
    """One page, HTML in UTF-8, its pictures inside.

    Args:
        blocks: the first heading is the title.
        classes: CSS class ("yes", "no", "code") of cells with this text.
    """
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html_block(block, classes) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _html_block(block: Block, classes: Mapping[str, str]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Figure(pictures, caption):
            panels = "\n".join(map(_html_picture, pictures))
            return f"<figure>{panels}\n<figcaption>{escape(caption)}</figcaption></figure>"
        case Table(header, rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            lines = ("".join(_html_cell(cell, classes) for cell in row) for row in rows)
            body = "\n".join(f"<tr>{line}</tr>" for line in lines)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
            return f'<div class="scroll" tabindex="0">{table}</div>'
        case _:
            return f"<p>{escape(block)}</p>"


def _html_cell(cell: Cell, classes: Mapping[str, str]) -> str:
    if isinstance(cell, Picture):
        return f"<td>{_html_picture(cell)}</td>"
    is_number = cell.lstrip("+-")[:1].isdigit()
    plain = "number" if is_number else "long" if len(cell) > _LONG_CELL else ""
    kind = classes.get(cell, plain)
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(cell)}</td>"


def _html_picture(picture: Picture) -> str:
    kind = "png" if picture.name.endswith(".png") else "jpeg"
    content = base64.b64encode(picture.content).decode("ascii")
    width = f' width="{picture.width}"' if picture.width else ""
    return f'<img alt="{escape(picture.alt)}"{width} src="data:image/{kind};base64,{content}">'


def as_markdown(blocks: Sequence[Block]) -> str:
    """The same as Markdown, which names its pictures: see `pictures_of`."""
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def pictures_of(blocks: Sequence[Block]) -> list[Picture]:
    """All pictures, which belong beside the Markdown."""
    figures = [p for b in blocks if isinstance(b, Figure) for p in b.pictures]
    cells = [c for b in blocks if isinstance(b, Table) for row in b.rows for c in row]
    return [*figures, *(c for c in cells if isinstance(c, Picture))]


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Figure(pictures, caption):
            return "\n".join(map(_markdown_cell, pictures)) + f"\n\n{caption}"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)
        case _:
            return block


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Picture):
        return f"![{cell.alt}]({cell.name})"
    return cell.replace("|", "\\|").replace("<", "&lt;")
