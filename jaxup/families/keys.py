"""What the keys of a config.json mean: their values, and keys that decide something together.

A parser takes any JSON value, and raises ValueError saying what is accepted.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxup.errors import UserError
from jaxup.model.config import MAX_LAYERS, ModelConfig


class Key(NamedTuple):
    """A key of config.json that decides what the model computes."""

    name: str
    fields: tuple[str, ...]  # of ModelConfig; all get the value
    default: Any  # what transformers takes when the key is absent
    parse: Callable[[Any], Any]  # the value, or ValueError saying what is accepted


class Rule(NamedTuple):
    """Keys that decide fields of ModelConfig only together, or together with other fields.

    `read` raises UserError, naming the key, for a value that no `ModelConfig` represents.
    """

    names: tuple[str, ...]
    fields: tuple[str, ...]  # of ModelConfig
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]  # (config.json, fields so far) -> fields
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}  # -> keys of config.json
    obstacle: Callable[[ModelConfig], str | None] = lambda config: None  # what `write` would need, if it lacks it


# Far above any model, and low enough that a hostile file cannot make shapes or frequencies overflow.
_MAX_SIZE, _MAX_NUMBER = 2**24, 1e30


def parsed(name: str, value: Any, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{name}={short(value)} is not supported, only {error}") from None


def size(value: Any, smallest: int = 1, largest: int = _MAX_SIZE) -> int:
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(f"an integer from {smallest} to {largest}")
    return value


layers = functools.partial(size, largest=MAX_LAYERS)
count = functools.partial(size, smallest=0)


def positive(value: Any) -> float:
    if type(value) not in (int, float) or not 1 / _MAX_NUMBER <= value <= _MAX_NUMBER:
        raise ValueError("a positive number")
    return float(value)


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


optional_size, optional_positive = _optional(size), _optional(positive)


def optional_weight(value: Any) -> float:
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= _MAX_NUMBER):
        raise ValueError("a number from 0, or null")
    return float(value or 0)


def boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


# Several of transformers' names are one function. The first name of each is the one written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip


def activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


# Its cost does not depend on the size of the value, which may be a hostile file's.
_REPR = reprlib.Repr()
_REPR.maxdict, _REPR.maxstring = 12, 80


def short(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
