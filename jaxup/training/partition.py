"""Params in two trees: what trains, and what does not.

Of what does not train there are no gradients, no moments and no copies: it is an argument of the step
that nothing is returned for, so its every bit stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh

from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.sharding import param_shardings
from jaxup.model.stack import SplitStack

Masks = dict[str, Any]  # a tree like params, of bool [L, 1, ...] under "blocks" and [] elsewhere; see depth.freeze


class Partition:
    """How a model's params are split by `masks`, and how the model computes from the two halves."""

    def __init__(self, model: ModelConfig, compute: Compute, masks: Masks):
        self.num_layers, self._model = model.num_layers, model
        self._graphdef, self._shapes = abstract(model, compute)
        self._masks = traverse_util.flatten_dict(masks)
        self._stack_masks = {path: mask.reshape(-1) for path, mask in _flat(masks["blocks"]).items()}

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what trains, what does not): in "blocks" the rows of each leaf [rows, ...]; one with none is left out."""
        trained, frozen = {}, {}
        for path, leaf in traverse_util.flatten_dict(params).items():
            for part, rows in ((trained, self._masks[path]), (frozen, ~self._masks[path])):
                if rows.all():
                    part[path] = leaf
                elif rows.any():
                    part[path] = leaf[np.flatnonzero(rows)]
        return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)

    def join(self, trained: Params, frozen: Params) -> Params:
        """The inverse of `split`: new arrays where a leaf was split, in the wider dtype of the two."""
        parts = [traverse_util.flatten_dict(part) for part in (trained, frozen)]

        def leaf(path: tuple[str, ...], mask: np.ndarray) -> Any:
            found = [part[path] for part in parts if path in part]
            if len(found) == 1:
                return found[0]
            rows = mask.reshape(-1)
            order = np.argsort(np.concatenate([np.flatnonzero(rows), np.flatnonzero(~rows)]))
            return jnp.concatenate(found)[order]

        return traverse_util.unflatten_dict({path: leaf(path, mask) for path, mask in self._masks.items()})

    def merge(self, trained: Params, params: Params) -> Params:
        """`params` with what was trained in the place of what it was; everything keeps its dtype."""
        joined = self.join(trained, self.split(params)[1])
        return jax.tree.map(lambda new, old: new.astype(old.dtype), joined, params)

    def hidden(self, trained: Params, frozen: Params, tokens_BS: jax.Array, **inputs: Any) -> tuple[Decoder, jax.Array]:
        """(a Decoder without blocks, what its head is applied to): `Decoder.hidden` of the joined params.

        Only `trained` is to be differentiated. Nothing flows back below the first layer that trains,
        unless the embedding does.
        """
        ends = _flat({k: v for k, v in self._shapes.items() if k != "blocks"})
        for part in (frozen, trained):
            ends |= _flat({k: v for k, v in part.items() if k != "blocks"})
        ends = traverse_util.unflatten_dict(ends, sep=".")
        decoder = nnx.merge(self._graphdef, {**ends, "blocks": self._shapes["blocks"]})
        stack = SplitStack(_flat(trained.get("blocks", {})), _flat(frozen.get("blocks", {})), self._stack_masks)
        return decoder, decoder.hidden(tokens_BS, stack=stack, **inputs)

    def rows(self, path: tuple[str, ...]) -> np.ndarray:
        """int [rows]: the layers of the trained leaf at this path, which begins with "blocks"."""
        return np.flatnonzero(self._masks[path])

    def shardings(self, mesh: Mesh) -> tuple[Params, Params]:
        """NamedShardings of the two halves: the layers' axis is never split, so rows lie as the whole does."""
        flat = traverse_util.flatten_dict(param_shardings(self._model, mesh))
        trained = {path: flat[path] for path, mask in self._masks.items() if mask.any()}
        frozen = {path: flat[path] for path, mask in self._masks.items() if not mask.all()}
        return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def digest(tree: Any) -> str:
    """A hex digest of all leaves' bits, computed where they lie: any one bit flipped changes it."""
    return hashlib.sha256(repr([int(word) for word in jax.tree.leaves(_words(tree))]).encode()).hexdigest()


@jax.jit
def _words(tree: Any) -> list[jax.Array]:
    def word(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        # Each word times an odd number that depends on its place, modulo 2^32.
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis in range(leaf.ndim):
            step = np.uint32(0x9E3779B1 * (2 * axis + 1) % 2**32)
            place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * step
        return jnp.sum(leaf.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return [word(leaf) for leaf in jax.tree.leaves(tree)]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=".")
