"""Which layer of each model is compared with which: by their numbers, or by the plan that made one of another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxup.depth import marked_yaml, plan_yaml
from jaxup.depth.draw import character
from jaxup.depth.plan import DepthPlan, Row
from jaxup.errors import UserError
from jaxup.lens.explain import explain
from jaxup.lens.sides import Side
from jaxup.model.spec import STACK
from jaxup.recipes import line as recipe_line
from jaxup.recipes.open import open_recipe


class Origin(NamedTuple):
    """Where a layer came from."""

    layer: int | None  # of `source`; None: it inherits nothing
    role: str  # as in the strip of a plan: = inherited, X copy, z zeroed copy, p partly inherited, n new
    source: str  # the model, as it was given, or as the plan calls it


class Alignment(NamedTuple):
    """What stands in each row of the comparison."""

    origins: tuple[Origin, ...]  # by row
    plan: DepthPlan | None  # that the sources are compared by; None: layers of the same number
    sources: dict[int, str]  # of the models that the plan takes from, by their places among the models
    notes: tuple[str, ...]

    def place(self, side: int, path: str, row: int | None) -> tuple[bool, int | None]:
        """Whether this side has something to compare there, and in which of its layers; row None: what is no layer."""
        if self.plan is None or side not in self.sources:
            return True, row
        source = self.sources[side]
        if row is None:
            return getattr(self.plan, path.split(".")[0]) == source, None
        made = self.plan.rows[row]
        return made.source == source and made.inherits(path.removeprefix(STACK)), made.layer

    def scaled(self, side: int, path: str, row: int | None) -> tuple[tuple[float, ...], str | None, str | None]:
        """What building does to this side's values there: factors, dtypes before and after, as in a Material."""
        if self.plan is None or side not in self.sources:
            return (), None, None
        inside = path.removeprefix(STACK)
        factors = self.plan.factors(path) if row is None else self.plan.rows[row].factors(inside)
        return factors, self.plan.dtype, self.plan.out_dtype


def align(sides: Sequence[Side], plan: str | os.PathLike | DepthPlan | None) -> Alignment:
    """Models of one depth layer by layer, unless a plan is given; of different depths by the plan.

    A plan that is not given is that of the first model that has one, in its directory or its run, and else what their
    weights say. UserError where they say nothing, and for a plan that is not of these models.
    """
    depths = [side.config.num_layers for side in sides]
    given = plan is not None
    same = len(set(depths)) == 1
    found, whose = (_opened(plan, sides), "the plan given") if plan is not None else _own(sides)
    if found is None and not same:
        found, whose = _inferred(sides[0], next(side for side in sides if side.config.num_layers != depths[0]))
    if found is None:
        return Alignment(_themselves(sides[0]), None, {}, ("layers of the same number are compared",))
    if same and not given:
        if found.num_layers != depths[0]:
            return Alignment(_themselves(sides[0]), None, {}, ("layers of the same number are compared",))
        note = f"layers of the same number are compared; which are copies says {whose}"
        return Alignment(origins_of(found.rows), None, {}, (note,))
    sources: dict[int, str] = {}
    for index, side in enumerate(sides):
        by_name = dict(found.sources).get(side.name) == depths[index]
        # A plan that was given for models of one depth is from the first of them.
        if by_name or depths[index] != found.num_layers or (index == 0 and same):
            sources[index] = _source(found, side, whose)
    if len(sources) == len(sides):
        raise UserError(f"{whose} makes {found.num_layers} layers, and none of the models has so many")
    notes = [f"layers are compared by {whose}"]
    known = dict.fromkeys(sources.values())
    if missing := [name for name in dict.fromkeys(row.source for row in found.rows if row.parts) if name not in known]:
        notes.append(f"not compared: what {whose} takes from {', '.join(missing)}")
    for source in known:
        used = {row.layer for row in found.rows if row.source == source}
        if unused := sorted(set(range(dict(found.sources)[source])) - used):
            notes.append(f"not compared: layers of {source} that are not used: {', '.join(map(str, unused))}")
    names = {source: sides[index].name for index, source in reversed(sources.items())}
    return Alignment(origins_of(found.rows, names), found, sources, tuple(notes))


def _themselves(side: Side) -> tuple[Origin, ...]:
    return tuple(Origin(layer, "=", side.name) for layer in range(side.config.num_layers))


def origins_of(rows: Sequence[Row], names: Mapping[str, str] = MappingProxyType({})) -> tuple[Origin, ...]:
    """Of the layers of a plan; `names` says what its sources are called."""
    return tuple(
        Origin(row.layer if row.parts else None, character(row), names.get(row.source, row.source)) for row in rows
    )


def _own(sides: Sequence[Side]) -> tuple[DepthPlan | None, str]:
    side = next((side for side in sides if side.plan is not None), None)
    return (None, "") if side is None else (side.plan, f"the plan of {side.name}")


def _inferred(base: Side, other: Side) -> tuple[DepthPlan, str]:
    """The plan that makes `other` of `base`, by their weights."""
    found = explain(other.name, against=[base.name])
    if not any(row.parts for row in found.plan.rows):
        what = f"{base.config.num_layers} layers in {base.name}, {other.config.num_layers} in {other.name}, and no plan"
        raise UserError(f"{what}; by its weights no layer came from there", hint="give the plan with --plan FILE")
    return found.plan, f"what the weights of {other.name} say"


def _source(plan: DepthPlan, side: Side, whose: str) -> str:
    """The plan's name for the model: its own, or that of the one source of its depth."""
    layers = dict(plan.sources)
    used = dict.fromkeys(row.source for row in plan.rows if row.parts)
    if layers.get(side.name) == side.config.num_layers:
        return side.name
    fitting = [name for name in used if layers[name] == side.config.num_layers]
    if len(fitting) == 1:
        return fitting[0]
    made = f"{plan.num_layers} layers of {', '.join(f'{name!r} ({layers[name]})' for name in used)}"
    if fitting:
        raise UserError(f"which of {', '.join(fitting)} it is cannot be known; {whose} makes {made}", at=side.name)
    raise UserError(f"has {side.config.num_layers} layers, and {whose} makes {made}", at=side.name)


def _opened(plan: str | os.PathLike | DepthPlan, sides: Sequence[Side]) -> DepthPlan:
    """Of a plan file no model is looked at; of other recipes those that they name, and else the first."""
    if isinstance(plan, DepthPlan):
        return plan
    recipe = os.fspath(plan)
    if not os.path.lexists(os.path.expanduser(recipe)) and recipe_line.is_line(recipe):
        by_name = {side.name: side.config.num_layers for side in sides}
        return recipe_line.parse(recipe).plan(lambda name: by_name.get(name, sides[0].config.num_layers))
    path = Path(recipe).expanduser()
    if path.is_file() and path.stat().st_size <= marked_yaml.MAX_CHARACTERS:
        text = path.read_text("utf-8", "replace")
        data = marked_yaml.load(text, recipe)
        if isinstance(data, marked_yaml.Map) and "rows" in data:
            return plan_yaml.load(text, recipe)
    return open_recipe(recipe, default=sides[0].name).plan
