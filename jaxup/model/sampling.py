"""Generation with a key/value cache: ragged prompts as one batch, or one text by turns; two programs for all of them.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxup.errors import UserError
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import KVCache, Params, abstract, check_numbers

# Prompts are padded, and the cache is made, to a multiple of it: lengths nearby share their programs.
_BUCKET = 64


def generate(
    config: ModelConfig,
    params: Params,
    prompts: np.ndarray | Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    vocab_size: int,
    order: Sequence[int] | np.ndarray | None = None,
    top_p: float = 1.0,
    eos_ids: Collection[int] = (),
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Yields int32 [batch] next tokens, at most `max_tokens` times, after `prompts` of any lengths.

    A row ends with the first of `eos_ids` that it draws, and is -1 from there on; when all rows have
    ended, so does the iteration. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 sample from all
    tokens. Token ids from `vocab_size` on (a table padded beyond its tokenizer) are never drawn. `order` is
    which layer runs when; see `Decoder`.

    A row depends on its prompt, its index in the batch, `seed` and the other keywords, not on the other
    rows, up to the rounding of the padding they bring. `params` may lie on a mesh; every process then gets
    all tokens. UserError for an empty prompt, and tokens, positions or layers that the model does not have.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths, default=0)
    if min(lengths, default=0) == 0:
        raise UserError("generate: the prompt has no tokens")
    if longest + max_tokens > config.max_positions and config.positions == "learned":
        room = config.max_positions - longest
        raise UserError(
            f"generate: a prompt of {longest} tokens and {max_tokens} new ones exceed the model's "
            f"{config.max_positions} positions; " + (f"at most {room} new tokens fit" if room > 0 else "none fits")
        )
    # Padded on the left, so that all rows end together.
    tokens_BS = np.zeros((len(lengths), _padded(longest)), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[-len(prompt) :] = prompt
    _check_tokens(tokens_BS, config)
    if order is not None:
        order = np.asarray(order, np.int32)
        check_numbers("layer", order, config.num_layers, first=-1)
    first_B = tokens_BS.shape[1] - np.asarray(lengths, np.int32)
    params, mesh = _placed(params)
    prefill, decode, _ = _programs(config, dtype, temperature, top_k, top_p, vocab_size, mesh)

    def steps():
        ended_B = np.zeros(len(lengths), bool)
        if max_tokens < 1:
            return
        length = tokens_BS.shape[1] + _padded(max_tokens)
        next_B, state = prefill(params, tokens_BS, first_B, np.uint32(seed), order, length=length)
        for i in range(1, max_tokens + 1):
            # The next step is dispatched before this one's tokens are read.
            following = decode(params, next_B, state, order) if i < max_tokens else None
            drawn_B = np.where(ended_B, np.int32(-1), np.asarray(next_B))
            yield drawn_B
            ended_B |= np.isin(drawn_B, list(eos_ids))
            if following is None or ended_B.all():
                return
            next_B, state = following

    return steps()


class Session:
    """One text that is added to and gone on from, by turns; two programs for all turns, whatever their lengths.

    Keys and values are kept: of each turn only what comes after that of the turn before is computed. The first reply
    is what `generate` draws for the same prompt, alone, up to rounding.

    Args:
      context: positions that there are for all of the text.
      others: as for `generate`.
    """

    def __init__(
        self, config: ModelConfig, params: Params, *, context: int, temperature: float, top_k: int, top_p: float,
        seed: int, vocab_size: int, dtype: str = "float32",
    ):  # fmt: skip
        self._config, self._context, self._seed, self._dtype = config, context, seed, dtype
        self._params, mesh = _placed(params)
        self._extend = _programs(config, dtype, temperature, top_k, top_p, vocab_size, mesh)[2]
        self._fed: list[int] = []  # tokens of which the state has keys and values
        self._state: Any = None

    def __call__(self, ids: Sequence[int], *, max_tokens: int, eos_ids: Collection[int] = ()) -> Iterator[int]:
        """Yields what is drawn after the text `ids`, at most `max_tokens`, up to and with one of `eos_ids`.

        May be broken off at any point, by Ctrl-C too. UserError for no tokens, those that the model does not have, and
        more than the context holds.
        """
        if not 0 < len(ids) <= self._context - max_tokens:
            raise UserError(f"{len(ids)} tokens and {max_tokens} new ones, and the context holds {self._context}")
        _check_tokens(np.asarray(ids), self._config)
        if self._state is None or self._state[0].k_LBTKH.is_deleted():  # or a step was broken off
            self._fed, self._state = [], self._empty()
        pairs = enumerate(zip(self._fed, ids[:-1]))
        same = next((i for i, (old, new) in pairs if old != new), min(len(self._fed), len(ids) - 1))
        del self._fed[same:]
        # Chunks of one length: the last ends with the text, and repeats what it must. Before the first position there
        # are as many slots of padding, where a chunk may begin.
        for end in (*range(same + _BUCKET, len(ids), _BUCKET), len(ids)):
            chunk_BS = np.asarray([[0] * _BUCKET + list(ids[:end])], np.int32)[:, -_BUCKET:]
            next_B, self._state = self._extend(self._params, chunk_BS, self._state, np.int32(end))
            self._fed = list(ids[:end])
        for left in reversed(range(max_tokens)):
            drawn_B = next_B
            if left:  # the next step is dispatched before this one's token is read
                slot = np.int32(_BUCKET + len(self._fed))
                next_B, self._state = self._extend(self._params, drawn_B, self._state, slot)
            token = int(np.asarray(drawn_B)[0])
            self._fed += [token] * (left > 0)
            yield token
            if token in eos_ids:
                return

    def _empty(self) -> Any:
        cache = KVCache.empty(self._config, 1, _BUCKET + self._context, jnp.dtype(self._dtype))
        # Where the parameters are, as after each step: what may lie anywhere would be another program.
        sharding = jax.tree.leaves(self._params)[0].sharding
        sharding = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
        return jax.device_put((cache, np.asarray([_BUCKET], np.int32), _keys(self._seed, 1)), sharding)


def _placed(params: Params) -> tuple[Params, Any]:
    """On devices: parameters in host memory would be sent there for every token. And the mesh that they lie on."""
    params = jax.tree.map(jnp.asarray, params)
    sharding = jax.tree.leaves(params)[0].sharding
    return params, sharding.mesh if isinstance(sharding, NamedSharding) else None


def _check_tokens(tokens: np.ndarray, config: ModelConfig) -> None:
    if not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(
            f"generate: the prompt has the token {wrong}, the model those up to {config.vocab_size - 1}; "
            "is this another model's tokenizer?"
        )


def _keys(seed: Any, batch: int) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def _padded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


@functools.lru_cache(maxsize=8)
def _programs(
    config: ModelConfig, dtype: str, temperature: float, top_k: int, top_p: float, vocab_size: int, mesh: Mesh | None
) -> tuple[Callable, Callable, Callable]:
    graphdef, _ = abstract(config, Compute(dtype=dtype))

    def step(params, tokens_BS, state, order=None):
        cache, first_B, key_B = state
        logits_BV, cache = nnx.merge(graphdef, params).decode(tokens_BS, cache, first_B, order)
        logits_BV = logits_BV[:, :vocab_size].astype(jnp.float32)
        if temperature == 0:
            next_B = jnp.argmax(logits_BV, axis=-1)
        else:
            # A row's own position, which no other row's length shifts.
            position_B = cache.length - first_B
            logits_BV = restrict(logits_BV / temperature, top_k, top_p)
            next_B = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(key_B, position_B), logits_BV)
        return next_B.astype(jnp.int32), (cache, first_B, key_B)

    def prefill(params, tokens_BS, first_B, seed, order, *, length):
        batch, layers = tokens_BS.shape[0], None if order is None else len(order)
        cache = KVCache.empty(config, batch, length, jnp.dtype(dtype), layers=layers)
        return step(params, tokens_BS, (cache, first_B, _keys(seed, batch)), order)

    def decode(params, tokens_B, state, order):
        return step(params, tokens_B[:, None], state, order)

    def extend(params, tokens, state, slot):
        """From any slot on: what is after it is forgotten."""
        cache, first_B, key_B = state
        return step(params, tokens.reshape(1, -1), (cache._replace(length=slot), first_B, key_B))

    # Every process reads the tokens; how the cache is split follows from the parameters.
    out = None if mesh is None else (NamedSharding(mesh, PartitionSpec()), None)
    return (
        jax.jit(prefill, static_argnames="length", out_shardings=out),
        jax.jit(decode, donate_argnums=2, out_shardings=out),
        jax.jit(extend, donate_argnums=2, out_shardings=out),
    )


def lowered(
    config: ModelConfig, params: Params, mesh: Mesh, *, length: int, temperature: float, top_k: int
) -> jax.stages.Lowered:
    """The program that `generate` draws each token of one text by, for params without arrays on a mesh."""
    decode: Any = _programs(config, "float32", temperature, top_k, 1.0, config.vocab_size, mesh)[1]

    def empty():
        return KVCache.empty(config, 1, _padded(length), jnp.float32), jnp.zeros(1, jnp.int32), _keys(0, 1)

    return decode.lower(params, jax.ShapeDtypeStruct((1,), jnp.int32), jax.eval_shape(empty), None)


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
