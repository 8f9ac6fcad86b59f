"""Numbers of layers and modules as heatmaps, layer 0 at the bottom, in which one layer does not hide the rest."""

from __future__ import annotations

import collections
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxup.depth.draw import CHARACTERS
from jaxup.depth.picture import COLORS, ON
from jaxup.errors import UserError, suggest
from jaxup.text import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxup.lens.alignment import Origin
    from jaxup.lens.differences import Differences

# What the darkest and the brightest shade are.
SCALES = {
    "column": "each column from its least to its largest",
    "global": "all columns from the least to the largest",
    "log": "all columns, logarithmic",
    "robust": "each column without its outliers",
    "rank": "by rank in each column",
}
# What a metric of `Differences` is, and in which unit.
LABELS = {
    "mean_abs": "mean |difference|, in units of the weights",
    "relative": "norm of the difference / norm of the first",
    "rms": "root mean square of the difference, in units of the weights",
    "cosine": "1 - cosine",
    "largest": "largest |difference|, in units of the weights",
    "changed": "share of the values that changed",
    "rank": "singular values that make 90% of the change",
}
MAP = "viridis"  # rises in lightness, and is told apart with any colour vision
FENCE = 1.5  # Tukey's: so many interquartile ranges beyond the quartiles values are outliers
_COLUMN, _GAP, _ROW = 0.36, 0.3, (0.1, 0.26)  # inches: columns, between panels, rows at least and at most
_TALLEST = 60  # inches: of a panel
_ABREAST = 4  # panels
_DPI, _PIXELS = 150, 60_000  # pixels of an inch, and at most along a side
_LETTER = 0.008  # inches: the width of a letter, about, for each point of its size
_SMALL = 7.5  # points
_NAMED = 6  # layers with outliers


class Shades(NamedTuple):
    """How values are drawn: `shade` in 0..1 and `outlier` are like the values, `low` and `high` of each column."""

    shade: np.ndarray
    low: np.ndarray
    high: np.ndarray
    outlier: np.ndarray  # what is clipped


def shades(values: np.ndarray, scale: str) -> Shades:
    """Values [panels, rows, columns] on one of the `SCALES`, which all panels share; NaN is left out, inf clipped."""
    if scale not in SCALES:
        raise UserError(f"{scale!r} is no scale{suggest(scale, list(SCALES))}")
    count = values.shape[-1]
    found = Shades(np.full(values.shape, np.nan), np.full(count, np.nan), np.full(count, np.nan), values == math.inf)
    columns = np.arange(count)
    for where in [columns] if scale in ("global", "log") else np.split(columns, count):
        these, there = values[..., where], ~np.isnan(values[..., where])
        drawn = there & (these < math.inf) & ((these > 0) | (scale != "log"))
        if scale == "robust" and drawn.any():
            first, third = np.quantile(these[drawn], [0.25, 0.75])
            # Where the middle half is one value, there is nothing that others could hide.
            if reach := FENCE * (third - first):
                drawn &= (these >= first - reach) & (these <= third + reach)
                found.outlier[..., where] |= there & ~drawn
        if not drawn.any():
            found.shade[..., where] = np.where(there, these == math.inf, np.nan)
            continue
        low, high = these[drawn].min(), these[drawn].max()
        found.low[where], found.high[where] = low, high
        if scale == "rank":
            ordered = np.sort(these[there])
            sides = [np.searchsorted(ordered, these, side) for side in ("left", "right")]
            shade = (sides[0] + sides[1] - 1) / 2 / max(ordered.size - 1, 1)
        elif scale == "log":
            shade = np.log10(np.clip(these, low, high) / low) / (math.log10(high / low) or 1)
        else:
            shade = (np.clip(these, low, high) - low) / ((high - low) or 1)
        found.shade[..., where] = np.where(there, shade, np.nan)
    return found


def differences(
    found: Differences, metric: str = "mean_abs", scale: str = "robust", pairs: Sequence[int] | None = None
) -> Figure:
    """A panel for each of the pairs, by their places in `found.pairs`; the panels share the scale."""
    if metric not in found.values:
        raise UserError(f"{metric!r} was not measured{suggest(metric, list(found.values))}")
    chosen = range(len(found.pairs)) if pairs is None else pairs
    titles = [[found.models[side] for side in found.pairs[pair]] for pair in chosen]
    return draw(
        found.values[metric][list(chosen)], [f"{a}\n→ {b}" for a, b in titles], found.modules, found.origins,
        LABELS[metric], scale,
    )  # fmt: skip


def png(figure: Figure, dpi: int = _DPI) -> bytes:
    """The contents of a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        figure.savefig(file, dpi=min(dpi, _PIXELS / max(figure.get_size_inches())))
    return file.getvalue()


def draw(
    values: np.ndarray, titles: Sequence[str], columns: Sequence[str], origins: Sequence[Origin], label: str,
    scale: str, column: float = _COLUMN,
) -> Figure:  # fmt: skip
    """Values [panels, rows, columns] with the origins of the rows at the side.

    Args:
      titles: of the panels, of two lines at most.
      columns: their names; "" for those that are not named.
      label: what the values are.
      column: its width in inches.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    shown = shades(values, scale)
    own = scale not in ("global", "log")  # ranges of the columns
    ranges = [
        f"\n{low:.3g} … {high:.3g}" if own and not math.isnan(low) else "" for low, high in zip(shown.low, shown.high)
    ]
    texts = [escaped(name) + range for name, range in zip(columns, ranges)]
    sources = [f"{letter}: {escaped(name)}" for name, letter in letters(origins).items()]
    names = labels(origins)
    row = min(_ROW[1], max(_ROW[0], 6 / len(origins)), _TALLEST / len(origins))
    every = math.ceil(_ROW[0] / row)  # so many rows have a label
    size = min(8.0, 0.85 * 72 * row * every)  # of letters in a row
    left = 0.45 + _LETTER * size * max(map(len, names))
    wide, tall = max(1.6, column * len(columns)), row * len(origins)
    above, under = 0.5, 0.2 + _LETTER * _SMALL * max(len(line) for text in texts for line in text.splitlines())
    abreast = min(_ABREAST, len(titles))
    width = max(5.0, left + abreast * (wide + _GAP) + 0.75)
    notes = [*sources, *_outliers(values, shown, scale, columns, titles)]
    lines = [line for note in notes for line in textwrap.wrap(note, int(width / _LETTER / _SMALL))]
    foot = 0.4 + 0.15 * len(lines)
    height = 0.3 + math.ceil(len(titles) / abreast) * (above + tall + under) + foot
    figure = Figure(figsize=(width, height))

    def at(x: float, y: float, w: float, h: float) -> Axes:
        axes = figure.add_axes((x / width, y / height, w / width, h / height))
        axes.tick_params(length=0, pad=2)
        return axes

    def write(x: float, y: float, text: str, **how: Any) -> None:
        figure.text(x / width, y / height, text, fontsize=_SMALL, parse_math=False, **how)

    for panel, title in enumerate(titles):
        down, across = divmod(panel, abreast)
        x, y = left + across * (wide + _GAP), height - 0.3 - (down + 1) * (above + tall + under) + under
        axes = at(x, y, wide, tall)
        image = axes.imshow(shown.shade[panel], MAP, aspect="auto", origin="lower", vmin=0, vmax=1)
        axes.set_facecolor("#dcdcdc")  # what is not there
        if column == _COLUMN:
            axes.vlines(np.arange(1, len(columns)) - 0.5, -0.5, len(origins) - 0.5, "#ffffff", linewidth=1)
        for marker, side in (("^", shown.shade[panel] > 0.5), ("v", shown.shade[panel] <= 0.5)):
            rows, places = np.nonzero(shown.outlier[panel] & side)
            axes.plot(places, rows, marker, markersize=0.6 * size, markerfacecolor="#fff", markeredgecolor="#000")
        named = [i for i, text in enumerate(texts) if text]
        axes.set_xticks(named, [texts[i] for i in named], rotation=90, fontsize=_SMALL, parse_math=False)
        axes.set_yticks([])
        short = [_shortened(line, int(wide / _LETTER / _SMALL)) for line in escaped(title, "\n").splitlines()]
        write(x, y + tall + 0.08, "\n".join(short), va="bottom")
        if not across:
            strip = at(x - 0.22, y, 0.17, tall)
            strip.imshow([[to_rgb(COLORS[o.role])] for o in origins], aspect="auto", origin="lower")
            for i, origin in enumerate(origins) if every == 1 else ():
                strip.text(0, i, origin.role, fontsize=size, color=ON[origin.role], ha="center", va="center_baseline")
            strip.set_xticks([])
            strip.set_yticks(range(0, len(origins), every), names[::every], fontsize=size)
        if panel == abreast - 1:
            bar = at(x + wide + 0.15, y + tall - min(tall, 3.0), 0.13, min(tall, 3.0))
            figure.colorbar(image, bar, ticks=[0, 0.5, 1])
            bar.set_yticklabels(["lowest", "", "highest"] if own else _levels(shown, scale), fontsize=_SMALL)
    x = 0.2
    for role, count in collections.Counter(origin.role for origin in origins).items():
        text = f"{role} {CHARACTERS[role][0]} ({count})"
        write(x, height - 0.22, text, color=ON[role], bbox={"facecolor": COLORS[role], "edgecolor": "none", "pad": 2})
        x += _LETTER * _SMALL * len(text) + 0.2
    for down, line in enumerate([f"{label}; {SCALES[scale]}", *lines]):
        write(0.2, foot - 0.2 - 0.15 * down, line, weight="normal" if down else "bold")
    return figure


def letters(origins: Sequence[Origin]) -> dict[str, str]:
    """A letter for each model that layers came from, if there are several."""
    sources = dict.fromkeys(origin.source for origin in origins if origin.layer is not None)
    return {source: chr(ord("a") + i % 26) for i, source in enumerate(sources)} if len(sources) > 1 else {}


def labels(origins: Sequence[Origin]) -> list[str]:
    """The number of each row, and where it came from if that is another number: "57 ← 35"."""
    letter = letters(origins)
    return [
        str(row) if origin.layer is None or (origin.layer == row and not letter)
        else f"{row} ← {letter.get(origin.source, '')}{origin.layer}"
        for row, origin in enumerate(origins)
    ]  # fmt: skip


def _outliers(
    values: np.ndarray, shown: Shades, scale: str, columns: Sequence[str], titles: Sequence[str]
) -> Iterator[str]:
    """What is clipped by name, the layers with the largest first."""
    rows: dict[tuple[int, int], list[int]] = {}
    for panel, row, column in sorted(zip(*np.nonzero(shown.outlier)), key=lambda at: -values[at]):
        rows.setdefault((panel, row), []).append(column)
    if not rows:
        return
    which = [f" of {escaped(' '.join(title.splitlines()))}" if len(titles) > 1 else "" for title in titles]
    far = f" is more than {FENCE} interquartile ranges beyond the quartiles of its column:"
    yield "▲ clipped, since it" + (far if scale == "robust" else " is infinite:")
    for (panel, row), of in list(rows.items())[:_NAMED]:
        named = ", ".join(f"{escaped(columns[i])} {values[panel, row, i]:.3g}" for i in of)
        yield f"layer {row}{which[panel]}: {named}"
    if len(rows) > _NAMED:
        yield f"and in {len(rows) - _NAMED} more layers"


def _levels(shown: Shades, scale: str) -> list[str]:
    low, high = float(shown.low[0]), float(shown.high[0])
    middle = math.sqrt(low * high) if scale == "log" else (low + high) / 2
    return [f"{value:.3g}" for value in (low, middle, high)]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[-(most - most // 2 - 1) :]}"
