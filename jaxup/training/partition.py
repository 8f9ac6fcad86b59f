"""Params in two trees: what trains, and what has no gradients, no moments and no copies, and keeps its every bit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import STACK, flatten, unflatten
from jaxup.model.stack import SplitStack

Masks = dict[str, Any]  # a tree like params, of bool [L, 1, ...] under "blocks" and [] elsewhere; see depth.freeze


class Partition:
    """How a model's params are split by `masks`, and how the model computes from the two halves."""

    rounds = False  # whether what is frozen is kept with less precision than it came in

    def __init__(self, model: ModelConfig, compute: Compute, masks: Masks):
        self.num_layers, self._model = model.num_layers, model
        self._graphdef, self._shapes = abstract(model, compute)
        self._masks = flatten(masks)

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what trains, what does not): under "blocks" leaves [rows, ...]; a leaf without rows is left out."""
        trained: Params = {}
        frozen: Params = {}
        for path, leaf in flatten(params).items():
            for part, rows in ((trained, self._masks[path]), (frozen, ~self._masks[path])):
                if rows.all():
                    part[path] = leaf
                elif rows.any():
                    part[path] = leaf[np.flatnonzero(rows)]
        return unflatten(trained), unflatten(frozen)

    def join(self, trained: Params, frozen: Params) -> Params:
        """The inverse of `split`: new arrays where a leaf was split, in the wider dtype of the two."""
        parts = [flatten(part) for part in (trained, frozen)]

        def leaf(path: str, mask: np.ndarray) -> Any:
            found = [part[path] for part in parts if path in part]
            if len(found) == 1:
                return found[0]
            rows = mask.reshape(-1)
            order = np.argsort(np.concatenate([np.flatnonzero(rows), np.flatnonzero(~rows)]))
            return jnp.concatenate(found)[order]

        return unflatten({path: leaf(path, mask) for path, mask in self._masks.items()})

    def merge(self, trained: Params, params: Params) -> Params:
        """`params` with what was trained in its place; everything keeps its dtype."""
        joined = self.join(trained, self.split(params)[1])
        return jax.tree.map(lambda new, old: new.astype(old.dtype), joined, params)

    def hidden(self, trained: Params, frozen: Params, tokens_BS: jax.Array, **inputs: Any) -> tuple[Decoder, jax.Array]:
        """(a Decoder without blocks, what its head is applied to): `Decoder.hidden` of the joined params."""
        decoder, hidden = self.decoder(trained, frozen)
        return decoder, hidden(tokens_BS, **inputs)

    def decoder(self, trained: Params, frozen: Params) -> tuple[Decoder, Callable[..., jax.Array]]:
        """(a Decoder without blocks, its `hidden`, by the layers of the joined params).

        Only `trained` is to be differentiated. Nothing flows back below the first layer that trains,
        unless the embedding does.
        """
        halves = [flatten(half) for half in (frozen, trained)]
        ends = {path: leaf for half in halves for path, leaf in half.items() if not path.startswith(STACK)}
        decoder = nnx.merge(self._graphdef, unflatten(flatten(self._shapes) | ends))
        masks = {path: mask.reshape(-1) for path, mask in _blocks(self._masks).items()}
        stack = SplitStack(_blocks(halves[1]), _blocks(halves[0]), masks)
        return decoder, functools.partial(decoder.hidden, stack=stack)

    def rows(self, path: str) -> np.ndarray:
        """int [rows]: the layers of the trained leaf at this path, a stacked one."""
        return np.flatnonzero(self._masks[path])

    def shardings(self, mesh: Mesh) -> tuple[Params, Params]:
        """NamedShardings of the two halves: the layers' axis is never split, so rows lie as the whole does."""
        flat = flatten(param_shardings(self._model, mesh))
        trained = {path: flat[path] for path, mask in self._masks.items() if mask.any()}
        frozen = {path: flat[path] for path, mask in self._masks.items() if not mask.all()}
        return unflatten(trained), unflatten(frozen)


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


def _blocks(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The stacked ones, by their paths inside a block."""
    return {path.removeprefix(STACK): leaf for path, leaf in leaves.items() if path.startswith(STACK)}
