"""Generation with a key/value cache, compiled once for a prompt's length."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxup.errors import UserError
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import KVCache, Params, abstract


def generate(
    config: ModelConfig,
    params: Params,
    prompt: np.ndarray,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    vocab_size: int,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Yields int32 [batch] next tokens, `max_tokens` times, after `prompt` int32 [batch, seq].

    `temperature` 0 is greedy; `top_k` 0 samples from all tokens. Token ids from `vocab_size` on
    (a table padded beyond its tokenizer) are never drawn. The tokens are a pure function of the
    arguments. UserError if prompt and `max_tokens` exceed the model's positions.
    """
    batch, length = prompt.shape
    if length == 0:
        raise UserError("generate: the prompt has no tokens")
    if length + max_tokens > config.max_positions and config.positions == "learned":
        raise UserError(
            f"generate: a prompt of {length} tokens and {max_tokens} new ones exceed the model's "
            f"{config.max_positions} positions; at most {config.max_positions - length} new tokens fit"
        )
    prefill, decode = _compiled(config, dtype, temperature, top_k, vocab_size)
    cache = KVCache.empty(config, batch, length + max_tokens, jnp.dtype(dtype))
    key = jax.random.key(seed)
    tokens, cache = prefill(params, jnp.asarray(prompt, jnp.int32), cache, key)
    for i in range(1, max_tokens + 1):
        # The next step is dispatched before this one's tokens are read.
        following = decode(params, tokens[:, None], cache, jax.random.fold_in(key, i)) if i < max_tokens else None
        yield np.asarray(tokens)
        if following is not None:
            tokens, cache = following


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, dtype: str, temperature: float, top_k: int, vocab_size: int):
    graphdef, _ = abstract(config, Compute(dtype=dtype))

    def next_token(params: Params, tokens_BS, cache: KVCache, key):
        logits_BV, cache = nnx.merge(graphdef, params).decode(tokens_BS, cache)
        logits_BV = logits_BV[:, :vocab_size].astype(jnp.float32)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache
        if 0 < top_k < vocab_size:
            least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32), cache

    return jax.jit(next_token), jax.jit(next_token, donate_argnums=2)
