"""Scaled dot-product attention behind one function, with a choice of implementation.

Shape suffixes: B batch, S query positions, T key positions, N query heads, K key/value heads,
G query heads per key/value head, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Queries per block of the "blocked" implementation.
_BLOCK = 128


def attention(
    q_BSNH: Float[Array, "batch seq heads head_dim"],
    k_BTKH: Float[Array, "batch keys kv_heads head_dim"],
    v_BTKH: Float[Array, "batch keys kv_heads head_dim"],
    *,
    q_start: int | Int[Array, ""] = 0,
    window: int | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    first: Int[Array, " batch"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention of `softmax(q k^T) v`; the caller has scaled `q` already.

    Query i stands at position `q_start + i` of the keys and sees the keys up to it, the last `window` of
    them if given, those of its own segment if `segment_ids` is given (then S == T), and none before its
    row's `first`. Softmax is float32; a query that sees nothing gets some average.

    Implementations: `xla` materialises [S, T] logits; `blocked` does so for blocks of queries and
    skips the keys that causality hides, half the work (needs S == T); `cudnn` is the GPU's flash
    attention (16-bit); `auto` takes cudnn, then blocked, then xla, the first that fits. Where the
    one asked for cannot do what is asked (decoding, and segments for cudnn), `xla` does it.
    """
    S, T = q_BSNH.shape[1], k_BTKH.shape[1]
    self_attention = isinstance(q_start, int) and q_start == 0 and S == T and first is None
    if implementation == "auto":
        implementation = _choose(q_BSNH.dtype, self_attention, S, q_BSNH.shape[-1], segment_ids is not None)
    if implementation == "cudnn" and self_attention and segment_ids is None:
        return jax.nn.dot_product_attention(
            q_BSNH, k_BTKH, v_BTKH, scale=1.0, is_causal=True, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    if implementation != "blocked" or not self_attention:
        return _dense(q_BSNH, k_BTKH, v_BTKH, _mask(q_start + jnp.arange(S), jnp.arange(T), window, segment_ids, first))
    blocks = []
    for start in range(0, S, _BLOCK):
        stop = min(start + _BLOCK, S)
        seen = slice(0 if window is None else max(0, start + 1 - window), stop)
        segments = None if segment_ids is None else segment_ids[:, seen]
        mask = _mask(jnp.arange(start, stop), jnp.arange(seen.start, stop), window, segments)
        blocks.append(_dense(q_BSNH[:, start:stop], k_BTKH[:, seen], v_BTKH[:, seen], mask))
    return jnp.concatenate(blocks, axis=1)


def _choose(dtype: jnp.dtype, self_attention: bool, seq_len: int, head_dim: int, segmented: bool) -> str:
    fits = head_dim % 8 == 0 and head_dim <= 128  # every GPU's flash attention; some take heads up to 256
    if jax.default_backend() == "gpu" and dtype != jnp.float32 and self_attention and not segmented and fits:
        return "cudnn"
    # Blocks are unrolled: a bound on the size of the program.
    return "blocked" if self_attention and seq_len <= 16 * _BLOCK else "xla"


def _mask(q_index_S, k_index_T, window, segment_ids_BT, first_B=None):
    """Boolean [1 or B, 1, 1, S, T]: may query s see key t?"""
    distance_ST = q_index_S[:, None] - k_index_T[None, :]
    mask = distance_ST >= 0
    if window is not None:
        mask &= distance_ST < window
    mask = mask[None]
    if segment_ids_BT is not None:
        # The queries are the last positions of the keys' slice.
        segment_ids_BS = segment_ids_BT[:, -q_index_S.shape[0] :]
        mask = mask & (segment_ids_BS[:, :, None] == segment_ids_BT[:, None, :])
    if first_B is not None:
        mask = mask & (k_index_T[None, None, :] >= first_B[:, None, None])
    return mask[:, None, None]


def _dense(q_BSNH, k_BTKH, v_BTKH, mask_B11ST):
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    logits_BKGST = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    weights_BKGST = jax.nn.softmax(jnp.where(mask_B11ST, logits_BKGST, -1e30), axis=-1)
    out_BSKGH = jnp.einsum("BKGST,BTKH->BSKGH", weights_BKGST.astype(v_BTKH.dtype), v_BTKH)
    return out_BSKGH.reshape(B, S, N, H)
