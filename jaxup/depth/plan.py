"""`DepthPlan`: a model's layers as an index into the layers of other models, with its reasons.

A decoder keeps its blocks stacked on axis 0, so changing its depth is a gather and a plan is the
index of that gather. It is plain data: immutable, hashable (a static argument of `jax.jit`),
printable, and YAML that a person can read and write (`jaxup.depth.plan_yaml`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterable

from jaxup.errors import UserError, suggest

ROLES = ("original", "copy", "new")
PARTS = ("attention", "mlp", "norms")  # of a block
ENDS = ("embed_tokens", "embed_positions", "norm", "lm_head")  # what is not a block
ALL_PARTS = PARTS + ENDS

# Which part of a block each of its modules belongs to.
MODULE_PARTS = {
    "self_attn": "attention",
    "mlp": "mlp",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of the result.

    Attributes:
      source, layer: the model and its layer that this one is made from.
      role: "original", "copy", or "new" for a layer that inherits nothing (`parts` is then empty).
      scales: (filter, value) pairs. A filter is a case-sensitive substring of a parameter's path
        inside a block, such as "o_proj" of "self_attn.o_proj.kernel"; "" matches all. The first
        match wins, no match means 1. They scale the row's parameters, inherited or new.
      parts: those of PARTS that come from the source; the others are newly initialised.
    """

    source: str
    layer: int
    role: str = "original"
    scales: tuple[tuple[str, float], ...] = ()
    parts: tuple[str, ...] = PARTS

    def __post_init__(self):
        if not isinstance(self.source, str) or not self.source:
            raise UserError(f"plan: a source's name must be text, not {self.source!r}")
        if self.role not in ROLES:
            raise UserError(f"plan: unknown role {self.role!r}{suggest(self.role, ROLES)}")
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"plan: unknown part {part!r}{suggest(part, PARTS)}")
        if self.role == "new" and self.parts:
            raise UserError(f"plan: a layer of role 'new' inherits nothing, but takes {', '.join(self.parts)}")
        if self.role != "new" and not self.parts:
            raise UserError(f"plan: a layer that inherits nothing has role 'new', not {self.role!r}")
        scales = tuple((filter, float(value)) for filter, value in self.scales)
        for i, (filter, value) in enumerate(scales):
            if not isinstance(filter, str) or filter in [f for f, _ in scales[:i]]:
                raise UserError(f"plan: the filter {filter!r} of a scale is not text, or is given twice")
            if not math.isfinite(value):
                raise UserError(f"plan: the scale of {filter!r} must be a finite number, not {value}")
        # One spelling each, so that equal rows compare equal.
        object.__setattr__(self, "layer", operator.index(self.layer))
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "parts", tuple(part for part in PARTS if part in self.parts))

    def scale(self, path: str) -> float:
        """The factor of the parameter at `path` inside the block ("mlp.up_proj.kernel")."""
        return next((value for filter, value in self.scales if filter in path), 1.0)

    def inherits(self, path: str) -> bool:
        """Whether the parameter at `path` inside the block comes from the source."""
        return MODULE_PARTS[path.split(".")[0]] in self.parts

    @property
    def zeroed(self) -> bool:
        """Whether the block adds nothing to the residual stream: o_proj and down_proj are zero."""
        return not any(
            self.scale(f"{module}.{name}")
            for module in ("self_attn.o_proj", "mlp.down_proj")
            for name in ("kernel", "bias")
        )


@dataclasses.dataclass(frozen=True)
class DepthPlan:
    """The layers of a result, in order, and where everything that is not a layer comes from.

    Attributes:
      rows: one per layer of the result.
      embed_tokens, embed_positions, norm, lm_head: the source each is taken from; None means newly
        initialised. They say nothing where a model has no such parameter: with tied embeddings the
        head follows embed_tokens whatever lm_head says.
      sources: (name, number of layers) of every model the plan may take from.

    Raises:
      UserError: a row or an end names an unknown source, or a layer its source does not have.
    """

    rows: tuple[Row, ...]
    embed_tokens: str | None
    embed_positions: str | None
    norm: str | None
    lm_head: str | None
    sources: tuple[tuple[str, int], ...]

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "sources", tuple((name, operator.index(n)) for name, n in self.sources))
        layers = dict(self.sources)
        if len(layers) != len(self.sources):
            raise UserError("plan: two sources have the same name")
        for name, count in self.sources:
            if not isinstance(name, str) or not name:
                raise UserError(f"plan: a source's name must be text, not {name!r}")
            if count < 1:
                raise UserError(f"plan: source {name!r} cannot have {count} layers")
        if not self.rows:
            raise UserError("plan: there are no rows; a model has at least one layer")
        for i, row in enumerate(self.rows):
            if row.source not in layers:
                raise UserError(f"plan: row {i} takes from unknown source {row.source!r}{suggest(row.source, layers)}")
            if not 0 <= row.layer < layers[row.source]:
                raise UserError(
                    f"plan: row {i} takes layer {row.layer} of {row.source!r}, "
                    f"which has layers 0-{layers[row.source] - 1}"
                )
        for end in ENDS:
            name = getattr(self, end)
            if name is not None and name not in layers:
                raise UserError(f"plan: {end} is taken from unknown source {name!r}{suggest(name, layers)}")

    @property
    def num_layers(self) -> int:
        return len(self.rows)

    def runs(self) -> list[tuple[Row, ...]]:
        """The rows, with those that differ only in being the next layer put together."""
        runs: list[list[Row]] = []
        for row in self.rows:
            if runs and row == dataclasses.replace(runs[-1][-1], layer=runs[-1][-1].layer + 1):
                runs[-1].append(row)
            else:
                runs.append([row])
        return [tuple(run) for run in runs]

    def to_yaml(self) -> str:
        from jaxup.depth import plan_yaml

        return plan_yaml.dump(self)

    @classmethod
    def from_yaml(cls, text: str) -> DepthPlan:
        """Reads what `to_yaml` writes, and what a person does; raises UserError with the line."""
        from jaxup.depth import plan_yaml

        return plan_yaml.load(text)

    def strip(self) -> str:
        """One character per layer: 0 original, X copy, z zeroed copy, p partly inherited, n new."""
        return "".join(map(_character, self.rows))

    def describe(self) -> str:
        """The strip, a table of the runs, the ends, and what is unusual about the order."""
        lines = [f"{self.num_layers} layers from {', '.join(f'{name!r} ({n})' for name, n in self.sources)}"]
        lines += [self.strip(), *_table(self)]
        origins: dict[str | None, list[str]] = {}
        for end in ENDS:
            origins.setdefault(getattr(self, end), []).append(end)
        for name, ends in origins.items():
            lines.append(f"{', '.join(ends)}: {'newly initialised' if name is None else f'from {name!r}'}")
        for name, count in self.sources:
            lines += [f"{name!r}: {remark}" for remark in _remarks(self, name, count)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


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
