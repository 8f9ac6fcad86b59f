"""A DepthPlan as YAML: what `jaxup` stores beside everything made from a plan.

    sources: {reference: 12}
    rows:
    - source: reference
      layers: [0, 6]          # half open; a single layer may be written `layers: 5`
    - source: reference
      layers: [2, 6]
      role: copy              # default: original
      scales: {o_proj: 0.0}   # default: none; a list of factors is applied in turn
      parts: [attention, mlp] # default: all
      noise: 0.5              # default: 0
    embed_tokens: reference   # null: newly initialised
    ...
    scales: {norm: 0.5}       # of what is not a layer; default: none
    dtype: bfloat16           # default: as it is
    out_dtype: float32        # default: as it is

Errors are `UserError("plan.yaml:7:3: ...")`.
"""

from __future__ import annotations

from typing import Any

import yaml

from jaxup.depth import marked_yaml
from jaxup.depth.marked_yaml import List, Map, Place, is_int, mapping, number, sequence, shown
from jaxup.depth.plan import DTYPES, ENDS, PARTS, DepthPlan, Row, Scales, runs
from jaxup.errors import UserError, suggest
from jaxup.model.config import MAX_LAYERS

HEADER = "# A depth plan. Ranges of layers are half open: [0, 6] is layers 0 to 5.\n"
REQUIRED = ("sources", "rows", *ENDS)
PLAN_KEYS = (*REQUIRED, "scales", "dtype", "out_dtype")
ROW_KEYS = ("source", "layers", "role", "scales", "parts", "noise")


def dump(plan: DepthPlan) -> str:
    rows = []
    for run in runs(plan.rows):
        first = run[0]
        row: dict[str, Any] = {"source": first.source, "layers": [first.layer, run[-1].layer + 1]}
        if first.role != "original":
            row["role"] = first.role
        if first.scales:
            row["scales"] = dict(first.scales)
        if first.parts != PARTS:
            row["parts"] = list(first.parts)
        if first.noise:
            row["noise"] = first.noise
        rows.append(row)
    data = {"sources": dict(plan.sources), "rows": rows} | {end: getattr(plan, end) for end in ENDS}
    optional = {"scales": dict(plan.scales), "dtype": plan.dtype, "out_dtype": plan.out_dtype}
    data |= {key: value for key, value in optional.items() if value}
    # Non-ASCII is escaped: PyYAML does not read all that it writes unescaped.
    # default_flow_style=None: only what holds no other list or mapping goes on one line.
    return HEADER + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=float("inf"))


def load(text: str, name: str = "plan") -> DepthPlan:
    """Raises UserError for anything that is not exactly a plan; `name` is what places are in."""
    data = mapping(marked_yaml.load(text, name), "a plan", Place(name, 1, 1))
    data.only(PLAN_KEYS)
    for key in REQUIRED:
        data.need(key)
    sources = mapping(data["sources"], "sources", data.values_at["sources"])
    for source, count in sources.items():
        place = sources.keys_at[source]
        sources.refuse_repeated(source)
        if not isinstance(source, str) or not is_int(count):
            raise place.error(f"sources are NAME: NUMBER OF LAYERS, not {shown(source)}: {shown(count)}")
        if count < 1:
            raise place.error(f"source {shown(source)} cannot have {count} layers")
    rows: list[Row] = []
    written = sequence(data["rows"], "rows", data.values_at["rows"])
    for row, place in zip(written, written.items_at, strict=True):
        rows += _rows(mapping(row, "a row", place), sources, MAX_LAYERS - len(rows))
    for key in (*ENDS, "dtype", "out_dtype"):
        value, known = data.get(key), sources if key in ENDS else DTYPES
        if value is not None and not (isinstance(value, str) and value in known):
            what = f"{key} must be a source's name or null, not" if key in ENDS else f"unknown {key}"
            raise data.values_at[key].error(f"{what} {shown(value)}{suggest(str(value), known)}")
    scales, given = _scales(data), {key: data.get(key) for key in (*ENDS, "dtype", "out_dtype")}
    try:
        return DepthPlan(tuple(rows), **given, sources=tuple(sources.items()), scales=scales)
    except UserError as error:
        raise data.place.error(error.what) from None


def _rows(row: Map, sources: Map, room: int) -> list[Row]:
    row.only(ROW_KEYS)
    source, layers = row.need("source"), row.need("layers")
    if not isinstance(source, str) or source not in sources:
        raise row.values_at["source"].error(f"unknown source {shown(source)}{suggest(str(source), sources)}")
    if is_int(layers):
        layers = [layers, layers + 1]
    place = row.values_at["layers"]
    if not isinstance(layers, list) or len(layers) != 2 or not all(map(is_int, layers)):
        raise place.error(f"layers must be [first, last + 1], not {shown(layers)}")
    first, stop = layers
    if first >= stop:
        hint = f"; did you mean [{first}, {first + 1}]?" if first == stop else ""
        raise place.error(f"layers [{first}, {stop}] is empty: ranges are half open{hint}")
    # Before the range is laid out: a slip of the keyboard must not fill the memory.
    if first < 0 or stop > sources[source]:
        raise place.error(f"layers [{first}, {stop}] of {shown(source)}, which has {sources[source]} layers")
    if stop - first > room:
        raise place.error(f"with layers [{first}, {stop}] the plan has more than {MAX_LAYERS} layers")
    parts = row.get("parts", list(PARTS))
    if not isinstance(parts, list):
        raise row.values_at["parts"].error(f"parts must be a list of {', '.join(PARTS)}, not {shown(parts)}")
    role = row.get("role", "original")
    for value in (role, *parts):
        if not isinstance(value, str):
            raise row.place.error(f"role and parts must be text, not {shown(value)}")
    noise = number(row.get("noise", 0), "noise", row.values_at.get("noise", row.place))
    scales = _scales(row)
    try:
        return [Row(source, layer, role, scales, tuple(parts), noise) for layer in range(first, stop)]
    except UserError as error:
        raise row.place.error(error.what) from None


def _scales(data: Map) -> Scales:
    if "scales" not in data:
        return ()
    scales = mapping(data["scales"], "scales", data.values_at["scales"])
    pairs: list[tuple[str, float | tuple[float, ...]]] = []
    for filter, value in scales.items():
        place = scales.values_at[filter]
        scales.refuse_repeated(filter)
        if not isinstance(filter, str):
            raise scales.keys_at[filter].error(f"a scale's filter must be text, not {shown(filter)}")
        several = zip(value, value.items_at, strict=True) if isinstance(value, List) and value else None
        factors = tuple(number(f, "a scale", at) for f, at in several) if several else number(value, "a scale", place)
        pairs.append((filter, factors))
    return tuple(pairs)
