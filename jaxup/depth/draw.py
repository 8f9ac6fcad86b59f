"""A plan for the eye: the strip, the table, the remarks, the picture."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable

from jaxup.depth.plan import ENDS, PARTS, DepthPlan, Row


def strip(plan: DepthPlan) -> str:
    """One character per layer: 0 original, X copy, z zeroed copy, p partly inherited, n new."""
    return "".join(map(_character, plan.rows))


def describe(plan: DepthPlan) -> str:
    """The strip, a table of the runs, the ends, and what is unusual about the order."""
    lines = [f"{plan.num_layers} layers from {', '.join(f'{name!r} ({n})' for name, n in plan.sources)}"]
    lines += [strip(plan), *_table(plan)]
    origins: dict[str | None, list[str]] = {}
    for end in ENDS:
        origins.setdefault(getattr(plan, end), []).append(end)
    for name, ends in origins.items():
        lines.append(f"{', '.join(ends)}: {'newly initialised' if name is None else f'from {name!r}'}")
    for name, count in plan.sources:
        lines += [f"{name!r}: {remark}" for remark in _remarks(plan, name, count)]
    return "\n".join(lines)


@functools.lru_cache(maxsize=1024)
def _character(row: Row) -> str:
    if row.role == "new":
        return "n"
    if row.parts != PARTS:
        return "p"
    if row.role == "copy":
        return "z" if row.zeroed else "X"
    return "0"


def _table(plan: DepthPlan) -> list[str]:
    table, start = [("result", "source", "layers", "role", "parts", "scales")], 0
    for run in plan.runs():
        first, new = run[0], run[0].role == "new"
        table.append((
            _ranges(range(start, start + len(run))),
            "-" if new else first.source,
            "-" if new else _ranges(row.layer for row in run),
            first.role,
            "all" if first.parts == PARTS else ", ".join(first.parts) or "none",
            ", ".join(f"{filter or 'all'} x {value:g}" for filter, value in first.scales),
        ))  # fmt: skip
        start += len(run)
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  " + "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def _remarks(plan: DepthPlan, source: str, num_layers: int) -> list[str]:
    """Which layers of a source are unused, repeated or out of order, one remark each."""
    placed = [(i, row.layer) for i, row in enumerate(plan.rows) if row.source == source and row.parts]
    uses = collections.Counter(layer for _, layer in placed)
    remarks = []
    if unused := [layer for layer in range(num_layers) if layer not in uses]:
        remarks.append(f"unused: {_ranges(unused)}")
    for times in sorted(set(uses.values()) - {1}):
        remarks.append(f"used {times} times: {_ranges(layer for layer in range(num_layers) if uses[layer] == times)}")
    back = [f"{a} -> {b} at layer {i} of the result" for (_, a), (i, b) in itertools.pairwise(placed) if b < a]
    if back:
        more = f" and {len(back) - 4} more" if len(back) > 4 else ""
        remarks.append(f"goes back: {', '.join(back[:4])}{more}")
    return remarks


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5", both ends included."""
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
