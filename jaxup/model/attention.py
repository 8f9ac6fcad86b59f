"""Scaled dot-product attention behind one function, with a choice of implementation.

Shape suffixes: B batch, S query positions, T key positions, N query heads, K key/value heads,
G query heads per key/value head, H head_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# Queries per block of the "blocked" implementation.
_BLOCK = 128
# So many blocks are unrolled, which XLA runs faster than a loop. More are loops, over blocks with the same keys.
_UNROLLED, _LOOPS = 16, 4
# Queries, and keys, that the TPU's kernel has in fast memory at once, and keys of one product in it. A grid of large
# blocks is short; these fit the 16 MiB that a kernel is given from v4 on, heads of up to 512 bytes with them.
_TPU_BLOCK, _TPU_PRODUCT = 1024, 512
# Up to so many blocks one kernel makes all gradients, which is faster: it has the queries' once for each block of keys.
_TPU_FUSED = 8


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
    batch_axes: tuple[str, ...] = (),
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention of `softmax(q k^T) v`; the caller has scaled `q` already.

    Query i stands at position `q_start + i` of the keys and sees the keys up to it, the last `window` of
    them if given, those of its own segment if `segment_ids` is given (then S == T), and none before its
    row's `first`. Softmax is float32; a query that sees nothing gets some average.

    Implementations: `xla` materialises [S, T] logits; `blocked` does so for blocks of queries, skips most
    keys that causality hides, and of long sequences keeps no logits for the backward pass (needs S == T);
    `cudnn` is the GPU's flash attention (16-bit); `splash` is the TPU's, which each device of the mesh runs on its own
    rows, as `batch_axes` split them, and heads, as the axis "tensor" does (elsewhere it is interpreted: for tests);
    `auto` and what `choose` takes instead of one that cannot do what is asked: see there.
    """
    S, T, H = q_BSNH.shape[1], k_BTKH.shape[1], q_BSNH.shape[-1]
    itself = isinstance(q_start, int) and q_start == 0 and S == T and first is None
    chosen = choose(
        implementation, dtype=q_BSNH.dtype, seq_len=S if itself else None, head_dim=H, packed=segment_ids is not None
    )
    if chosen == "splash":
        return _splash(q_BSNH, k_BTKH, v_BTKH, window, segment_ids, batch_axes)
    if chosen == "cudnn":
        return _cudnn(q_BSNH, k_BTKH, v_BTKH, window, segment_ids)
    if chosen == "blocked":
        return _blocked(q_BSNH, k_BTKH, v_BTKH, window, segment_ids)
    return _dense(q_BSNH, k_BTKH, v_BTKH, _mask(q_start + jnp.arange(S), jnp.arange(T), window, segment_ids, first))


def choose(asked: str, *, dtype: DTypeLike, seq_len: int | None, head_dim: int, packed: bool) -> str:
    """Which implementation computes what is asked of `asked` here; `seq_len` is None where S != T, as in decoding.

    It is chosen for the devices of the mesh that is set (`jax.set_mesh`), which need not be this process's, and without
    one for those that jax takes by itself. `splash` is taken on TPUs: under a mesh, as a kernel that no mesh says how
    to split runs on one device only. cuDNN's is taken from NVIDIA's Ampere on, or where it is asked for, if it fits:
    16-bit; heads up to 128, from Hopper on up to 256; packed rows of even length. Otherwise `blocked`, and `xla` for
    decoding.
    """
    if seq_len is None or asked == "xla":
        return "xla"
    platform = _platform()
    if asked == "splash" or (asked == "auto" and platform == "tpu" and not jax.sharding.get_abstract_mesh().empty):
        return "splash"
    capability = _capability(platform)
    largest = 256 if capability >= 9 else 128
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim <= largest and not (packed and seq_len % 2)
    return "cudnn" if fits and (asked == "cudnn" or (asked == "auto" and capability >= 8)) else "blocked"


def described(asked: str, *, dtype: DTypeLike, seq_len: int | None, head_dim: int, packed: bool) -> str:
    """What `choose` takes, with the positions that it computes at once."""
    chosen = choose(asked, dtype=dtype, seq_len=seq_len, head_dim=head_dim, packed=packed)
    if chosen == "splash" and seq_len is not None:
        return f"splash, blocks of {_equal(seq_len, _most(head_dim, dtype))[1]:,}"
    return f"blocked, {_BLOCK} queries each" if chosen == "blocked" else chosen


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # type: ignore[attr-defined]  # jax adds its options at run time
    return getattr(device, "platform", device) or jax.default_backend()


def _capability(platform: str) -> float:
    """Of this process's NVIDIA GPUs, if that is what is computed on; otherwise 0."""
    if platform != "gpu":
        return 0.0
    capability = str(getattr(jax.local_devices(backend=platform)[0], "compute_capability", ""))
    return float(capability) if capability[:1].isdigit() else 0.0  # AMD's have names


def is_kernel(primitive: Any, *_: Any, narrow: bool = True, **params: Any) -> bool:
    """Of `jax.checkpoint`: what a kernel of attention gave, which is small to keep, and much work to compute again.

    Without `narrow` not what a TPU stores in twice its bytes or more: heads of up to 64, as if they were of 128.
    """
    kept = (_SPLASH, _NARROW) if narrow else (_SPLASH,)
    return primitive.name.startswith(_CUDNN) or (primitive.name == "name" and params.get("name") in kept)


_CUDNN = "dot_product_attention"  # what the names of the kernel's primitives begin with
_SPLASH, _NARROW = "splash attention", "splash attention of narrow heads"  # what its output and statistics are named


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
    @functools.partial(jax.checkpoint, policy=is_kernel)
    def masked(q, k, v, segment_ids_BS):
        index_S = jnp.arange(q.shape[1])
        return kernel(q, k, v, mask=_mask(index_S, index_S, window, segment_ids_BS)[:, 0])

    return masked(*padded, segment_ids_BS)[..., :H]


def _most(head_dim, dtype):
    """Positions of a block of the TPU's kernel."""
    return _TPU_BLOCK if head_dim * jnp.dtype(dtype).itemsize <= 512 else _TPU_BLOCK // 2


def _equal(length, most):
    """The fewest blocks of one size, a multiple of 128 up to `most`, that hold `length`: (their number, their size)."""
    count = -(-length // most)
    return count, -(-length // (128 * count)) * 128


def _splash(q_BSNH, k_BSKH, v_BSKH, window, segment_ids_BS, batch_axes):
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # slow to import, and for TPUs only

    S, K, H = k_BSKH.shape[1:]
    # Rows end in keys that no query before them sees, so that blocks of one size are all of them.
    count, block = _equal(S, _most(H, k_BSKH.dtype))
    product = math.gcd(block, _TPU_PRODUCT)
    fused = count <= _TPU_FUSED
    sizes = pallas.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=product, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=product, use_fused_bwd_kernel=fused, block_q_dq=None if fused else block,
        block_kv_dq=None if fused else product,
    )  # fmt: skip
    shape = (count * block,) * 2
    mask = pallas.CausalMask(shape) if window is None else pallas.LocalMask(shape, (window - 1, 0), 0)

    def local(q_BNSH, k_BKSH, v_BKSH, segment_ids_BS):
        kernel = pallas.make_splash_mha(
            pallas.MultiHeadMask([mask] * q_BNSH.shape[1]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            residual_checkpoint_name=_SPLASH if H > 64 else _NARROW, interpret=_platform() != "tpu",
        )  # fmt: skip
        ids = None if segment_ids_BS is None else pallas.SegmentIds(segment_ids_BS, segment_ids_BS)
        return jax.vmap(kernel)(q_BNSH, k_BKSH, v_BKSH, ids)

    pad = lambda x: jnp.pad(x, ((0, 0), (0, shape[0] - S)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    heads_first = [jnp.swapaxes(pad(x), 1, 2) for x in (q_BSNH, k_BSKH, v_BSKH)]
    ids_BS = None if segment_ids_BS is None else pad(segment_ids_BS)
    run: Callable[..., Any] = local
    mesh = jax.sharding.get_abstract_mesh()
    # Those that an enclosing shard_map has split already are no more to be split.
    if left := {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}:
        rows = tuple(axis for axis in batch_axes if axis in left)
        split = PartitionSpec(rows, "tensor" if K % left.get("tensor", K + 1) == 0 else None)
        run = jax.shard_map(
            local, in_specs=(split, split, split, PartitionSpec(rows)), out_specs=split, axis_names={*left},
            check_vma=False,
        )  # fmt: skip
    return jnp.swapaxes(run(*heads_first, ids_BS), 1, 2)[:, :S]


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
