"""Cross-entropy in chunks: [batch, seq, vocab] logits never exist at once.

Shape suffixes: B batch, S sequence, C positions of one chunk, D hidden, V vocabulary,
T all positions of a chunk (B * C).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    x_BSD: Float[Array, "batch seq hidden"],
    kernel_DV: Float[Array, "hidden vocab"],
    targets_BS: Int[Array, "batch seq"],
    weights_BS: Float[Array, "batch seq"],
    *,
    chunk: int,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over all positions of (the loss to minimise, the plain cross-entropy), in nats.

    The first is the second plus `z_loss * logsumexp(logits)^2` (PaLM); only the first carries a
    gradient. The gradients of the logits are formed in the same pass, while a chunk's logits are there:
    three matrix products with the vocabulary instead of the four of rematerialisation, and no logits
    kept (as in Liger). Sums are float32; so is the kernel's gradient until it is cast to its dtype.
    """
    seq_len = x_BSD.shape[1]
    chunk = min(chunk, seq_len)
    if padding := -seq_len % chunk:
        pad = lambda a: jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
        x_BSD, targets_BS, weights_BS = pad(x_BSD), pad(targets_BS), pad(weights_BS)
    loss, plain = _sums(x_BSD, kernel_DV, targets_BS, weights_BS, chunk, z_loss)
    return loss, jax.lax.stop_gradient(plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(x_BSD, kernel_DV, targets_BS, weights_BS, chunk, z_loss):
    def body(sums, inputs):
        _, losses = _chunk(kernel_DV, z_loss, *inputs)
        return jax.tree.map(jnp.add, sums, losses), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), _split(chunk, x_BSD, targets_BS, weights_BS))[0]


def _forward(x_BSD, kernel_DV, targets_BS, weights_BS, chunk, z_loss):
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
    dx_BSD = jnp.moveaxis(dx, 0, 1).reshape(x_BSD.shape)
    return sums, (dx_BSD, dkernel_DV.astype(kernel_DV.dtype))


def _backward(chunk, z_loss, residuals, cotangents):
    scale = cotangents[0]
    dx_BSD, dkernel_DV = residuals
    return (dx_BSD * scale.astype(dx_BSD.dtype), dkernel_DV * scale.astype(dkernel_DV.dtype), None, None)


_sums.defvjp(_forward, _backward)


def _split(chunk, *arrays):
    """[B, S, ...] -> [S / chunk, B, chunk, ...]; the batch axis, which meshes split, stays whole."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0) for a in arrays)


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
