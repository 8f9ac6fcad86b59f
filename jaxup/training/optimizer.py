"""AdamW with a decay mask, gradient clipping, and learning-rate schedules; all of it optax."""

from __future__ import annotations

import dataclasses

import jax
import optax

from jaxup.errors import UserError, suggest
from jaxup.model.decoder import Params
from jaxup.model.spec import flatten, is_kernel, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float  # peak
    end_learning_rate: float  # reached at the last step by every schedule but "constant"
    schedule: str  # constant | linear | cosine | wsd (warmup-stable-decay)
    warmup_steps: int  # linear from 1/warmup of the peak
    decay_fraction: float  # wsd: the share of the steps, at the end, in which it decays linearly
    b1: float
    b2: float
    eps: float
    weight_decay: float  # decoupled (Loshchilov & Hutter 2019), on kernels only
    clip_norm: float  # global gradient norm; 0 = no clipping


SCHEDULES = ("constant", "linear", "cosine", "wsd")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """step (0-based) -> learning rate, for a run of `steps` updates."""
    c, peak, end = config, config.learning_rate, config.end_learning_rate
    if c.schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule: unknown {c.schedule!r}{suggest(c.schedule, SCHEDULES)}")
    for key, rate in (("learning_rate", peak), ("end_learning_rate", end)):
        if not 0 <= rate < float("inf"):
            raise UserError(f"optimizer.{key}={rate}: must be a number and not negative")
    if not 0 <= c.warmup_steps <= steps:
        raise UserError(f"optimizer.warmup_steps={c.warmup_steps} does not fit a run of {steps} steps")
    # Intervals between the first step at the peak and the last step.
    remaining = max(1, steps - 1 - c.warmup_steps)
    match c.schedule:
        case "constant":
            main = optax.constant_schedule(peak)
        case "linear":
            main = optax.linear_schedule(peak, end, remaining)
        case "cosine":
            main = optax.cosine_decay_schedule(peak, remaining, alpha=end / peak if peak else 0.0)
        case "wsd":
            decay = max(1, round(c.decay_fraction * steps))
            main = optax.linear_schedule(peak, end, decay, transition_begin=max(0, remaining - decay))
    if not c.warmup_steps:
        return main
    warmup = optax.linear_schedule(peak / c.warmup_steps, peak, max(1, c.warmup_steps - 1))
    return optax.join_schedules([warmup, main], [c.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, rates: Params | None = None) -> optax.GradientTransformation:
    """clip -> Adam -> decoupled decay of kernels -> learning rate; state in the params' dtype.

    `rates`, a tree of arrays that broadcast to the params, multiplies the learning rate of each, and so
    its decay, as in a parameter group of PyTorch's AdamW.
    """
    scale = lambda updates, params: jax.tree.map(lambda update, rate: update * rate, updates, rates)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.identity() if rates is None else optax.stateless(scale),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def decay_mask(params: Params) -> Params:
    """True for the kernels of linear layers; embeddings, norms and biases are not decayed."""
    return unflatten({path: is_kernel(path) for path in flatten(params)})
