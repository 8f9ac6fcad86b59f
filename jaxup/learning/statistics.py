"""What samples of several problems say: pass@k, the best of N by a score, votes, and intervals over problems.

Shape suffixes: P problems, N samples of each, K sizes of a subset, R draws. All of it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxup.errors import UserError

LEVEL = 0.95  # of an interval


def pass_at_k(n: int, c: Int[np.ndarray, "*shape"], k: int) -> Float[np.ndarray, "*shape"]:
    """The share of the subsets of k out of n samples, c of them right, that have a right one: 1 - C(n-c,k)/C(n,k).

    Its mean over c ~ Binomial(n, p) is 1 - (1-p)^k exactly (Chen et al. 2021, 2107.03374), which that of
    1 - (1-c/n)^k is not. The quotient is a product of n-c+1 ... n over 1 - k/i: no factorial is formed.

    Raises:
      UserError: k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} of {n} samples: from 1 to {n}")
    factors = np.maximum(0.0, 1 - k / np.arange(1, n + 1))  # one of them is 0 where fewer than k are wrong
    missed = np.append(np.cumprod(factors[::-1])[::-1], 1.0)  # [n + 1], by the number of wrong ones
    return 1 - missed[n - c]


def best_of(
    scores_PN: Float[np.ndarray, "p n"], right_PN: Float[np.ndarray, "p n"], size: int
) -> Float[np.ndarray, " p"]:
    """How right the sample with the highest score is on average, over all subsets of `size` of the N samples.

    Exact: the highest of a subset is among the m best of all unless the subset has none of them, which is pass@size
    with m right ones. Among equal scores each is as likely. A score of NaN is below all others.
    """
    n = scores_PN.shape[1]
    scores_PN = np.where(np.isnan(scores_PN), -np.inf, scores_PN)
    order_PN = np.argsort(-scores_PN, axis=1, kind="stable")
    sorted_PN = np.take_along_axis(scores_PN, order_PN, 1)
    edge_PN = np.ones((len(scores_PN), n + 1), bool)  # where other scores begin
    edge_PN[:, 1:-1] = sorted_PN[:, 1:] != sorted_PN[:, :-1]
    start_PN = np.maximum.accumulate(np.where(edge_PN, np.arange(n + 1), 0), axis=1)[:, :-1]  # samples that are better
    end_PN = np.minimum.accumulate(np.where(edge_PN, np.arange(n + 1), n)[:, ::-1], axis=1)[:, ::-1][:, 1:]
    chosen_PN = (pass_at_k(n, end_PN, size) - pass_at_k(n, start_PN, size)) / (end_PN - start_PN)
    return (chosen_PN * np.take_along_axis(right_PN, order_PN, 1)).sum(1)


def vote(
    finals: Sequence[Sequence[str]], weights_PN: Float[np.ndarray, "p n"], right_PN: Float[np.ndarray, "p n"],
    sizes: Sequence[int], *, orders: int, seed: int,
) -> Float[np.ndarray, "p k"]:  # fmt: skip
    """How right the answer with the largest sum of weights is, on average over random subsets of each size.

    With weights of 1 it is the majority's. Subsets are the beginnings of `orders` random orders of the samples and of
    all their rotations, so that for a size of 1 and of N the average is exact. Answers with equal sums are as likely
    each. What says nothing ("") is never chosen; where nothing is chosen, that is wrong.

    Args:
      finals: of each sample what it says.
      weights_PN: not negative.
      right_PN: how right each sample is; an answer is as right as its samples are on average.
    """
    rng, n, result = np.random.default_rng(seed), weights_PN.shape[1], []
    ends_K, turned_NN = np.asarray(sizes) - 1, (np.arange(n)[:, None] + np.arange(n)) % n
    for texts, weights_N, right_N in zip(finals, weights_PN, right_PN, strict=True):
        known = {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)))}
        says_NF = np.array([known.get(text, -1) for text in texts])[:, None] == np.arange(max(1, len(known)))
        right_F = (says_NF * right_N[:, None]).sum(0) / np.maximum(1, says_NF.sum(0))
        order_RN = rng.permuted(np.tile(np.arange(n), (orders, 1)), axis=1)[:, turned_NN].reshape(-1, n)
        said_RKF = np.cumsum(says_NF[order_RN], axis=1)[:, ends_K]
        # Rounded, as sums of equal weights in another order differ by less.
        sums_RKF = np.cumsum((says_NF * weights_N[:, None])[order_RN], axis=1)[:, ends_K].round(9)
        sums_RKF = np.where(said_RKF > 0, sums_RKF, -1.0)
        best_RKF = (sums_RKF == sums_RKF.max(-1, keepdims=True)) & (said_RKF > 0)
        result.append(((best_RKF * right_F).sum(-1) / np.maximum(1, best_RKF.sum(-1))).mean(0))
    return np.array(result)


class Band(NamedTuple):
    """Means over problems with percentile intervals."""

    mean: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]


def bootstrap(values_PK: Float[np.ndarray, "p k"], *, draws: int, seed: int) -> Band:
    """Means over problems, and what they would be had other problems been drawn.

    As many problems are drawn as there are, with replacement (Efron and Tibshirani, An Introduction to the Bootstrap,
    13.3); all columns of a problem stay together. The difference of two models on the same problems is that of their
    values, problem by problem: `bootstrap(a_PK - b_PK, ...)`.
    """
    problems = len(values_PK)
    times_RP = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), draws)
    low_K, high_K = np.quantile(times_RP @ values_PK / problems, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Band(values_PK.mean(0), low_K, high_K)


def auc(scores_N: Float[np.ndarray, " n"], right_N: Bool[np.ndarray, " n"]) -> float:
    """How often a right answer has the higher score than a wrong one, where equal scores count a half: the area below
    the ROC curve, by ranks (Mann and Whitney 1947). NaN where there are none of a kind."""
    right, wrong = int(right_N.sum()), int((~right_N).sum())
    if not right or not wrong:
        return math.nan
    _, place_N, count = np.unique(scores_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2)[place_N]
    return float((rank_N[right_N].sum() - right * (right + 1) / 2) / (right * wrong))


def accepted_limit(p: float, tpr: float, fpr: float) -> float:
    """What share of the answers that a noisy verifier accepts is right: best-of-N with it, as N grows.

    Args:
      p: the share of right ones among all samples.
      tpr: how often a right one is accepted.
      fpr: how often a wrong one is. Where nothing is accepted, all are the same to it.
    """
    accepted = p * tpr + (1 - p) * fpr
    return p * tpr / accepted if accepted else p


def kl_bound(n: int) -> float:
    """The most nats that the best of n samples is from one sample, as a distribution: log n - (n-1)/n
    (Beirami et al. 2024, 2401.01879)."""
    return math.log(n) - (n - 1) / n
