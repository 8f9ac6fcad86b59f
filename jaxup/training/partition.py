"""Params in two trees: what trains, and what does not.

Of what does not train there are no gradients, no moments and no copies: it is an argument of the step
that nothing is returned for, so its every bit stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.stack import SplitStack

Masks = dict[str, Any]  # a tree like params, of bool [L, 1, ...] under "blocks" and [] elsewhere; see depth.freeze


def split(params: Params, masks: Masks) -> tuple[Params, Params]:
    """(what trains, what does not): under "blocks" the rows of each leaf [rows, ...]; a leaf with none is left out."""
    trained, frozen = {}, {}
    flat = traverse_util.flatten_dict(masks)
    for path, leaf in traverse_util.flatten_dict(params).items():
        for part, rows in ((trained, flat[path]), (frozen, ~flat[path])):
            if rows.all():
                part[path] = leaf
            elif rows.any():
                part[path] = leaf[np.flatnonzero(rows)]
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Params, frozen: Params, masks: Masks) -> Params:
    """The inverse of `split`: new arrays where a leaf was split."""
    parts = [traverse_util.flatten_dict(part) for part in (trained, frozen)]

    def leaf(path: tuple[str, ...], mask: np.ndarray) -> jax.Array:
        found = [part[path] for part in parts if path in part]
        if len(found) == 1:
            return found[0]
        rows = mask.reshape(-1)
        order = np.argsort(np.concatenate([np.flatnonzero(rows), np.flatnonzero(~rows)]))
        return jnp.concatenate(found)[order]

    return traverse_util.unflatten_dict({p: leaf(p, m) for p, m in traverse_util.flatten_dict(masks).items()})


def make_hidden(model: ModelConfig, compute: Compute, masks: Masks) -> Callable[..., tuple[Decoder, jax.Array]]:
    """(trained, frozen, tokens, **inputs) -> (a Decoder without blocks, what its head is applied to).

    `Decoder.hidden` with the params in two trees: only the first is to be differentiated. Nothing
    flows back below the first layer that trains, unless the embedding does.
    """
    graphdef, shapes = abstract(model, compute)
    rows = {path: mask.reshape(-1) for path, mask in _flat(masks["blocks"]).items()}

    def hidden(trained: Params, frozen: Params, tokens_BS: jax.Array, **inputs: Any) -> tuple[Decoder, jax.Array]:
        ends = _flat({k: v for k, v in shapes.items() if k != "blocks"})
        for part in (frozen, trained):
            ends |= _flat({k: v for k, v in part.items() if k != "blocks"})
        ends = traverse_util.unflatten_dict(ends, sep=".")
        decoder = nnx.merge(graphdef, {**ends, "blocks": shapes["blocks"]})
        stack = SplitStack(_flat(trained.get("blocks", {})), _flat(frozen.get("blocks", {})), rows)
        return decoder, decoder.hidden(tokens_BS, stack=stack, **inputs)

    return hidden


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=".")
