"""The `scale` of mergekit recipes: filters, gradients and the order of their scopes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxup.depth.marked_yaml import List, Map, Place, mapping, number, shown
from jaxup.depth.plan import Scales, simplest_scales
from jaxup.errors import nearest, suggest
from jaxup.recipes.mergekit_keys import Keys

MAX_FILTERS = 64  # of one scale: each is looked for in every tensor's name


class Scale:
    """A `scale` of one scope: the first filter found in a tensor's name decides."""

    def __init__(self, entries: list[tuple[str, tuple[float, ...], Place]]):
        self.entries = entries  # (filter, values along the layers, place)
        self.numbered = any(c.isdigit() for filter, _, _ in entries for c in filter)
        self.found: set[str] = set()  # filters that are in the name of a tensor that the scope applies to
        self.applied: dict[str, None] = {}  # the models whose names were looked through


class Scaling:
    """Reads scales, and says what they do to the tensors of each layer."""

    def __init__(self, keys: Keys):
        self.keys = keys
        self.parsed: dict[int, Scale | None] = {}  # by id of the `parameters`, which aliases share
        self.matches: dict[tuple[int, str, int | None], dict[str, int]] = {}

    def of(self, data: Map) -> Scale | None:
        """The scale among the parameters of one scope."""
        if data.get("parameters") is None:
            return None
        parameters = mapping(data["parameters"], "parameters", data.values_at["parameters"])
        if id(parameters) not in self.parsed:
            self.keys.check(parameters, "parameters")
            place = parameters.values_at.get("scale")
            self.parsed[id(parameters)] = self.parse(parameters["scale"], place) if place else None
        return self.parsed[id(parameters)]

    def parse(self, value: Any, place: Place) -> Scale:
        if isinstance(value, Map):
            conditions = [(value, place)]
        elif isinstance(value, List) and any(isinstance(item, Map) for item in value):
            conditions = list(zip(value, value.items_at, strict=True))
        else:
            return Scale([("", _values(value, place), place)])
        if len(conditions) > MAX_FILTERS:
            raise place.error(f"{len(conditions)} filters; at most {MAX_FILTERS} are looked for")
        entries: list[tuple[str, tuple[float, ...], Place]] = []
        for condition, at in conditions:
            condition = mapping(condition, "an entry of scale beside others", at)
            self.keys.check(condition, "scale")
            filter = condition.get("filter")
            if not (filter is None or isinstance(filter, str)):
                raise condition.values_at["filter"].error(f"a filter must be text, not {shown(filter)}")
            filter = "" if filter in (None, "*") else filter
            if any(earlier in filter for earlier, _, _ in entries):
                self.keys.note(
                    "is never reached: an entry before it matches all that it does", shown(filter or "*"), at
                )
            values = _values(condition.need("value"), condition.values_at["value"])
            entries.append((filter, values, condition.values_at.get("filter", at)))
        return Scale(entries)

    def matching(self, scale: Scale, source: str, layer: int | None, names: Mapping[str, str]) -> dict[str, int]:
        """Which entry of the scale decides, by path; `names` are those of a layer, or for None of an end."""
        # A filter without a digit finds the same in every layer.
        key = (id(scale), source, layer if scale.numbered else -1)
        if layer is None or key not in self.matches:
            scale.applied[source] = None
            self.matches[key] = {}
            for path, name in names.items():
                hits = [i for i, (filter, _, _) in enumerate(scale.entries) if filter in name]
                scale.found.update(scale.entries[i][0] for i in hits)
                if hits:
                    self.matches[key][path] = hits[0]
        return self.matches[key]

    def factors(
        self, scopes: tuple[Scale, ...], source: str, layer: int | None, names: Mapping[str, str], t: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The factor of each path, and those of the filters that decided them, in the order of the scopes."""
        factors = dict.fromkeys(names, 1.0)
        written: dict[str, float] = {}
        undecided = set(names)
        for scale in scopes:
            decided = self.matching(scale, source, layer, names)
            for i in sorted({decided[path] for path in undecided & decided.keys()}):
                filter, values, _ = scale.entries[i]
                written[filter] = _at(values, t)
                factors |= {path: written[filter] for path in undecided & decided.keys() if decided[path] == i}
            undecided -= decided.keys()
        return factors, written

    def refuse_unused(self, sources: Mapping[str, tuple[int, Mapping[str, str]]]) -> None:
        """UserError for a filter that is in no tensor's name; a note if it is only in those of other layers or ends.

        `sources` have the number of layers and the names, with {layer}, of each model.
        """
        for scale in self.parsed.values():
            if scale is None or not scale.applied:
                continue
            models = [sources[source] for source in scale.applied]
            for filter, _, place in scale.entries:
                if filter in scale.found:
                    continue
                if any(_occurs(filter, count, names.values()) for count, names in models):
                    self.keys.note(
                        "is in no name of a tensor that it applies to: it does nothing", shown(filter), place
                    )
                    continue
                whole = {name.partition("{layer}.")[2] or name for _, names in models for name in names.values()}
                parts = {part for name in whole for part in name.split(".")[-3:-1]}
                near = nearest(filter.lower(), sorted(parts | whole)) or suggest(filter, sorted(parts))
                raise place.error(f"the filter {shown(filter)} is in no name of a tensor that it applies to{near}")


def _occurs(filter: str, count: int, names: Iterable[str]) -> bool:
    """Whether it is in the name of a tensor of any of `count` layers.

    Where digits of it are in the number of one layer, they are so in the number that they are, or that a 1 before
    them makes: no other need be looked at.
    """
    digits = re.findall("[0-9]{1,5}", filter)
    layers = {0, *map(int, digits), *(int(f"1{run}") for run in digits)}
    return any(filter in name.replace("{layer}", str(i)) for i in layers if i < count for name in names)


def _values(value: Any, place: Place) -> tuple[float, ...]:
    """A factor, or those between which the layers of a slice are interpolated."""
    what = "a scale (a number, a list of them, or a list of {filter, value})"
    if not isinstance(value, List):
        return (number(value, what, place),)
    if not value:
        raise place.error("the list of a scale is empty")
    return tuple(number(item, what, at) for item, at in zip(value, value.items_at, strict=True))


def _at(values: tuple[float, ...], t: float) -> float:
    """Linear between the values, with mergekit's rounding; t is 0 at the first and 1 at the last."""
    position = t * (len(values) - 1)
    below = int(position)
    share = position - below
    return (1 - share) * values[below] + share * values[min(below + 1, len(values) - 1)]


@functools.lru_cache(maxsize=4096)
def spelled(factors: tuple[tuple[str, float], ...], written: tuple[tuple[str, float], ...]) -> Scales:
    """Scales that give each path its factor: as written if that does, else as simple as can be."""
    pairs = list(written)
    while pairs and pairs[-1][1] == 1:
        pairs.pop()
    for path, factor in factors:
        if next((value for filter, value in pairs if filter in path), 1.0) != factor:
            return simplest_scales({path: () if factor == 1 else (factor,) for path, factor in factors})
    return tuple(pairs)
