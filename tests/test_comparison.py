"""Cells of a study compared, against SciPy."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from outcomes import outcome

from jaxup.experiments.comparison import (
    BETTER,
    OPEN,
    SAME,
    WORSE,
    bootstrap_interval,
    cost,
    difference,
    loss_at,
    student_interval,
    summarise,
    t_quantile,
)


def study(**scores):
    return [outcome(cell, seed, score) for cell, values in scores.items() for seed, score in enumerate(values)]


def scipys(values):
    draw = np.random.default_rng(0)
    return scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=draw)


@pytest.mark.parametrize("values", [[-0.3, 0.1, 0.2], [0.5, 0.7, 0.4, 0.9], [1.0, 1.0, 2.0], [1.0, 2.0]])
def test_the_bootstrap_of_few_pairs_is_that_of_all_resamples(values):
    found = bootstrap_interval(np.array(values))
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))])
    # An end is a mean of which the share until it, and that from it on, are both as large as asked for.
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        assert (means <= end + 1e-12).mean() >= share
        assert (means >= end - 1e-12).mean() >= 1 - share
    theirs = scipys(values)
    # Of 3 values the ends are means that several times 2.5% of all draws have or pass: any thousands of draws agree.
    # They are sums of the same few numbers in another order.
    assert found[1:] == pytest.approx(theirs.confidence_interval, abs=1e-12)
    assert found.value == np.mean(values)


def test_the_bootstrap_of_many_pairs_is_that_of_scipy():
    values = np.random.default_rng(0).gamma(2, 1, 12)
    theirs = scipys(values)
    # 2000 draws: see the interval of a claim, whose quantiles these are.
    assert bootstrap_interval(values)[1:] == pytest.approx(theirs.confidence_interval, abs=0.4 * theirs.standard_error)


@given(st.integers(1, 60), st.floats(0.6, 0.999))
def test_students_quantile_is_that_of_scipy(freedom, share):
    assert t_quantile(share, freedom) == pytest.approx(scipy.stats.t.ppf(share, freedom), rel=1e-9)


def test_students_interval_is_that_of_scipy():
    values = np.array([0.2, 0.35, 0.1, 0.4])
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values)[1:] == pytest.approx(tuple(theirs), rel=1e-12)


def test_verdicts():
    outcomes = study(control=[3.0, 3.1, 3.2], low=[2.5, 2.6, 2.71], high=[3.5, 3.6, 3.7], mixed=[2.9, 3.2, 3.1])
    outcomes += study(near=[2.97, 3.0, 3.19], same=[3.0, 3.1, 3.2], one=[2.0])
    found = {cell: difference(outcomes, cell, "control") for cell in ("low", "high", "mixed", "near", "same", "one")}
    verdicts = {cell: d.verdict for cell, d in found.items()}
    # All seeds of `near` are below the control, as those of equal cells are in one of eight studies.
    expected = {"low": BETTER, "high": WORSE, "mixed": SAME, "near": SAME, "same": SAME, "one": OPEN}
    assert verdicts == expected
    assert found["near"].bootstrap.high < 0 < found["near"].student.high
    assert (found["one"].seeds, found["one"].alone) == ((0,), (1, 2))
    assert all(map(math.isnan, found["one"].student[1:] + found["one"].bootstrap[1:]))
    assert difference(outcomes, "none", "control").verdict == ""


def test_the_seed_is_the_pair():
    """What a seed adds to both is no part of the difference; neither is what was stopped, nor the order of the runs."""
    outcomes = [outcome(c, s, 10.0 * s + (c == "b") + 0.01 * s * (c == "b")) for c in "ab" for s in (1, 2, 3)]
    outcomes.append(outcome("b", 4, math.nan, stopped="its norm was high"))
    outcomes.append(outcome("a", 4, 0.0))
    found = difference(outcomes, "b", "a")
    assert found.values == pytest.approx((1.01, 1.02, 1.03))
    assert (found.seeds, found.alone, found.verdict) == ((1, 2, 3), (4,), WORSE)
    assert difference(outcomes[::-1], "b", "a") == found


def test_a_cell_is_summed_up():
    outcomes = study(a=[3.0, 3.2], b=[2.0])
    base = {"base-1f": (7, 5e8)}  # which both runs of a have, and one of b
    outcomes = [dataclasses.replace(o, costs=o.costs | base) for o in outcomes]
    outcomes.append(outcome("b", 1, math.nan, steps=20, flops=2e8, stopped="poor"))
    a, b = summarise(outcomes)
    assert (a.name, a.seeds, a.mean) == ("a", (0, 1), 3.1)
    assert a.spread == pytest.approx(np.std([3.0, 3.2], ddof=1))
    assert math.isnan(b.spread)
    assert (b.seeds, [o.seed for o in b.stopped]) == ((0,), [1])
    assert (b.tokens, b.flops) == (120 * 8 * 32 + 7, 1.7e9)
    assert (a.tokens, a.flops) == (200 * 8 * 32 + 7, 2.5e9)
    assert cost(outcomes) == (320 * 8 * 32 + 7, 3.7e9)


def test_losses_at_equal_flops():
    cheap = outcome("a", 0, 3.0, flops=1e9)
    dear = outcome("b", 0, 2.0, flops=4e9, curve=((0, 6.0), (50, 3.0), (100, 2.0)))
    assert [c.equal for c in summarise([cheap, dear])] == pytest.approx([3.0, 4.5])
    assert loss_at(dear, 3e9) == pytest.approx(2.5)
    assert math.isnan(loss_at(dear, 5e9))
    # Of one that grew most of its FLOPs were of its last steps.
    grown = outcome("c", 0, 2.0, steps=2, curve=((0, 4.0), (1, 3.0), (2, 2.0)), flops_N=np.array([1e9, 4e9]))
    assert loss_at(grown, 1e9) == pytest.approx(3.0)
