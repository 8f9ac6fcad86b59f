"""`DepthPlan`: a model's layers as an index into the layers of other models, with its reasons.

It is plain data: immutable, hashable (a static argument of `jax.jit`), printable, and YAML that a person
can read and write. The words (row, source, part, end, role) are explained in CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from jaxup.errors import UserError, suggest, within
from jaxup.model.spec import PART_OF, STACK

ROLES = ("original", "copy", "new")
PARTS = ("attention", "mlp", "norms")  # of a block
ENDS = ("embed_tokens", "embed_positions", "norm", "lm_head")  # what is not a block
ALL_PARTS = PARTS + ENDS
DTYPES = ("float32", "bfloat16", "float16")

# Every parameter that a block of some family has, and every one that is not of a block.
BLOCK_PATHS = tuple(path.removeprefix(STACK) for path in PART_OF if path.startswith(STACK))
END_PATHS = tuple(path for path in PART_OF if not path.startswith(STACK))

# What makes a block add nothing to the residual stream: its two projections back into it.
ZEROED = (("o_proj", 0.0), ("down_proj", 0.0))

Scales = tuple[tuple[str, float | tuple[float, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of the result.

    Attributes:
      source, layer: the model and its layer that this one is made from.
      role: "original", "copy", or "new" for a layer that inherits nothing (`parts` is then empty).
      scales: (filter, value) pairs. A filter is a case-sensitive substring of a parameter's path
        inside a block (one of BLOCK_PATHS), such as "o_proj" of "self_attn.o_proj.kernel"; "" and
        "*" match all. The first match wins, no match means 1. A value is a factor, or several that
        are multiplied with in turn, each product rounded to the parameter's dtype, as by plans
        applied one after the other. They scale the row's parameters, inherited or new.
      parts: those of PARTS that come from the source; the others are newly initialised.
      noise: the share, from 0 to 1, of freshly initialised values mixed into the row's inherited
        kernels: (1 - noise) * inherited + noise * new. It does not go with scales.
    """

    source: str
    layer: int
    role: str = "original"
    scales: Scales = ()
    parts: tuple[str, ...] = PARTS
    noise: float = 0.0

    @within("plan")
    def __post_init__(self):
        if not isinstance(self.source, str) or not self.source:
            raise UserError(f"a source's name must be text, not {self.source!r}")
        if self.role not in ROLES:
            raise UserError(f"unknown role {self.role!r}{suggest(self.role, ROLES)}")
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"unknown part {part!r}{suggest(part, PARTS)}")
        if self.role == "new" and self.parts:
            raise UserError(f"a layer of role 'new' inherits nothing, but takes {', '.join(self.parts)}")
        if self.role != "new" and not self.parts:
            raise UserError(f"a layer that inherits nothing has role 'new', not {self.role!r}")
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise={self.noise!r} is not a share from 0 to 1")
        if self.noise and self.scales:
            raise UserError("a layer has scales or noise, not both")
        # One spelling each, so that equal rows compare equal.
        object.__setattr__(self, "layer", operator.index(self.layer))
        object.__setattr__(self, "scales", _scales(self.scales))
        object.__setattr__(self, "parts", tuple(part for part in PARTS if part in self.parts))
        object.__setattr__(self, "noise", float(self.noise))

    def factors(self, path: str) -> tuple[float, ...]:
        """What multiplies the parameter at `path` inside the block: () nothing, (0.0,) it is zero."""
        return factors_of(self.scales, path)

    def inherits(self, path: str) -> bool:
        """Whether the parameter at `path` inside the block comes from the source."""
        return PART_OF[STACK + path] in self.parts

    @property
    def zeroed(self) -> bool:
        """Whether the block adds nothing to the residual stream: o_proj and down_proj are zero."""
        return all(
            self.factors(f"{module}.{name}") == (0.0,)
            for module in ("self_attn.o_proj", "mlp.down_proj")
            for name in ("kernel", "bias")
        )


@dataclasses.dataclass(frozen=True)
class DepthPlan:
    """The layers of a result, in order, and where everything that is not a layer comes from.

    Attributes:
      rows: one per layer of the result.
      embed_tokens, embed_positions, norm, lm_head: the source each is taken from; None means newly
        initialised. One that a model does not have is passed over; `head` says what the head is where
        models tie it to the embedding.
      sources: (name, number of layers) of every model the plan may take from.
      scales: of what is not a block, as `Row.scales`, with filters on END_PATHS.
      dtype, out_dtype: what is inherited is cast to `dtype`, scaled, and cast to `out_dtype`; None
        keeps the dtype. Products are computed in float32 and rounded to `dtype`.
    """

    rows: tuple[Row, ...]
    embed_tokens: str | None
    embed_positions: str | None
    norm: str | None
    lm_head: str | None
    sources: tuple[tuple[str, int], ...]
    scales: Scales = ()
    dtype: str | None = None
    out_dtype: str | None = None

    @within("plan")
    def __post_init__(self):
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "sources", tuple((name, operator.index(n)) for name, n in self.sources))
        object.__setattr__(self, "scales", _scales(self.scales))
        layers = dict(self.sources)
        if len(layers) != len(self.sources):
            raise UserError("two sources have the same name")
        for name, count in self.sources:
            if not isinstance(name, str) or not name:
                raise UserError(f"a source's name must be text, not {name!r}")
            if count < 1:
                raise UserError(f"source {name!r} cannot have {count} layers")
        if not self.rows:
            raise UserError("there are no rows; a model has at least one layer")
        for i, row in enumerate(self.rows):
            if row.source not in layers:
                raise UserError(f"row {i} takes from unknown source {row.source!r}{suggest(row.source, layers)}")
            if not 0 <= row.layer < (count := layers[row.source]):
                raise UserError(f"row {i} takes layer {row.layer} of {row.source!r}, which has layers 0-{count - 1}")
        for end in ENDS:
            name = getattr(self, end)
            if name is not None and name not in layers:
                raise UserError(f"{end} is taken from unknown source {name!r}{suggest(name, layers)}")
        for dtype in (self.dtype, self.out_dtype):
            if dtype is not None and dtype not in DTYPES:
                raise UserError(f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_layers(self) -> int:
        return len(self)

    def factors(self, path: str) -> tuple[float, ...]:
        """What multiplies the parameter at `path`, one of END_PATHS."""
        return factors_of(self.scales, path)

    def head(self, tied: Mapping[str, bool]) -> tuple[str, str | None] | None:
        """The head of the result: (which parameter, of which source); None if it is tied to the embedding.

        `tied` says of each source whether its own head is. The parameter is "lm_head", or
        "embed_tokens" where a tied model's head goes beside another model's embedding. A source of
        None means newly initialised.
        """
        both = [name for name in (self.embed_tokens, self.lm_head) if name is not None]
        if self.lm_head is None:
            both = [self.embed_tokens] if self.embed_tokens is not None else [name for name, _ in self.sources]
        if all(tied[name] for name in both):
            return None
        if self.lm_head is None or not tied[self.lm_head]:
            return "lm_head", self.lm_head
        return "embed_tokens", self.lm_head

    def order(self) -> tuple[int, ...]:
        """The source's layers as they run, -1 for a layer that adds nothing; see `Decoder`.

        UserError unless the result is one model's layers, whole and unscaled (a zeroed copy runs as
        -1), between that model's own ends.
        """
        problem = ""
        if len({row.source for row in self.rows} | {getattr(self, end) for end in ENDS}) > 1:
            problem = "it takes from several sources, or what it needs is newly initialised"
        elif self.dtype or self.out_dtype or any(factors for path in END_PATHS if (factors := self.factors(path))):
            problem = "it casts or scales"
        for i, row in enumerate(self.rows):
            if row.parts != PARTS or row.noise:
                problem = f"layer {i} is not inherited whole"
            elif not row.zeroed and any(row.factors(path) for path in BLOCK_PATHS):
                problem = f"layer {i} is scaled"
        if problem:
            raise UserError(f"cannot be run as an order of layers: {problem}", at="plan")
        return tuple(-1 if row.zeroed else row.layer for row in self.rows)

    def renamed(self, names: Mapping[str, str]) -> DepthPlan:
        """The same plan with other names for its sources; sources that get the same name become one."""
        rows = tuple(dataclasses.replace(row, source=names[row.source]) for row in self.rows)
        sources = {names[name]: count for name, count in self.sources}
        ends: dict[str, Any] = {end: names.get(getattr(self, end)) for end in ENDS}
        return dataclasses.replace(self, rows=rows, sources=tuple(sources.items()), **ends)

    def to_yaml(self) -> str:
        from jaxup.depth import plan_yaml

        return plan_yaml.dump(self)

    @classmethod
    def from_yaml(cls, text: str, name: str = "plan") -> DepthPlan:
        """Reads what `to_yaml` writes, and what a person does; raises UserError as NAME:LINE:COLUMN."""
        from jaxup.depth import plan_yaml

        return plan_yaml.load(text, name)

    def strip(self) -> str:
        """One character per layer: = original, X copy, z zeroed copy, p partly inherited, n new."""
        from jaxup.depth import draw

        return draw.strip(self)

    def describe(self) -> str:
        """The strip, a table of the runs, the ends, and what is unusual about the order."""
        from jaxup.depth import draw

        return draw.describe(self)

    __str__ = describe

    def __repr__(self) -> str:
        """One line: the strip, or its two ends."""
        strip, before = self.strip(), " + ".join(str(count) for _, count in self.sources[:8])
        shown = strip if len(strip) <= 120 else f"{strip[:58]}...{strip[-58:]}"
        return f"<DepthPlan {before}{' + ...' * (len(self.sources) > 8)} -> {self.num_layers} layers: {shown}>"

    def _repr_png_(self) -> bytes | None:
        """For notebooks: the picture, unless there are too many sources to draw."""
        from jaxup.depth import picture

        try:
            return picture.png(self, " + ".join(name for name, _ in self.sources))
        except UserError:
            return None

    def _repr_html_(self) -> str:
        """For notebooks, which take it before the picture: that, and what `describe` says below it."""
        from jaxup.depth import picture

        return picture.html(self)


def runs(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """The rows, with those that differ only in being the next layer put together."""
    found: list[list[Row]] = []
    for row in rows:
        if found and row == dataclasses.replace(found[-1][-1], layer=found[-1][-1].layer + 1):
            found[-1].append(row)
        else:
            found.append([row])
    return [tuple(run) for run in found]


def simplest_scales(factors: Mapping[str, Sequence[float]]) -> Scales:
    """The shortest scales that give each path its factors: what a person would write."""
    values = {path: tuple(f) for path, f in factors.items()}
    default = max(sorted(set(values.values())), key=list(values.values()).count, default=())
    rest = {path: value for path, value in values.items() if value != default}
    pairs: list[tuple[str, tuple[float, ...]]] = []
    while rest:
        # The name that covers most of what is left and nothing else, else one path.
        names = {part for path in rest for part in (path, *path.split("."), path.rpartition(".")[0]) if part}
        covers = {
            name: [path for path in rest if name in path]
            for name in sorted(names)
            if len({values[path] for path in values if name in path}) == 1
        }
        name = min(covers, key=lambda name: (-len(covers[name]), len(name), name))
        pairs.append((name, values[covers[name][0]]))
        rest = {path: value for path, value in rest.items() if name not in path}
    if default:
        pairs.append(("", default))
    return _scales(pairs)


def _scales(scales: Sequence[tuple[str, float | Sequence[float]]]) -> Scales:
    """In one spelling: factors of 1 left out of several, 0 instead of several with a 0."""
    result: list[tuple[str, float | tuple[float, ...]]] = []
    for filter, value in scales:
        if not isinstance(filter, str) or filter in [f for f, _ in result]:
            raise UserError(f"the filter {filter!r} of a scale is not text, or is given twice")
        factors = tuple(float(f) for f in (value if isinstance(value, Sequence) else (value,)))
        if not all(map(math.isfinite, factors)):
            raise UserError(f"the scale of {filter!r} must be a finite number, not {value}")
        if 0 in factors:
            factors = (0.0,)
        factors = tuple(f for f in factors if f != 1) or (1.0,)
        result.append((filter, factors[0] if len(factors) == 1 else factors))
    return tuple(result)


def factors_of(scales: Scales, path: str) -> tuple[float, ...]:
    """What scales multiply the parameter at `path` with: () nothing, (0.0,) it is zero."""
    value = next((value for filter, value in scales if filter == "*" or filter in path), 1.0)
    factors = value if isinstance(value, tuple) else (value,)
    return () if factors == (1.0,) else factors
