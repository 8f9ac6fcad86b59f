"""A plan for the eye: the strip, the table, the remarks. The picture is in `jaxup.depth.picture`."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

from jaxup.depth.plan import ENDS, PARTS, DepthPlan, Row, runs
from jaxup.text import named

# What a character of the strip means, and its colour on a terminal (SGR parameters).
CHARACTERS = {
    "=": ("original", "34"),
    "X": ("copy", "33"),
    "z": ("zeroed copy", "35"),
    "p": ("partly inherited", "36"),
    "n": ("new", "32"),
}
_WIDTH = 100  # layers in one row of the strip


def strip(plan: DepthPlan) -> str:
    """One character per layer: = original, X copy, z zeroed copy, p partly inherited, n new."""
    return "".join(map(character, plan.rows))


@functools.lru_cache(maxsize=1024)
def character(row: Row) -> str:
    """The layer's character in the strip."""
    if row.role == "new":
        return "n"
    if row.parts != PARTS:
        return "p"
    if row.role == "copy":
        return "z" if row.zeroed else "X"
    return "="


def describe(plan: DepthPlan, *, color: bool = False) -> str:
    """The strip, a table of the runs, the ends, and what is unusual about the order; `color` is for terminals."""
    lines = [f"{plan.num_layers} layers from {', '.join(f'{name!r} ({n})' for name, n in plan.sources)}"]
    lines += [*_strip_rows(plan, color), *_table(plan), *_ends(plan), *_remarks(plan)]
    return "\n".join(lines)


def _strip_rows(plan: DepthPlan, color: bool) -> Iterator[str]:
    """Rows of 100 layers, the index of the first before each if there are several; and what the characters mean."""
    whole, digits = strip(plan), len(str(plan.num_layers))
    for start in range(0, len(whole), _WIDTH):
        row = whole[start : start + _WIDTH]
        if color:
            row = "".join(_colored(c, "".join(same)) for c, same in itertools.groupby(row))
        yield row if len(whole) <= _WIDTH else f"{start:>{digits}} {row}"
    yield "  ".join(f"{_colored(c, c) if color else c} {CHARACTERS[c][0]}" for c in CHARACTERS if c in whole)


def _colored(character: str, text: str) -> str:
    return f"\033[{CHARACTERS[character][1]}m{text}\033[0m"


# ---- the table


def _table(plan: DepthPlan) -> Iterator[str]:
    """A line for each run of layers; what repeats many times is shown once, with a line that says how often."""
    header = ("result", "source", "layers", "role", "parts", "scales")
    cells: list[Sequence[str]] = [header]
    notes: dict[int, str] = {}
    for start, stop, period, shift in _patterns(plan.rows):
        first = start
        for run in runs(plan.rows[start : start + period]):
            cells.append(_cells(run, first))
            first += len(run)
        if (times := (stop - start) // period) > 1:
            above = "the layer above" if period == 1 else f"the {period} layers above"
            next = f", each time {abs(shift)} layer{'s'[: abs(shift) != 1]} {'on' if shift > 0 else 'back'}"
            notes[len(cells)] = f"{start}-{stop - 1}: {above}, {times} times{next if shift else ''}"
    # A column that says nothing is left out.
    dull = {
        "source": len(plan.sources) == 1,
        "parts": all(row.parts == PARTS for row in plan.rows),
        "scales": not any(row[-1] for row in cells[1:]),
    }
    kept = [i for i, name in enumerate(header) if not dull.get(name)]
    cells = [[row[i] for i in kept] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for i, row in enumerate(cells):
        if i in notes:
            yield f"  {notes[i]}"
        yield "  " + "  ".join(map(str.ljust, row, widths)).rstrip()
    if len(cells) in notes:
        yield f"  {notes[len(cells)]}"


def _cells(run: Sequence[Row], start: int) -> tuple[str, ...]:
    first, new = run[0], run[0].role == "new"
    return (
        ranges(range(start, start + len(run))),
        "-" if new else named(first.source),
        "-" if new else ranges(row.layer for row in run),
        first.role,
        "all" if first.parts == PARTS else ", ".join(first.parts) or "none",
        ", ".join([*_scales(first.scales), *([f"noise {first.noise:g}"] if first.noise else [])]),
    )


def _scales(scales: Sequence[tuple[str, float | tuple[float, ...]]]) -> Iterator[str]:
    for filter, value in scales:
        factors = value if isinstance(value, tuple) else (value,)
        yield f"{named(filter) or 'all'} {' '.join(f'x {factor:g}' for factor in factors)}"


def _patterns(rows: Sequence[Row]) -> Iterator[tuple[int, int, int, int]]:
    """The rows as consecutive pieces (start, stop, period, shift): the period, or all, repeats `shift` layers on."""
    count, longest = len(rows), min(_MAX_PERIOD, len(rows) // 3)
    kinds, layers = list(map(_kind, rows)), [row.layer for row in rows]
    heads = set(itertools.accumulate(map(len, runs(rows)), initial=0))
    lines = list(itertools.accumulate((i in heads for i in range(count)), initial=0))  # of the table, above each row
    # By period p and row i: how many layers row i + p is beyond row i, and for how many rows from i on that stays so.
    shifts: list[list[int | None]] = [[]]
    holds: list[list[int]] = [[]]
    for p in range(1, longest + 1):
        shift = [layers[i + p] - layers[i] if kinds[i] == kinds[i + p] else None for i in range(count - p)]
        hold = [1] * len(shift)
        for i in reversed(range(len(shift) - 1)):
            if shift[i] == shift[i + 1]:
                hold[i] += hold[i + 1]
        shifts.append(shift)
        holds.append(hold)

    start = done = 0
    while start < count:
        best, spared = None, _LEAST_SPARED - 1
        for p in range(1, min(longest, (count - start) // 3) + 1):
            times, on = (holds[p][start] + p) // p, shifts[p][start]
            if on is None or times < 3:
                continue
            stop = start + times * p
            # The words are a line as well, and so is a run that begins or ends within what repeats.
            spares = lines[stop] - lines[start + p] - 1 - (start not in heads) - (stop not in heads)
            if spares > spared:
                best, spared = (start, stop, p, on), spares
        if best is None:
            start += 1
            continue
        if done < start:
            yield done, start, start - done, 0
        yield best
        start = done = best[1]
    if done < count:
        yield done, count, count - done, 0


_MAX_PERIOD = 128
_LEAST_SPARED = 4  # lines of the table: words are longer to read than lines


def _kind(row: Row) -> tuple[object, ...]:
    """All of a row but which layer it is."""
    return row.source, row.role, row.parts, row.noise, row.scales


# ---- the rest


def _ends(plan: DepthPlan) -> Iterator[str]:
    origins: dict[str | None, list[str]] = {}
    for end in ENDS:
        origins.setdefault(getattr(plan, end), []).append(end)
    for name, ends in origins.items():
        yield f"{', '.join(ends)}: {'newly initialised' if name is None else f'from {name!r}'}"
    if plan.scales:
        yield f"scales of these: {', '.join(_scales(plan.scales))}"
    if plan.dtype or plan.out_dtype:
        cast = [f"computed in {plan.dtype}"] * bool(plan.dtype) + [f"cast to {plan.out_dtype}"] * bool(plan.out_dtype)
        yield f"what is inherited is {', then '.join(cast)}"


def _remarks(plan: DepthPlan) -> Iterator[str]:
    """What adds nothing; which layers of each source are unused, repeated or out of order, one remark each."""
    if silent := sum(row.zeroed for row in plan.rows):
        yield f"{silent} of {plan.num_layers} layers add nothing to the residual stream as they are"
    for source, num_layers in plan.sources:
        of = "" if len(plan.sources) == 1 else f" of {source!r}"
        placed = [(i, row) for i, row in enumerate(plan.rows) if row.source == source and row.parts]
        uses = collections.Counter(row.layer for _, row in placed)
        speaks = {row.layer for _, row in placed if not row.zeroed}
        if not uses:
            yield f"none of the layers{of or ' of the source'} is used"
            continue
        if unused := [layer for layer in range(num_layers) if layer not in uses]:
            yield f"source {_layers(unused, of)} never used"
        if silenced := [layer for layer in sorted(uses) if layer not in speaks]:
            lost = "it computes" if len(silenced) == 1 else "they compute"
            yield f"source {_layers(silenced, of)} used as zeroed copies only: what {lost} is lost"
        for times in sorted(set(uses.values()) - {1}):
            layers = [layer for layer in sorted(uses) if uses[layer] == times]
            yield f"source {_layers(layers, of)} used {times} times"
        back = [(a.layer, b.layer, i) for (_, a), (i, b) in itertools.pairwise(placed) if b.layer < a.layer]
        if back:
            shown = ", ".join(f"{a} -> {b} at layer {i}" for a, b, i in back[:4])
            more = f" and {len(back) - 4} more" if len(back) > 4 else ""
            yield f"the order goes back in the source{of}: {shown}{more}"


def _layers(layers: Sequence[int], of: str) -> str:
    many = len(layers) > 1
    return f"layer{'s' * many} {ranges(layers)}{of} {'are' if many else 'is'}"


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5", both ends included; [0, 2, 4, 6] as "0, 2, ..., 6"."""
    left, spans = list(numbers), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = next((i for i in range(1, len(left)) if left[i] - left[i - 1] != step), len(left))
        if step != 1 and count < 4:
            count = 1
        between = "-" if step == 1 else f", {left[1]}, ..., "
        spans.append(f"{left[0]}{between}{left[count - 1]}" if count > 1 else f"{left[0]}")
        left = left[count:]
    return ", ".join(spans)
