"""Cross-entropy, distillation and log-probabilities in chunks: [batch, seq, vocab] logits never exist at once.

Shape suffixes: B batch, S sequence, C positions of one chunk, D hidden, E hidden of the teacher, V vocabulary,
T all positions of a chunk (B * C).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxup.model.attention import seq_axis
from jaxup.model.sharding import splits


class _Weighing(NamedTuple):
    """What the loss to minimise is made of."""

    z_loss: float
    alpha: float = 0.0  # the teacher's share; where it is 0 there is none
    temperature: float = 1.0
    divisor: float = 1.0  # what the model's logits are divided by before anything else


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
    return _loss(((x_BSD, kernel_DV),), targets_BS, weights_BS, chunk, _Weighing(z_loss), batch_axes)


def distillation(
    x_BSD: Float[Array, "batch seq hidden"],
    kernel_DV: Float[Array, "hidden vocab"],
    teacher_BSE: Float[Array, "batch seq wide"],
    teacher_EV: Float[Array, "wide vocab"],
    targets_BS: Int[Array, "batch seq"],
    weights_BS: Float[Array, "batch seq"],
    *,
    alpha: float,
    temperature: float,
    chunk: int,
    z_loss: float,
    batch_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """As `cross_entropy`, but the loss to minimise is, at each position,

        alpha * T^2 * KL(softmax(teacher / T) || softmax(logits / T)) + (1 - alpha) * cross-entropy + z-loss

    with logits of the model and of the teacher and T the temperature: Hinton, Vinyals & Dean (arXiv 1503.02531), whose
    T^2 keeps the two parts of one size at any T. Of the teacher nothing carries a gradient. The cross-entropy of that
    paper's soft targets differs from the KL by the teacher's entropy, which no gradient depends on. PyTorch's
    `kl_div(log_softmax(logits / T), softmax(teacher / T), reduction="batchmean")` over positions is the same KL.

    Others give alpha to the cross-entropy. So, it seems, does the code behind Inheritune's table, of which the logs are
    released: that of a student of medium has a training loss of 6.587, 0.6 times the validation's 10.978, at step 0.
    """
    heads = ((x_BSD, kernel_DV), (teacher_BSE, teacher_EV))
    return _loss(heads, targets_BS, weights_BS, chunk, _Weighing(z_loss, alpha, temperature), batch_axes)


def log_probs(
    x_BSD: Float[Array, "batch seq hidden"],
    kernel_DV: Float[Array, "hidden vocab"],
    targets_BS: Int[Array, "batch seq"],
    *,
    chunk: int,
    temperature: float,
    batch_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """(log-probability of each target, entropy), both float32 [B, S], in nats, under softmax(logits / temperature).

    This is what the tokens of an answer were drawn from at that temperature, without top-k and top-p. Only the first
    carries a gradient. `batch_axes`: as those of `cross_entropy`.
    """
    logp_BS, entropy_BS = _log_probs(x_BSD, kernel_DV, targets_BS, chunk, temperature, _axes(batch_axes))
    return logp_BS, jax.lax.stop_gradient(entropy_BS)


# Each position has a cotangent of its own, which is not known before the log-probabilities are: a ratio to older ones
# is made of them. So the gradients of the logits cannot be formed in the same pass, and a chunk's logits are computed
# twice: four products with the vocabulary, where the sum that `cross_entropy` minimises needs three. Keeping them would
# be B * S * V numbers.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_probs(x_BSD, kernel_DV, targets_BS, chunk, temperature, axes):
    def local(heads, targets_BS, _):
        ((x_BSD, kernel_DV),) = heads

        def body(_, inputs):
            x_BCD, targets_BC = inputs
            logp_BCV = jax.nn.log_softmax(_logits(x_BCD, kernel_DV) / temperature)
            taken_BC1 = jnp.take_along_axis(logp_BCV, targets_BC[..., None], axis=-1)
            entropy_BC = -jnp.sum(jnp.exp(logp_BCV) * logp_BCV, axis=-1)
            return None, (taken_BC1[..., 0], entropy_BC)

        found = jax.lax.scan(body, None, _split(chunk, x_BSD, targets_BS))[1]
        return tuple(_joined(a, targets_BS.shape[1]) for a in found)

    weights_BS = jnp.zeros(targets_BS.shape, jnp.float32)
    return _on_own_rows(local, axes, ((x_BSD, kernel_DV),), targets_BS, weights_BS, gives="rows")


def _log_probs_forward(x_BSD, kernel_DV, targets_BS, chunk, temperature, axes):
    return _log_probs(x_BSD, kernel_DV, targets_BS, chunk, temperature, axes), (x_BSD, kernel_DV, targets_BS)


def _log_probs_backward(chunk, temperature, axes, residuals, cotangents):
    """The gradient of sum(g * logp) is that of a cross-entropy with the weights -g."""
    x_BSD, kernel_DV, targets_BS = residuals
    local = functools.partial(_with_gradients, chunk, _Weighing(0.0, divisor=temperature))
    heads, weights_BS = ((x_BSD, kernel_DV),), -cotangents[0]
    _, (dx_BSD, dkernel_DV) = _on_own_rows(local, axes, heads, targets_BS, weights_BS, gives="gradients")
    return dx_BSD, dkernel_DV.astype(kernel_DV.dtype), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _axes(batch_axes):
    """Those along which each device takes its own rows, or its part of them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in batch_axes if mesh.shape[axis] > 1)
    seq = seq_axis(batch_axes)
    return (*axes, seq) if seq else axes


def _loss(heads, targets_BS, weights_BS, chunk, weighing, batch_axes):
    """`heads`: what the head is applied to and its kernel, of the model and maybe of its teacher."""
    loss, plain = _sums(heads, targets_BS, weights_BS, chunk, weighing, _axes(batch_axes))
    return loss, jax.lax.stop_gradient(plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _sums(heads, targets_BS, weights_BS, chunk, weighing, axes):
    def local(heads, targets_BS, weights_BS):
        xs, kernels = zip(*heads)

        def body(sums, inputs):
            _, losses = _chunk(kernels, weighing, *inputs)
            return jax.tree.map(jnp.add, sums, losses), None

        return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), _split(chunk, xs, targets_BS, weights_BS))[0]

    return _on_own_rows(local, axes, heads, targets_BS, weights_BS)


def _forward(heads, targets_BS, weights_BS, chunk, weighing, axes):
    local = functools.partial(_with_gradients, chunk, weighing)
    sums, (dx_BSD, dkernel_DV) = _on_own_rows(local, axes, heads, targets_BS, weights_BS, gives="gradients")
    return sums, (dx_BSD, dkernel_DV.astype(heads[0][1].dtype), (None,) * (len(heads) - 1))


def _on_own_rows(local, axes, heads, targets_BS, weights_BS, gives="sums"):
    """`local` of each device's rows and whole kernels: the sums of all; or these, each its dx, and the sum of all
    dkernel ("gradients"); or two numbers for each position ("rows")."""
    if not axes:
        return local(heads, targets_BS, weights_BS)
    mesh = jax.sharding.get_abstract_mesh()
    split = [tuple(axis for axis in splits("embed", kernel.shape[0], mesh) if axis in axes) for _, kernel in heads]

    def collective(heads, targets_BS, weights_BS):
        # Gathered after the cast: half the bytes where the model computes in 16 bits.
        heads = tuple(
            (x, jax.lax.all_gather(kernel.astype(x.dtype), over, axis=0, tiled=True) if over else kernel)
            for (x, kernel), over in zip(heads, split)
        )
        found = local(heads, targets_BS, weights_BS)
        if gives != "gradients":
            return found if gives == "rows" else jax.lax.psum(found, axes)
        sums, (dx_BSD, dkernel_DV) = found
        if split[0]:
            dkernel_DV = jax.lax.psum_scatter(dkernel_DV, split[0], scatter_dimension=0, tiled=True)
        dkernel_DV = jax.lax.psum(dkernel_DV, tuple(axis for axis in axes if axis not in split[0]))
        return jax.lax.psum(sums, axes), (dx_BSD, dkernel_DV)

    seq = seq_axis(axes)
    rows = PartitionSpec(tuple(axis for axis in axes if axis != seq), seq)
    kernels = [PartitionSpec(over) for over in split]
    sums = (PartitionSpec(), PartitionSpec())
    specs = {"sums": sums, "gradients": (sums, (rows, kernels[0])), "rows": (rows, rows)}
    return jax.shard_map(
        collective, in_specs=(tuple((rows, kernel) for kernel in kernels), rows, rows),
        out_specs=specs[gives], axis_names={*axes}, check_vma=False,
    )(heads, targets_BS, weights_BS)  # fmt: skip


def _with_gradients(chunk, weighing, heads, targets_BS, weights_BS):
    """The sums, and what the first of them has as gradients: dx, and float32 dkernel."""
    (x_BSD, kernel_DV), *_ = heads
    xs, kernels = zip(*heads)
    z_loss, alpha, temperature, divisor = weighing

    def body(carry, inputs):
        sums, dkernel_DV = carry
        (x_BCD, *_), targets_BC, weights_BC = inputs
        (logits_BCV, lse_BC1, soft), losses = _chunk(kernels, weighing, *inputs)
        weights_BC1 = weights_BC[..., None]
        hard_BC1 = (1 - alpha) * weights_BC1
        dlogits_BCV = jnp.exp(logits_BCV - lse_BC1) * (weights_BC1 * (1 - alpha + 2 * z_loss * lse_BC1))
        is_target_BCV = targets_BC[..., None] == jnp.arange(kernel_DV.shape[1])[None, None]
        dlogits_BCV -= jnp.where(is_target_BCV, hard_BC1, 0)
        if soft is not None:
            student_BCV, teacher_BCV = map(jnp.exp, soft)
            dlogits_BCV += (alpha * temperature * weights_BC1) * (student_BCV - teacher_BCV)
        dlogits_BCV = (dlogits_BCV / divisor).astype(x_BCD.dtype)
        dlogits_TV, x_TD = _flat(dlogits_BCV), _flat(x_BCD)
        dx_BCD = (dlogits_TV @ kernel_DV.astype(x_BCD.dtype).T).reshape(x_BCD.shape)
        dkernel_DV += jnp.dot(x_TD.T, dlogits_TV, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, losses), dkernel_DV), dx_BCD

    zeros = ((jnp.float32(0), jnp.float32(0)), jnp.zeros(kernel_DV.shape, jnp.float32))
    (sums, dkernel_DV), dx = jax.lax.scan(body, zeros, _split(chunk, xs, targets_BS, weights_BS))
    return sums, (_joined(dx, x_BSD.shape[1]), dkernel_DV)


def _backward(chunk, weighing, axes, residuals, cotangents):
    scale = cotangents[0]
    dx_BSD, dkernel_DV, of_teacher = residuals
    own = (dx_BSD * scale.astype(dx_BSD.dtype), dkernel_DV * scale.astype(dkernel_DV.dtype))
    return (own, *of_teacher), None, None


_sums.defvjp(_forward, _backward)


def _split(chunk, *arrays):
    """[B, S, ...] -> [S / chunk, B, chunk, ...], zeros at the end; the batch axis, which meshes split, stays whole."""
    chunk = min(chunk, arrays[-1].shape[1])

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % chunk)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def _joined(a, length):
    """The inverse of `_split`: [S / chunk, B, chunk, ...] -> [B, S, ...]."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, :length]


def _flat(a):
    """[B, C, ...] -> [B * C, ...]: XLA's CPU backend is faster on plain matrix products."""
    return a.reshape(-1, a.shape[-1])


def _chunk(kernels, weighing, xs, targets_BC, weights_BC):
    """(logits, their logsumexp, log-probabilities at the temperature of model and teacher if there is one), sums."""
    logits_BCV, *teacher = (_logits(x, kernel) for x, kernel in zip(xs, kernels))
    logits_BCV = logits_BCV / weighing.divisor
    lse_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
    plain = jnp.sum(weights_BC * (lse_BC1 - target_BC1)[..., 0])
    loss = (1 - weighing.alpha) * plain + weighing.z_loss * jnp.sum(weights_BC * lse_BC1[..., 0] ** 2)
    soft = None
    if teacher:
        soft = tuple(jax.nn.log_softmax(a / weighing.temperature) for a in (logits_BCV, *teacher))
        kl_BC = jnp.sum(jnp.exp(soft[1]) * (soft[1] - soft[0]), axis=-1)
        loss += weighing.alpha * weighing.temperature**2 * jnp.sum(weights_BC * kl_BC)
    return (logits_BCV, lse_BC1, soft), (loss, plain)


def _logits(x_BCD, kernel_DV):
    logits_TV = jnp.dot(_flat(x_BCD), kernel_DV.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
    return logits_TV.reshape(*x_BCD.shape[:-1], -1)
