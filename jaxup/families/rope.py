"""Rotary positions in config.json: one base, and the ways in which contexts are stretched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxup.errors import UserError, nearest
from jaxup.families.keys import Rule, boolean, optional_positive, optional_weight, parsed, positive, short, size
from jaxup.model.config import ModelConfig, RopeScaling

# The parameters of each kind of rotary scaling, besides rope_type and rope_theta.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
}  # fmt: skip
_REQUIRED = object()


def _read_rope(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 4 spells it `rope_theta` and `rope_scaling`, 5 has all of it in `rope_parameters`.

    Both read both; where a file has several spellings they must agree, for the versions prefer different ones.
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


def _rope_of(name: str, hf: Mapping[str, Any], theta: float, max_positions: int) -> tuple[float, RopeScaling | None]:
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
            near = nearest(key[:100], sorted(known))
            raise UserError(f"{name}: unknown key {short(key)} of rope_type {kind!r}{near}")
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
    factor = get("factor", optional_positive) or max_positions / original
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
    parameters: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        names = {"kind": "rope_type", "original_max_positions": "original_max_position_embeddings"}
        # Older versions know of `truncate` only what is true, and what a kind does not use is 0 or None.
        values = dataclasses.asdict(scaling) | {"truncate": None if scaling.truncate else scaling.truncate}
        parameters = {names.get(field, field): v for field, v in values.items() if v or v is False}
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
    ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    ("rope_theta", "rope_scaling"), _read_rope, _write_rope,
)  # fmt: skip
