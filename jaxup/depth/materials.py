"""The bill of materials: what every parameter of a plan's result is made from.

Worked out once, without files and without jax. To make the result is to carry the bill out: in
memory (`jaxup.depth.apply`), from files onto devices (`jaxup.hub.transfer`), or from files to files
(`jaxup.building`). What is said of a result, such as its size, is read from its bill.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np

from jaxup.depth.plan import ENDS, DepthPlan
from jaxup.model.spec import STACK, is_kernel


class Material(NamedTuple):
    """What one layer of a stacked parameter, or a parameter that is not stacked, is made from.

    Its values are cast to `before`, multiplied with each factor in turn, and cast to `after`, as
    `jaxup.depth.arithmetic.rescale` does it; then, if there is noise, new values are mixed in.
    """

    source: str | None  # the model; None: newly initialised
    path: str  # of the source's parameter: the head may be another model's embedding, transposed
    layer: int | None  # of the source
    factors: tuple[float, ...]  # () leaves it as it is
    noise: float  # the share of new values
    before: str  # the dtype that it is computed in
    after: str  # the dtype that it has in the end

    @property
    def is_zero(self) -> bool:
        """Whether it is zero whatever the source holds, so that nothing need be read."""
        return self.factors == (0.0,)


Bill = Mapping[str, tuple[Material, ...]]  # by path: one for each layer, or one


def materials(
    plan: DepthPlan, paths: Iterable[str], tied: Mapping[str, bool],
    stored: Callable[[str | None, str, int | None], str],
) -> Bill:  # fmt: skip
    """The bill of what `plan` makes.

    Args:
      paths: the parameters that the result has.
      tied: of each source whether its head is its embedding.
      stored: the dtype of a source's parameter (source, path, layer); of None, that of new values.
        The layer is None where the parameter is not stacked.

    Inherited layers keep their own dtype, and new ones take that of the inherited layers of the same
    parameter, unless the plan names one. A stack that needs one dtype takes the `common` one.
    """
    ends = {end: (end, getattr(plan, end)) for end in ENDS} | {"lm_head": plan.head(tied)}

    def made(
        source: str | None, path: str, layer: int | None, factors: tuple[float, ...], noise: float, dtype: str
    ) -> Material:
        before = plan.dtype or dtype
        return Material(source, path, layer, factors, noise, before, plan.out_dtype or before)

    bill: dict[str, tuple[Material, ...]] = {}
    for path in paths:
        inside = path.removeprefix(STACK)
        if inside == path:
            end = path.split(".")[0]
            part, source = ends[end] or (end, None)
            origin = path if part == end else part
            bill[path] = (made(source, origin, None, plan.factors(path), 0.0, stored(source, origin, None)),)
            continue
        inherited = [stored(row.source, path, row.layer) if row.inherits(inside) else None for row in plan.rows]
        beside = common(filter(None, inherited)) or stored(None, path, 0)
        bill[path] = tuple(
            made(row.source, path, row.layer, row.factors(inside), row.noise if is_kernel(path) else 0.0, dtype)
            if dtype is not None
            else made(None, path, i, row.factors(inside), 0.0, beside)
            for i, (row, dtype) in enumerate(zip(plan.rows, inherited))
        )
    return bill


def common(dtypes: Iterable[str]) -> str:
    """The narrowest dtype that holds all of these exactly; "" if there are none."""
    return functools.reduce(_widest, dict.fromkeys(dtypes), "")


def _widest(a: str, b: str) -> str:
    if not a or a == b:
        return b
    try:
        return np.promote_types(a, b).name
    except TypeError:  # numpy knows none for bfloat16 and float16
        return "float32"
