"""The family of this project's own, for what none of transformers computes: layers normalised after the sum, say.

Its config.json holds the whole `ModelConfig`, and its tensors have the names and layouts of LLaMA's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxup.errors import UserError, within
from jaxup.families import keys
from jaxup.families.family import FIXED, Family, our_names
from jaxup.families.keys import Rule
from jaxup.model.config import ModelConfig

_KEY = "jaxup"
_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name != "beside")


def _read(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields. `ModelConfig` looks at what they are; here, that no number is beyond any model."""
    with within(_KEY):
        if not isinstance(given := hf.get(_KEY), dict):
            raise UserError(f"{keys.short(given)} is not the description of a model")
        for name, value in _numbers(given):
            keys.parsed(name, value, keys.count if type(value) is int else _number)
        for name in ("norm_eps", "rope_theta", "embed_scale", "init_std"):
            if given.get(name) is not None:
                keys.parsed(name, given[name], keys.positive)
        config = ModelConfig.from_dict({"kinds": None, "rope_scaling": None, **given})
        if config.beside:
            raise UserError(f"{keys.short(given['beside'])} is no part of a model directory", at="beside")
    return {name: getattr(config, name) for name in _FIELDS}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """All that are in it, and what they are called."""
    if isinstance(value, int | float):
        yield from () if isinstance(value, bool) else [(name, value)]
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, key[:100])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each, name)


def _number(value: float) -> float:
    return keys.positive(value) if value else value


NATIVE = Family(
    model_type="jaxup",
    architecture="JaxupForCausalLM",
    keys=(),
    rules=(
        Rule(
            (_KEY,), _FIELDS, _read,
            lambda config: {_KEY: {name: dataclasses.asdict(config)[name] for name in _FIELDS}},
        ),
    ),
    fixed=FIXED,
    fields={},
    modules=our_names("model"),
    ignored_tensors=(),
    native=True,
)  # fmt: skip
