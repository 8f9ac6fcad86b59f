"""Scaled dot-product attention behind one function, with a choice of implementation.

Shape suffixes: B batch, S query positions, T key positions, N query heads, K key/value heads,
G query heads per key/value head, H head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxup.errors import UserError

# The axis of the mesh that splits sequences, for what has its batch split: see `balanced`.
_CONTEXT = "context"
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
    q_start: int | Int[Array, ""] | Int[Array, " batch"] = 0,
    window: int | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    first: Int[Array | np.ndarray, " batch"] | None = None,
    steps: Int[Array | np.ndarray, "#batch seq"] | None = None,
    together: bool = False,
    implementation: str = "auto",
    batch_axes: tuple[str, ...] = (),
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention of `softmax(q k^T) v`; the caller has scaled `q` already.

    Query i stands at position `q_start + i` of the keys, where `q_start` may be each row's own, and sees the keys up to
    it, the last `window` of them if given, those of its own segment if `segment_ids` is given (then S == T), and none
    before its row's `first`. Softmax is float32; a query that sees nothing gets some average.

    With `steps` (then S == T) a query sees the keys of its own step and of lower ones instead, wherever they stand, and
    of a window those that are nearer than it on either side. Queries that are `together` see each other, and the keys
    before all of them: as one step, after what a cache holds.

    Implementations: `xla` materialises [S, T] logits; `blocked` does so for blocks of queries, skips most
    keys that causality hides, and of long sequences keeps no logits for the backward pass (needs S == T);
    `cudnn` is the GPU's flash attention (16-bit); `splash` is the TPU's, which each device of the mesh runs on its own
    rows, as `batch_axes` split them, and heads, as the axis "tensor" does (elsewhere it is interpreted: for tests);
    `auto` and what `choose` takes instead of one that cannot do what is asked: see there.

    Where the mesh splits sequences too (`seq_axis`), they are in the order of `balanced`. Then each device has its own
    queries and gathers all keys and values, as Llama 3 was trained (Dubey et al. 2024): with grouped queries these are
    the small part, and segments and windows stay what they are.
    """
    S, T, H = q_BSNH.shape[1], k_BTKH.shape[1], q_BSNH.shape[-1]
    itself = isinstance(q_start, int) and q_start == 0 and S == T and first is None and not together
    chosen = choose(
        implementation, dtype=q_BSNH.dtype, seq_len=S if itself else None, head_dim=H, packed=segment_ids is not None,
        stepwise=steps is not None,
    )  # fmt: skip
    if not itself:
        index_BS, index_T = jnp.reshape(q_start, (-1, 1)) + jnp.arange(S)[None], jnp.arange(T)
        block = (jnp.zeros((1, S), bool), index_T[None] > index_BS[:, -1:]) if together else None
        return _dense(q_BSNH, k_BTKH, v_BTKH, _mask(index_BS, index_T, window, _pair(segment_ids, S), first, block))
    if chosen == "splash":
        return _splash(q_BSNH, k_BTKH, v_BTKH, window, segment_ids, batch_axes)
    run = {"cudnn": _cudnn, "blocked": _blocked, "xla": _whole}[chosen]
    if seq_axis(batch_axes):
        if steps is not None:
            what = "steps do not go together with a mesh that splits sequences"
            raise UserError(what, at=f"mesh.context={context_size()}", hint="mesh.context=1")
        return _chunks(run, q_BSNH, k_BTKH, v_BTKH, window, segment_ids, batch_axes)
    return run(q_BSNH, k_BTKH, v_BTKH, window, segment_ids, steps)


def attention_weights(
    q_BSNH: Float[Array, "batch seq heads head_dim"],
    k_BSKH: Float[Array, "batch seq kv_heads head_dim"],
    window: int | None,
) -> Float[Array, "batch heads seq seq"]:
    """What `attention` weighs the values of a sequence with, in float32: a row for each query, of sum 1."""
    B, S, N, _ = q_BSNH.shape
    mask_11SS = _mask(jnp.arange(S), jnp.arange(S), window)
    return _softmax(q_BSNH, k_BSKH, mask_11SS).reshape(B, N, S, S)


def seq_axis(batch_axes: tuple[str, ...]) -> str | None:
    """The axis of the current mesh that splits the sequences of a batch which `batch_axes` split, if one does."""
    return _CONTEXT if batch_axes and context_size() > 1 else None


def context_size() -> int:
    """How many parts the current mesh splits sequences into."""
    return jax.sharding.get_abstract_mesh().shape.get(_CONTEXT, 1)


def balanced(seq_len: int, parts: int) -> np.ndarray:
    """int [seq_len]: the positions of a sequence in the order in which so many devices have equal parts of it.

    Of 2 * parts chunks device i has chunks i and 2 * parts - 1 - i: all have as many pairs of a query and a key that a
    causal mask leaves.
    """
    chunks = np.arange(seq_len).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[::-1][:parts]], axis=1).reshape(seq_len)


def choose(
    asked: str, *, dtype: DTypeLike, seq_len: int | None, head_dim: int, packed: bool, stepwise: bool = False
) -> str:  # fmt: skip
    """Which implementation computes what is asked of `asked` here; `seq_len` is None where S != T, as in decoding.

    It is chosen for the devices of the mesh that is set (`jax.set_mesh`), which need not be this process's, and without
    one for those that jax takes by itself. `splash` is taken on TPUs: under a mesh, as a kernel that no mesh says how
    to split runs on one device only. cuDNN's is taken from NVIDIA's Ampere on, or where it is asked for, if it fits:
    16-bit; heads up to 128, from Hopper on up to 256; packed rows of even length, and chunks of rows where the mesh
    splits them. Otherwise `blocked`, and `xla` for decoding. What is `stepwise`, as it has `steps`, is as if it were
    packed, and nothing for `splash`, whose masks are constants of a program.
    """
    if seq_len is None or asked == "xla":
        return "xla"
    platform = _platform()
    if asked == "splash" or (asked == "auto" and platform == "tpu" and not jax.sharding.get_abstract_mesh().empty):
        return "blocked" if stepwise else "splash"
    capability = _capability(platform)
    largest = 256 if capability >= 9 else 128
    if (parts := context_size()) > 1:
        packed, seq_len = True, seq_len // (2 * parts)  # each chunk has a mask
    masked = packed or stepwise
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim <= largest and not (masked and seq_len % 2)
    return "cudnn" if fits and (asked == "cudnn" or (asked == "auto" and capability >= 8)) else "blocked"


def described(asked: str, *, dtype: DTypeLike, seq_len: int | None, head_dim: int, **given: bool) -> str:
    """What `choose` takes, with the positions that it computes at once."""
    chosen = choose(asked, dtype=dtype, seq_len=seq_len, head_dim=head_dim, **given)
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


# ---- attention of the last S of T positions: causal, or by steps if S == T


def _cudnn(q_BSNH, k_BTKH, v_BTKH, window, segment_ids_BT, steps_BT=None):
    S, T, H = q_BSNH.shape[1], k_BTKH.shape[1], q_BSNH.shape[-1]
    # The kernel wants heads of a multiple of 8; zeros change no product.
    padded = [jnp.pad(x, ((0, 0),) * 3 + ((0, -H % 8),)) for x in (q_BSNH, k_BTKH, v_BTKH)]
    kernel = functools.partial(
        jax.nn.dot_product_attention, scale=1.0, is_causal=steps_BT is None, implementation="cudnn"
    )
    if segment_ids_BT is None and steps_BT is None and S == T:
        return kernel(*padded, local_window_size=None if window is None else (window - 1, 0))[..., :H]

    # The mask becomes a 16-bit bias [B, 1, S, T], of 1 / 2N of the bytes of logits, and nothing for each layer to keep.
    # cuDNN takes offsets of segments as well: but JAX has no public way to it, and makes softmax's statistics as many
    # times as a row may have segments.
    @functools.partial(jax.checkpoint, policy=is_kernel)
    def masked(q, k, v, segment_ids_BT, steps_BT):
        segments, steps = _pair(segment_ids_BT, S), _pair(steps_BT, S)
        return kernel(q, k, v, mask=_mask(jnp.arange(T - S, T), jnp.arange(T), window, segments, steps=steps)[:, 0])

    return masked(*padded, segment_ids_BT, steps_BT)[..., :H]


def _whole(q_BSNH, k_BTKH, v_BTKH, window, segment_ids_BT, steps_BT=None):
    S, T = q_BSNH.shape[1], k_BTKH.shape[1]
    segments, steps = _pair(segment_ids_BT, S), _pair(steps_BT, S)
    return _dense(q_BSNH, k_BTKH, v_BTKH, _mask(jnp.arange(T - S, T), jnp.arange(T), window, segments, steps=steps))


def _blocked(q_BSNH, k_BTKH, v_BTKH, window, segment_ids_BT, steps_BT=None):
    S, T, out = q_BSNH.shape[1], k_BTKH.shape[1], []
    count = -(-T // _BLOCK)
    each = 1 if count <= _UNROLLED else -(-count // _LOOPS)
    for start in range(T - S, T, each * _BLOCK):
        stop = min(start + each * _BLOCK, T)
        reach = T if window is None else window - 1  # by steps a query may see keys after it
        seen = slice(max(0, start - reach), stop if steps_BT is None else min(stop + reach, T))
        q, k, v = q_BSNH[:, start - T + S : stop - T + S], k_BTKH[:, seen], v_BTKH[:, seen]
        if stop - start <= _BLOCK:
            index_S, index_T = jnp.arange(start, stop), jnp.arange(seen.start, seen.stop)
            segments, steps = ((x[:, start:stop], x[:, seen]) if x is not None else None
                               for x in (segment_ids_BT, steps_BT))  # fmt: skip
            out.append(_dense(q, k, v, _mask(index_S, index_T, window, segments, steps=steps)))
        else:
            ids, steps_seen = (None if x is None else x[:, seen] for x in (segment_ids_BT, steps_BT))
            out.append(_loop(q, k, v, start - seen.start, window, ids, steps_seen))
    return jnp.concatenate(out, axis=1)


def _loop(q_BSNH, k_BTKH, v_BTKH, q_start, window, segment_ids_BT, steps_BT):
    """S of T positions, the first `q_start`, a block of queries at a time; the backward pass computes logits again."""
    B, S, N, H = q_BSNH.shape
    T = k_BTKH.shape[1]
    blocks = -(-S // _BLOCK)
    after = 0 if window is None or steps_BT is None else window - 1
    size = T if window is None else min(T, _BLOCK + window - 1 + after)  # keys that a block sees
    q = jnp.pad(q_BSNH, ((0, 0), (0, blocks * _BLOCK - S), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(B, blocks, _BLOCK, N, H), 1, 0)
    # In float32, so that the gradients of all blocks are added in it.
    keys, values = k_BTKH.astype(jnp.float32), v_BTKH.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(keys, values, q, start):
        first = jnp.clip(start + (_BLOCK + after) - size, 0, T - size)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        index_S, index_T = start + jnp.arange(_BLOCK), first + jnp.arange(size)
        segments, steps = ((x.at[:, index_S].get(mode="clip"), take(x)) if x is not None else None
                           for x in (segment_ids_BT, steps_BT))  # fmt: skip
        mask = _mask(index_S, index_T, window, segments, steps=steps)
        return _dense(q, take(keys).astype(q.dtype), take(values).astype(q.dtype), mask)

    starts = q_start + _BLOCK * jnp.arange(blocks)
    out = jax.lax.scan(lambda _, xs: (None, block(keys, values, *xs)), None, (q, starts))[1]
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :S]


# ---- on the devices of a mesh


def _chunks(run, q_BSNH, k_BSKH, v_BSKH, window, segment_ids_BS, batch_axes):
    """`run` of the two chunks of a sequence that each device has, and of the keys that they see."""
    parts = context_size()

    def own(device, q, k, v, ids):
        chunk, out = q.shape[1] // 2, []
        for half, number in enumerate((device, 2 * parts - 1 - device)):
            start, stop = number * chunk, (number + 1) * chunk
            first = 0 if window is None else max(0, start + 1 - window) // 2 * 2  # even, as cuDNN wants the length
            seen = None if ids is None else ids[:, first:stop]
            mine = q[:, half * chunk : (half + 1) * chunk]
            out.append(run(mine, k[:, first:stop], v[:, first:stop], window, seen))
        return jnp.concatenate(out, axis=1)

    # A program for each device, so that none computes what its mask hides. What they keep for the backward pass is of
    # the same shapes, and so there once: their arguments, and what a kernel gave.
    programs = [jax.checkpoint(functools.partial(own, device), policy=is_kernel) for device in range(parts)]

    def local(_, q, k, v, ids, ids_BT):
        return jax.lax.switch(jax.lax.axis_index(_CONTEXT), programs, q, k, v, ids_BT)

    return _on_own_part(local, None, None, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, batch_axes)


def _most(head_dim, dtype):
    """Positions of a block of the TPU's kernel."""
    return _TPU_BLOCK if head_dim * jnp.dtype(dtype).itemsize <= 512 else _TPU_BLOCK // 2


def _equal(length, most):
    """The fewest blocks of one size, a multiple of 128 up to `most`, that hold `length`: (their number, their size)."""
    count = -(-length // most)
    return count, -(-length // (128 * count)) * 128


def _splash(q_BSNH, k_BSKH, v_BSKH, window, segment_ids_BS, batch_axes):
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # slow to import, and for TPUs only

    S, N, H = q_BSNH.shape[1:]
    mesh, axis = jax.sharding.get_abstract_mesh(), seq_axis(batch_axes)
    parts = context_size() if axis else 1
    # Sequences end in keys that no query before them sees, so that blocks of one size are all of them.
    (q_count, q_block), (count, block) = (_equal(n, _most(H, k_BSKH.dtype)) for n in (S // parts, S))
    Q, T = q_count * q_block, count * block
    product = math.gcd(block, _TPU_PRODUCT)
    fused = count <= _TPU_FUSED
    sizes = pallas.BlockSizes(
        block_q=q_block, block_kv=block, block_kv_compute=product, block_q_dkv=q_block, block_kv_dkv=block,
        block_kv_dkv_compute=product, use_fused_bwd_kernel=fused, block_q_dq=None if fused else q_block,
        block_kv_dq=None if fused else product,
    )  # fmt: skip
    shape = (parts * Q, T)
    mask: Any = pallas.CausalMask(shape) if window is None else pallas.LocalMask(shape, (window - 1, 0), 0)
    order = balanced(S, parts).reshape(parts, -1) if axis else np.arange(S)[None]
    mask.q_sequence = np.pad(order, ((0, 0), (0, Q - S // parts)), constant_values=T - 1).reshape(-1).astype(np.int32)
    heads = _split(batch_axes, k_BSKH.shape[2])[1]

    def made():
        return pallas.make_splash_mha(
            pallas.MultiHeadMask([mask] * (N // mesh.shape[heads] if heads else N)), block_sizes=sizes, head_shards=1,
            q_seq_shards=parts, residual_checkpoint_name=_SPLASH if H > 64 else _NARROW, interpret=_platform() != "tpu",
        )  # fmt: skip

    def local(kernel, q, k, v, ids_BS, ids_BT):
        pad = lambda x, length: jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
        ids = None if ids_BS is None else pallas.SegmentIds(pad(ids_BS, Q), pad(ids_BT, T))
        heads_first = [jnp.swapaxes(pad(x, length), 1, 2) for x, length in ((q, Q), (k, T), (v, T))]
        return jnp.swapaxes(jax.vmap(kernel or made())(*heads_first, ids), 1, 2)[:, : q.shape[1]]

    # Where sequences are split, each device has the rows of the mask that are of its queries.
    kernel: Any = made() if axis else None
    spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis))) if axis else None
    return _on_own_part(local, kernel, spec, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, batch_axes)


def _split(batch_axes, kv_heads):
    """The axes that split rows, and that which splits heads; those that an enclosing shard_map has split split none."""
    mesh = jax.sharding.get_abstract_mesh()
    left = {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}
    rows = tuple(axis for axis in batch_axes if axis in left)
    return rows, "tensor" if kv_heads % left.get("tensor", kv_heads + 1) == 0 else None


def _on_own_part(local, kernel, spec, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, batch_axes):
    """`local` on each device of the mesh: (kernel, its queries, the keys, the values, segments of both)."""
    mesh, axis = jax.sharding.get_abstract_mesh(), seq_axis(batch_axes)
    if not (left := {*mesh.shape} - {*mesh.manual_axes}):
        return local(kernel, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, segment_ids_BS)

    def whole(x):
        """What all devices have of the sequences, in its own order."""
        if axis is None or x is None:
            return x
        x = jax.lax.all_gather(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), axis, axis=1)
        chunks = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
        return chunks.reshape(x.shape[0], -1, *x.shape[4:])

    def gathered(kernel, q, k, v, ids):
        return local(kernel, q, whole(k), whole(v), ids, whole(ids))

    rows, heads = _split(batch_axes, k_BSKH.shape[2])
    part = PartitionSpec(rows, axis, heads)
    return jax.shard_map(
        gathered, in_specs=(spec, part, part, part, PartitionSpec(rows, axis)), out_specs=part,
        axis_names=left, check_vma=False,
    )(kernel, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS)  # fmt: skip


# ---- what all have in common


def _pair(x_BT, queries):
    """Of something that each key has what the last of them have, which are the queries, and all."""
    return None if x_BT is None else (x_BT[:, -queries:], x_BT)


def _mask(q_index, k_index_T, window, segments=None, first_B=None, steps=None):
    """Boolean [1 or B, 1, 1, S, T]: may query s see key t? Segments and steps are (of the queries, of the keys).

    `q_index` is [S], or [1 or B, S].
    """
    distance_BST = jnp.atleast_2d(q_index)[:, :, None] - k_index_T[None, None, :]
    mask = distance_BST >= 0 if steps is None else steps[1][:, None, :] <= steps[0][:, :, None]
    if window is not None:
        mask &= (distance_BST if steps is None else jnp.abs(distance_BST)) < window
    if segments is not None:
        mask = mask & (segments[0][:, :, None] == segments[1][:, None, :])
    if first_B is not None:
        mask = mask & (k_index_T[None, None, :] >= first_B[:, None, None])
    return mask[:, None, None]


def _softmax(q_BSNH, k_BTKH, mask_B11ST):
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)
    logits_BKGST = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(mask_B11ST, logits_BKGST, -1e30), axis=-1)


def _dense(q_BSNH, k_BTKH, v_BTKH, mask_B11ST):
    B, S, N, H = q_BSNH.shape
    weights_BKGST = _softmax(q_BSNH, k_BTKH, mask_B11ST)
    out_BSKGH = jnp.einsum("BKGST,BTKH->BSKGH", weights_BKGST.astype(v_BTKH.dtype), v_BTKH)
    return out_BSKGH.reshape(B, S, N, H)
