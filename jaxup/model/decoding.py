"""What generation computes: prefixes, what each of many texts draws next, and the distribution that it is drawn from.

Shape suffixes: B rows, R rows that get a text at once, P prefixes, K key/value heads or numbers of a key, S sequence,
T cache length, L layers, H head_dim, V vocabulary, N draws of a block, E sets of tokens that end a text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import KVCache, abstract
from jaxup.model.sharding import splits


def keys(numbers_BK: Any) -> Array:
    """The key of each row: the first number is a seed, into which the others are folded."""
    fold = lambda key, numbers: functools.reduce(jax.random.fold_in, numbers, key)  # noqa: E731
    return jax.vmap(lambda numbers: fold(jax.random.key(numbers[0]), list(numbers[1:])))(jnp.asarray(numbers_BK))


class Rows(NamedTuple):
    """Texts that are being drawn, each in a row of the cache with a length of its own."""

    cache: KVCache
    token_B: Array  # int32: the next that is decoded
    key_B: Array
    left_B: Array  # int32: how many may still be drawn; 0 = nobody's
    ends_B: Array  # int32: which set of tokens ends it


class Programs(NamedTuple):
    """What `Sampler` and `Session` run, compiled when it is first called."""

    empty: Callable
    prefill: Callable
    place: Callable
    decode: Callable
    extend: Callable


@functools.lru_cache(maxsize=8)
def programs(
    config: ModelConfig, dtype: str, temperature: float, top_k: int, top_p: float, vocab_size: int, slots: int,
    where: Sharding,
) -> Programs:  # fmt: skip
    graphdef, _ = abstract(config, Compute(dtype=dtype))

    def chosen(logits_BV, key_B, position_B):
        return draw(logits_BV[:, :vocab_size], key_B, position_B, temperature=temperature, top_k=top_k, top_p=top_p)

    def empty(*, room, layers):
        cache = KVCache.empty(config, slots, room, jnp.dtype(dtype), layers=layers)
        zeros = jnp.zeros(slots, jnp.int32)
        key_B = keys(jnp.zeros((slots, 1), jnp.uint32))
        return Rows(cache._replace(length=zeros), zeros, key_B, zeros, zeros)

    def prefill(params, tokens_PS, order):
        layers = None if order is None else len(order)
        batch, length = tokens_PS.shape
        cache = KVCache.empty(config, batch, length, jnp.dtype(dtype), layers=layers)
        _, cache = nnx.merge(graphdef, params).decode_block(tokens_PS, cache, order=order, together=False)
        return cache.k_LBKTH, cache.v_LBKTH

    def place(state, k_LPKSH, v_LPKSH, *, rows_R, sources_R, tokens_R, keys_RK, lengths_R, left_R, ends_R):
        def put(old, new):
            return old.at[rows_R].set(new, mode="drop")

        def copied(cache_LBKTH, x_LPKSH):
            # All of a row: no number that is not finite may be left in it, as 0 times it is none either.
            fill = ((0, 0), (0, 0), (0, 0), (0, cache_LBKTH.shape[3] - x_LPKSH.shape[3]), (0, 0))
            return cache_LBKTH.at[:, rows_R].set(jnp.pad(x_LPKSH[:, sources_R], fill), mode="drop")

        k, v, length_B = state.cache
        cache = KVCache(copied(k, k_LPKSH), copied(v, v_LPKSH), put(length_B, lengths_R))
        return Rows(cache, *map(put, state[1:], (tokens_R, keys(keys_RK), left_R, ends_R)))

    def decode(params, *, state, ends_EV, alive_B, least, order, most):
        """Up to `most` tokens of each row, until there are only `least` rows left to draw for."""
        decoder = nnx.merge(graphdef, params)

        def going(carry):
            i, state, _ = carry
            return (i < most) & ((state.left_B > 0).sum() > least)

        def step(carry):
            i, (cache, token_B, key_B, left_B, ends_B), out = carry
            active_B = left_B > 0
            logits_BV, after = decoder.decode(token_B[:, None], cache, order=order)
            drawn = chosen(logits_BV, key_B, after.length)
            left_B = jnp.where(active_B & ~ends_EV[ends_B, drawn[0]], left_B - 1, 0)
            cache = after._replace(length=jnp.where(active_B, after.length, cache.length))
            out = tuple(x_NB.at[i].set(jnp.where(active_B, x_B, -1)) for x_NB, x_B in zip(out, drawn, strict=True))
            return i + 1, Rows(cache, drawn[0], key_B, left_B, ends_B), out

        state = state._replace(left_B=jnp.where(alive_B, state.left_B, 0))
        out = tuple(jnp.full((most, slots), -1, kind) for kind in (jnp.int32, jnp.float32, jnp.float32))
        carry = jnp.int32(0), state, out
        _, state, out = step(carry) if most == 1 else jax.lax.while_loop(going, step, carry)
        return (*out, state.left_B), state

    def extend(params, tokens, state, slot):
        """From any slot on: what is after it is forgotten."""
        cache, first_B, key_B = state
        cache = cache._replace(length=slot)
        logits_BV, cache = nnx.merge(graphdef, params).decode(tokens.reshape(1, -1), cache, first_B)
        return chosen(logits_BV, key_B, cache.length - first_B)[0], (cache, first_B, key_B)

    # Every process reads what is drawn; the cache is split over what splits rows and heads.
    stored = rows = where
    if isinstance(where, NamedSharding):
        heads = splits("kv_heads", config.num_kv_heads, where.mesh) or None
        over = tuple(axis for axis in ("data", "fsdp") if axis in where.mesh.shape)
        over = () if slots % math.prod(where.mesh.shape[axis] for axis in over) else over
        stored = NamedSharding(where.mesh, PartitionSpec(None, None, heads))
        rows = NamedSharding(where.mesh, PartitionSpec(None, over or None, heads))
    states: Any = Rows(*[where] * 5)._replace(cache=KVCache(rows, rows, where))  # type: ignore[arg-type]
    return Programs(
        jax.jit(empty, static_argnames=("room", "layers"), out_shardings=states),
        jax.jit(prefill, out_shardings=stored),
        jax.jit(place, donate_argnames="state", out_shardings=states),
        jax.jit(decode, static_argnames="most", donate_argnames="state", out_shardings=(where, states)),
        jax.jit(extend, donate_argnames="state", out_shardings=(where, None)),
    )


def draw(
    logits_BV: Float[Array, "batch vocab"], key_B: Any, position_B: Int[Array, " batch"], *, temperature: float,
    top_k: int, top_p: float,
) -> tuple[Int[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:  # fmt: skip
    """(tokens, their log-probabilities, the entropies in nats): see `Sampler`. In float32, whatever the logits are."""
    logits_BV = logits_BV.astype(jnp.float32)
    if temperature == 0:
        zeros = jnp.zeros(len(logits_BV), jnp.float32)
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), zeros, zeros
    logits_BV = restrict(logits_BV / temperature, top_k, top_p)
    token_B = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(key_B, position_B), logits_BV)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    entropy_B = -jnp.where(jnp.isfinite(logp_BV), jnp.exp(logp_BV) * logp_BV, 0).sum(axis=-1)
    logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), logp_B, entropy_B


def restrict(logits_BV: Float[Array, "batch vocab"], top_k: int, top_p: float) -> Float[Array, "batch vocab"]:
    """-inf for all but the `top_k` likeliest tokens, then for all but the fewest that hold `top_p` of the rest.

    As transformers' TopKLogitsWarper and TopPLogitsWarper in turn: of equal logits at the border
    top-k keeps all, top-p as many as it needs. 0 and 1 restrict nothing.
    """
    batch, vocab = logits_BV.shape
    if 0 < top_k < vocab:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        order_BV = jnp.argsort(logits_BV, axis=-1)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        unlikely_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) <= 1 - top_p
        sorted_BV = jnp.where(unlikely_BV.at[:, -1].set(False), -jnp.inf, sorted_BV)
        logits_BV = jnp.zeros_like(sorted_BV).at[jnp.arange(batch)[:, None], order_BV].set(sorted_BV)
    return logits_BV
