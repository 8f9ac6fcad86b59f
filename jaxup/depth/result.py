"""The configuration of what a plan makes, and what its sources disagree about."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxup.depth.plan import ENDS, DepthPlan
from jaxup.errors import UserError, suggest
from jaxup.model.config import INITIAL, ModelConfig

# Two models may differ in these and still have layers of one function.
_FREE = ("num_layers", "kinds", "tie_embeddings", "beside", *INITIAL)


def result_config(
    plan: DepthPlan, configs: Mapping[str, ModelConfig], *, base: str | None = None, vocab_size: int | None = None
) -> ModelConfig:
    """The configuration of what `plan` makes from models of these configurations.

    Layers bring their own kind along, and `DepthPlan.head` decides whether the embeddings are tied. Fields
    that do not change what is computed, such as the longest sequence a model was trained on, are those of
    the source `base`, by default that of the first layer. With a `vocab_size` for the result, those of the
    models may differ; UserError if they differ in anything else that layers share.
    """
    for name, depth in plan.sources:
        if name not in configs:
            raise UserError(f"plan: the configuration of source {name!r} is not given{suggest(name, configs)}")
        if configs[name].num_layers != depth:
            raise UserError(f"plan: source {name!r} has {configs[name].num_layers} layers, but the plan says {depth}")
    for field, (a, name_a), (b, name_b) in disagreements(plan, configs):
        if field != "vocab_size" or vocab_size is None:
            raise UserError(f"plan: {field} is {a!r} in {name_a!r} and {b!r} in {name_b!r}")
    for i, row in enumerate(plan.rows):
        if row.zeroed and (why := configs[row.source].speaks(row.layer)):
            what = f"plan: layer {i} has nothing to add, and changes what comes in all the same: layer {row.layer} of "
            raise UserError(f"{what}{row.source!r} {why}", hint="a plain copy claims nothing: duplicate, stack")
    first = configs[plan.rows[0].source]
    free = first if base is None else configs[base]
    return dataclasses.replace(
        first,
        **{field: getattr(free, field) for field in INITIAL},
        max_positions=free.max_positions if first.positions == "rope" else first.max_positions,
        num_layers=plan.num_layers,
        kinds=tuple(configs[row.source].kinds_of_layers[row.layer] for row in plan.rows),
        tie_embeddings=plan.head({name: config.tie_embeddings for name, config in configs.items()}) is None,
        vocab_size=vocab_size or first.vocab_size,
    )


def disagreements(
    plan: DepthPlan, configs: Mapping[str, ModelConfig]
) -> Iterator[tuple[str, tuple[Any, str], tuple[Any, str]]]:
    """Fields that must be the same in all sources used and are not: (field, (value, source), (value, source))."""
    used = [*(row.source for row in plan.rows), *filter(None, (getattr(plan, end) for end in ENDS))]
    first, *others = dict.fromkeys(used)
    for other in others:
        for field in dataclasses.fields(ModelConfig):
            a, b = (getattr(configs[name], field.name) for name in (first, other))
            if a == b or field.name in _FREE:
                continue
            # With rotary positions this is what a model was trained to, not what it computes.
            if field.name == "max_positions" and configs[first].positions == "rope":
                continue
            yield field.name, (a, first), (b, other)
