"""A narrower model inside a wider one: what of each parameter is left, along the axes that the table names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.spec import flatten, spec, unflatten

_HALVED = ("num_heads", "num_kv_heads", "intermediate_size")


def halved(config: ModelConfig) -> ModelConfig:
    """With half of the heads and half of the MLP in every layer, and everything else as it is: half the parameters of
    the blocks, but for norms. UserError for a size that is odd.

    The residual stream keeps its width, so embeddings, norms and head fit as they are.
    """
    sizes = {name: getattr(config, name) for name in _HALVED}
    for name, size in sizes.items():
        if size % 2:
            raise UserError(f"{name}={size} cannot be halved")
    return dataclasses.replace(config, **{name: size // 2 for name, size in sizes.items()})


def narrow(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Of the params of a wider model those of one of this config: along each axis the first as many as it has.

    Of grouped queries whole groups stay, if heads and key/value heads shrink alike: a query keeps its key. UserError if
    a parameter is missing or has fewer along an axis.
    """
    leaves, wanted = flatten(params), spec(config)
    for path, param in wanted.items():
        if path not in leaves:
            raise UserError(f"{path} is not there to be narrowed")
        shape = leaves[path].shape
        if len(shape) != len(param.shape) or any(has < wants for has, wants in zip(shape, param.shape)):
            raise UserError(f"{path} has shape {[*shape]}, and {[*param.shape]} is no part of it")
    return unflatten({path: leaves[path][tuple(map(slice, param.shape))] for path, param in wanted.items()})
