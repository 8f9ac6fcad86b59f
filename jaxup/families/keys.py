"""What the keys of a config.json mean: single values, and keys that decide something together.

Everything here raises `UserError`, naming the key, for a value that no `ModelConfig` represents.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxup.errors import UserError, suggest
from jaxup.model.config import LAYER_TYPES, ModelConfig, RopeScaling

# ---- single values: a parser takes any JSON value, and raises ValueError saying what is accepted

# Far above any model, and low enough that a hostile file cannot make shapes or frequencies overflow.
_MAX_SIZE, _MAX_LAYERS, _MAX_NUMBER = 2**24, 10_000, 1e30


def parsed(name: str, value: Any, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{name}={short(value)} is not supported, only {error}") from None


def size(value, smallest: int = 1, largest: int = _MAX_SIZE) -> int:
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(f"an integer from {smallest} to {largest}")
    return value


def layers(value) -> int:
    return size(value, largest=_MAX_LAYERS)


def count(value) -> int:
    return size(value, smallest=0)


def optional_size(value) -> int | None:
    return None if value is None else size(value)


def positive(value) -> float:
    if type(value) not in (int, float) or not 1 / _MAX_NUMBER <= value <= _MAX_NUMBER:
        raise ValueError("a positive number")
    return float(value)


def optional_positive(value) -> float | None:
    return None if value is None else positive(value)


def optional_weight(value) -> float:
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= _MAX_NUMBER):
        raise ValueError("a number from 0, or null")
    return float(value or 0)


def boolean(value) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


# Several of transformers' names are one function. The first name of each is the one written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip


def activation(value) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def suggest_key(name: str, known) -> str:
    """A suggestion only if one is near: the list of all known keys would fill a screen."""
    near = suggest(name[:100], sorted(known))
    return near if near.startswith("; did you mean") else ""


# Its cost does not depend on the size of the value, which may be a hostile file's.
_REPR = reprlib.Repr()
_REPR.maxdict, _REPR.maxstring = 12, 80


def short(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# ---- keys that decide something together


class Rule(NamedTuple):
    """Keys that decide fields of ModelConfig only together, or together with other fields."""

    names: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]  # (config.json, fields so far) -> fields
    write: Callable[[ModelConfig], dict[str, Any]]  # -> keys of config.json


def _gpt2_sizes(hf, fields):
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    if hidden % heads:
        raise UserError(f"n_embd={hidden} is not a multiple of n_head={heads}")
    return {"head_dim": hidden // heads, "intermediate_size": fields["intermediate_size"] or 4 * hidden}


def _llama_sizes(hf, fields):
    return {
        "head_dim": fields["head_dim"] or fields["hidden_size"] // fields["num_heads"],
        "num_kv_heads": fields["num_kv_heads"] or fields["num_heads"],
    }


GPT2_SIZES, LLAMA_SIZES = (Rule((), read, lambda config: {}) for read in (_gpt2_sizes, _llama_sizes))


# The parameters of each kind of rotary scaling, besides rope_type and rope_theta.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
}  # fmt: skip
_REQUIRED = object()


def _read_rope(hf, fields):
    """transformers 4 spells it `rope_theta` and `rope_scaling`, 5 has all of it in `rope_parameters`.

    Both read both; where a file has several spellings they must agree, for the versions differ in
    which one they prefer.
    """
    theta = parsed("rope_theta", hf.get("rope_theta", 10_000.0), positive)
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        if hf.get(name) not in (None, {}):
            found[name] = _rope_of(name, hf, theta, fields["max_positions"])
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        both = (f"{name}={short(hf[name])}" for name in found)
        raise UserError(" contradicts ".join(both))
    theta, scaling = next(iter(found.values()), (theta, None))
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_of(name: str, hf, theta: float, max_positions: int) -> tuple[float, RopeScaling | None]:
    values = hf[name]
    if not isinstance(values, dict):
        raise UserError(f"{name}={short(values)} is not supported, only an object or null")
    kind = values.get("rope_type", values.get("type", "default"))
    _agree(f"{name}.type", values.get("type", kind), f"{name}.rope_type", kind)
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(f"{name}.rope_type={short(kind)} is not supported, only {', '.join(_ROPE_KEYS)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    for key in values:
        if key not in known:
            raise UserError(f"{name}: unknown key {short(key)} of rope_type {kind!r}{suggest_key(key, known)}")
    for key in ("rope_theta", "original_max_position_embeddings"):
        if key in values and key in hf:
            _agree(key, hf[key], f"{name}.{key}", values[key])

    def get(key: str, parse: Callable[[Any], Any], default: Any = _REQUIRED) -> Any:
        value = values.get(key, default)
        if value is _REQUIRED:
            raise UserError(f"{name}: rope_type {kind!r} needs {key}")
        return parsed(f"{name}.{key}", value, parse)

    theta = get("rope_theta", positive, theta)
    if get("partial_rotary_factor", positive, 1.0) != 1.0:
        raise UserError(f"{name}.partial_rotary_factor={values['partial_rotary_factor']} is not supported, only 1.0")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=get("factor", positive))
    original = get("original_max_position_embeddings", size, hf.get("original_max_position_embeddings", max_positions))
    if kind == "llama3":
        return theta, RopeScaling(
            kind=kind, factor=get("factor", positive), original_max_positions=original,
            low_freq_factor=get("low_freq_factor", positive), high_freq_factor=get("high_freq_factor", positive),
        )  # fmt: skip
    factor = get("factor", optional_positive)
    if factor is None:
        factor = max_positions / original
    return theta, RopeScaling(
        kind=kind, factor=factor, original_max_positions=original,
        beta_fast=get("beta_fast", optional_positive, None) or 32.0,
        beta_slow=get("beta_slow", optional_positive, None) or 1.0,
        attention_factor=get("attention_factor", optional_positive, None)
        or _yarn_attention(factor, get("mscale", optional_weight, None), get("mscale_all_dim", optional_weight, None)),
        truncate=get("truncate", boolean, True),
    )  # fmt: skip


def _yarn_attention(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """What multiplies cosines and sines where the file does not say: 1 + log(factor) / 10, or a ratio of two such."""
    log = math.log(factor) / 10 if factor > 1 else 0.0
    if mscale and mscale_all_dim:
        return (1 + mscale * log) / (1 + mscale_all_dim * log)
    return 1 + log


def _agree(name: str, value: Any, other_name: str, other: Any) -> None:
    if value != other:
        raise UserError(f"{name}={short(value)} contradicts {other_name}={short(other)}")


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is None:
        parameters = {"rope_type": "default"}
    else:
        parameters = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "truncate": None if scaling.truncate else scaling.truncate,  # older versions know only true
        }
        parameters = {key: value for key, value in parameters.items() if value is not None}
    old = dict(parameters)
    # Given this key, transformers 4 takes the ratio of the two contexts for yarn's factor.
    if scaling is not None and scaling.kind == "yarn" and scaling.original_max_positions == config.max_positions:
        del old["original_max_position_embeddings"]
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else old,
        "rope_parameters": {**parameters, "rope_theta": theta},
    }


ROPE = Rule(
    ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"), _read_rope, _write_rope
)


def _read_uniform(hf, fields):
    """`layer_types` of a family whose layers are all alike may only say so."""
    types, depth = hf.get("layer_types"), fields["num_layers"]
    kind = LAYER_TYPES[fields["sliding_window"] is not None]
    if types is not None and types != [kind] * depth:
        raise UserError(f"layer_types={short(types)} is not supported, only null or {depth} times {kind!r}")
    return {}


UNIFORM = Rule(("layer_types",), _read_uniform, lambda config: {})


def _read_windows(hf, fields):
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
    return {"sliding_window": window, "layer_types": tuple(types)}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    types = [LAYER_TYPES[config.window_of(layer) is not None] for layer in range(config.num_layers)]
    # Older versions know no layer_types; they see the same model if no full layer follows a windowed one.
    first = types.index("sliding_attention") if "sliding_attention" in types else len(types)
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": types,
    }


WINDOWS = Rule(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _read_windows, _write_windows
)
