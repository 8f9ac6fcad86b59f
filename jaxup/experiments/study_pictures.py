"""Pictures of a study: its cells over tokens and over depth, their differences to the control, and grids."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxup.depth.picture import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from jaxup.experiments.comparison import BETTER, WORSE, Cell, Difference
from jaxup.experiments.outcomes import Outcome
from jaxup.text import escaped, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, _INK = "#8A9199", "#1b1f24"
_SEVERAL = 8  # cells: of more only the best ones and the control have a colour
_BEST = 3
_PALETTE, _MARKERS = (RED, GREEN, PURPLE, ORANGE, SKY, _INK, "#A0522D"), "sD^vPX*"
_LONGEST = 42  # characters of a cell's name
_MAP = "viridis"


class Look(NamedTuple):
    color: str
    marker: str
    line: str
    shown: bool  # by a label and a band


def write(
    directory: Path, title: str, outcomes: Sequence[Outcome], cells: Sequence[Cell], differences: Sequence[Difference],
    control: str, unit: str, changes: Mapping[str, Mapping[str, Any]],
) -> list[str]:  # fmt: skip
    """The PNG files in `directory`/plots, and their names without the ending.

    Args:
      cells: the best first.
      changes: what each cell changes of the configuration, by key.
    """
    looks = _looks(cells, control)
    figures = {
        "validation_loss": over_tokens(title, outcomes, cells, looks, unit),
        "differences": forest(title, differences, control, unit),
        "grid": grid(title, cells, changes, unit),
        **{f"layers_{_plain(name)}": over_depth(title, name, outcomes, cells, looks) for name in _measures(outcomes)},
    }
    (directory / "plots").mkdir(exist_ok=True)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        file = io.BytesIO()
        figure.savefig(file, dpi=140)
        write_atomically(directory / "plots" / f"{name}.png", file.getvalue())
    return list(drawn)


def over_tokens(
    title: str, outcomes: Sequence[Outcome], cells: Sequence[Cell], looks: Mapping[str, Look], unit: str
) -> Figure | None:
    """Mean and range over seeds of the validation loss; what was stopped ends in a cross."""
    figure, axes = _figure(title, "tokens", f"validation loss (nats per {unit})")
    late: list[float] = []
    for cell in reversed(cells):
        look = looks[cell.name]
        mine = [o for o in outcomes if o.cell == cell.name and o.curve]
        done = [o for o in mine if o.finished]
        if done:
            x, low, mean, high = _band([(_tokens(o), np.array(o.curve)[:, 1]) for o in done])
            _draw(axes, look, x, low, mean, high, f"{_short(cell.name)}: {cell.mean:.4f}")
            late += [*low[x >= 0.1 * x[-1]], *high[x >= 0.1 * x[-1]]]
        for o in (o for o in mine if o.stopped):
            x, y = _tokens(o), np.array(o.curve)[:, 1]
            axes.plot(x, y, color=look.color, linewidth=0.8, linestyle=":")
            axes.plot(x[-1:], y[-1:], "x", color=look.color, markersize=5)
    if not late:
        return None
    # The loss of an untrained model, ln(vocabulary), would flatten everything else.
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter())
    margin = 0.06 * (max(late) - min(late)) or 0.1
    axes.set_ylim(min(late) - margin, max(late) + margin)
    _legend(axes, looks, "each cell's mean over its seeds; shaded: from the least to the largest")
    return figure


def over_depth(
    title: str, name: str, outcomes: Sequence[Outcome], cells: Sequence[Cell], looks: Mapping[str, Look]
) -> Figure:
    """Mean and range over seeds of a number that each layer has."""
    figure, axes = _figure(title, "layer", _short(name.replace("_", " ")))
    values: list[float] = []
    for cell in reversed(cells):
        lines = [o.measures[name] for o in outcomes if o.cell == cell.name and name in o.measures]
        # Runs of a cell have the same layers, unless what is found while they run decides how many.
        depth = min(map(len, lines), default=0)
        if depth:
            x, low, mean, high = _band([(np.arange(depth), line[:depth]) for line in lines])
            _draw(axes, looks[cell.name], x, low, mean, high, _short(cell.name))
            values += [*mean]
    positive = [v for v in values if math.isfinite(v)]
    if positive and min(positive) > 0 and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    _legend(axes, looks, "each cell's mean over its seeds; shaded: from the least to the largest")
    return figure


def forest(title: str, differences: Sequence[Difference], control: str, unit: str) -> Figure | None:
    """Differences to the control with both intervals, and those of each seed; None if no cell has any."""
    found = sorted((d for d in differences if d.values), key=lambda d: -d.mean)
    if not found:
        return None
    from matplotlib.lines import Line2D

    figure, axes = _figure(title, f"validation loss less that of {_short(control)} (nats per {unit})", "",
                           height=1.7 + 0.3 * len(found))  # fmt: skip
    axes.axvline(0, color=BLUE, linestyle=(0, (5.0, 3.0)), linewidth=1.2)
    intervals = (("student", 1.2), ("bootstrap", 4.5))
    for row, d in enumerate(found):
        color = {BETTER: GREEN, WORSE: RED}.get(d.verdict, GREY)
        for name, width in intervals:
            low, high = getattr(d, name)[1:]
            if math.isfinite(low):
                axes.plot([low, high], [row, row], color=color, linewidth=width, alpha=0.85, solid_capstyle="butt")
        axes.plot(d.values, [row] * len(d.values), "o", markersize=3.5, markerfacecolor="white", color=_INK,
                  markeredgewidth=0.8)  # fmt: skip
        axes.plot([d.mean], [row], "D", color=color, markersize=6, markeredgecolor="white")
    axes.set_yticks(range(len(found)), [_short(d.cell) for d in found], fontsize=8 if len(found) > 12 else 9)
    axes.set_ylim(-0.7, len(found) - 0.3)
    # A t interval of two seeds reaches 13 standard errors, which would leave of all others a dot.
    reach = max(max(map(abs, (*d.values, *(v for v in d.bootstrap[1:] if math.isfinite(v))))) for d in found)
    ends = [abs(v) for d in found for v in d.student[1:] if math.isfinite(v)]
    if ends and max(ends) > 3 * reach > 0:
        axes.set_xlim(-3 * reach, 3 * reach)
    handles = [Line2D([], [], color=GREY, linewidth=width) for _, width in intervals]
    handles.append(Line2D([], [], marker="o", linestyle="", markersize=3.5, markerfacecolor="white", color=_INK))
    figure.legend(
        handles, ["95% by Student's t", "95% by the bootstrap", "a seed"], frameon=False, fontsize=8, ncols=3,
        loc="outside lower center", title="green: lower loss, red: higher loss, grey: no difference is shown",
        title_fontsize=8,
    )  # fmt: skip
    return figure


def grid(title: str, cells: Sequence[Cell], changes: Mapping[str, Mapping[str, Any]], unit: str) -> Figure | None:
    """Mean scores by two keys; None if cells differ in other ways."""
    keys = list(dict.fromkeys(key for cell in cells for key in changes.get(cell.name, {})))
    if len(keys) != 2 or any(len(changes.get(cell.name, {})) != 2 for cell in cells):
        return None
    rows, columns = (_sorted({changes[cell.name][key] for cell in cells}) for key in keys)
    if len(rows) < 2 or len(columns) < 2 or len(rows) * len(columns) != len(cells):
        return None
    table = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        at = (values.index(changes[cell.name][key]) for key, values in zip(keys, (rows, columns)))
        table[tuple(at)] = cell.mean
    if not np.isfinite(table).any():
        return None
    figure, axes = _figure(title, keys[1], keys[0], width=2.6 + 0.95 * len(columns), height=1.8 + 0.55 * len(rows))
    image = axes.imshow(np.ma.masked_invalid(table), cmap=f"{_MAP}_r", aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), [_value(v) for v in columns])
    axes.set_yticks(range(len(rows)), [_value(v) for v in rows])
    low, high = np.nanmin(table), np.nanmax(table)
    for (row, column), value in np.ndenumerate(table):
        # The reversed map is light where the loss is low.
        dark = math.isfinite(value) and value - low > 0.45 * (high - low)
        text = f"{value:.4f}" if math.isfinite(value) else "none\nfinished"
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else _INK, fontsize=8,
                  fontweight="bold" if value == low else "normal")  # fmt: skip
    figure.colorbar(image, ax=axes, label=f"mean validation loss\n(nats per {unit})")
    return figure


# ---- how cells are drawn


def _looks(cells: Sequence[Cell], control: str) -> dict[str, Look]:
    """The control is blue. Of many cells the best ones have colours, and all others are grey."""
    others = [cell.name for cell in cells if cell.name != control]
    shown = others if len(cells) <= _SEVERAL else others[:_BEST]
    looks = {name: Look(GREY, "", "-", False) for name in others}
    looks |= {name: Look(color, marker, "-", True) for name, color, marker in zip(shown, _PALETTE, _MARKERS)}
    return looks | {control: Look(BLUE, "o", "--", True)}


def _draw(
    axes: Axes, look: Look, x: np.ndarray, low: np.ndarray, mean: np.ndarray, high: np.ndarray, label: str
) -> None:
    if look.shown:
        axes.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0)
    axes.plot(
        x, mean, color=look.color, linestyle=look.line, marker=look.marker or None, markersize=4,
        linewidth=1.8 if look.shown else 0.8, alpha=1.0 if look.shown else 0.6, label=label if look.shown else None,
        zorder=3 if look.shown else 2, markevery=max(1, len(x) // 12),
    )  # fmt: skip


def _legend(axes: Axes, looks: Mapping[str, Look], note: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    order = range(len(labels) - 1, -1, -1)  # the best was drawn last
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    if others := sum(not look.shown for look in looks.values()):
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color=GREY, linewidth=0.8))
        labels.append(f"{others} others")
    legend = axes.legend(handles, labels, frameon=False, fontsize=8, title=note, title_fontsize=7)
    legend.get_title().set_color("#646c76")


def _band(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, least, mean and largest where all lines have a point."""
    common = sorted(set.intersection(*({float(v) for v in x} for x, _ in lines)))
    values = np.array([[y[np.searchsorted(x, at)] for at in common] for x, y in lines])
    return np.array(common), values.min(0), values.mean(0), values.max(0)


def _tokens(outcome: Outcome) -> np.ndarray:
    return np.array(outcome.curve)[:, 0] * (outcome.tokens / max(outcome.steps, 1))


def _measures(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({name for o in outcomes for name, values in o.measures.items() if len(values) > 1})


def _figure(title: str, xlabel: str, ylabel: str, *, width: float = 8.0, height: float = 5.0) -> tuple[Figure, Axes]:
    """Without pyplot, whose figures and backend are a notebook's own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    return figure, axes


def _short(name: str) -> str:
    name = escaped(name).replace("$", r"\$")
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _sorted(values: set[Any]) -> list[Any]:
    numbers = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numbers else sorted(values, key=str)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _short(str(value))
