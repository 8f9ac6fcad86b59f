"""Attention windows in config.json: one for all layers, or `layer_types` that say which layers have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxup.errors import UserError
from jaxup.families.keys import Rule, boolean, count, optional_size, parsed, short
from jaxup.model.config import LayerKind, ModelConfig

LAYER_TYPES = ("full_attention", "sliding_attention")  # as transformers names them


def layer_types(config: ModelConfig) -> list[str]:
    return [LAYER_TYPES[kind.window is not None] for kind in config.kinds_of_layers]


def _one_window(config: ModelConfig) -> int | None:
    return next((window for window in config.windows if window is not None), None)


def _read_one(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`layer_types` of a family whose layers are all alike may only say so."""
    window = parsed("sliding_window", hf.get("sliding_window", fields.get("sliding_window")), optional_size)
    types, depth = hf.get("layer_types"), fields["num_layers"]
    kind = LAYER_TYPES[window is not None]
    if types is not None and types != [kind] * depth:
        raise UserError(f"layer_types={short(types)} is not supported, only null or {depth} times {kind!r}")
    return {"kinds": (LayerKind(window=window),)}


def one_window(default: int | None) -> Rule:
    """All layers have the window `sliding_window`, which is the default if the key is absent."""
    return Rule(
        ("sliding_window", "layer_types"),
        ("kinds",),
        lambda hf, fields: _read_one(hf, {**fields, "sliding_window": default}),
        lambda config: {"sliding_window": _one_window(config)},
        lambda config: None if config.kinds == (LayerKind(window=_one_window(config)),) else "layers of one kind",
    )


NO_WINDOW = Rule(
    ("layer_types",), ("kinds",), _read_one,
    obstacle=lambda config: None if config.kinds == (LayerKind(),) else "layers without a window, of one kind",
)  # fmt: skip


def _read_some(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's: `layer_types` says which layers have the window, else all from `max_window_layers` on have it."""
    window = None
    if parsed("use_sliding_window", hf.get("use_sliding_window", False), boolean):
        window = parsed("sliding_window", hf.get("sliding_window", 4096), optional_size)
    first = parsed("max_window_layers", hf.get("max_window_layers", 28), count)
    types, depth = hf.get("layer_types"), fields["num_layers"]
    if types is None:
        types = [LAYER_TYPES[window is not None and layer >= first] for layer in range(depth)]
    if not isinstance(types, list) or len(types) != depth or any(kind not in LAYER_TYPES for kind in types):
        raise UserError(f"layer_types={short(types)} is not supported, only {depth} times one of {LAYER_TYPES}")
    if window is None and "sliding_attention" in types:
        raise UserError("layer_types has 'sliding_attention', which needs use_sliding_window=true and a sliding_window")
    kinds = dict(zip(LAYER_TYPES, (LayerKind(), LayerKind(window=window))))
    return {"kinds": tuple(kinds[kind] for kind in types)}


def _write_some(config: ModelConfig) -> dict[str, Any]:
    types, window = layer_types(config), _one_window(config)
    # Older versions know no layer_types; they see the same model if no full layer follows a windowed one.
    first = types.index("sliding_attention") if window is not None else len(types)
    return {
        "use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first,
        "layer_types": types,
    }  # fmt: skip


def _some_obstacle(config: ModelConfig) -> str | None:
    if set(config.kinds) <= {LayerKind(), LayerKind(window=_one_window(config))}:
        return None
    sizes = [str(window) for window in config.windows if window is not None]
    return f"one window, not {' and '.join(sizes)}" if len(sizes) > 1 else "layers that differ in their window only"


SOME_WINDOWS = Rule(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), ("kinds",),
    _read_some, _write_some, _some_obstacle,
)  # fmt: skip
