"""A plan as a mergekit passthrough recipe, where passthrough can say it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxup.depth.plan import ENDS, PARTS, DepthPlan, Row, runs, simplest_scales
from jaxup.errors import UserError, within
from jaxup.families.llama import LLAMA
from jaxup.model.spec import PART_OF

# The names of tensors in the files of the Llama, Mistral and Qwen families, by path of the parameter.
LLAMA_NAMES = {
    path: LLAMA.tensor_name(path)
    for path in PART_OF
    if path != "embed_positions" and not path.endswith("norm.bias") and "_output_layernorm." not in path
}


@within("plan", "mergekit's passthrough cannot say it")
def dump(plan: DepthPlan, *, base: str | None = None, names: Mapping[str, str] = LLAMA_NAMES) -> str:
    """The recipe that mergekit builds to the same tensors, and that `load` reads back as this plan.

    What a recipe has no words for is lost: sources that nothing is taken from, and roles. UserError
    names what passthrough cannot do.

    Args:
      base: the source whose config.json and tokenizer the result takes; None: the first slice's.
      names: of the tensors in the files, by path of the parameter, as in `mergekit.Source`. Without
        them filters may be written for tensors of Qwen that the models lack, which `load` refuses.
    """
    first, last = _check(plan, base, names)
    blocks = {path.removeprefix("blocks."): name for path, name in names.items() if "{layer}" in name}
    slices = []
    scales: list[list[tuple[str, float]]] = []
    # A recipe has no roles; rows that differ in nothing else are one slice.
    for run in runs([dataclasses.replace(row, role="original") for row in plan.rows]):
        layers = range(run[0].layer, run[-1].layer + 1)
        factors = {path: _one(run[0].factors(path)) for path in blocks}
        full = [(path, name.replace("{layer}", str(layer))) for path, name in blocks.items() for layer in layers]
        scales.append(_filters(factors, full, run[0]))
        slices.append(_slice(run[0].source, [layers.start, layers.stop], scales[-1]))
    # The scales of the slices at the ends are those of the ends too; where that is wrong, or another
    # model gives them, an empty slice does.
    counts = dict(plan.sources)
    for end, source, prefixes in ((0, first, ("embed_",)), (-1, last, ("norm.", "lm_head."))):
        ends = [(path, name) for path, name in names.items() if path.startswith(prefixes)]
        wanted = {path: _one(plan.factors(path)) for path, _ in ends}
        row = plan.rows[end]
        if source != row.source or any(_found(scales[end], name) != wanted[path] for path, name in ends):
            layer = 0 if end == 0 else counts[source]
            empty = _slice(source, [layer, layer], _filters(wanted, ends, None))
            slices.insert(0 if end == 0 else len(slices), empty)
    recipe: dict[str, Any] = {"merge_method": "passthrough"}
    if base is not None:
        recipe["base_model"] = _model(base)
    recipe["slices"] = slices
    recipe |= {key: value for key in ("dtype", "out_dtype") if (value := getattr(plan, key))}
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=float("inf"))


def _check(plan: DepthPlan, base: str | None, names: Mapping[str, str]) -> tuple[str, str]:
    """The sources that the embedding, and norm and head, are of; UserError for what passthrough cannot do."""
    if base is not None and base not in dict(plan.sources):
        raise UserError(f"the base model {base!r} is none of the plan's sources")
    for i, row in enumerate(plan.rows):
        if row.parts != PARTS:
            raise UserError(f"layer {i} is new" if not row.parts else f"layer {i} inherits only {', '.join(row.parts)}")
        if row.noise:
            raise UserError(f"layer {i} has noise mixed in")
    for filter, value in itertools.chain(plan.scales, *(row.scales for row in plan.rows)):
        if isinstance(value, tuple):
            raise UserError(f"{filter or 'everything'} is scaled by {len(value)} factors in turn")
    for end in ENDS:
        if getattr(plan, end) is None and (end != "embed_positions" or end in names):
            raise UserError(f"{end} is newly initialised")
    first, positions, last = plan.embed_tokens, plan.embed_positions, plan.norm
    assert first is not None
    assert last is not None
    if positions not in (first, None):
        raise UserError(f"embed_positions is taken from {positions!r}, embed_tokens from {first!r}")
    if plan.lm_head != last:
        raise UserError(f"lm_head is taken from {plan.lm_head!r}, norm from {last!r}")
    return first, last


def _one(factors: tuple[float, ...]) -> float:
    return factors[0] if factors else 1.0


def _found(scales: Sequence[tuple[str, float]], name: str) -> float:
    return next((value for filter, value in scales if filter in name), 1.0)


def _filters(
    factors: Mapping[str, float], names: Sequence[tuple[str, str]], row: Row | None
) -> list[tuple[str, float]]:
    """Scales with filters on the names of tensors; `names` are (path, name) of all that they apply to."""

    def right(scales: Sequence[tuple[str, float]]) -> bool:
        return all(_found(scales, name) == factors[path] for path, name in names)

    by_name: dict[str, tuple[float, ...]] = {}
    for path, name in names:
        ending = _ending(name)
        value = (factors[path],) if factors[path] != 1 else ()
        if by_name.setdefault(ending, value) != value:
            raise UserError(f"parts of one tensor, {ending}, are scaled differently")
    for written in ((), () if row is None else row.scales, simplest_scales(by_name)):
        # Of several factors in turn there are none left.
        scales = [(filter.replace("*", ""), value) for filter, value in written if isinstance(value, float)]
        if right(scales):
            return scales
    return [(ending, _one(value)) for ending, value in by_name.items()]


def _ending(name: str) -> str:
    """A tensor's name without the number of its layer and what stands before it."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


def _slice(source: str, layer_range: list[int], scales: Sequence[tuple[str, float]]) -> dict[str, Any]:
    result: dict[str, Any] = {"layer_range": layer_range, "model": _model(source)}
    if [filter for filter, _ in scales] == [""]:
        result["parameters"] = {"scale": scales[0][1]}
    elif scales:
        entries = [{"filter": filter, "value": value} if filter else {"value": value} for filter, value in scales]
        result["parameters"] = {"scale": entries}
    return {"sources": [result]}


def _model(name: str) -> Any:
    # mergekit reads what follows a + as an adapter's name, but not in the long form.
    return {"model": {"path": name}} if "+" in name else name
