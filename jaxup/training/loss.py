"""Cross-entropy in chunks: [batch, seq, vocab] logits never exist at once.

Shape suffixes: B batch, S sequence, C positions of one chunk, D hidden, V vocabulary,
T all positions of a chunk (B * C).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxup.model.attention import seq_axis
from jaxup.model.sharding import splits


def cross_entropy(
    x_BSD: Float[Array, "batch seq hidden"],
    kernel_DV: Float[Array, "hidden vocab"],
    targets_BS: Int[Array, "batch seq"],
    weights_BS: Float[Array, "batch seq"],
    *,
    chunk: int,
    z_loss: float,
    batch_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over all positions of (the loss to minimise, the plain cross-entropy), in nats.

    The first is the second plus `z_loss * logsumexp(logits)^2` (PaLM); only the first carries a
    gradient. The gradients of the logits are formed in the same pass, while a chunk's logits are there:
    three matrix products with the vocabulary instead of the four of rematerialisation, and no logits
    kept (as in Liger). Sums are float32; so is the kernel's gradient until it is cast to its dtype.

    `batch_axes` are the axes of the current mesh that split the batch. Then each device takes its own rows, or its part
    of them (`seq_axis`): the kernel, which these axes may split along hidden, is gathered once, and its gradient
    reduced once, not in each chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in batch_axes if mesh.shape[axis] > 1)
    if seq := seq_axis(batch_axes):
        axes += (seq,)
    loss, plain = _sums(x_BSD, kernel_DV, targets_BS, weights_BS, chunk, z_loss, axes)
    return loss, jax.lax.stop_gradient(plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(x_BSD, kernel_DV, targets_BS, weights_BS, chunk, z_loss, axes):
    def local(x_BSD, kernel_DV, targets_BS, weights_BS):
        def body(sums, inputs):
            _, losses = _chunk(kernel_DV, z_loss, *inputs)
            return jax.tree.map(jnp.add, sums, losses), None

        return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), _split(chunk, x_BSD, targets_BS, weights_BS))[0]

    return _on_own_rows(local, axes, x_BSD, kernel_DV, targets_BS, weights_BS)


def _forward(x_BSD, kernel_DV, targets_BS, weights_BS, chunk, z_loss, axes):
    local = functools.partial(_with_gradients, chunk, z_loss)
    sums, (dx_BSD, dkernel_DV) = _on_own_rows(local, axes, x_BSD, kernel_DV, targets_BS, weights_BS, gradients=True)
    return sums, (dx_BSD, dkernel_DV.astype(kernel_DV.dtype))


def _on_own_rows(local, axes, x_BSD, kernel_DV, targets_BS, weights_BS, gradients=False):
    """`local` of each device's rows and the whole kernel: the sums of all, each its dx, and the sum of all dkernel."""
    if not axes:
        return local(x_BSD, kernel_DV, targets_BS, weights_BS)
    split = tuple(
        axis for axis in splits("embed", kernel_DV.shape[0], jax.sharding.get_abstract_mesh()) if axis in axes
    )

    def collective(x_BSD, kernel_DV, targets_BS, weights_BS):
        if split:  # after the cast: half the bytes where the model computes in 16 bits
            kernel_DV = jax.lax.all_gather(kernel_DV.astype(x_BSD.dtype), split, axis=0, tiled=True)
        found = local(x_BSD, kernel_DV, targets_BS, weights_BS)
        if not gradients:
            return jax.lax.psum(found, axes)
        sums, (dx_BSD, dkernel_DV) = found
        if split:
            dkernel_DV = jax.lax.psum_scatter(dkernel_DV, split, scatter_dimension=0, tiled=True)
        dkernel_DV = jax.lax.psum(dkernel_DV, tuple(axis for axis in axes if axis not in split))
        return jax.lax.psum(sums, axes), (dx_BSD, dkernel_DV)

    seq = seq_axis(axes)
    rows = PartitionSpec(tuple(axis for axis in axes if axis != seq), seq)
    kernel = PartitionSpec(split)
    sums = (PartitionSpec(), PartitionSpec())
    return jax.shard_map(
        collective, in_specs=(rows, kernel, rows, rows), out_specs=(sums, (rows, kernel)) if gradients else sums,
        axis_names={*axes}, check_vma=False,
    )(x_BSD, kernel_DV, targets_BS, weights_BS)  # fmt: skip


def _with_gradients(chunk, z_loss, x_BSD, kernel_DV, targets_BS, weights_BS):
    """The sums, and what the first of them has as gradients: dx, and float32 dkernel."""

    def body(carry, inputs):
        sums, dkernel_DV = carry
        x_BCD, targets_BC, weights_BC = inputs
        (logits_BCV, lse_BC1), losses = _chunk(kernel_DV, z_loss, *inputs)
        weights_BC1 = weights_BC[..., None]
        dlogits_BCV = jnp.exp(logits_BCV - lse_BC1) * (weights_BC1 * (1 + 2 * z_loss * lse_BC1))
        is_target_BCV = targets_BC[..., None] == jnp.arange(kernel_DV.shape[1])[None, None]
        dlogits_BCV = (dlogits_BCV - jnp.where(is_target_BCV, weights_BC1, 0)).astype(x_BCD.dtype)
        dlogits_TV, x_TD = _flat(dlogits_BCV), _flat(x_BCD)
        dx_BCD = (dlogits_TV @ kernel_DV.astype(x_BCD.dtype).T).reshape(x_BCD.shape)
        dkernel_DV += jnp.dot(x_TD.T, dlogits_TV, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, losses), dkernel_DV), dx_BCD

    zeros = ((jnp.float32(0), jnp.float32(0)), jnp.zeros(kernel_DV.shape, jnp.float32))
    (sums, dkernel_DV), dx = jax.lax.scan(body, zeros, _split(chunk, x_BSD, targets_BS, weights_BS))
    B, S, D = x_BSD.shape
    dx_BSD = jnp.moveaxis(dx, 0, 1).reshape(B, -1, D)[:, :S]
    return sums, (dx_BSD, dkernel_DV)


def _backward(chunk, z_loss, axes, residuals, cotangents):
    scale = cotangents[0]
    dx_BSD, dkernel_DV = residuals
    return (dx_BSD * scale.astype(dx_BSD.dtype), dkernel_DV * scale.astype(dkernel_DV.dtype), None, None)


_sums.defvjp(_forward, _backward)


def _split(chunk, *arrays):
    """[B, S, ...] -> [S / chunk, B, chunk, ...], zeros at the end; the batch axis, which meshes split, stays whole."""
    chunk = min(chunk, arrays[0].shape[1])

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % chunk)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)

    return tuple(map(split, arrays))


def _flat(a):
    """[B, C, ...] -> [B * C, ...]: XLA's CPU backend is faster on plain matrix products."""
    return a.reshape(-1, a.shape[-1])


def _chunk(kernel_DV, z_loss, x_BCD, targets_BC, weights_BC):
    logits_TV = jnp.dot(_flat(x_BCD), kernel_DV.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
    logits_BCV = logits_TV.reshape(*targets_BC.shape, -1)
    lse_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
    plain = jnp.sum(weights_BC * (lse_BC1 - target_BC1)[..., 0])
    return (logits_BCV, lse_BC1), (plain + z_loss * jnp.sum(weights_BC * lse_BC1[..., 0] ** 2), plain)
