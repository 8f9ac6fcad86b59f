"""A plan applied to the results of plans, as one plan on the originals."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping

from jaxup.depth.plan import BLOCK_PATHS, END_PATHS, ENDS, PARTS, DepthPlan, Row, Scales, factors_of, simplest_scales
from jaxup.errors import UserError, within

Factors = tuple[float, ...]


@within("compose")
def compose(outer: DepthPlan, inners: Mapping[str, DepthPlan]) -> DepthPlan:
    """The plan that does at once what `outer` does to the results of `inners`.

    Args:
      outer: its sources that are named in `inners` are what those plans make.
      inners: their sources keep their names, and become the result's.

    Returns:
      A plan that gives the same tensors, bit for bit but for the sign of zeros. What is newly
      initialised gets the values for its place in the final result.

    Raises:
      UserError: depths do not fit, or no single plan says this: rounding to several dtypes in turn,
        scaling what noise was mixed into, repeating a layer that is newly initialised.
    """
    for name, count in outer.sources:
        if name in inners and inners[name].num_layers != count:
            raise UserError(f"{name!r} has {inners[name].num_layers} layers, but the plan on it says {count}")
    uses = collections.Counter((row.source, row.layer) for row in outer.rows if row.parts)
    rows = []
    for i, row in enumerate(outer.rows):
        if row.source in inners:
            inner = inners[row.source].rows[row.layer]
            if (inner.parts != PARTS or inner.noise) and uses[row.source, row.layer] > 1:
                raise UserError(f"layer {row.layer} of {row.source!r} is newly initialised, and used several times")
            row = _row(i, row, inner)
        rows.append(row)

    ends, factors = {}, {}
    for end in ENDS:
        name = getattr(outer, end)
        made = inners.get(name)
        ends[end] = name if made is None else getattr(made, end)
        for path in END_PATHS:
            if path.split(".")[0] == end:
                factors[path] = _chain(() if made is None else made.factors(path), outer.factors(path))
    _check_head(outer, inners)
    dtype, out_dtype = _dtypes(outer, inners)
    named = (inners[name].sources if name in inners else ((name, count),) for name, count in outer.sources)
    sources, scales = all_sources(itertools.chain.from_iterable(named)), _scales(factors, outer.scales)
    return DepthPlan(tuple(rows), **ends, sources=sources, scales=scales, dtype=dtype, out_dtype=out_dtype)


def all_sources(sources: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Those of several plans, each once; UserError for one that has two depths."""
    found: dict[str, int] = {}
    for name, layers in sources:
        if found.setdefault(name, layers) != layers:
            raise UserError(f"{name!r} has {found[name]} layers in one plan and {layers} in another")
    return tuple(found.items())


def _row(i: int, outer: Row, inner: Row) -> Row:
    parts = tuple(part for part in outer.parts if part in inner.parts)
    role = "new" if not parts else "copy" if "copy" in (outer.role, inner.role) else "original"
    factors = {
        path: _chain(inner.factors(path) if outer.inherits(path) else (), outer.factors(path)) for path in BLOCK_PATHS
    }
    scales = _scales(factors, outer.scales, inner.scales)
    noise = outer.noise or inner.noise
    if (noise and scales) or (outer.noise and inner.noise) or (inner.noise and outer.parts != PARTS):
        raise UserError(f"layer {i} has noise, and is changed by another plan")
    return Row(inner.source, inner.layer, role, scales, parts, noise)


def _chain(first: Factors, second: Factors) -> Factors:
    return (0.0,) if (0.0,) in (first, second) else first + second


def _scales(factors: Mapping[str, Factors], *as_written: Scales) -> Scales:
    """Scales that give these factors: those of one of the plans if they do."""
    for scales in ((), *as_written):
        if all(factors_of(scales, path) == value for path, value in factors.items()):
            return scales
    return simplest_scales(factors)


def _check_head(outer: DepthPlan, inners: Mapping[str, DepthPlan]) -> None:
    """Refuses what depends on whether an inner result ties its head to its embedding, which no plan knows."""
    if (name := outer.lm_head) is None or name not in inners or outer.embed_tokens == name:
        return
    inner = inners[name]
    if inner.embed_tokens != inner.lm_head or inner.factors("embed_tokens") != inner.factors("lm_head.kernel"):
        raise UserError(f"the head of {outer.lm_head!r} is not of the model, or the scale, of its embedding")


def _dtypes(outer: DepthPlan, inners: Mapping[str, DepthPlan]) -> tuple[str | None, str | None]:
    found = {(inners[n].dtype, inners[n].out_dtype) if n in inners else (None, None) for n, _ in outer.sources}
    problem = UserError("no single plan rounds to the dtypes of these plans in turn")
    if len(found) > 1:
        raise problem
    ((dtype, out),) = found
    if (dtype, out) == (None, None):
        if (outer.dtype or outer.out_dtype) and any(_rounds(inner) for inner in inners.values()):
            raise problem
        return outer.dtype, outer.out_dtype
    if (outer.dtype, outer.out_dtype) == (None, None) and not _rounds(outer):
        return dtype, out
    # The inner result has the dtype that it is computed in, and so has the outer one's arithmetic.
    if dtype is None or out not in (None, dtype) or outer.dtype not in (None, dtype):
        raise problem
    return dtype, outer.out_dtype or out


def _rounds(plan: DepthPlan) -> bool:
    """Whether it multiplies with anything but zero, or mixes noise in."""

    def scales(factors: Callable[[str], Factors], paths: tuple[str, ...]) -> bool:
        return any(factors(path) not in ((), (0.0,)) for path in paths)

    return scales(plan.factors, END_PATHS) or any(row.noise or scales(row.factors, BLOCK_PATHS) for row in plan.rows)
