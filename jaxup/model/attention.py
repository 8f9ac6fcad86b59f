"""Scaled dot-product attention behind one function, with a choice of implementation.

Shape suffixes: B batch, S query positions, T key positions, N query heads, K key/value heads,
G query heads per key/value head, H head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# Queries per block of the "blocked" implementation.
_BLOCK = 128
# So many blocks are unrolled, which XLA runs faster than a loop. More are loops, over blocks with the same keys.
_UNROLLED, _LOOPS = 16, 4


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

    Implementations: `xla` materialises [S, T] logits; `blocked` does so for blocks of queries, skips most
    keys that causality hides, and of long sequences keeps no logits for the backward pass (needs S == T);
    `cudnn` is the GPU's flash attention (16-bit); `auto` and what `choose` takes instead of one that cannot
    do what is asked: see there.
    """
    S, T, H = q_BSNH.shape[1], k_BTKH.shape[1], q_BSNH.shape[-1]
    itself = isinstance(q_start, int) and q_start == 0 and S == T and first is None
    chosen = choose(
        implementation, dtype=q_BSNH.dtype, seq_len=S if itself else None, head_dim=H, packed=segment_ids is not None
    )
    if chosen == "cudnn":
        return _cudnn(q_BSNH, k_BTKH, v_BTKH, window, segment_ids)
    if chosen == "blocked":
        return _blocked(q_BSNH, k_BTKH, v_BTKH, window, segment_ids)
    return _dense(q_BSNH, k_BTKH, v_BTKH, _mask(q_start + jnp.arange(S), jnp.arange(T), window, segment_ids, first))


def choose(asked: str, *, dtype: DTypeLike, seq_len: int | None, head_dim: int, packed: bool) -> str:
    """Which implementation computes what is asked of `asked` here; `seq_len` is None where S != T, as in decoding.

    cuDNN's is taken from NVIDIA's Ampere on, or where it is asked for, if it fits: 16-bit; heads up to 128, from
    Hopper on up to 256; packed rows of even length. Otherwise `blocked`, and `xla` for decoding.
    """
    if seq_len is None or asked == "xla":
        return "xla"
    capability = _capability()
    largest = 256 if capability >= 9 else 128
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim <= largest and not (packed and seq_len % 2)
    return "cudnn" if fits and (asked == "cudnn" or (asked == "auto" and capability >= 8)) else "blocked"


def _capability() -> float:
    """Of the NVIDIA GPU that this process computes on; 0 if it does not."""
    if jax.default_backend() != "gpu":
        return 0.0
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return float(capability) if capability[:1].isdigit() else 0.0  # AMD's have names


def _cudnn(q_BSNH, k_BSKH, v_BSKH, window, segment_ids_BS):
    H = q_BSNH.shape[-1]
    # The kernel wants heads of a multiple of 8; zeros change no product.
    padded = [jnp.pad(x, ((0, 0),) * 3 + ((0, -H % 8),)) for x in (q_BSNH, k_BSKH, v_BSKH)]
    kernel = functools.partial(jax.nn.dot_product_attention, scale=1.0, is_causal=True, implementation="cudnn")
    if segment_ids_BS is None:
        return kernel(*padded, local_window_size=None if window is None else (window - 1, 0))[..., :H]

    # The mask becomes a 16-bit bias [B, 1, S, S], of 1 / 2N of the bytes of logits, and nothing for each layer to keep.
    # cuDNN takes offsets of segments as well: but JAX has no public way to it, and makes softmax's statistics as many
    # times as a row may have segments.
    @functools.partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name.startswith(CUDNN))
    def masked(q, k, v, segment_ids_BS):
        index_S = jnp.arange(q.shape[1])
        return kernel(q, k, v, mask=_mask(index_S, index_S, window, segment_ids_BS)[:, 0])

    return masked(*padded, segment_ids_BS)[..., :H]


CUDNN = "dot_product_attention"  # what the names of the kernel's primitives begin with


def _blocked(q_BSNH, k_BSKH, v_BSKH, window, segment_ids_BS):
    S, out = q_BSNH.shape[1], []
    count = -(-S // _BLOCK)
    each = 1 if count <= _UNROLLED else -(-count // _LOOPS)
    for start in range(0, S, each * _BLOCK):
        stop = min(start + each * _BLOCK, S)
        seen = slice(0 if window is None else max(0, start + 1 - window), stop)
        q, k, v = q_BSNH[:, start:stop], k_BSKH[:, seen], v_BSKH[:, seen]
        ids = None if segment_ids_BS is None else segment_ids_BS[:, seen]
        if stop - start <= _BLOCK:
            out.append(_dense(q, k, v, _mask(jnp.arange(start, stop), jnp.arange(seen.start, stop), window, ids)))
        else:
            out.append(_loop(q, k, v, start - seen.start, window, ids))
    return jnp.concatenate(out, axis=1)


def _loop(q_BSNH, k_BTKH, v_BTKH, q_start, window, segment_ids_BT):
    """The last S of T positions, a block of queries at a time, whose logits the backward pass computes again."""
    B, S, N, H = q_BSNH.shape
    T = k_BTKH.shape[1]
    blocks = -(-S // _BLOCK)
    size = T if window is None else min(T, _BLOCK + window - 1)  # keys that a block sees
    q = jnp.pad(q_BSNH, ((0, 0), (0, blocks * _BLOCK - S), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(B, blocks, _BLOCK, N, H), 1, 0)
    # In float32, so that the gradients of all blocks are added in it.
    keys, values = k_BTKH.astype(jnp.float32), v_BTKH.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(keys, values, q, start):
        first = jnp.clip(start + _BLOCK - size, 0, T - size)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        index_S, index_T = start + jnp.arange(_BLOCK), first + jnp.arange(size)
        mask = _mask(index_S, index_T, window)
        if segment_ids_BT is not None:
            ids_BS = segment_ids_BT.at[:, index_S].get(mode="clip")
            mask = mask & (ids_BS[:, :, None] == take(segment_ids_BT)[:, None, :])[:, None, None]
        return _dense(q, take(keys).astype(q.dtype), take(values).astype(q.dtype), mask)

    starts = q_start + _BLOCK * jnp.arange(blocks)
    out = jax.lax.scan(lambda _, xs: (None, block(keys, values, *xs)), None, (q, starts))[1]
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :S]


def _mask(q_index_S, k_index_T, window, segment_ids_BT=None, first_B=None):
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
