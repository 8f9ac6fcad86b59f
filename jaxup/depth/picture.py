"""A plan as a picture: the path of the result through the layers of its sources.

One cell per layer of the result, at its own index from left to right and at its source layer from
bottom to top; several sources lie in bands above each other. Sizes are pixels, two per point.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from jaxup.depth.draw import CHARACTERS, character, ranges
from jaxup.depth.plan import DepthPlan, Row
from jaxup.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

# Okabe and Ito's palette, which is told apart with any colour vision.
BLUE, ORANGE, PURPLE, SKY, GREEN, RED = "#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00"
COLORS = {"=": BLUE, "X": ORANGE, "z": PURPLE, "p": SKY, "n": GREEN}
ON = {"=": "#ffffff", "X": "#1b1f24", "z": "#1b1f24", "p": "#1b1f24", "n": "#ffffff"}  # letters on these
_INK, _FAINT, _GRID, _PATH, _UNUSED, _PAPER = "#1b1f24", "#646c76", "#e6e9ed", "#4d5763", "#fde7e4", "#ffffff"
_ALARM = "#b3261e"  # the writing on what is never used

_MARGIN, _TEXT, _SMALL, _TITLE = 48, 26, 22, 36
_WIDTH, _HEIGHT = 2000, 1100  # of all cells, about
_CELL = 56  # at most
_STRIP = 36
_LETTERED = 24  # cells of this width have the letters of the strip, and so has the legend
_MAX_PIXELS = 10**8


_Unused = tuple[tuple[int, int], str]  # (first, last) layer, and what is written beside them


class _Band(NamedTuple):
    """Where the layers of a source are; its last layer is at the top."""

    name: str
    layers: int
    top: int
    cell: float  # height

    def y(self, layer: int | float) -> int:
        """The upper edge of a layer."""
        return self.top + round((self.layers - 1 - layer) * self.cell)

    @property
    def bottom(self) -> int:
        return self.y(-1)


def png(plan: DepthPlan, title: str) -> bytes:
    """`picture`, as the contents of a PNG file."""
    file = io.BytesIO()
    picture(plan, title).save(file, "png")
    return file.getvalue()


def html(plan: DepthPlan) -> str:
    """The picture and, to be unfolded below it, what `describe` says; names in it are not to be trusted."""
    drawn, text = plan._repr_png_(), f"<pre>{escape(plan.describe())}</pre>"
    if drawn is None:
        return text
    source = f"data:image/png;base64,{base64.b64encode(drawn).decode()}"
    image = f'<img alt="{escape(repr(plan))}" style="max-width: 100%; max-height: 40em" src="{source}">'
    return f"{image}<details><summary>in words</summary>{text}</details>"


def picture(plan: DepthPlan, title: str) -> Image:
    """The plan drawn below its title; RGB, two pixels per point. UserError for hundreds of sources."""
    from PIL import Image, ImageDraw

    total = sum(count for _, count in plan.sources)
    width = _cell(_WIDTH, plan.num_layers)
    height = min(_cell(_HEIGHT, total), max(1.5 * width, 300 / total))  # nearly square, if there is room
    left = _MARGIN + max(_length(text, _SMALL) for text in {str(count) for _, count in plan.sources}) + 28
    top = _MARGIN + _TITLE + 20 + _TEXT + 40 + _TEXT + 24
    bands = []
    for name, count in plan.sources:
        top += 44  # the name
        bands.append(_Band(name, count, top, height))
        top = bands[-1].bottom + 20
    where: dict[str | None, _Band] = {band.name: band for band in bands}
    if any(row.role == "new" for row in plan.rows):
        where[None] = new = _Band("", 1, top + 8, max(28.0, height))
        top = new.bottom
    strip = top + 28
    right = left + round(plan.num_layers * width)
    used = {name: {row.layer for row in plan.rows if row.source == name and row.parts} for name, _ in plan.sources}
    labels = {band.name: _unused(band, used[band.name]) for band in bands}
    texts = {text for found in labels.values() for _, text in found}
    margin = max((_length(text, _SMALL) for text in texts), default=0)
    depths = f"{' + '.join(str(count) for _, count in plan.sources)} -> {plan.num_layers} layers"
    legend = sum(_length(text, _TEXT) + 74 for text in _entries(plan).values())
    wide = max(800, _MARGIN + max(right + 20 + margin, left + legend, left + _length(depths, _TEXT)))
    tall = strip + _STRIP + 130
    if wide * tall > _MAX_PIXELS:
        raise UserError(f"plan: {len(plan.sources)} sources are too many to draw")

    image = Image.new("RGB", (wide, tall), _PAPER)
    draw = ImageDraw.Draw(image)
    _write(draw, (_MARGIN, _MARGIN), _fitting(title, _TITLE, wide - 2 * _MARGIN), _TITLE)
    _write(draw, (_MARGIN, _MARGIN + _TITLE + 20), depths, _TEXT, _FAINT)
    _draw_legend(draw, plan, _MARGIN, _MARGIN + _TITLE + 20 + _TEXT + 40, lettered=width >= _LETTERED)

    def x(i: int) -> int:
        return left + round(i * width)

    for band in bands:
        _draw_band(draw, band, left, right, wide, labels[band.name])
    if None in where:
        _write(draw, (left - 12, (where[None].top + where[None].bottom) // 2), "new", _SMALL, _FAINT, "rm")
    ticks = _ticks(plan.num_layers, (right - left) / (2 * _length("000", _SMALL)))
    for i in ticks:
        for band in where.values():
            draw.line([(x(i) + round(width / 2), band.top), (x(i) + round(width / 2), band.bottom)], _GRID, 2)

    gap = 2 if width >= 8 and height >= 8 else 0
    for i, row in enumerate(plan.rows):
        band, layer = _place(row, where)
        low = max(band.y(layer - 1), band.y(layer) + 4)
        color = COLORS[character(row)]
        draw.rectangle([x(i), band.y(layer), max(x(i + 1), x(i) + 2) - 1 - gap, low - 1 - gap], color)
        draw.rectangle([x(i), strip, max(x(i + 1), x(i) + 2) - 1 - gap, strip + _STRIP - 1], color)
        if width >= _LETTERED:
            middle = ((x(i) + x(i + 1) - gap) // 2, strip + _STRIP // 2)
            _write(draw, middle, character(row), _SMALL, ON[character(row)], "mm")
    _draw_path(draw, plan, where, x)
    below = strip + _STRIP + 10
    for i in ticks:
        _write(draw, (x(i) + round(width / 2), below), str(i), _SMALL, _FAINT, "ma")
    _write(draw, (left, below + _SMALL + 16), "layer of the result", _SMALL, _FAINT)
    return image


def _cell(room: int, count: int) -> float:
    """The side of a cell when so many have to fit: whole pixels, unless there are too many for that."""
    return float(min(_CELL, max(2, room // count))) if count < room else 1.5 * room / count


def _unused(band: _Band, used: set[int]) -> list[_Unused]:
    """((first, last), label) of the layers that are never used; one label for all if they would collide."""
    unused = set(range(band.layers)) - used
    firsts, lasts = (sorted(layer for layer in unused if layer + step not in unused) for step in (-1, 1))
    spans = list(zip(firsts, lasts))
    middles = [band.y((first + last) / 2) for first, last in spans]
    if len(spans) <= 6 and all(a - b >= _SMALL + 6 for a, b in itertools.pairwise(middles)):
        return [((a, b), f"{ranges(range(a, b + 1))} never used") for a, b in spans]
    count = sum(b - a + 1 for a, b in spans)
    middle = len(spans) // 2
    return [((a, b), f"{count} layers never used" if i == middle else "") for i, (a, b) in enumerate(spans)]


def _ticks(count: int, most: float) -> list[int]:
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return list(range(0, count, next(step for step in steps if count / step <= max(most, 1))))


def _entries(plan: DepthPlan) -> dict[str, str]:
    """What stands in the legend for each kind of layer that there is."""
    kinds = [character(row) for row in plan.rows]
    return {c: f"{meaning} ({kinds.count(c)})" for c, (meaning, _) in CHARACTERS.items() if c in kinds}


def _draw_legend(draw: ImageDraw, plan: DepthPlan, x: int, y: int, *, lettered: bool) -> None:
    for kind, text in _entries(plan).items():
        draw.rectangle([x, y + 2, x + 23, y + 25], COLORS[kind])
        if lettered:
            _write(draw, (x + 12, y + 14), kind, _SMALL, ON[kind], "mm")
        _write(draw, (x + 34, y + 14), text, _TEXT, _INK, "lm")
        x += 34 + _length(text, _TEXT) + 40


def _draw_band(draw: ImageDraw, band: _Band, left: int, right: int, wide: int, unused: list[_Unused]) -> None:
    name = _fitting(f"layers of {band.name}", _SMALL, wide - left - _MARGIN)
    _write(draw, (left, band.top - 12), name, _SMALL, _FAINT, "lb")
    for (first, last), text in unused:
        low = max(band.y(first - 1), band.y(last) + 4)
        draw.rectangle([left, band.y(last), right - 1, low - 1], _UNUSED)
        _write(draw, (right + 16, (band.y(last) + low) // 2), text, _SMALL, _ALARM, "lm")
    for layer in _ticks(band.layers, (band.bottom - band.top) / (2 * _SMALL)):
        middle = (band.y(layer) + band.y(layer - 1)) // 2
        draw.line([(left, middle), (right, middle)], _GRID, 2)
        _write(draw, (left - 12, middle), str(layer), _SMALL, _FAINT, "rm")
    draw.line([(left - 4, band.top), (left - 4, band.bottom)], _GRID, 2)


def _place(row: Row, where: dict[str | None, _Band]) -> tuple[_Band, int]:
    """The band that the layer is in, and its layer there; new ones have a band of their own."""
    return (where[None], 0) if row.role == "new" else (where[row.source], row.layer)


def _draw_path(draw: ImageDraw, plan: DepthPlan, where: dict[str | None, _Band], x: Callable[[int], int]) -> None:
    """A thin line wherever the path does not go on to the next layer or stay at the same one."""

    def place(i: int, row: Row) -> tuple[int, int]:
        band, layer = _place(row, where)
        return (x(i) + x(i + 1)) // 2, (band.y(layer) + band.y(layer - 1)) // 2

    for i, (a, b) in enumerate(itertools.pairwise(plan.rows)):
        same = a.source == b.source and (a.role == "new") == (b.role == "new")
        if not same or (b.role != "new" and b.layer - a.layer not in (0, 1)):
            draw.line([place(i, a), place(i + 1, b)], _PATH, 2)


# ---- writing


@functools.cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _length(text: str, size: int) -> int:
    return round(_font(size).getlength(text))


def _write(draw: ImageDraw, at: tuple[int, int], text: str, size: int, color: str = _INK, anchor: str = "la") -> None:
    draw.text(at, text, color, _font(size), anchor)


def _fitting(text: str, size: int, room: int) -> str:
    """The text, with its middle left out if it is too long; what cannot be printed is a question mark."""
    text = "".join(c if c.isprintable() else "?" for c in text)[:1000]
    kept = len(text)
    while kept > 8 and _length(text, size) > room:
        kept -= max(1, kept // 20)
        text = f"{text[: kept // 2]}...{text[-(kept // 2) :]}"
    return text
