"""A plan carried out on params trees in memory: a gather and a scale per leaf.

Pure and shaped by the plan alone, so it runs under `jax.jit` with the plan static, `jax.eval_shape`,
`jax.vmap` and `jax.grad`, and on any tree of the structure of params, such as Adam's moments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxup.depth.compose import compose
from jaxup.depth.materials import Bill, Material, common, materials
from jaxup.depth.plan import ENDS, DepthPlan
from jaxup.depth.result import result_config
from jaxup.errors import UserError, suggest, within
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.spec import PART_OF, STACK, flatten, unflatten, without_beside

INIT = None  # the name, among the sources, of the freshly initialised tree


@overload
def apply(plan: DepthPlan, sources: Mapping[str, Params], init: Params | None = None) -> Params: ...


@overload
def apply(plan: DepthPlan, sources: Decoder | Mapping[str, Decoder], init: Params | None = None) -> Decoder: ...


@within("apply")
def apply(plan: DepthPlan, sources: Any, init: Params | None = None) -> Any:
    """The params that `plan` makes from those of its sources, or of models the model.

    Args:
      plan: hashable; make it static under `jax.jit`.
      sources: params of each of the plan's sources, and maybe others, leaves under "blocks" [L, ...]; or
        models, or, of one source, the model itself.
      init: freshly initialised params of the result's depth, leaves under "blocks" [M, ...], from which
        what the plan does not inherit is taken.

    Returns:
      Params with leaves under "blocks" [M, ...]. A leaf has the dtype of its sources (promoted if
      they differ, so that nothing inherited is rounded), whatever that of `init`, unless the plan
      says otherwise. Scaling is done in float32; a scale of 0 gives +0.0 and a scale of 1 a
      bit-exact copy. The layer axis must not be sharded; the sharding of the others is kept.
      Embeddings, final norm and head may be the very arrays of the sources, which then must not be donated.
      A model computes as that of the first layer does, and has the tokenizer of that of the embedding.
      What stands beside the decoder is that of the first layer's source, or without any there that of `init`.

    Raises:
      UserError: sources or `init` are missing, or do not fit the plan or each other.
    """
    if isinstance(sources, Decoder):
        if len(plan.sources) != 1:
            raise UserError(f"the plan has {len(plan.sources)} sources; give a mapping from their names to models")
        sources = {plan.sources[0][0]: sources}
    models = {name: model for name, model in sources.items() if isinstance(model, Decoder)}
    if models:
        if len(models) < len(sources):
            raise UserError("some sources are models and some are params")
        made = _apply(plan, {name: model.params for name, model in models.items()}, init and without_beside(init))
        config = result_config(plan, {name: model.config for name, model in models.items()})
        model = nnx.merge(abstract(config, models[plan.rows[0].source].compute)[0], made)
        model.origin = _origin(plan, models)
        return model
    return _apply(plan, sources, init)


def _origin(plan: DepthPlan, models: Mapping[str, Decoder]) -> Any:
    """That of the model with the embedding, whose tokenizer fits; with all that was done to the models since."""
    main = models[plan.embed_tokens if plan.embed_tokens is not None else plan.rows[0].source].origin
    if main is None:
        return None
    whole, known = None, {name: model.origin for name, model in models.items() if model.origin is not None}
    if len(known) == len(models):
        with contextlib.suppress(UserError):  # no single plan says what several did
            whole = compose(plan, {name: origin.whole(models[name].config) for name, origin in known.items()})
    return dataclasses.replace(main, plan=whole)


def _apply(plan: DepthPlan, sources: Mapping[str, Params], init: Params | None) -> Params:
    """`apply` on params."""
    trees: dict[str | None, dict[str, Any]] = {}
    for name, _ in plan.sources:
        if name not in sources:
            raise UserError(f"the plan's source {name!r} is not given{suggest(name, sources)}")
        trees[name] = flatten(without_beside(sources[name]))
    if init is not None:
        trees[INIT] = flatten(without_beside(init))
    _check_depths(plan, trees)
    _check_shapes(trees)
    tied = {name: "lm_head.kernel" not in trees[name] for name, _ in plan.sources}
    paths = [*_of("blocks", next(iter(trees.values()))), *_end_paths(plan, trees, tied)]

    def stored(source: str | None, path: str, layer: int | None) -> str:
        if source not in trees:
            raise UserError(f"{path} is to be newly initialised, and no init is given")
        return trees[source][path].dtype.name

    bill = materials(plan, paths, tied, stored)
    leaves = {path: _leaf(path, made, trees) for path, made in bill.items()}
    if any(made.noise for rows in bill.values() for made in rows):
        leaves = add_noise(bill, leaves, trees[INIT])
    beside = next((tree["beside"] for tree in (sources[plan.rows[0].source], init or {}) if "beside" in tree), None)
    return unflatten(leaves) | ({} if beside is None else {"beside": beside})


def add_noise(bill: Bill, leaves: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with the noise of their materials mixed in; both `leaves` and `fresh`, the new values, are by path.

    A kernel becomes (1 - noise) * inherited + noise * new, in float32, rounded to its own dtype.
    """

    def mix(leaf: Any, rows: tuple[Material, ...], new: Any) -> Any:
        noise = np.array([made.noise for made in rows], np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
        mixed = (1 - noise) * leaf.astype(jnp.float32) + noise * new.astype(jnp.float32)
        return jnp.where(noise == 0, leaf, mixed.astype(leaf.dtype))

    noisy = {path for path, rows in bill.items() if any(made.noise for made in rows)}
    return {path: mix(leaf, bill[path], fresh[path]) if path in noisy else leaf for path, leaf in leaves.items()}


def _end_paths(
    plan: DepthPlan, trees: Mapping[str | None, Mapping[str, Any]], tied: Mapping[str, bool]
) -> Iterator[str]:
    """What the result has besides blocks."""
    for end in ENDS:
        part, name = (plan.head(tied) or (end, None)) if end == "lm_head" else (end, getattr(plan, end))
        if end == "lm_head" and plan.head(tied) is None:
            found: list[str] = []
        elif name is INIT and INIT not in trees:
            if any(_of(end, tree) for tree in trees.values()):
                raise UserError(f"{end} is to be newly initialised, and no init is given")
            continue
        else:
            found = _of(end, trees[name]) if part == end else ["lm_head.kernel"]
        if INIT in trees and sorted(found) != sorted(there := _of(end, trees[INIT])):
            raise UserError(f"{end} is in {'init' if there else 'the result'} only")
        yield from found


def _of(end: str, tree: Mapping[str, Any]) -> list[str]:
    return [path for path in tree if path.split(".")[0] == end]


def _leaf(path: str, rows: tuple[Material, ...], trees: Mapping[str | None, Mapping[str, Any]]) -> jax.Array:
    """A leaf of the result, [M, ...] if it is stacked."""
    if not path.startswith(STACK):
        (made,) = rows
        leaf = jnp.asarray(trees[made.source][made.path])
        leaf = (leaf if made.path == path else leaf.T).astype(made.before)
        return scale_rows(leaf[None], [made.factors], made.after)[0] if made.factors else leaf.astype(made.after)
    if INIT not in trees and any(made.source is INIT or made.noise for made in rows):
        layer = next(i for i, made in enumerate(rows) if made.source is INIT or made.noise)
        what = "is to be newly initialised" if rows[layer].source is INIT else "is to be mixed with new values"
        raise UserError(f"{path.removeprefix(STACK)} of layer {layer} {what}, and no init is given")
    before, after = common(made.before for made in rows), common(made.after for made in rows)
    pieces = []
    for name, run in itertools.groupby(rows, key=lambda made: made.source):
        layers = np.array([made.layer for made in run], np.int32)
        pieces.append(jnp.asarray(trees[name][path]).at[layers].get(mode="promise_in_bounds").astype(before))
    leaf = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
    return scale_rows(leaf, [made.factors for made in rows], after)


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


def _check_depths(plan: DepthPlan, trees: Mapping[str | None, Mapping[str, Any]]) -> None:
    depths: dict[str | None, int] = {**dict(plan.sources), INIT: plan.num_layers}
    for name, tree in trees.items():
        for path, leaf in tree.items():
            if path not in PART_OF:
                raise UserError(f"{_called(name)} has {path}, which a plan knows nothing of")
            found = leaf.shape[0] if leaf.ndim else 0
            if path.startswith(STACK) and found != depths[name]:
                raise UserError(f"{path} of {_called(name)} has {found} layers, but the plan says {depths[name]}")


def _check_shapes(trees: Mapping[str | None, Mapping[str, Any]]) -> None:
    """All trees must be of one architecture but for depth, and for ends that some do not have."""
    seen: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    first, *others = trees
    paths = {name: set(_of("blocks", tree)) for name, tree in trees.items()}
    for other in others:
        if differ := paths[first] ^ paths[other]:
            path = min(differ)
            has, lacks = (first, other) if path in paths[first] else (other, first)
            raise UserError(f"{_called(has)} has {path}, and {_called(lacks)} has not")
    for name, tree in trees.items():
        for path, leaf in tree.items():
            skip, now = path.startswith(STACK), leaf.shape
            who, shape = seen.setdefault(path, (name, now))
            if shape[skip:] != now[skip:]:
                raise UserError(f"{path} has shape {[*shape]} in {_called(who)} and {[*now]} in {_called(name)}")


def _called(name: str | None) -> str:
    return "init" if name is INIT else repr(name)
