"""Which layers a model may do without, as plans: by the criteria of papers, and by the losses that were measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from jaxup.depth import recipes
from jaxup.depth.draw import ranges
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError, suggest
from jaxup.lens.probe_attention import lazy

Values = Mapping[str, np.ndarray]  # of `jaxup.lens.probe.Probe`


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A plan, why it is suggested, and what it costs before anything is trained.

    Attributes:
      name: of its file.
      why: the criterion, in words.
      plan: for `jaxup.build_model` or `python -m jaxup.build`.
      predicted: the loss, if what skipping each of its layers alone costs added up.
      measured: the loss of the model that the plan makes, on the text of the probe.
    """

    name: str
    why: str
    plan: DepthPlan
    predicted: float
    measured: float


def by_block_influence(values: Values, count: int) -> list[int]:
    """The layers of the least block influence, which ShortGPT removes (arXiv 2403.03853)."""
    return sorted(np.argsort(values["block_influence"], kind="stable")[:count].tolist())


def by_angular_distance(values: Values, count: int) -> list[int]:
    """The run of layers l, ..., l + n - 1 of the least d(l, n), which Deeper Layers drops (arXiv 2403.17887)."""
    return _run(values["angular_distance"], count)


def by_loss(values: Values, count: int) -> list[int]:
    """The run of layers without which the loss is least."""
    if np.isnan(values["skip_run"][0, count]):
        longest = int(np.flatnonzero(~np.isnan(values["skip_run"][0, :-1])).max())
        raise UserError(f"runs of {count} layers were not measured, but up to {longest}")
    return _run(values["skip_run"], count)


CRITERIA: dict[str, Callable[[Values, int], list[int]]] = {
    "block_influence": by_block_influence, "angular_distance": by_angular_distance, "loss": by_loss,
}  # fmt: skip


def _run(table: np.ndarray, count: int) -> list[int]:
    first = int(np.nanargmin(table[:, count]))
    return [*range(first, first + count)]


def choose(by: str, values: Values, count: int) -> list[int]:
    """So many layers to drop, by one of CRITERIA."""
    if by not in CRITERIA:
        raise UserError(f"by={by!r} is no criterion{suggest(by, CRITERIA)}")
    return CRITERIA[by](values, count) if count else []


def to_inherit(values: Values) -> tuple[int, str]:
    """How many of the first layers to inherit, and why (Inheritune, arXiv 2404.08634)."""
    is_lazy = lazy(values["attention_rank"])
    layers = len(is_lazy)
    if is_lazy[-1] and not is_lazy.all():
        count = int(np.flatnonzero(~is_lazy).max()) + 1
        return count, f"Inheritune: the layers before the last ones that are lazy, {ranges([*range(count, layers)])}"
    return max(1, layers // 2), "Inheritune: half of the layers, as the paper begins with"


def proposals(
    source: str, layers: int, values: Values, counts: Collection[int]
) -> Iterator[tuple[str, str, DepthPlan]]:
    """(name, why, plan) of each suggestion."""
    whys = {
        "block_influence": ("shortgpt", "ShortGPT: the least block influence"),
        "angular_distance": ("deeper_layers", "Deeper Layers: the least angular distance"),
        "loss": ("least_loss", "the run without which the loss is least"),
    }
    for count in counts:
        for by, (name, why) in whys.items():
            if by != "loss" or not np.isnan(values["skip_run"][0, count]):
                yield f"{name}_{count}", why, recipes.drop(source, layers, choose(by, values, count))
        simple = range(layers - 1 - count, layers - 1)
        why = "Deeper Layers, simple variant: the deepest but the last"
        yield f"deepest_{count}", why, recipes.drop(source, layers, simple)
    count, why = to_inherit(values)
    yield f"inherit_{count}", why, recipes.inherit(source, layers, count)


def dropped(plan: DepthPlan) -> list[int]:
    """The layers of its one source that it does not use."""
    kept = {row.layer for row in plan.rows}
    return [layer for layer in range(plan.sources[0][1]) if layer not in kept]


def predicted(values: Values, plan: DepthPlan) -> float:
    whole = float(values["loss"])
    return whole + sum(float(values["skip_layer"][layer]) - whole for layer in dropped(plan))
