"""Heads against closed forms: what the best net attains, what it draws, and what each loss is in float64.

Losses and draws over many tokens are means with a standard error: they are to be within 4.5 of it, which of a thousand
seeds less than one would not.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from jaxup.continuous import heads
from jaxup.continuous.heads import HEADS, Categorical, Cosine, Diffusion, Flow, Gaussian
from jaxup.continuous.nets import MLP, NETS, Net, Spatial, dense, linear
from jaxup.continuous.schedules import cosine
from jaxup.continuous.stages import Stages
from jaxup.errors import UserError
from jaxup.model.spec import unflatten

HIDDEN, CHANNELS = 12, 3
T = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Net):
    """The best net for values that are normal, of this mean and variance, whatever z: of noise, or of a flow."""

    width: int = 1
    depth: int = 1
    mean: float = 0.0
    variance: float = 1.0
    mix: float = 0.0  # how large the head's variance is
    noise: bool = False

    joint: ClassVar[bool] = False

    def __post_init__(self):
        pass

    def table(self, hidden, channels, outputs):
        return ()

    def __call__(self, params, y_BSC, time_BS, z_BSD, map_BS):
        if self.noise:
            a = jnp.asarray(cosine(T, T).signal, jnp.float32)[jnp.round(time_BS * T / 1000).astype(int)][..., None]
            best = jnp.sqrt(1 - a) / (a * self.variance + 1 - a) * (y_BSC - jnp.sqrt(a) * self.mean)
            return jnp.concatenate([best, jnp.full_like(best, self.mix)], axis=-1)
        r = time_BS[..., None] / 1000
        slope = (r - (1 - r) * self.variance) / ((1 - r) ** 2 * self.variance + r**2)
        return slope * (y_BSC - (1 - r) * self.mean) - self.mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock(Exact):
    """Says the time."""

    joint: ClassVar[bool] = True

    def __call__(self, params, y_BSC, time_BS, z_BSD, map_BS):
        return jnp.broadcast_to(time_BS[..., None], y_BSC.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Exact):
    """A matrix, of all that a net is given: soon compiled."""

    def table(self, hidden, channels, outputs):
        return dense("all", channels + 1 + hidden, outputs)

    def __call__(self, params, y_BSC, time_BS, z_BSD, map_BS):
        return 0.2 * linear(params["all"], jnp.concatenate([y_BSC, time_BS[..., None] / 1000, z_BSD], axis=-1))


def diffusion(net, draws=1):
    return Diffusion(channels=CHANNELS, net=net, draws=draws, train_steps=T, limit=50.0)


def flow(net, times="uniform", stages=1, draws=1, channels=CHANNELS):
    return Flow(channels=channels, net=net, draws=draws, times=times, stages=stages)


ALL = {
    "cosine": Cosine(channels=CHANNELS), "gaussian": Gaussian(channels=CHANNELS, least_deviation=0.01),
    "categorical": Categorical(channels=CHANNELS, bins=16, limit=4.0),
    "diffusion": diffusion(Small(), draws=2), "flow": flow(MLP(width=8, depth=2), "logit-normal"),
}  # fmt: skip


SLOW = pytest.mark.slow  # more of the same
SOME = [pytest.param(name, marks=SLOW if name not in ("cosine", "diffusion") else ()) for name in ALL]


def drawn(table, seed=0, zeros=0.3):
    """First values, and others in the place of zeros: so that no part of a net is idle."""
    random = np.random.default_rng(seed)
    return unflatten({p.path: (p.fill + (p.std or zeros) * random.normal(size=p.shape)).astype("f") for p in table})


def batch(rows, seq, hidden=HIDDEN, seed=0):
    """(z, x, keys)"""
    random = np.random.default_rng(seed)
    z, x = (random.normal(size=(rows, seq, size)).astype(np.float32) for size in (hidden, CHANNELS))
    return z, x, jax.random.split(jax.random.key(seed), rows)


def within_error(each, expected):
    error = np.std(each, ddof=1) / math.sqrt(np.size(each))
    assert abs(np.mean(each) - expected) < 4.5 * error, (np.mean(each), expected, error)


def losses(head, mean, variance, rows=256, seq=256):
    """The loss of normal values, of each row."""
    z, x, keys = batch(rows, seq, hidden=1)
    x = mean + math.sqrt(variance) * x

    def weighed(weight):
        return head.loss({"net": {}}, z, x, weight, keys)

    return np.asarray(jax.jit(jax.grad(weighed))(jnp.ones((rows, seq)))).mean(1)


def test_registry():
    assert {name: type(head) for name, head in ALL.items()} == HEADS
    assert {*NETS} == {"mlp", "decoder"}


# ---- the least loss


@pytest.mark.parametrize(("mean", "variance", "mix"), [(0.0, 1.0, 0.0), (0.7, 0.3, -1.0)])
def test_diffusion_floor(mean, variance, mix):
    """The best net's squared error is A v / (A v + 1 - A), and the bound is linear in it."""
    table = cosine(T, T)
    a, low, high = table.signal, table.log_posterior, table.log_beta
    floor = a * variance / (a * variance + 1 - a)
    if variance == 1:
        assert abs(floor.mean() - 0.496) < 5e-4
    own = low + (mix + 1) / 2 * (high - low)
    error = table.clean**2 * (1 - a) / a * floor * np.exp(-own)
    nats = np.where(np.arange(T) == 0, math.log(2 * math.pi) + own, own - low + np.exp(low - own) - 1) + error
    net = Exact(mean=mean, variance=variance, mix=mix, noise=True)
    within_error(losses(diffusion(net), mean, variance), (floor + nats / 2 / math.log(2)).mean())


@pytest.mark.parametrize(
    ("times", "mean", "variance", "known"),
    [
        ("uniform", 0.0, 1.0, math.pi / 2),
        ("logit-normal", 0.0, 1.0, 1.741),
        pytest.param("uniform", -0.5, 0.25, None, marks=SLOW),
    ],
)
def test_flow_floor(times, mean, variance, known):
    def floor(s):
        return variance / ((1 - s) ** 2 * variance + s * s)

    def logit_normal(u):
        return floor(scipy.special.expit(u)) * scipy.stats.norm.pdf(u)

    whole = scipy.integrate.quad(*((floor, 0, 1) if times == "uniform" else (logit_normal, -12, 12)))[0]
    assert known is None or abs(whole - known) < 5e-4
    within_error(losses(flow(Exact(mean=mean, variance=variance), times), mean, variance), whole)


def constant(head, outputs):
    """Params with which the head says the same of every token."""
    zero = unflatten({p.path: np.zeros(p.shape, np.float32) for p in head.table(HIDDEN)})
    return {**zero, "down": {**zero["down"], "bias": jnp.asarray(outputs, jnp.float32)}}


def loss_of(head, targets):
    """loss(outputs): the mean over these targets, if the head says the same of all."""
    z, _, keys = batch(1, len(targets))
    weight = jnp.full((1, len(targets)), 1 / len(targets))
    x = jnp.asarray(targets, jnp.float32)[None]
    return jax.jit(jax.value_and_grad(lambda said: head.loss(constant(head, said), z, x, weight, keys)))


def test_cosine_optimum():
    """The direction of the mean of unit targets, where the loss is minus that mean's length."""
    head, random = ALL["cosine"], np.random.default_rng(0)
    for targets in (np.eye(3)[:2], 1 + random.normal(size=(7, 3))):
        loss, mean = loss_of(head, targets), (targets / np.linalg.norm(targets, axis=1, keepdims=True)).mean(0)
        least, slope = loss(jnp.asarray(3 * mean, jnp.float32))
        assert math.isclose(least, -np.linalg.norm(mean), rel_tol=1e-6)
        assert np.abs(slope).max() < 1e-6
        assert min(loss(jnp.asarray(other, jnp.float32))[0] for other in random.normal(size=(9, 3))) > least
        if len(targets) == 2:  # orthogonal
            assert math.isclose(least, -1 / math.sqrt(2), rel_tol=1e-6)


def test_gaussian_optimum():
    """The mean and the variance of the targets; the loss is the density's, by SciPy."""
    head, targets = ALL["gaussian"], np.random.default_rng(0).normal(size=(9, 3)) * 2 + 1
    mean, variance = targets.mean(0), targets.var(0)
    said = jnp.asarray(np.concatenate([mean, np.log(variance - head.least_deviation**2)]), jnp.float32)
    least, slope = loss_of(head, targets)(said)
    assert np.abs(slope).max() < 1e-5
    assert math.isclose(least, -scipy.stats.norm.logpdf(targets, mean, np.sqrt(variance)).mean(), rel_tol=1e-5)


def test_categorical_loss_and_draws():
    head, random = Categorical(channels=2, bins=4, limit=2.0), np.random.default_rng(0)
    logits = random.normal(size=(2, 4))
    targets, bins = [[-9.0, -0.5], [0.0, 9.0], [-1.0, 1.5]], [[0, 1], [2, 3], [1, 3]]
    log = scipy.special.log_softmax(logits, axis=1)
    expected = -np.mean([[log[channel, row[channel]] for channel in range(2)] for row in bins])
    assert math.isclose(loss_of(head, targets)(jnp.asarray(logits.reshape(-1), jnp.float32))[0], expected, rel_tol=1e-6)
    z, _, keys = batch(2, 5_000)
    draw = jax.jit(functools.partial(head.sample, steps=1, guidance=1))
    params = constant(head, logits.reshape(-1))
    likeliest = draw(params, z[:, :1], keys, temperature=0.0)
    assert np.array_equal(likeliest[0, 0], np.argmax(logits, 1) - 1.5)
    found = np.asarray(draw(params, z, keys, temperature=2.0)).reshape(-1, 2) + 1.5
    for channel, expected in enumerate(scipy.special.softmax(logits / 2, axis=1)):
        for index, share in enumerate(expected):
            within_error(found[:, channel] == index, share)


# ---- the bound of the variance


def test_bound_is_that_of_nichol_and_dhariwal():
    """Their terms as they write them, from x, x_t and the two means, in float64."""
    head, random = diffusion(Exact()), np.random.default_rng(0)
    step = np.arange(T)
    f = lambda t: np.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    betas = np.minimum(1 - f(step + 1) / f(step), 0.999)
    bars = np.cumprod(1 - betas)
    before = np.append(1.0, bars[:-1])
    posterior = betas * (1 - before) / (1 - bars)
    log_posterior = np.log(np.append(posterior[1], posterior[1:]))

    t = np.array([0, 1, 5, 300, 998, 999])
    x, noise, said, mix = random.normal(size=(4, len(t), CHANNELS))
    said = noise + 0.1 * said
    beta, bar, bar_before, log_true = (a[t][:, None] for a in (betas, bars, before, log_posterior))
    x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * noise

    def mean_given(x):
        return (np.sqrt(bar_before) * beta * x + np.sqrt(1 - beta) * (1 - bar_before) * x_t) / (1 - bar)

    predicted = np.sqrt(1 / bar) * x_t - np.sqrt(1 / bar - 1) * said
    own = (mix + 1) / 2 * np.log(beta) + (1 - mix) / 2 * log_true
    apart = mean_given(x) - mean_given(predicted)
    kl = 0.5 * (-1 + own - log_true + np.exp(log_true - own) + apart**2 * np.exp(-own))
    density = scipy.stats.norm.logpdf(x, mean_given(predicted), np.exp(own / 2))
    expected = np.where(t[:, None] == 0, -density, kl) / math.log(2)

    as_given = [jnp.asarray(a[None], jnp.float32) for a in ((said - noise) ** 2, mix)]
    bound = jax.jit(head.bound)(*as_given, jnp.asarray(t[None], jnp.int32))[0]
    # Logarithms of up to 17 in float32, and what they are the exponents of.
    np.testing.assert_allclose(bound, expected, rtol=1e-5, atol=1e-5)

    def total(said):
        run = lambda y, time: said  # noqa: E731
        share = jnp.full((1, len(t)), 0.4)
        return jnp.sum(head.terms(run, *(jnp.asarray(a[None], jnp.float32) for a in (x, noise)), share, 0))

    # The mean has the gradient of its squared error alone.
    slope = jax.jit(jax.grad(total))(jnp.asarray(np.concatenate([said, mix], -1)[None], jnp.float32))
    np.testing.assert_allclose(slope[0, :, :CHANNELS], 2 * (said - noise), rtol=1e-4, atol=1e-6)
    assert np.abs(slope[0, :, CHANNELS:]).min() > 0


def test_fewer_steps_of_a_schedule():
    whole, some, one = cosine(T, T), cosine(T, 7), cosine(T, 1)
    assert np.ptp(np.diff(some.times)) <= 1
    assert (some.times[0], some.times[-1], one.times.tolist()) == (0, 999, [999])
    assert np.array_equal(whole.signal[some.times], some.signal)
    assert np.array_equal(whole.times, np.arange(T))
    for kept in (0, T + 1):
        with pytest.raises(UserError, match=f"head_steps: {kept} steps of diffusion: it has been learned in 1000"):
            cosine(T, kept)


# ---- what is drawn


def draws(head, steps, temperature=1.0, rows=4, seq=128):
    z, _, keys = batch(rows, seq, hidden=1)
    program = jax.jit(functools.partial(head.sample, steps=steps, temperature=temperature, guidance=1))
    return np.asarray(program({"net": {}}, z, keys)), np.asarray(heads.noise(keys, seq, head.channels))


@pytest.mark.parametrize(
    ("steps", "mix", "temperature"), [(1000, -1.0, 1.0), (50, 1.0, 1.0), pytest.param(50, 0.0, 0.5, marks=SLOW)]
)
def test_diffusion_draws(steps, mix, temperature):
    """Each step is linear in x_t, and so the law of what is drawn is normal; its moments follow step by step."""
    mean, variance = 0.6, 0.4
    found, _ = draws(diffusion(Exact(mean=mean, variance=variance, mix=mix, noise=True)), steps, temperature)
    table = cosine(T, steps)
    m, v = 0.0, 1.0
    for index in reversed(range(steps)):
        a = table.signal[index]
        slope = np.sqrt(1 - a) / (a * variance + 1 - a)
        x_slope, x_offset = (1 - np.sqrt(1 - a) * slope) / np.sqrt(a), np.sqrt(1 - a) * slope * mean
        gain = table.clean[index] * x_slope + table.noisy[index]
        own = np.exp(table.log_posterior[index] + (mix + 1) / 2 * (table.log_beta - table.log_posterior)[index])
        m, v = gain * m + table.clean[index] * x_offset, gain**2 * v + (temperature**2 * own if index else 0)
    within_error(found, m)
    within_error((found - m) ** 2, v)
    if steps == T:
        assert abs(m - mean) < 1e-3
        assert abs(v - variance) < 5e-3


def test_euler_reaches_the_law_with_an_error_of_one_step():
    """The exact field is affine, and so is what comes of noise: offset + gain * noise. Means go straight."""
    mean, variance = -0.8, 0.36
    apart = []
    for steps in (16, 32, 64):
        found, start = draws(flow(Exact(mean=mean, variance=variance), channels=1), steps, rows=1, seq=8)
        gain, offset = np.polyfit(start.reshape(-1).astype(float), found.reshape(-1).astype(float), 1)
        assert abs(offset - mean) < 1e-5
        apart.append(abs(gain - math.sqrt(variance)))
    assert apart[-1] < 0.02
    assert np.allclose(np.divide(apart[:-1], apart[1:]), 2, atol=0.1)


def test_temperature():
    gaussian, z = ALL["gaussian"], batch(2, 5)[0]
    params, keys = drawn(gaussian.table(HIDDEN)), batch(2, 5)[2]
    draw = jax.jit(functools.partial(gaussian.sample, steps=1, guidance=1))
    mean, one, two = (np.asarray(draw(params, z, keys, temperature=t)) for t in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(two - mean, 2 * (one - mean), rtol=1e-4, atol=1e-5)
    head = flow(Exact(variance=0.5))
    cold, hot = (draws(head, 4, temperature=t, rows=1, seq=64)[0] for t in (0.0, 1.0))
    assert np.abs(cold).max() == 0 < hot.std()


# ---- rows, padding, precision


@functools.cache
def programs(name):
    """(params, loss and its gradients, draws), of a head with no weight that is zero."""
    head = ALL[name]
    draw = jax.jit(functools.partial(head.sample, steps=3, temperature=1.0), static_argnames="guidance")
    guided = jax.jit(functools.partial(head.sample, steps=3, temperature=1.0))
    loss = jax.jit(jax.value_and_grad(head.loss, argnums=(0, 1)))
    return drawn(head.table(HIDDEN)), loss, draw, guided


@pytest.mark.parametrize("name", SOME)
def test_a_row_is_by_itself(name):
    """Neither other rows nor what is not weighed, be it NaN, change a row's loss, gradient or draw."""
    params, loss, _, guided = programs(name)
    z, x, keys = batch(4, 5)
    weight = np.ones((4, 5), np.float32)
    weight[1] = [1, 0.5, 0, 0, 0]
    whole, slopes = loss(params, z, x, weight, keys)
    spoiled_z, spoiled_x = z.copy(), x.copy()
    spoiled_x[1, 2:] = spoiled_z[1, 2:] = np.nan
    jax.tree.map(np.testing.assert_array_equal, (whole, slopes), loss(params, spoiled_z, spoiled_x, weight, keys))

    each = []
    for row in range(4):
        other_z, other_x, other_keys = batch(4, 5, seed=row + 1)
        own = np.arange(4) == row
        mixed = [np.where(own[:, None, None], a, b) for a, b in ((z, other_z), (x, other_x))]
        mixed_keys = jnp.where(own, keys, other_keys)
        each.append(loss(params, *mixed, weight * own[:, None], mixed_keys)[0])
        if row < 2:  # its other half is what is said without a condition
            mixed[0][row + 2] = z[row + 2]
            tokens = guided(params, mixed[0], mixed_keys, guidance=2.0)[row]
            assert np.array_equal(tokens, guided(params, z, keys, guidance=2.0)[row])
    np.testing.assert_allclose(sum(each), whole, rtol=1e-5)


def test_a_longer_row_begins_with_the_same_noise():
    keys = batch(3, 1)[2]
    long, others = jax.jit(lambda: [heads.noise(keys, 9, CHANNELS), heads.noise(keys[1:], 5, CHANNELS)])()
    assert np.array_equal(long[1:, :5], others)


@pytest.mark.parametrize("name", SOME)
def test_guidance(name):
    params, _, draw, guided = programs(name)
    z, _, keys = batch(4, 5)
    plain = draw(params, z[:2], keys[:2], guidance=1)
    at_one, at_two = (guided(params, z, keys, guidance=guidance) for guidance in (1.0, 2.0))
    assert plain.shape == at_one.shape == (2, 5, CHANNELS)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(at_one, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(at_two - plain).max() > 1e-3
    other = guided(params, z, keys[2:], guidance=1.0)
    assert (np.abs(other - at_one).max() > 0.01) == (name != "cosine")


def test_sixteen_bits():
    """What the decoder says decides what a head computes in; its loss is float32."""
    head, (params, loss, *_), (z, x, keys) = ALL["flow"], programs("flow"), batch(4, 5)
    weight = np.ones((4, 5), np.float32)
    found = jax.jit(head.loss)(params, jnp.asarray(z, jnp.bfloat16), x, weight, keys)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, loss(params, z, x, weight, keys)[0], rtol=0.05)


def test_guidance_moves_away_from_what_is_said_without_the_condition():
    (params, _, _, guided), (z, _, keys) = programs("cosine"), batch(4, 5)
    said = np.asarray(jax.jit(ALL["cosine"].said)(params, z))
    moved = said[2:] + 2.5 * (said[:2] - said[2:])
    found = guided(params, z, keys, guidance=2.5)
    np.testing.assert_allclose(found, moved / np.linalg.norm(moved, axis=-1, keepdims=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-6)


# ---- stages


def test_one_stage_is_a_plain_flow_to_the_bit():
    head, stages = flow(Exact(variance=0.5), "logit-normal"), Stages(grid=(2, 2), count=1, jump="corrected")
    z, x, keys = batch(3, 4)

    @jax.jit
    def found(x, trained_from, drawn_from):
        draw = functools.partial(head.sample, steps=3, temperature=1.0, guidance=1, stage=0)
        return (
            head.loss({"net": {}}, z, x, jnp.ones((3, 4)), keys, start_BSC=trained_from, stage=0),
            draw({"net": {}}, z, keys, start_BSC=drawn_from),
        )

    white = jax.jit(
        lambda: [heads.noise(own, 4, 3) for own in (jax.vmap(jax.random.fold_in, (0, None))(keys, 0), keys)]
    )
    ((start, end),) = stages.chain(x, [np.asarray(white()[0])])
    jax.tree.map(np.testing.assert_array_equal, found(x, None, None), found(end, start, white()[1]))


def test_times_of_stages_and_maps():
    """Each time means one stage, and the tokens of a map that see each other have one time."""
    head = flow(Clock(), stages=3)
    z, x, keys = batch(2, 6)
    stage, maps = jnp.asarray([[0, 0, 1, 1, 2, 2]] * 2), jnp.asarray([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1]])

    def weighed(weight, maps):
        zeros = jnp.zeros_like(x)
        return head.loss({"net": {}}, z, zeros, weight, keys, start_BSC=zeros, stage=stage, map_BS=maps)

    each = jax.jit(jax.grad(weighed))
    times = np.sqrt(each(jnp.ones((2, 6)), maps)) * 3 / 1000
    assert np.array_equal(np.floor(times), [[2, 2, 1, 1, 0, 0]] * 2)
    share = times % 1
    for row, own in zip(share, np.asarray(maps)):
        for other in range(6):
            assert (np.abs(row - row[other]) < 1e-5).tolist() == (own == own[other]).tolist()
    whole = np.sqrt(each(jnp.ones((2, 6)), None)) * 3 / 1000 % 1
    assert np.ptp(whole, axis=1).max() < 1e-5 < abs(whole[0, 0] - whole[1, 0])


def test_steps_of_three_stages_cost_seven_sixteenths():
    head, stages = flow(MLP(width=8, depth=2), stages=3), Stages(grid=(8, 8), count=3, jump="corrected")
    sizes = [math.prod(grid) for grid in stages.grids]
    staged = sum(5 * size * head.flops(HIDDEN, size) for size in sizes)
    assert staged / (15 * sizes[-1] * head.flops(HIDDEN, sizes[-1])) == stages.cost == 0.4375


# ---- nets


def test_mlp_is_that_of_mar():
    """As MAR writes it, in float64; but for the scale and bias of norms, which modulations make needless."""
    net, random = MLP(width=8, depth=3), np.random.default_rng(1)
    params = drawn(net.table(HIDDEN, CHANNELS, 2 * CHANNELS))
    y, z, time = (random.normal(size=(2, 4, size)).astype("f") for size in (CHANNELS, HIDDEN, 1))
    time = np.abs(time[..., 0]) * 300
    found = jax.jit(net)(params, y, time, z, None)

    silu = lambda x: x * scipy.special.expit(x)  # noqa: E731
    dense = lambda p, x: x @ np.float64(p["kernel"]) + p["bias"]  # noqa: E731
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)  # noqa: E731
    angle = time[..., None] * np.exp(-math.log(10_000) * np.arange(128) / 128)
    embedding = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    c = silu(
        dense(params["time"]["down"], silu(dense(params["time"]["up"], embedding))) + dense(params["condition"], z)
    )
    x = dense(params["token"], y)
    for index in range(3):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"])
        scale, shift, gate = np.split(dense(own["modulation"], c), 3, -1)
        x = x + gate * dense(own["down"], silu(dense(own["up"], norm(x) * (1 + scale) + shift)))
    scale, shift = np.split(dense(params["modulation"], c), 2, -1)
    # The float32 of an angle of 1000 is 3e-5 from it.
    np.testing.assert_allclose(found, dense(params["output"], norm(x) * (1 + scale) + shift), rtol=1e-3, atol=1e-3)
    products = sum(math.prod(p.shape) for p in net.table(HIDDEN, CHANNELS, 6) if p.path.endswith("kernel"))
    assert net.flops(HIDDEN, CHANNELS, 6, 64) == 2 * products


NET = Spatial(width=8, depth=2, heads=2)


@functools.cache
def spatial():
    return jax.jit(NET)


@pytest.mark.parametrize("net", [MLP(width=8, depth=2), NET])
def test_nets_begin_with_zeros(net):
    z, x, _ = batch(2, 6)
    params = drawn(net.table(HIDDEN, CHANNELS, CHANNELS), zeros=0)
    run = spatial() if net is NET else jax.jit(net)
    found = run(params, x, jnp.full((2, 6), 500.0), z, np.zeros((2, 6), np.int32))
    assert found.dtype == np.float32
    assert np.abs(found).max() == 0


def test_tokens_of_a_map_see_each_other_and_no_others():
    params, (z, x, _) = drawn(NET.table(HIDDEN, CHANNELS, CHANNELS)), batch(2, 6)
    maps, times = np.array([[0, 0, 1, 1, 1, 1]] * 2, np.int32), np.full((2, 6), 500.0, np.float32)

    def seen(token):
        """Which tokens change when this one does."""
        changed = x.copy()
        changed[0, token] += 1
        return (np.abs(spatial()(params, changed, times, z, maps) - whole) > 0).any(-1)

    whole = spatial()(params, x, times, z, maps)
    assert (maps[0] == maps[0, 1]).tolist() == seen(1)[0].tolist()
    assert (maps[0] == maps[0, 4]).tolist() == seen(4)[0].tolist()
    assert not seen(4)[1].any()
    # A map is the same wherever it stands: nothing counts positions but within it.
    moved = [np.roll(a, 4, axis=1) for a in (x, times, z, maps)]
    np.testing.assert_allclose(spatial()(params, *moved), np.roll(whole, 4, axis=1), rtol=1e-4, atol=1e-5)


def test_spatial_net_as_the_net_of_a_flow():
    head = flow(NET, stages=2)
    params, (z, x, keys) = drawn(head.table(HIDDEN)), batch(4, 5)
    maps, stage = np.array([[0, 1, 1, 1, 1]] * 4, np.int32), np.array([[0, 1, 1, 1, 1]] * 4, np.int32)
    assert np.isfinite(
        jax.jit(head.loss)(params, z, x, np.ones((4, 5), np.float32), keys, start_BSC=x, stage=stage, map_BS=maps)
    )
    draw = functools.partial(head.sample, steps=2, temperature=1.0, guidance=2.0)
    found = jax.eval_shape(draw, params, z, keys, start_BSC=x[:2], stage=stage[:2], map_BS=maps[:2])
    assert found.shape == (2, 5, CHANNELS)
    # Products with the weights, and every token of four with four: 4 * width in each layer.
    parts = head.flops(HIDDEN, 4), head.flops(HIDDEN, 1)
    assert parts[0] - parts[1] == 4 * NET.width * NET.depth * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(channels=0), "head.channels=0: must be a positive number"),
        (lambda: flow(MLP(width=8, depth=1), "logitnormal"), "head.times: unknown 'logitnormal'; did you mean 'logit"),
        (lambda: MLP(width=8, depth=0), "net.depth=0: must be at least 1"),
        (lambda: Spatial(width=9, depth=1, heads=2), "hidden_size=9 is not a multiple of num_heads=2"),
    ],
)
def test_refused(make: Any, message: str):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)
