"""Heads: which distribution of a continuous token the decoder's output stands for.

A head has a table of parameters, a loss and a way to draw. Tokens drawn together are independent given z, unless the
net of a head sees a whole map at once.

Shape suffixes: B batch, S sequence, D hidden of the decoder, C channels of a token, K bins of a channel.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxup.continuous.nets import Net, Table, dense, linear
from jaxup.continuous.schedules import cosine
from jaxup.errors import UserError, suggest

Guidance = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(abc.ABC):
    """Hashable: part of the key of a program."""

    channels: int  # of a token

    unit: ClassVar[bool] = False  # whether it draws tokens of length 1, which then are what the decoder must be fed

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise UserError("must be a positive number", at=f"head.{field.name}={value}")

    @abc.abstractmethod
    def table(self, hidden: int) -> Table:
        """Its parameters, for a decoder of this width."""

    @abc.abstractmethod
    def loss(
        self,
        params: Mapping[str, Any],
        z_BSD: Float[Array, "batch seq hidden"],
        x_BSC: Float[Array, "batch seq channels"],
        weight_BS: Float[Array, "batch seq"],
        key_B: Key[Array, " batch"],
        *,
        start_BSC: Float[Array, "batch seq channels"] | None = None,
        stage: int | Int[Array, "batch seq"] = 0,
        map_BS: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, ""]:
        """The sum of weight * loss over tokens, float32; the loss of a token is the mean over its channels.

        Where the weight is 0 it does not matter what stands there, be it NaN. The noise of a row depends on its key and
        on nothing else. `start_BSC` and `stage` are those of `jaxup.continuous.stages`; `map_BS` numbers the maps of
        a row from 0 on, for a net that sees whole maps: such a map has weights everywhere.
        """

    @abc.abstractmethod
    def sample(
        self,
        params: Mapping[str, Any],
        z_BSD: Float[Array, "batch seq hidden"],
        key_B: Key[Array, " keys"],
        *,
        steps: int,
        temperature: float | Float[Array, ""],
        guidance: Guidance,
        start_BSC: Float[Array, "rows seq channels"] | None = None,
        stage: int | Int[Array, "rows seq"] = 0,
        map_BS: Int[Array, "rows seq"] | None = None,
    ) -> Float[Array, "rows seq channels"]:
        """Tokens, float32.

        Guidance other than the number 1 wants rows with their condition, and then as many with none (Ho & Salimans,
        arXiv 2207.12598): what the first half says is moved away from what the second half says, and only the first
        half's rows are drawn. As an array it may be traced, also where it is 1. Keys are those of the rows drawn; more
        are ignored.

        `steps` and `temperature` mean something to some heads only: at temperature 0 a head with a density draws its
        mean, and the categorical head the likeliest bin; the cosine head knows no noise.
        """

    @abc.abstractmethod
    def flops(self, hidden: int, tokens: int) -> float:
        """Of one token in one step, forward; a map has so many tokens."""


# ---- heads of one step


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Direct(Head):
    """Two linear layers with a GELU between, as MetaMorph's head is: D-D-outputs."""

    last_std: ClassVar[float | None] = 0.0  # of the last layer; with 0 the first prediction is that of scaled values

    @property
    def outputs(self) -> int:
        return self.channels

    @property
    def guided(self) -> int:
        """So many outputs are moved by guidance; of the others the condition's are taken."""
        return self.outputs

    def table(self, hidden: int) -> Table:
        return (*dense("up", hidden, hidden), *dense("down", hidden, self.outputs, std=self.last_std))

    def flops(self, hidden: int, tokens: int) -> float:
        return 2.0 * hidden * (hidden + self.outputs)

    def loss(self, params, z_BSD, x_BSC, weight_BS, key_B, *, start_BSC=None, stage=0, map_BS=None):
        z_BSD, x_BSC = (_weighed(weight_BS, a) for a in (z_BSD, x_BSC))
        return jnp.sum(weight_BS * self.each(self.said(params, z_BSD), x_BSC))

    def sample(self, params, z_BSD, key_B, *, steps, temperature, guidance, start_BSC=None, stage=0, map_BS=None):
        said = _guided(self.said(params, z_BSD), guidance, self.guided)
        return self.drawn(said, key_B[: len(said)], temperature)

    def said(self, params: Mapping[str, Any], z_BSD: Float[Array, "batch seq hidden"]) -> Array:
        """Float32 [B, S, outputs]."""
        return linear(params["down"], jax.nn.gelu(linear(params["up"], z_BSD), approximate=False)).astype(jnp.float32)

    @abc.abstractmethod
    def each(self, said: Array, x_BSC: Array) -> Float[Array, "batch seq"]:
        """The loss of each token."""

    @abc.abstractmethod
    def drawn(self, said: Array, key_B: Array, temperature: Any) -> Float[Array, "rows seq channels"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(_Direct):
    """MetaMorph's regression (arXiv 2412.14164): a direction, always the same one for the same z.

    The loss is -cos, at its least -R where R is the length of the mean of unit targets. Draws have length 1.
    """

    unit: ClassVar[bool] = True

    last_std: ClassVar[float | None] = None  # zeros have no direction

    def each(self, said, x_BSC):
        return -jnp.sum(_unit(said) * _unit(x_BSC), axis=-1)

    def drawn(self, said, key_B, temperature):
        return _unit(said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(_Direct):
    """A mean and a variance for each channel; the loss is the negative log-density in nats.

    The variance has `least_deviation`^2 added, so that targets that are certain do not make the loss fall for ever.
    Guidance moves the means. The temperature multiplies the deviation.
    """

    least_deviation: float

    @property
    def outputs(self):
        return 2 * self.channels

    @property
    def guided(self):
        return self.channels

    def each(self, said, x_BSC):
        mean, variance = self._moments(said)
        nats = 0.5 * (jnp.log(2 * math.pi * variance) + jnp.square(x_BSC - mean) / variance)
        return jnp.mean(nats, axis=-1)

    def drawn(self, said, key_B, temperature):
        mean, variance = self._moments(said)
        return mean + temperature * jnp.sqrt(variance) * noise(key_B, *mean.shape[1:])

    def _moments(self, said):
        mean, log_variance = jnp.split(said, 2, axis=-1)
        return mean, jnp.exp(log_variance) + self.least_deviation**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical(_Direct):
    """Each channel in one of `bins` of equal width between -limit and limit; the loss is the cross-entropy in nats.

    Values beyond the limits are in the outermost bins. Draws are the middles of bins.
    """

    bins: int
    limit: float  # in deviations of the values, which have been scaled to 1

    @property
    def outputs(self):
        return self.channels * self.bins

    def each(self, said, x_BSC):
        log_BSCK = jax.nn.log_softmax(self._logits(said), axis=-1)
        bin_BSC = jnp.floor((x_BSC / self.limit + 1) / 2 * self.bins).astype(jnp.int32)
        bin_BSC = jnp.clip(bin_BSC, 0, self.bins - 1)
        return -jnp.mean(jnp.take_along_axis(log_BSCK, bin_BSC[..., None], axis=-1)[..., 0], axis=-1)

    def drawn(self, said, key_B, temperature):
        logits_BSCK = self._logits(said)
        # Gumbel noise times the temperature: the same draw as from logits divided by it, and 0 takes the likeliest.
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits_BSCK.shape[1:]))(key_B)
        bin_BSC = jnp.argmax(logits_BSCK + temperature * gumbel, axis=-1)
        return ((bin_BSC.astype(jnp.float32) + 0.5) / self.bins * 2 - 1) * self.limit

    def _logits(self, said):
        return said.reshape(*said.shape[:2], self.channels, self.bins)


# ---- heads of many steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iterative(Head):
    """By a net that is asked again and again on the way from noise to tokens."""

    net: Net
    draws: int  # of time and noise for each token and step of training, for which z is made once; MAR has 4

    outputs: ClassVar[int]  # of the net, for each channel

    def table(self, hidden: int) -> Table:
        own = self.net.table(hidden, self.channels, self.outputs * self.channels)
        return tuple(dataclasses.replace(param, path=f"net.{param.path}") for param in own)

    def flops(self, hidden: int, tokens: int) -> float:
        return self.net.flops(hidden, self.channels, self.outputs * self.channels, tokens)

    def loss(self, params, z_BSD, x_BSC, weight_BS, key_B, *, start_BSC=None, stage=0, map_BS=None):
        z_BSD, x_BSC, start_BSC = (_weighed(weight_BS, a) for a in (z_BSD, x_BSC, start_BSC))
        seq = x_BSC.shape[1]
        # Draws are rows of one call: products with an axis more are half as fast on CPUs. Those of one row are side by
        # side, so that they lie on its device.
        each = lambda a: a if a is None or jnp.ndim(a) < 2 else jnp.repeat(a, self.draws, axis=0)  # noqa: E731
        z_RSD, x_RSC, start_RSC, stage, map_RS = (each(a) for a in (z_BSD, x_BSC, start_BSC, stage, map_BS))
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        key_R = fold(key_B, jnp.arange(self.draws)).reshape(-1)
        share_RS = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (seq,)))(key_R)
        if self.net.joint:
            map_or_0_RS = jnp.zeros(share_RS.shape, jnp.int32) if map_RS is None else jnp.maximum(map_RS, 0)
            share_RS = jnp.take_along_axis(share_RS, map_or_0_RS, axis=1)
        start_RSC = noise(key_R, seq, self.channels) if start_RSC is None else start_RSC

        def run(y_RSC, time_RS):
            return self.net(params["net"], y_RSC, time_RS, z_RSD, map_RS)

        each_RS = jnp.mean(self.terms(run, x_RSC, start_RSC, share_RS, stage), axis=-1)
        each_BS = jnp.mean(each_RS.reshape(-1, self.draws, seq), axis=1)
        return jnp.sum(weight_BS * each_BS)

    @abc.abstractmethod
    def terms(
        self, run: Callable[[Array, Array], Array], x_BSC: Array, start_BSC: Array, share_BS: Array, stage: Any
    ) -> Float[Array, "batch seq channels"]:
        """The loss of each channel, where `run(y_BSC, time_BS)` is the net, and `share_BS`, uniform from 0 to 1, says
        how far on the way from x to its start each token is."""

    def _said(self, params, z_BSD, y_BSC, time, guidance, map_BS):
        """What the net says with guidance, of rows at these times."""
        time_BS = jnp.broadcast_to(jnp.asarray(time, jnp.float32), y_BSC.shape[:2])
        if not _plain(guidance):
            y_BSC, time_BS = jnp.concatenate([y_BSC, y_BSC]), jnp.concatenate([time_BS, time_BS])
            map_BS = None if map_BS is None else jnp.concatenate([map_BS, map_BS])
        return _guided(self.net(params["net"], y_BSC, time_BS, z_BSD, map_BS), guidance, self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion(Iterative):
    """Denoising diffusion that predicts the noise, by the cosine schedule, with a learned variance.

    The loss is the squared error of the noise plus the variational bound in bits, in which the mean carries no gradient
    (Nichol & Dhariwal, arXiv 2102.09672: their weight of .001, times 1000 steps; and so MAR's code). Of the step to the
    clean token the bound has the density, where they have pixels of 256 values.

    The temperature multiplies the noise of each step, not the noise that drawing begins with, as MAR has it. Guidance
    moves the predicted noise, and leaves the variance. What a step predicts of the clean token is kept within `limit`:
    where all is noise, an error of the predicted noise is many thousand times as large in it.
    """

    train_steps: int
    limit: float  # in deviations of the values, which have been scaled to 1

    outputs: ClassVar[int] = 2

    def terms(self, run, x_BSC, start_BSC, share_BS, stage):
        index_BS = jnp.minimum((share_BS * self.train_steps).astype(jnp.int32), self.train_steps - 1)
        signal_BS1 = _column(cosine(self.train_steps, self.train_steps).signal)[index_BS][..., None]
        y_BSC = jnp.sqrt(signal_BS1) * x_BSC + jnp.sqrt(1 - signal_BS1) * start_BSC
        said_BSC, mix_BSC = jnp.split(run(y_BSC, self._time(index_BS)), 2, axis=-1)
        squared_BSC = jnp.square(said_BSC - start_BSC)
        return squared_BSC + self.bound(jax.lax.stop_gradient(squared_BSC), mix_BSC, index_BS)

    def bound(
        self,
        squared_BSC: Float[Array, "batch seq channels"],
        mix_BSC: Float[Array, "batch seq channels"],
        index_BS: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq channels"]:
        """Bits of KL(x_{t-1} given x_t and x || what the head says of it); at the first step those of x's density.

        `squared_BSC` are the squared errors of the predicted noise, which are sqrt((1 - A) / A) times as large of x
        before the square. `mix_BSC` says how large the variance is, from -1 for the posterior's to 1 for beta.
        """
        table = cosine(self.train_steps, self.train_steps)
        apart = table.clean**2 * (1 - table.signal) / table.signal
        first_BS1 = (index_BS == 0)[..., None]
        apart_BS1, low_BS1, high_BS1 = (
            _column(column)[index_BS][..., None] for column in (apart, table.log_posterior, table.log_beta)
        )
        own_BSC = _between(low_BS1, high_BS1, mix_BSC)
        spread_BSC = jnp.where(first_BS1, math.log(2 * math.pi), jnp.exp(low_BS1 - own_BSC) - 1 - low_BS1)
        return (own_BSC + spread_BSC + apart_BS1 * squared_BSC * jnp.exp(-own_BSC)) / (2 * math.log(2))

    def sample(self, params, z_BSD, key_B, *, steps, temperature, guidance, start_BSC=None, stage=0, map_BS=None):
        table = cosine(self.train_steps, steps)
        key_B, seq = key_B[: _rows(z_BSD, guidance)], z_BSD.shape[1]

        def back(y_BSC, step):
            number, time, signal, clean, noisy, low, high = step
            said = self._said(params, z_BSD, y_BSC, self._time(time), guidance, map_BS)
            said_BSC, mix_BSC = jnp.split(said, 2, axis=-1)
            x_BSC = (y_BSC - jnp.sqrt(1 - signal) * said_BSC) / jnp.sqrt(signal)
            mean_BSC = clean * jnp.clip(x_BSC, -self.limit, self.limit) + noisy * y_BSC
            deviation_BSC = temperature * jnp.exp(_between(low, high, mix_BSC) / 2)
            added_BSC = deviation_BSC * noise(key_B, seq, self.channels, number)
            return mean_BSC + jnp.where(number < steps, added_BSC, 0), None  # the last step adds none

        first_BSC = noise(key_B, seq, self.channels)
        steps_back = (jnp.arange(1, steps + 1), *(_column(column[::-1]) for column in table))
        return jax.lax.scan(back, first_BSC, steps_back)[0]

    def _time(self, index):
        return index * (1000 / self.train_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow(Iterative):
    """Flow matching (Lipman et al., arXiv 2210.02747) along straight lines: from a token to noise, or from the end of a
    stage to its start (`jaxup.continuous.stages`).

    Of a point r * start + (1 - r) * x it predicts start - x; Euler's method draws. The temperature multiplies the noise
    that drawing begins with; a start that is given is taken as it is.
    """

    times: str  # how r is drawn in training: "uniform", or "logit-normal" (arXiv 2403.03206): oftener in the middle
    stages: int  # into how many the whole way is divided

    outputs: ClassVar[int] = 1

    def __post_init__(self):
        super().__post_init__()
        if self.times not in TIMES:
            raise UserError(f"unknown {self.times!r}{suggest(self.times, TIMES)}", at="head.times")

    def terms(self, run, x_BSC, start_BSC, share_BS, stage):
        r_BS = TIMES[self.times](share_BS)
        y_BSC = r_BS[..., None] * start_BSC + (1 - r_BS[..., None]) * x_BSC
        return jnp.square(run(y_BSC, self._time(r_BS, stage)) - (start_BSC - x_BSC))

    def sample(self, params, z_BSD, key_B, *, steps, temperature, guidance, start_BSC=None, stage=0, map_BS=None):
        if start_BSC is None:
            start_BSC = temperature * noise(key_B[: _rows(z_BSD, guidance)], z_BSD.shape[1], self.channels)

        def back(step, y_BSC):
            time = self._time(1 - step / steps, stage)
            return y_BSC - self._said(params, z_BSD, y_BSC, time, guidance, map_BS) / steps

        return jax.lax.fori_loop(0, steps, back, start_BSC)

    def _time(self, r, stage):
        """Of the whole way, so that each time means one stage: levels of noise belong to two where stages overlap."""
        return (self.stages - 1 - stage + r) * (1000 / self.stages)


TIMES: dict[str, Callable[[Array], Array]] = {
    "uniform": lambda share: share,
    "logit-normal": lambda share: jax.nn.sigmoid(jax.scipy.special.ndtri(share)),
}

HEADS: dict[str, type[Head]] = {
    "categorical": Categorical, "cosine": Cosine, "gaussian": Gaussian, "diffusion": Diffusion, "flow": Flow,
}  # fmt: skip


# ---- what these consist of


def noise(key_B: Key[Array, " batch"], seq: int, channels: int, number: Any = 0) -> Float[Array, "batch seq channels"]:
    """White noise of rows, each by its key alone; a longer row begins with the same. `number`: which one of a key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), (seq, channels)))(key_B)


def _weighed(weight_BS, a):
    """Zeros where nothing is weighed, whatever is there: 0 times NaN is NaN, also in a gradient."""
    return None if a is None else jnp.where(weight_BS[..., None] != 0, a, 0)


def _plain(guidance):
    return isinstance(guidance, (int, float)) and guidance == 1


def _rows(z_BSD, guidance):
    """How many rows are drawn."""
    return len(z_BSD) // (1 if _plain(guidance) else 2)


def _guided(said, guidance, moved):
    """Of rows with and rows without condition those with, of which the first `moved` outputs are moved away."""
    if _plain(guidance):
        return said
    with_BSO, without_BSO = jnp.split(said, 2)
    # At 1 to the bit what the condition says.
    apart_BSO = with_BSO[..., :moved] - without_BSO[..., :moved]
    return with_BSO.at[..., :moved].add((guidance - 1) * apart_BSO)


def _column(column: np.ndarray) -> Array:
    return jnp.asarray(column, jnp.float32)


def _between(low, high, mix):
    """From `low` where mix is -1 to `high` where it is 1."""
    return low + (mix + 1) / 2 * (high - low)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
