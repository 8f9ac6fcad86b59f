"""AdamW with a decay mask, gradient clipping, and learning-rate schedules; all of it optax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxup.errors import UserError, suggest
from jaxup.model.decoder import Params
from jaxup.model.spec import flatten, is_kernel, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """What decides the program of an update; its learning rate is an argument."""

    b1: float
    b2: float
    eps: float
    weight_decay: float  # decoupled (Loshchilov & Hutter 2019), on kernels only
    clip_norm: float  # global gradient norm; 0 = no clipping

    def __post_init__(self):
        for field in dataclasses.fields(self):
            meant, holds = _RANGES.get(field.name, ("", lambda _: True))
            if not holds(value := getattr(self, field.name)):
                raise UserError(f"must be {meant}", at=f"optimizer.{field.name}={value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(AdamW):
    learning_rate: float  # peak
    end_learning_rate: float  # reached at the last step by every schedule but "constant"
    schedule: str  # constant | linear | cosine | wsd (warmup-stable-decay)
    warmup_steps: int  # linear from 1/warmup of the peak
    decay_fraction: float  # wsd: the share of the steps, at the end, in which it decays linearly

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"unknown {self.schedule!r}{suggest(self.schedule, SCHEDULES)}", at="optimizer.schedule")
        super().__post_init__()

    @property
    def adamw(self) -> AdamW:
        return AdamW(**{field.name: getattr(self, field.name) for field in dataclasses.fields(AdamW)})


SCHEDULES = ("constant", "linear", "cosine", "wsd")

# No comparison holds of NaN.
_NOT_NEGATIVE = "a number and not negative", lambda value: 0 <= value < math.inf
_BELOW_ONE = "at least 0 and below 1", lambda value: 0 <= value < 1
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": _NOT_NEGATIVE, "end_learning_rate": _NOT_NEGATIVE, "warmup_steps": _NOT_NEGATIVE,
    "decay_fraction": ("between 0 and 1", lambda value: 0 <= value <= 1), "b1": _BELOW_ONE, "b2": _BELOW_ONE,
    "eps": ("a positive number", lambda value: 0 < value < math.inf), "weight_decay": _NOT_NEGATIVE,
    "clip_norm": _NOT_NEGATIVE,
}  # fmt: skip


def learning_rate(config: OptimizerConfig, steps: int, peaks: Iterable[tuple[int, float]] = ()) -> Callable[[Any], Any]:
    """step (0-based) -> learning rate, for a run of `steps` updates: an optax.Schedule.

    `peaks`: (step, rate), from which step on (counted from 1, in order) the schedule has its peak at which rate.
    """
    c, peak, end = config, config.learning_rate, config.end_learning_rate
    if c.warmup_steps > steps:
        raise UserError(f"does not fit a run of {steps} steps", at=f"optimizer.warmup_steps={c.warmup_steps}")
    decay = round(c.decay_fraction * steps)
    if c.schedule == "wsd" and c.warmup_steps + decay > steps:
        what = f"the last {decay} of {steps} steps overlap with the {c.warmup_steps} of warmup_steps"
        raise UserError(what, at=f"optimizer.decay_fraction={c.decay_fraction}")
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
            decay = min(max(1, decay), remaining)  # between so many steps there is one interval less
            main = optax.linear_schedule(peak, end, decay, transition_begin=remaining - decay)
    if c.warmup_steps:
        warmup = optax.linear_schedule(peak / c.warmup_steps, peak, max(1, c.warmup_steps - 1))
        main = optax.join_schedules([warmup, main], [c.warmup_steps])
    schedule = main
    for step, rate in peaks:
        if not peak:
            raise UserError("a rate of 0 has no peak to change", at="optimizer.learning_rate")
        schedule = _changed(schedule, main, step - 1, rate / peak)
    return schedule


def _changed(before: optax.Schedule, schedule: optax.Schedule, count: int, factor: float) -> optax.Schedule:
    return lambda now: jnp.where(now < count, before(now), factor * schedule(now))


def make_optimizer(config: AdamW, rates: Params | None = None) -> optax.GradientTransformationExtraArgs:
    """clip -> Adam -> decoupled decay of kernels -> learning rate; state in the params' dtype.

    The learning rate of an update is its argument `learning_rate`, a float32 scalar, so that runs which differ in it
    alone have one program. The state counts the updates: that is what a schedule is asked with.

    `rates`, a tree of arrays that broadcast to the params, multiplies the learning rate of each, and so
    its decay, as in a parameter group of PyTorch's AdamW.
    """
    scale = lambda updates, params: jax.tree.map(lambda update, rate: update * rate, updates, rates)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.identity() if rates is None else optax.stateless(scale),
        optax.GradientTransformationExtraArgs(optax.scale_by_schedule(lambda _: 0.0).init, _scale_by_argument),
    )


def _scale_by_argument(
    updates: Params, state: optax.ScaleByScheduleState, params: Params | None = None, *, learning_rate: jax.Array,
    **_: Any,
) -> tuple[Params, optax.ScaleByScheduleState]:  # fmt: skip
    scaled = jax.tree.map(lambda update: (-learning_rate).astype(update.dtype) * update, updates)
    return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))


def updates_made(opt_state: Any) -> jax.Array:
    """How many updates a state of `make_optimizer` has seen, those that were left out included."""
    return opt_state[-1].count


def decay_mask(params: Params) -> Params:
    """True for the kernels of linear layers; embeddings, norms and biases are not decayed."""
    return unflatten({path: is_kernel(path) for path in flatten(params)})
