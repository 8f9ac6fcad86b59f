"""A DepthPlan as YAML: what `jaxup` stores beside everything made from a plan.

    sources: {reference: 12}
    rows:
    - source: reference
      layers: [0, 6]          # half open; a single layer may be written `layers: 5`
    - source: reference
      layers: [2, 6]
      role: copy              # default: original
      scales: {o_proj: 0.0}   # default: none
      parts: [attention, mlp] # default: all
    embed_tokens: reference   # null: newly initialised
    ...

Errors are `UserError("plan: line 7: ...")`.
"""

from __future__ import annotations

from typing import Any

import yaml

from jaxup.depth.plan import ENDS, PARTS, DepthPlan, Row
from jaxup.errors import UserError, suggest

HEADER = "# A depth plan. Ranges of layers are half open: [0, 6] is layers 0 to 5.\n"
PLAN_KEYS = ("sources", "rows", *ENDS)
ROW_KEYS = ("source", "layers", "role", "scales", "parts")


def dump(plan: DepthPlan) -> str:
    rows = []
    for run in plan.runs():
        first = run[0]
        row: dict[str, Any] = {"source": first.source, "layers": [first.layer, run[-1].layer + 1]}
        if first.role != "original":
            row["role"] = first.role
        if first.scales:
            row["scales"] = dict(first.scales)
        if first.parts != PARTS:
            row["parts"] = list(first.parts)
        rows.append(row)
    data = {"sources": dict(plan.sources), "rows": rows} | {end: getattr(plan, end) for end in ENDS}
    # Non-ASCII is escaped: PyYAML does not read all that it writes unescaped.
    # default_flow_style=None: only what holds no other list or mapping goes on one line.
    return HEADER + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=float("inf"))


def load(text: str) -> DepthPlan:
    """Raises UserError for anything that is not exactly a plan."""
    data = _mapping(_parse(text), "a plan", 1)
    data.only(PLAN_KEYS, required=PLAN_KEYS)
    sources = _mapping(data["sources"], "sources", data.lines["sources"])
    for name, count in sources.items():
        if _is_int(count) and count < 1:
            raise _error(sources.lines[name], f"source {name!r} cannot have {count} layers")
        if not isinstance(name, str) or not _is_int(count):
            raise _error(sources.lines[name], f"sources are NAME: NUMBER OF LAYERS, not {name!r}: {count!r}")
    if not isinstance(data["rows"], list):
        raise _error(data.lines["rows"], "rows must be a list")
    rows: list[Row] = []
    for row in data["rows"]:
        rows += _rows(_mapping(row, "a row", data.lines["rows"]), sources)
    for end in ENDS:
        if data[end] is not None and not isinstance(data[end], str):
            raise _error(data.lines[end], f"{end} must be a source's name or null, not {data[end]!r}")
    return DepthPlan(tuple(rows), **{end: data[end] for end in ENDS}, sources=tuple(sources.items()))


def _rows(row: _Map, sources: dict[str, int]) -> list[Row]:
    row.only(ROW_KEYS, required=("source", "layers"))
    source, layers = row["source"], row["layers"]
    if not isinstance(source, str) or source not in sources:
        raise _error(row.lines["source"], f"unknown source {source!r}{suggest(source, sources)}")
    if _is_int(layers):
        layers = [layers, layers + 1]
    line = row.lines["layers"]
    if not isinstance(layers, list) or len(layers) != 2 or not all(map(_is_int, layers)):
        raise _error(line, f"layers must be [first, last + 1], not {layers!r}")
    first, stop = layers
    if first >= stop:
        hint = f"; did you mean [{first}, {first + 1}]?" if first == stop else ""
        raise _error(line, f"layers [{first}, {stop}] is empty: ranges are half open{hint}")
    # Before the range is laid out: a slip of the keyboard must not fill the memory.
    if first < 0 or stop > sources[source]:
        raise _error(line, f"layers [{first}, {stop}] of {source!r}, which has {sources[source]} layers")
    scales = _mapping(row.get("scales", _Map()), "scales", row.lines.get("scales", line))
    parts = row.get("parts", list(PARTS))
    if not isinstance(parts, list):
        raise _error(row.lines["parts"], f"parts must be a list of {', '.join(PARTS)}, not {parts!r}")
    role = row.get("role", "original")
    for value in (role, *parts):
        if not isinstance(value, str):
            raise _error(row.line, f"role and parts must be text, not {value!r}")
    pairs = tuple((filter, _number(value, scales.lines[filter])) for filter, value in scales.items())
    for filter in scales:
        if not isinstance(filter, str):
            raise _error(scales.lines[filter], f"a scale's filter must be text, not {filter!r}")
    try:
        return [Row(source, layer, role, pairs, tuple(parts)) for layer in range(first, stop)]
    except UserError as error:
        raise _error(row.line, str(error).removeprefix("plan: ")) from None


def _number(value: Any, line: int) -> float:
    # YAML 1.1 reads 1e-3, which lacks a point, as text.
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _error(line, f"a scale must be a number, not {value!r}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _error(line: int, message: str) -> UserError:
    return UserError(f"plan: line {line}: {message}")


class _Map(dict):
    """A mapping that knows its line and the line of each of its keys."""

    line = 1

    def __init__(self):
        super().__init__()
        self.lines: dict[Any, int] = {}

    def only(self, known: tuple[str, ...], required: tuple[str, ...]) -> None:
        for key in self:
            if key not in known:
                raise _error(self.lines[key], f"unknown key {key!r}{suggest(key, known)}")
        for key in required:
            if key not in self:
                raise _error(self.line, f"{key!r} is missing")


def _mapping(value: Any, what: str, line: int) -> _Map:
    if not isinstance(value, _Map):
        raise _error(line, f"{what} must be a mapping of keys to values, not {type(value).__name__}")
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing the duplicate keys it would otherwise drop."""


def _construct_map(loader: _Loader, node: yaml.MappingNode):
    result = _Map()
    result.line = node.start_mark.line + 1
    yield result  # before it is filled, so that an anchor may refer to its own mapping
    seen = set()
    for key_node, _ in node.value:
        key = (key_node.tag, str(key_node.value))
        if key in seen:
            raise _error(key_node.start_mark.line + 1, f"{key[1]!r} is given twice")
        seen.add(key)
    loader.flatten_mapping(node)  # `<<: *anchor`
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        result.lines[key] = key_node.start_mark.line + 1
        result[key] = loader.construct_object(value_node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _error(line, " ".join((error.problem or str(error)).split())) from None
    except Exception as error:  # PyYAML lets through whatever its scalars raise, such as ValueError
        raise UserError(f"plan: not YAML: {' '.join(str(error).split())}") from None
