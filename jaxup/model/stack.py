"""The stack of blocks, and how a decoder runs through it.

What `lax.scan` runs over is usually one stack with the layer on axis 0 of every leaf. When only a part
trains there are two: rows that train, which have gradients and moments, and rows that do not. They are
never joined: each layer takes its parameters from where they lie. Some leaves, such as low-rank adapters,
have no row at all for some layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Carry = Any
# (carry, (block, its index, its entries of the columns)) -> (carry, None)
Step = Callable[[Carry, tuple[Any, jax.Array, dict[str, jax.Array]]], tuple[Carry, None]]
Kind = tuple[bool | None, ...]  # of each of a layer's leaves: whether it trains; None: the layer has none
Pattern = list[tuple[Kind, int]]  # so many layers of a kind, and so on


@dataclasses.dataclass(frozen=True)
class SplitStack:
    """Blocks in two stacks, by the dotted path of each leaf inside a block.

    Attributes:
      trained, frozen: for each leaf an array [rows, ...], of the layers that train and of those that
        do not, in their order. A leaf without rows may be left out. What is frozen may also be
        quantised, a `qwix.QArray`.
      masks: bool [L] for each leaf: which layers are in `trained`. The others are in `frozen`; if
        that has no such leaf, they do without: in their block it is None.
    """

    trained: Mapping[str, jax.Array]
    frozen: Mapping[str, Any]
    masks: Mapping[str, np.ndarray]

    def scan(
        self, step: Step, carry: Carry, like: Any, columns: Mapping[str, jax.Array], *,
        policy: Callable[..., bool] | None, unroll: int = 1,
    ) -> Carry:  # fmt: skip
        """Runs all layers; `like` is a pytree with the structure of the blocks' module, `columns` are arrays [L].

        `policy` is that of `jax.checkpoint`; None: the backward pass keeps all but the frozen parameters,
        which it looks up again where they lie. `unroll` is that of `Compute`, for each scan.

        Layers that take the same leaves from the same stacks are one scan, and what repeats, such as
        one frozen layer and two that train, is one scan of scans: programs are as many as patterns.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        paths = [leaf_path(keys) for keys, _ in leaves]
        kinds = list(zip(*map(self._kinds, paths), strict=True))
        keep = _all_but_params(self.frozen.values())
        places = {path: _ranks(self.masks[path]) for path in paths}  # of each layer, its row in its stack

        def layers(carry: Carry, first: jax.Array, count: int, kind: Kind, rows: dict[str, jax.Array]) -> Carry:
            """`count` layers of one kind from `first` on, of which `rows` are the trained leaves."""
            lacking = [path for path, trains in zip(paths, kind, strict=True) if trains is None]

            def body(carry, xs):
                trained, layer = xs
                block = jax.tree.unflatten(
                    structure,
                    [
                        trained.get(path) if trains is not False else self._frozen_row(path, places[path], layer)
                        for path, trains in zip(paths, kind, strict=True)
                    ],
                )
                for path in lacking:
                    *owners, name = path.split(".")
                    setattr(functools.reduce(getattr, owners, block), name, None)
                return step(carry, (block, layer, {name: column[layer] for name, column in columns.items()}))

            each = min(unroll, count) or count
            # Only where no loop is left could XLA take the first computation's values for the second's.
            body = jax.checkpoint(body, policy=policy or keep, prevent_cse=each == count)
            return jax.lax.scan(body, carry, (rows, first + jnp.arange(count)), unroll=each)[0]

        def group(carry: Carry, first: jax.Array, pattern: Pattern, rows: dict[str, jax.Array]) -> Carry:
            taken = dict.fromkeys(rows, 0)
            for kind, count in pattern:
                here = {path for path, trains in zip(paths, kind, strict=True) if trains}
                part = {path: rows[path][taken[path] : taken[path] + count] for path in here}
                carry = layers(carry, first, count, kind, part)
                first, taken = first + count, {path: n + count * (path in here) for path, n in taken.items()}
            return carry

        first, taken = 0, dict.fromkeys(self.trained, 0)
        for pattern, times in _patterns(kinds):
            length = sum(count for _, count in pattern)
            counts = {
                path: sum(count for kind, count in pattern if kind[i])
                for i, path in enumerate(paths)
                if path in self.trained
            }
            rows = {path: self.trained[path][taken[path] : taken[path] + times * n] for path, n in counts.items() if n}
            if times == 1:
                carry = group(carry, jnp.int32(first), pattern, rows)
            else:
                stacked = {path: leaf.reshape(times, -1, *leaf.shape[1:]) for path, leaf in rows.items()}
                starts = first + length * jnp.arange(times)
                body = lambda carry, xs, pattern=pattern: (group(carry, xs[0], pattern, xs[1]), None)  # noqa: E731
                carry, _ = jax.lax.scan(body, carry, (starts, stacked))
            first, taken = first + times * length, {path: taken[path] + times * counts.get(path, 0) for path in taken}
        return carry

    def _kinds(self, path: str) -> list[bool | None]:
        """Of each layer whether this leaf trains; None: it has none."""
        return [True if trains else False if path in self.frozen else None for trains in self.masks[path].tolist()]

    def _frozen_row(self, path: str, places_L: np.ndarray, layer: jax.Array) -> Any:
        row = jnp.asarray(places_L)[layer]
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), self.frozen[path])


_MOVES = ("reshape", "convert_element_type", "transpose", "squeeze", "copy")
_DEQUANTISES = (*_MOVES, "broadcast_in_dim", "gather", "mul")  # as qwix does


def _all_but_params(stacks: Iterable[Any]) -> Callable[..., bool]:
    """A policy of `jax.checkpoint`: keep all of a layer but its parameters, of [rows, ...] stacks, cast, reshaped or
    dequantised."""
    stacks = list(stacks)
    sizes = {math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(stacks)}
    # Activations that are of a parameter's size by chance are computed again too: all of these are cheap.
    names = _DEQUANTISES if any(hasattr(leaf, "qvalue") for leaf in stacks) else _MOVES

    def policy(primitive: Any, *operands: Any, **params: Any) -> bool:
        is_param = primitive.name in names and any(math.prod(operand.shape) in sizes for operand in operands)
        return primitive.name != "dynamic_slice" and not is_param

    return policy


def leaf_path(keys: Any) -> str:
    """The dotted path of a leaf of the blocks' module, or of their params."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
    return ".".join(str(name) for name in names if name not in (None, "value"))


def _ranks(mask: np.ndarray) -> np.ndarray:
    """int32 [L]: the row of each layer in the stack that it is in."""
    return np.where(mask, np.cumsum(mask) - 1, np.cumsum(~mask) - 1).astype(np.int32)


def _patterns(kinds: Sequence[Kind]) -> list[tuple[Pattern, int]]:
    """The layers' kinds as ((runs of equal ones), how often these runs follow each other)."""
    runs = [(kind, len(list(same))) for kind, same in itertools.groupby(kinds)]
    patterns, at = [], 0
    while at < len(runs):
        best = (1, 1)  # (runs in the pattern, times)
        for period in range(1, (len(runs) - at) // 2 + 1):
            times = 1
            while runs[at + times * period : at + (times + 1) * period] == runs[at : at + period]:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = (period, times)
        patterns.append((runs[at : at + best[0]], best[1]))
        at += best[0] * best[1]
    return patterns
