"""What may stand where in a mergekit recipe, and what is said about the rest."""

from __future__ import annotations

from jaxup.depth.marked_yaml import Map, Place, shown
from jaxup.errors import nearest

MAX_KEYS = 200  # of one mapping: each unknown one is compared with those that are known

LAYERS = ("slices", "models", "modules")
_KEYS = {
    "recipe": ("merge_method", *LAYERS, "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
               "chat_template", "parameters"),
    "module": ("slices", "models", "parameters"),
    "slice": ("sources", "base_model", "residual_weight", "parameters"),
    "source": ("model", "layer_range", "parameters"),
    "models": ("model", "parameters"),
    "model": ("model", "lora", "override_architecture", "path", "revision"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "parameters": ("scale",),
    "scale": ("filter", "value"),
}  # fmt: skip
_BELONGS = {key: "at the top of the recipe" for key in _KEYS["recipe"] if key != "parameters"} | {
    "sources": "in the list under 'slices'",
    "layer_range": "in the list under 'sources'",
    "model": "in the list under 'sources'",
    "scale": "under 'parameters'",
    "filter": "in the list under 'scale'",
    "value": "in the list under 'scale'",
}
_REMARKS = {"name", "revision", "description", "comment", "author", "license", "tags", "version"}


class Keys:
    """Checks the keys of a recipe, and gathers the notes on it."""

    def __init__(self):
        self.found: dict[str, list[tuple[str, Place]]] = {}

    def check(self, data: Map, kind: str) -> None:
        """Refuses misspelt and misplaced keys and those given twice; notes those that mean nothing."""
        known = _KEYS[kind]
        if len(data) > MAX_KEYS:
            raise data.place.error(f"{len(data)} keys, where {len(known)} are known: {', '.join(known)}")
        absent = [key for key in known if key not in data]
        if any(key in data for key in LAYERS):
            absent = [key for key in absent if key not in LAYERS]
        for key, place in data.keys_at.items():
            if key in known:
                data.refuse_repeated(key)
                continue
            if key in data.repeated:
                self.note("is given twice; the last one counts", shown(key), data.repeated[key][1])
            if key in _REMARKS or (kind == "recipe" and key in data.anchored):
                continue
            if key in _BELONGS:
                raise place.error(f"{shown(key)} belongs {_BELONGS[key]}; here it would mean nothing")
            if near := nearest(str(key), absent):
                raise place.error(f"unknown key {shown(key)}{near}")
            self.note("means nothing to passthrough and is ignored", shown(key), place)

    def note(self, kind: str, subject: str, place: Place) -> None:
        self.found.setdefault(kind, []).append((subject, place))

    def lines(self) -> tuple[str, ...]:
        """One line for each kind, however often it occurs."""
        lines = []
        for kind, found in self.found.items():
            (subject, place), *others = dict.fromkeys(found)
            also = [f"{s} at {p.line}:{p.column}" if s != subject else f"{p.line}:{p.column}" for s, p in others[:3]]
            also += [f"{len(others) - 3} more"] if len(others) > 3 else []
            text = " ".join(filter(None, (subject, kind)))
            lines.append(f"{place}: {text}" + (f" (also {', '.join(also)})" if also else ""))
        return tuple(lines)
