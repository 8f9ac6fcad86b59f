"""pass@k, best-of-N, votes and intervals: against SciPy, closed forms, and all subsets one by one."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from jaxup.errors import UserError
from jaxup.learning import statistics
from jaxup.learning.statistics import accepted_limit, best_of, bootstrap, kl_bound, pass_at_k, vote

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("n", "p", "k"), [(8, 0.1, 1), (8, 0.3, 4), (64, 0.02, 16), (200, 0.5, 7), (30, 0.05, 30)])
def test_pass_at_k_is_unbiased_and_the_plug_in_is_not(n, p, k):
    c = np.arange(n + 1)
    weights = stats.binom.pmf(c, n, p)
    # n + 1 products of at most n factors, each of relative error 1e-16.
    np.testing.assert_allclose(weights @ pass_at_k(n, c, k), 1 - (1 - p) ** k, rtol=1e-12)
    plug_in = weights @ (1 - (1 - c / n) ** k)
    assert k == 1 or plug_in < 1 - (1 - p) ** k - 1e-12


def test_pass_at_k_is_the_quotient_of_binomials():
    for n, k in ((5, 2), (64, 64), (1000, 500)):
        c = np.arange(n + 1)
        exact = [float(1 - math.comb(n - i, k) / math.comb(n, k)) for i in c.tolist()]
        np.testing.assert_allclose(pass_at_k(n, c, k), exact, rtol=1e-12, atol=1e-15)
    assert pass_at_k(9, np.arange(10), 9).tolist() == [0.0, *[1.0] * 9]
    for k in (0, 10):
        with pytest.raises(UserError, match=f"pass@{k} of 9 samples"):
            pass_at_k(9, np.arange(10), k)


def test_best_of_is_the_average_over_all_subsets():
    scores, right = RNG.integers(0, 3, (4, 7)).astype(float), RNG.random((4, 7)).round(1)
    scores[0, 2], scores[1] = np.nan, 1.0
    for size in range(1, 8):
        found = best_of(scores, right, size)
        for row, (s, r) in enumerate(zip(np.nan_to_num(scores, nan=-9.0), right)):
            chosen = [r[list(c)][s[list(c)] == s[list(c)].max()].mean() for c in itertools.combinations(range(7), size)]
            np.testing.assert_allclose(found[row], np.mean(chosen), rtol=1e-12)


def test_best_of_by_the_verdict_is_pass_at_n():
    right = (RNG.random((5, 12)) < 0.3).astype(float)
    for size in range(1, 13):
        expected = pass_at_k(12, right.sum(1).astype(int), size)
        np.testing.assert_allclose(best_of(right, right, size), expected, rtol=1e-12, atol=1e-15)


def test_the_best_of_many_by_a_noisy_verdict_reaches_the_limit():
    p, tpr, fpr, n = 0.2, 0.9, 0.2, 4000
    right = (RNG.random((50, n)) < p).astype(float)
    accepted = (RNG.random((50, n)) < np.where(right == 1, tpr, fpr)).astype(float)
    limit = accepted_limit(p, tpr, fpr)
    assert limit == pytest.approx(0.18 / 0.34)
    # Of 200 some are accepted but for 1 in 10^36. About 68,000 are: their share has a deviation of .0019.
    assert best_of(accepted, right, 200).mean() == pytest.approx(limit, abs=0.008)
    assert best_of(accepted, right, 1).mean() == pytest.approx(p, abs=0.004)
    assert accepted_limit(0.3, 1.0, 0.0) == 1.0
    assert accepted_limit(0.3, 0.0, 0.0) == 0.3  # nothing is told apart


def test_votes_are_averages_over_subsets():
    finals, weights, right = ["a", "b", "", "a", "c", "b"], RNG.integers(1, 4, 6) / 4, np.array([1.0, 0, 0, 1, 0, 0])
    for each in (np.ones(6), weights):

        def chosen(subset, each=each):
            sums = {f: sum(each[i] for i in subset if finals[i] == f) for f in {finals[i] for i in subset} - {""}}
            best = [f for f in sums if sums[f] == max(sums.values())]
            return np.mean([f == "a" for f in best]) if best else 0.0

        found = vote([finals], each[None], right[None], [1, 2, 3, 4, 6], orders=2000, seed=0)[0]
        expected = [np.mean([chosen(c) for c in itertools.combinations(range(6), k)]) for k in (1, 2, 3, 4, 6)]
        np.testing.assert_allclose(found[[0, -1]], np.array(expected)[[0, -1]], rtol=1e-12)
        # 2000 orders, of which the 6 rotations are not independent: a deviation of at most .5 / sqrt(2000) = .011.
        np.testing.assert_allclose(found, expected, atol=0.04)


def test_the_majority_of_many_is_the_likeliest_answer():
    drawn = RNG.choice(3, size=(2, 400), p=[0.5, 0.3, 0.2])
    finals = [["xyz"[i] for i in row] for row in drawn]
    for answer, expected in (("x", 1.0), ("y", 0.0)):
        right = np.array([[float(f == answer) for f in row] for row in finals])
        found = vote(finals, np.ones((2, 400)), right, [1, 200, 400], orders=3, seed=0)
        np.testing.assert_allclose(found[:, 0], right.mean(1), rtol=1e-12)
        # The likeliest leads by .2 * 200 = 40, and the deviation of that is below 13.
        assert (abs(found[:, 1] - expected) < 0.03).all()
        assert found[:, 2].tolist() == [expected] * 2
    assert vote([["", ""]], np.ones((1, 2)), np.ones((1, 2)), [1, 2], orders=3, seed=0).tolist() == [[0.0, 0.0]]


def test_intervals_are_scipys_and_pairs_are_narrower():
    base = RNG.random((60, 1))
    a, b = base + 0.02 * RNG.random((60, 2)), base + 0.1 + 0.02 * RNG.random((60, 2))
    mean, low, high = bootstrap(a, draws=4000, seed=0)
    theirs = stats.bootstrap((a,), np.mean, n_resamples=4000, method="percentile", rng=1)
    np.testing.assert_allclose(mean, a.mean(0))
    # The quantile of 4000 draws at 2.5% has a deviation of .04 of the means' own, which is .037.
    np.testing.assert_allclose(low, theirs.confidence_interval.low, atol=0.01)
    np.testing.assert_allclose(high, theirs.confidence_interval.high, atol=0.01)
    paired = bootstrap(b - a, draws=1000, seed=0)
    assert (paired.low > 0.08).all()
    assert (paired.high < 0.12).all()
    assert (high - low > 5 * (paired.high - paired.low)).all()
    again = bootstrap(a, draws=4000, seed=0)
    assert (again.low == low).all()
    assert statistics.LEVEL == 0.95


def test_kl_bound_holds_and_is_sharp():
    for n in (1, 2, 16, 64):
        for m in (3, 100_000):  # texts as likely each, and no two of them liked the same
            i = np.arange(m + 1) / m
            best = np.diff(i**n)
            kl = stats.entropy(best, np.full(m, 1 / m))
            assert kl <= kl_bound(n) + 1e-9
        assert kl == pytest.approx(kl_bound(n), abs=1e-3)
