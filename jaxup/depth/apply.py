"""A plan carried out on params trees in memory: a gather and a scale per leaf.

Pure and shaped by the plan alone, so it runs under `jax.jit` with the plan static, `jax.eval_shape`,
`jax.vmap` and `jax.grad`, and on any tree of the structure of params, such as Adam's moments.

L is the number of layers of a source, M that of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxup.depth.plan import ENDS, MODULE_PARTS, DepthPlan
from jaxup.errors import UserError, suggest

Params = dict[str, Any]  # nested dict of arrays
INIT = None  # the name, among the sources, of the freshly initialised tree


def apply(plan: DepthPlan, sources: Mapping[str, Params], init: Params | None = None) -> Params:
    """The params that `plan` makes from those of its sources.

    Args:
      plan: hashable; make it static under `jax.jit`.
      sources: params of each of the plan's sources, leaves under "blocks" [L, ...]. Sources the
        plan does not name are ignored.
      init: freshly initialised params of the result's depth, leaves under "blocks" [M, ...]: what
        the plan does not inherit is taken from the same place of it.

    Returns:
      Params with leaves under "blocks" [M, ...]. A leaf has the dtype of its sources (promoted if
      they differ, so that nothing inherited is rounded), whatever that of `init`, unless the plan
      says otherwise. Scaling is done in float32; a scale of 0 gives +0.0 and a scale of 1 a
      bit-exact copy. The layer axis must not be sharded; the sharding of the others is kept.
      Blocks are new arrays; embeddings, final norm and head may be the sources' own, which matters
      if either is donated.

    Raises:
      UserError: a source is missing or is not what the plan was made for, sources and `init` do
        not fit each other, or something new is needed and there is no `init`.
    """
    trees: dict[str | None, Params] = {}
    for name, _ in plan.sources:
        if name not in sources:
            raise UserError(f"apply: the plan's source {name!r} is not given{suggest(name, sources)}")
        trees[name] = sources[name]
    if init is not None:
        trees[INIT] = init
    _check_depths(plan, trees)
    _check_shapes(trees)
    result = {end: tree for end in ENDS if (tree := _end(plan, end, trees)) is not None}
    if init is not None and (differ := set(result) ^ (set(init) - {"blocks"})):
        end = min(differ)
        raise UserError(f"apply: {end} is in {'init' if end in init else 'the result'} only")

    blocks = {name: tree["blocks"] for name, tree in trees.items()}
    names = list(blocks)
    # Any tree does as the first: all have the same structure.
    result["blocks"] = jax.tree_util.tree_map_with_path(
        lambda path, *leaves: _leaf(plan, _path(path), dict(zip(names, leaves))), *blocks.values()
    )
    if any(row.noise for row in plan.rows):
        if init is None:
            raise UserError("apply: layers are to be mixed with newly initialised ones, and no init is given")
        result = add_noise(plan, result, init)
    return result


def add_noise(plan: DepthPlan, params: Params, init: Params) -> Params:
    """The params of the plan's result, without noise, with the noise that its rows ask for.

    A kernel becomes (1 - noise) * inherited + noise * new, in float32, rounded to its own dtype.
    """

    def mix(keys: Any, leaf: Any, new: Any) -> Any:
        path = _path(keys)
        noise = np.array([row.noise if row.inherits(path) else 0 for row in plan.rows], np.float32)
        if not path.endswith(".kernel") or not noise.any():
            return leaf
        noise = noise.reshape(-1, *[1] * (leaf.ndim - 1))
        mixed = (1 - noise) * leaf.astype(jnp.float32) + noise * new.astype(jnp.float32)
        return jnp.where(noise == 0, leaf, mixed.astype(leaf.dtype))

    return params | {"blocks": jax.tree_util.tree_map_with_path(mix, params["blocks"], init["blocks"])}


def _leaf(plan: DepthPlan, path: str, leaves: Mapping[str | None, Any]) -> jax.Array:
    """The result's [M, ...] leaf at `path` of a block, from [L, ...] of each source."""
    origins = []  # (source, layer) of each row
    for i, row in enumerate(plan.rows):
        if not row.inherits(path) and INIT not in leaves:
            raise UserError(f"apply: {path} of layer {i} is to be newly initialised, and no init is given")
        origins.append((row.source, row.layer) if row.inherits(path) else (INIT, i))
    names = {name for name, _ in origins}
    dtype = jnp.dtype(plan.dtype or jnp.result_type(*[leaves[name].dtype for name in names - {INIT} or names]))

    pieces = []
    for name, run in itertools.groupby(origins, key=lambda origin: origin[0]):
        layers = np.array([layer for _, layer in run], np.int32)
        pieces.append(jnp.asarray(leaves[name]).at[layers].get(mode="promise_in_bounds").astype(dtype))
    leaf = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
    return scale_rows(leaf, [row.factors(path) for row in plan.rows], plan.out_dtype)


def scale_rows(leaf: jax.Array, factors: Sequence[tuple[float, ...]], out_dtype: Any = None) -> jax.Array:
    """Each row of a [rows, ...] leaf multiplied with its factors in turn; see `arithmetic.rescale`."""
    dtype, zero = leaf.dtype, np.array([f == (0.0,) for f in factors])
    rows = (-1, *[1] * (leaf.ndim - 1))
    for step in itertools.zip_longest(*factors, fillvalue=1.0):
        scales = np.array(step, np.float32).reshape(rows)
        # Without a barrier XLA may leave out a rounding that is followed by a widening.
        leaf = jax.lax.optimization_barrier(leaf)
        product = (leaf.astype(jnp.promote_types(dtype, jnp.float32)) * scales).astype(dtype)
        leaf = jnp.where(scales == 1, leaf, product)
    if zero.any():
        # Not by multiplying: 0 * -1 is -0, and 0 * inf is nan.
        leaf = jnp.where(zero.reshape(rows), jnp.zeros((), dtype), leaf)
    return jax.lax.optimization_barrier(leaf).astype(out_dtype or dtype)


def _end(plan: DepthPlan, end: str, trees: Mapping[str | None, Params]) -> Any | None:
    """What the plan takes for `end`, or None where the result has no such thing."""
    name = getattr(plan, end)
    if end == "lm_head":
        head = plan.head({source: "lm_head" not in trees[source] for source, _ in plan.sources})
        if head is None:
            return None
        part, name = head
        if part == "embed_tokens":
            return {"kernel": _ended(plan, "lm_head.kernel", jnp.asarray(trees[name][part]).T)}
    if name is INIT and INIT not in trees:
        if any(end in tree for tree in trees.values()):
            raise UserError(f"apply: {end} is to be newly initialised, and no init is given")
        return None
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _ended(plan, ".".join(filter(None, (end, _path(keys)))), leaf), trees[name].get(end)
    )


def _ended(plan: DepthPlan, path: str, leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf).astype(plan.dtype or leaf.dtype)
    if factors := plan.factors(path):
        return scale_rows(leaf[None], [factors], plan.out_dtype)[0]
    return leaf.astype(plan.out_dtype or leaf.dtype)


def _check_depths(plan: DepthPlan, trees: Mapping[str | None, Params]) -> None:
    depths: dict[str | None, int] = {**dict(plan.sources), INIT: plan.num_layers}
    for name, tree in trees.items():
        for key in tree:
            if key not in (*ENDS, "blocks"):
                raise UserError(f"apply: {_called(name)} has {key!r}, of which a plan knows nothing")
        for path, leaf in _flat(tree["blocks"]).items():
            if path.split(".")[0] not in MODULE_PARTS:
                raise UserError(f"apply: {_called(name)} has blocks.{path}, of which a plan knows nothing")
            found = leaf.shape[0] if leaf.ndim else 0
            if found != depths[name]:
                raise UserError(
                    f"apply: blocks.{path} of {_called(name)} has {found} layers, but the plan says {depths[name]}"
                )


def _check_shapes(trees: Mapping[str | None, Params]) -> None:
    """All trees must be of one architecture but for depth, and for ends that some do not have."""
    seen: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    first, *others = trees
    paths = {name: _flat(tree["blocks"]).keys() for name, tree in trees.items()}
    for other in others:
        if differ := paths[first] ^ paths[other]:
            path = min(differ)
            has, lacks = (first, other) if path in paths[first] else (other, first)
            raise UserError(f"apply: {_called(has)} has blocks.{path}, and {_called(lacks)} has not")
    for name, tree in trees.items():
        for path, leaf in _flat(tree).items():
            skip = 1 if path.startswith("blocks.") else 0
            who, shape = seen.setdefault(path, (name, leaf.shape))
            if shape[skip:] != leaf.shape[skip:]:
                raise UserError(
                    f"apply: {path} has shape {list(shape)} in {_called(who)} and {list(leaf.shape)} in {_called(name)}"
                )


def _called(name: str | None) -> str:
    return "init" if name is INIT else repr(name)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _flat(tree: Params) -> dict[str, Any]:
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
