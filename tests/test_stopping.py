"""Poor runs stopped early: who stops, whatever the order and the moment of looking; and the rules tested."""

import dataclasses
import itertools
import math
from random import Random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import outcome

from jaxup.errors import UserError
from jaxup.experiments.outcomes import Outcome
from jaxup.experiments.stopping import (
    DIVERGED,
    HALVING,
    NORMS,
    Rule,
    decide,
    gradient_noise,
    loss_at,
    norm_at,
    squared_gradient,
)
from jaxup.experiments.stopping_tested import CORRECTED, LOSS, NORM, RANDOM, at_random, examine, prune, rank_correlation

RULE = Rule(
    stop=NORMS, stop_from=0.1, stop_every=0.02, stop_keep=2, stop_norm=0.2, stop_loss=0.02, stop_checks=3, stop_factor=2
)  # fmt: skip
HALVES = dataclasses.replace(RULE, stop=HALVING)


def names(stops):
    return [(stop.cell, round(stop.at, 6)) for stop in stops]


def cut(run, steps):
    """As it was after so many steps."""
    curve = tuple((step, loss) for step, loss in run.curve if step <= steps)
    logs = {key: getattr(run, key)[:steps] for key in ("samples_N", "flops_N", "loss_N", "norm_N")}
    return dataclasses.replace(run, score=math.nan, steps=steps, curve=curve, **logs)


def curve(losses):
    """Validation at 0, 5, 10, ... of 100 steps."""
    return tuple(zip(range(0, 101, 5), losses))


def group(**signals):
    """Runs of one group: a norm, a training loss and a validation loss each, which they have from 5 steps on."""
    return [
        outcome(name, score=val, norm=norm, loss=loss, curve=curve([9.0] + 20 * [val]))
        for name, (norm, loss, val) in signals.items()
    ]


def test_both_signals_are_needed_three_times_in_a_row():
    both = {"poor": (1.3, 0.9, 3.2), "high": (1.3, 1.0, 3.3), "low": (1.0, 0.9, 3.4), "a": (1.0, 1.0, 3.0)}
    runs = group(**both, b=(1.0, 1.0, 3.1))
    (stop,) = decide(runs, RULE)
    assert (stop.cell, stop.seed, stop.step, stop.kind) == ("poor", 0, 14, NORMS)
    assert stop.at == pytest.approx(0.14)
    assert "30% above" in stop.why
    assert "0.1000 below" in stop.why
    assert decide(runs, dataclasses.replace(RULE, stop="")) == []
    assert names(decide(runs, dataclasses.replace(RULE, stop_checks=1))) == [("poor", 0.1)]
    # One check in three is not in a row.
    runs[0] = dataclasses.replace(runs[0], norm_N=np.where(np.arange(100) % 6 < 2, 1.0, 1.3))
    assert decide(runs, RULE) == []


def test_who_is_never_stopped():
    # The best on validation, even if it is alone with both signs.
    runs = group(best=(1.5, 0.5, 2.0), a=(1.0, 1.0, 3.0), b=(1.0, 1.0, 3.1), c=(1.0, 1.0, 3.1))
    assert decide(runs, RULE) == []
    # The last two; the worst goes first, and its absence changes the median of the others.
    runs = group(a=(1.0, 1.0, 3.0), b=(1.1, 1.0, 3.1), c=(3.0, 0.5, 3.1), d=(2.0, 0.6, 3.1))
    assert {stop.cell for stop in decide(runs, RULE)} == {"c", "d"}
    assert names(decide(runs, dataclasses.replace(RULE, stop_keep=3))) == [("c", 0.14)]
    # Nobody is poor before there is a validation that tells them apart.
    assert decide([dataclasses.replace(r, curve=((0, 9.0), (100, r.score))) for r in runs], RULE) == []
    # Groups are looked at by themselves.
    assert decide([dataclasses.replace(r, group=r.cell) for r in runs], RULE) == []


@pytest.mark.parametrize("rule", [RULE, HALVES])
def test_identical_runs_are_never_pruned(rule):
    runs = [dataclasses.replace(group(a=(1.2, 1.0, 3.0))[0], cell=cell) for cell in "abcdefgh"]
    assert decide(runs, rule) == []


def any_runs(seed, count):
    """That differ, each always about as much; of some the same numbers."""
    rng = np.random.default_rng(seed)
    many = (np.round(rng.uniform(1, 3, (count, 1)) + rng.normal(0, 0.2, (count, 20)), 1) for _ in range(3))
    return [
        outcome(str(i), 0, val[-1], norm=np.repeat(norm, 5), loss=np.repeat(loss, 5), curve=curve([9.0, *val]))
        for i, (norm, loss, val) in enumerate(zip(*(values.tolist() for values in many)))
    ]  # fmt: skip


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(3, 8), st.sampled_from([RULE, HALVES]))
def test_neither_order_nor_the_moment_of_looking_changes_a_decision(seed, count, rule):
    runs, random = any_runs(seed, count), Random(seed)
    at_the_end = decide(runs, rule)
    assert decide(random.sample(runs, count), rule) == at_the_end
    # Live: each run is somewhere, some have not begun; those that stop are found to stop, and go no further.
    steps, stopped = dict.fromkeys((r.cell for r in runs), 0), {}
    while any(steps[r.cell] < 100 and r.cell not in stopped for r in runs):
        for r in runs:
            if r.cell not in stopped:
                steps[r.cell] = min(100, steps[r.cell] + random.randrange(0, 30))
        now = []
        for r in runs:
            seen = cut(r, steps[r.cell]) if 0 < steps[r.cell] < 100 else r
            seen = seen if steps[r.cell] else Outcome.to_come(r.cell, 0, 8)
            now.append(dataclasses.replace(seen, group="all", stopped=stopped.get(r.cell, "")))
        stopped |= {stop.cell: stop.why for stop in decide(now, rule)}
    assert stopped == {stop.cell: stop.why for stop in at_the_end}


def test_a_group_waits_for_its_last_run_and_not_for_one_that_ended():
    runs = group(poor=(1.5, 0.5, 3.2), a=(1.0, 1.0, 3.0), b=(1.0, 1.0, 3.1), c=(1.0, 1.0, 3.1))
    assert len(decide(runs, RULE)) == 1
    assert decide([*runs[:3], cut(runs[3], 13)], RULE) == []
    assert decide([*runs[:3], dataclasses.replace(Outcome.to_come("c", 0, 8), group="8 0")], RULE) == []
    assert len(decide([*runs[:3], dataclasses.replace(cut(runs[3], 3), stopped="a kernel died")], RULE)) == 1


def test_successive_halving():
    runs = [outcome(str(i), score=3.0 + i, curve=curve([9.0] + 20 * [3.0 + i])) for i in range(8)]
    found = decide(runs, HALVES)
    assert names(found) == [*((str(i), 0.1) for i in (4, 5, 6, 7)), ("2", 0.2), ("3", 0.2)]
    assert "the 4 that go on have at most 6.0000" in found[0].why
    thirds = dataclasses.replace(HALVES, stop_factor=3, stop_from=0.3)
    assert names(decide(runs, thirds)) == [*((str(i), 0.3) for i in (3, 4, 5, 6, 7)), ("2", 0.9)]


def test_what_diverges_stops_at_once_and_is_counted_apart():
    runs = group(a=(1.0, 1.0, 3.0), b=(1.0, 1.0, 3.1), up=(1.0, 1.0, 3.1), nan=(1.0, 1.0, 3.1))
    runs[2] = dataclasses.replace(runs[2], loss_N=np.where(np.arange(100) < 4, 1.0, 90.0))
    runs[3] = dataclasses.replace(runs[3], loss_N=np.where(np.arange(100) == 1, np.nan, 1.0))
    found = decide(runs, RULE)
    assert names(found) == [("nan", 0.02), ("up", 0.05)]
    assert {stop.kind for stop in found} == {DIVERGED}
    assert all(stop.why.startswith(DIVERGED) for stop in found)


def test_signals_are_smoothed_as_adam_does_it():
    values = np.random.default_rng(0).normal(size=400)
    average, rate = 0.0, 2 / (0.02 * 400 + 1)
    for value in values[:60]:
        average = (1 - rate) * average + rate * value
    average /= 1 - (1 - rate) ** 60
    # Sums of 60 numbers of size one in another order.
    assert loss_at(outcome("a", steps=400, loss=values), 0.15) == pytest.approx(average, abs=1e-13)


# ---- gradients without the noise of their batches


def test_the_noise_of_a_quadratic_loss_is_found():
    """Rows i with the loss |x - c_i|^2 / 2, whose gradients x - c_i are G and noise of a covariance that is known."""
    rng, small, large, batches = np.random.default_rng(0), 4, 32, 4000
    gradient, sigma = np.array([0.5, -0.2, 0.1]), np.diag([1.0, 0.5, 0.25])
    rows = rng.multivariate_normal(gradient, sigma, (batches, large))
    parts = rows.reshape(batches, large // small, small, 3).mean(2)
    micro, whole = (parts**2).sum(-1).mean(-1), (rows.mean(1) ** 2).sum(-1)
    for values, true in (
        (squared_gradient(micro, whole, small, large), gradient @ gradient),
        (gradient_noise(micro, whole, small, large), np.trace(sigma)),
    ):
        assert values.mean() == pytest.approx(true, abs=4 * values.std() / math.sqrt(batches))  # standard errors
    excess = [(rows[:, :n].mean(1) ** 2).sum(-1).mean() - gradient @ gradient for n in (16, 32)]
    assert excess[0] / excess[1] == pytest.approx(2, abs=0.15)  # each is a mean of 4000 within some 2%
    # What is expected of batches of n rows is found exactly.
    mean = lambda n: gradient @ gradient + np.trace(sigma) / n  # noqa: E731
    assert squared_gradient(mean(4), mean(32), 4, 32) == pytest.approx(gradient @ gradient, rel=1e-12)
    assert gradient_noise(mean(4), mean(32), 4, 32) == pytest.approx(np.trace(sigma), rel=1e-12)


def test_norms_of_different_batches_are_compared_without_their_noise():
    """|G| = 1, tr(Sigma) = 16: by its norm the small batch would be the poor one."""
    noisy = lambda cell, rows, micro, **more: outcome(  # noqa: E731
        cell, batch_size=rows, norm=math.sqrt(1 + 16 / rows), micro_N=np.full(100, 1 + 16 / micro), micro_rows=micro,
        group="all", loss=1.0, **more,
    )  # fmt: skip
    runs = [
        noisy(str(rows), rows, rows // 4, score=3.0, curve=curve([9.0] + 20 * [3.0 + 1 / rows]))
        for rows in (8, 16, 32, 64)
    ]
    assert [norm_at(run, 0.2, corrected=True) for run in runs] == pytest.approx([1.0] * 4)
    runs[0] = dataclasses.replace(runs[0], loss_N=np.full(100, 0.5))
    assert decide(runs, RULE) == []
    assert (
        len(decide([dataclasses.replace(run, batch_size=8, samples_N=np.arange(1, 101) * 8) for run in runs], RULE))
        == 1
    )


# ---- the rules tested


def test_rank_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 20).astype(float), rng.normal(size=20)
    weights = np.stack([np.ones(20, int), rng.multinomial(20, np.full(20, 0.05))])
    plain, drawn = rank_correlation(x, y, ["a"] * 20, weights)
    assert plain == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    repeated = scipy.stats.spearmanr(np.repeat(x, weights[1]), np.repeat(y, weights[1])).statistic
    assert drawn == pytest.approx(repeated, abs=1e-12)
    # Within two races: what sets one off from the other is no correlation.
    races = ["a"] * 10 + ["b"] * 10
    apart = [scipy.stats.spearmanr(x[mine], y[mine]).statistic for mine in (slice(10), slice(10, 20))]
    x[10:] += 100
    y[10:] -= 100
    x[:] = x + 1e-3 * np.arange(20)  # without ties the ranks of both races have the same variance
    apart = [scipy.stats.spearmanr(x[mine], y[mine]).statistic for mine in (slice(10), slice(10, 20))]
    assert rank_correlation(x, y, races, weights[:1])[0] == pytest.approx(np.mean(apart), abs=1e-12)
    assert rank_correlation(x, y, ["a"] * 20, weights[:1])[0] < -0.5


def grid(seeds=3, *, sign=1.0, noise=0.0):
    """Eight learning rates and three seeds: the higher the norm and the lower the loss, the worse the end."""
    rng = np.random.default_rng(0)
    runs = []
    for rate, seed in itertools.product(range(8), range(seeds)):
        score = 3 + sign * 0.1 * rate + 10 * seed + noise * rng.normal()
        late = [4 - 0.05 * n - 0.01 * rate for n in range(10)]  # what is best early is worst in the end
        losses = [9.0, *late, *np.linspace(late[-1], score, 10)]
        runs.append(outcome(f"rate {rate}", seed, score, norm=1 + 0.2 * rate, loss=2 - 0.1 * rate, curve=curve(losses)))
    return runs


def test_a_rule_that_is_right():
    found = examine(grid(noise=0.01), RULE)
    assert found.reproduced is True
    within = {(c.signal, c.at): c.rho for c in found.correlations if not c.across}
    assert within[NORM, 0.1].value == pytest.approx(1, abs=0.1)
    assert within[LOSS, 0.3].value == pytest.approx(-1, abs=0.1)
    norms, halving, by_chance = found.prunings
    # One after the other stops until the norms of those left are within a fifth of their median: five of eight.
    assert (norms.runs, norms.precision, norms.recall, norms.stopped) == (24, 4 / 5, 1.0, 15)
    assert (norms.regret, norms.won, norms.seeds) == (0.0, 0, 3)
    assert norms.saved > 0.2
    assert halving.won == 3
    assert halving.regret > 0
    assert (by_chance.rule, by_chance.stopped) == (RANDOM, norms.stopped)
    assert by_chance.saved == pytest.approx(norms.saved, rel=1e-9)
    assert by_chance.precision == pytest.approx(0.5, abs=0.05)  # half of them are poor


def test_a_rule_that_is_wrong_or_not_told():
    assert examine(grid(sign=-1.0), RULE).reproduced is False
    assert examine(grid(noise=3.0), RULE).reproduced is False
    few = [run for run in grid() if run.cell in ("rate 1", "rate 5")]
    assert examine(few, RULE).reproduced is None
    assert examine([outcome("a"), outcome("b", 1)], RULE) is None
    assert all(c.signal != CORRECTED for c in examine(grid(), RULE).correlations)


def test_what_a_rule_would_have_saved_and_lost():
    runs = [outcome(cell, seed, s + 10 * seed) for seed in (0, 1) for cell, s in zip("abcd", (1.0, 2.0, 3.0, 5.0))]
    at = np.array([[0.2, np.nan, np.nan, 0.5, np.nan, np.nan, np.nan, 0.5]])
    found = prune(NORMS, runs, at)
    assert (found.stopped, found.precision, found.recall) == (3, 2 / 3, 2 / 4)
    assert (found.won, found.seeds, found.regret) == (1, 2, 0.5)
    assert found.saved == pytest.approx((0.8 + 0.5 + 0.5) / 8)
    # At random: the mean over all ways to stop two of the first seed and one of the second.
    regrets = [
        (min(s for i, s in enumerate((1, 2, 3, 5)) if i not in gone) - 1) / 2
        for count in (2, 1) for gone in itertools.combinations(range(4), count)
    ]  # fmt: skip
    expected = np.mean(regrets[:6]) + np.mean(regrets[6:])
    drawn = prune(RANDOM, runs, at_random(runs, at))
    assert drawn.regret == pytest.approx(expected, abs=0.05)  # 2000 draws of numbers of size one
    assert drawn.saved == pytest.approx(found.saved)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("stop", "norm", "study.stop: unknown 'norm'; did you mean 'norms'?"),
        ("stop_from", 0.0, "study.stop_from: must be above 0 and below 1, not 0.0"),
        ("stop_every", math.nan, "study.stop_every: must be above 0 and below 1, not nan"),
        ("stop_norm", -0.1, "study.stop_norm: must be at least 0, not -0.1"),
        ("stop_keep", 0, "study.stop_keep: must be above 0, not 0"),
        ("stop_factor", 1, "study.stop_factor: must be above 1, not 1"),
    ],
)
def test_what_a_rule_cannot_be(key, value, what):
    with pytest.raises(UserError) as refused:
        Rule.of({**dataclasses.asdict(RULE), key: value})
    assert str(refused.value).startswith(what)
