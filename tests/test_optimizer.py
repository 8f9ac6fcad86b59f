"""Schedules against their closed forms, and AdamW with clipping against torch's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxup.errors import UserError
from jaxup.training.optimizer import OptimizerConfig, decay_mask, learning_rate, make_optimizer, updates_made

BASE = dict(
    learning_rate=1e-2, end_learning_rate=1e-3, schedule="constant", warmup_steps=0, decay_fraction=0.2,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0,
)  # fmt: skip


def rates(steps, **changes):
    schedule = learning_rate(OptimizerConfig(**{**BASE, **changes}), steps)
    return np.array([float(schedule(s)) for s in range(steps)])


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedule_closed_form(kind, warmup):
    steps, peak, end = 100, 1e-2, 1e-3
    expected = []
    for s in range(steps):
        t = min(1.0, max(0.0, (s - warmup) / (steps - 1 - warmup)))
        if s < warmup:
            expected.append(peak * (s + 1) / warmup)
        elif kind == "constant":
            expected.append(peak)
        elif kind == "linear":
            expected.append(peak + (end - peak) * t)
        elif kind == "cosine":
            expected.append(end + (peak - end) * 0.5 * (1 + np.cos(np.pi * t)))
        else:  # the last 20 steps fall linearly to the end
            expected.append(peak + (end - peak) * max(0.0, (s - (steps - 1 - 20)) / 20))
    np.testing.assert_allclose(rates(steps, schedule=kind, warmup_steps=warmup), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "optimizer.schedule: unknown 'cosin'; did you mean 'cosine'"),
        ({"warmup_steps": 11}, "optimizer.warmup_steps=11: does not fit a run of 10 steps"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps=-1: must be a number and not negative"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate=nan: must be a number and not negative"),
        ({"end_learning_rate": -1e-3}, "optimizer.end_learning_rate=-0.001: must be a number and not negative"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm=-1.0: must be a number and not negative"),
        ({"weight_decay": float("inf")}, "optimizer.weight_decay=inf: must be a number and not negative"),
        ({"b1": 1.5}, "optimizer.b1=1.5: must be at least 0 and below 1"),
        ({"b2": 1.0}, "optimizer.b2=1.0: must be at least 0 and below 1"),
        ({"eps": 0.0}, "optimizer.eps=0.0: must be a positive number"),
        ({"decay_fraction": 3.0}, "optimizer.decay_fraction=3.0: must be between 0 and 1"),
        (
            {"schedule": "wsd", "warmup_steps": 5, "decay_fraction": 0.8},
            "optimizer.decay_fraction=0.8: the last 8 of 10 steps overlap with the 5 of warmup_steps",
        ),
    ],
)
def test_schedule_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        rates(10, **changes)


@pytest.mark.parametrize(("warmup", "fraction"), [(0, 1.0), (20, 0.8), (50, 0.5)])
def test_wsd_that_fills_the_run_ends_where_it_is_to(warmup, fraction):
    found = rates(100, schedule="wsd", warmup_steps=warmup, decay_fraction=fraction)
    assert found[-1] == pytest.approx(1e-3, rel=1e-5)
    assert found.max() == pytest.approx(1e-2)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_another_peak_from_a_step_on(kind):
    plain = rates(10, schedule=kind, warmup_steps=2)
    schedule = learning_rate(
        OptimizerConfig(**{**BASE, "schedule": kind, "warmup_steps": 2}), 10, [(4, 5e-3), (8, 0.0)]
    )
    expected = plain * np.array([1] * 3 + [0.5] * 4 + [0] * 3)
    np.testing.assert_allclose([float(schedule(s)) for s in range(10)], expected, rtol=1e-6)


def test_adamw_equals_torch(torch):
    rng = np.random.default_rng(0)
    start = {"a": {"kernel": rng.normal(size=(7, 5))}, "b": {"scale": rng.normal(size=5)}}
    # The second half is small enough not to be clipped.
    gradients = [
        jax.tree.map(lambda p, i=i: rng.normal(size=p.shape) * (3.0 if i < 5 else 0.05), start) for i in range(10)
    ]

    optimizer, schedule = make_optimizer(OptimizerConfig(**BASE)), rates(10, schedule="cosine", warmup_steps=3)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), start)
    assert decay_mask(params) == {"a": {"kernel": True}, "b": {"scale": False}}
    state = optimizer.init(params)
    for g, rate in zip(gradients, schedule, strict=True):
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(rate))
        params = optax.apply_updates(params, updates)

    kernel, scale = (torch.nn.Parameter(torch.tensor(start[m][n])) for m, n in (("a", "kernel"), ("b", "scale")))
    oracle = torch.optim.AdamW(
        [{"params": [kernel], "weight_decay": 0.1}, {"params": [scale], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for g, rate in zip(gradients, schedule, strict=True):
        kernel.grad, scale.grad = torch.tensor(g["a"]["kernel"]), torch.tensor(g["b"]["scale"])
        torch.nn.utils.clip_grad_norm_([kernel, scale], 1.0)
        for group in oracle.param_groups:
            group["lr"] = rate
        oracle.step()
    # The oracle runs in float64; ten float32 updates round to a few parts in 1e7, and torch's clip
    # divides by norm + 1e-6.
    np.testing.assert_allclose(params["a"]["kernel"], kernel.detach(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(params["b"]["scale"], scale.detach(), rtol=2e-5, atol=1e-6)


def test_a_rate_that_is_given_is_one_that_is_in_the_program_to_the_bit():
    """Against optax's own chain, with its schedule in it: updates, moments and the tree that a checkpoint has.

    The schedule is a table: one that XLA computes in the kernel of the update it may round otherwise there.
    """
    rng = np.random.default_rng(2)
    draw = lambda: {"a": {"kernel": rng.normal(size=(37, 21))}, "b": {"scale": rng.normal(size=21)}}  # noqa: E731
    table = np.float32(rates(9, schedule="linear", warmup_steps=3))
    ours, theirs = make_optimizer(OptimizerConfig(**BASE).adamw), optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95, 1e-8),
        optax.add_decayed_weights(0.1, mask=decay_mask), optax.identity(),
        optax.scale_by_learning_rate(lambda count: jnp.asarray(table)[count]),
    )  # fmt: skip

    @functools.partial(jax.jit, static_argnums=0)
    def step(optimizer, params, state, grads, rate):
        updates, state = optax.with_extra_args_support(optimizer).update(grads, state, params, learning_rate=rate)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.float32, draw())
    given, within = ((params, optimizer.init(params)) for optimizer in (ours, theirs))
    assert jax.tree.structure(given) == jax.tree.structure(within)
    for n, rate in enumerate(table):
        assert updates_made(given[1]) == n
        grads = jax.tree.map(jnp.float32, draw())
        given, within = step(ours, *given, grads, rate), step(theirs, *within, grads, rate)
        jax.tree.map(np.testing.assert_array_equal, given, within)


def test_rates_are_the_learning_rates_of_parameter_groups(torch):
    """A row of a stacked kernel with a rate of its own is a parameter group of torch's AdamW."""
    rng = np.random.default_rng(1)
    start, factors = rng.normal(size=(3, 7, 5)), np.array([1.0, 0.1, 0.0], np.float32)
    gradients = [0.05 * rng.normal(size=start.shape) for _ in range(6)]
    params = {"blocks": {"kernel": jnp.asarray(start, jnp.float32)}}
    optimizer = make_optimizer(OptimizerConfig(**BASE), {"blocks": {"kernel": factors.reshape(3, 1, 1)}})
    state = optimizer.init(params)
    for g in gradients:
        grads = {"blocks": {"kernel": jnp.asarray(g, jnp.float32)}}
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(BASE["learning_rate"]))
        params = optax.apply_updates(params, updates)
    rows = [torch.nn.Parameter(torch.tensor(row)) for row in start]
    groups = [{"params": [row], "lr": BASE["learning_rate"] * float(f)} for row, f in zip(rows, factors, strict=True)]
    oracle = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in gradients:
        for row, part in zip(rows, g, strict=True):
            row.grad = torch.tensor(part)
        torch.nn.utils.clip_grad_norm_(rows, 1.0)
        oracle.step()
    for got, row in zip(params["blocks"]["kernel"], rows, strict=True):
        np.testing.assert_allclose(got, row.detach(), rtol=2e-5, atol=1e-6)  # as above
    np.testing.assert_array_equal(params["blocks"]["kernel"][2], start[2].astype(np.float32))
