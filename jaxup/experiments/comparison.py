"""Cells of a study compared: means and spreads over seeds, and differences to the control with their intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxup.experiments.outcomes import Outcome
from jaxup.learning.student import t_quantile
from jaxup.lens.bootstrap import LEVEL, Interval, interval
from jaxup.lens.ratios import ratio

BETTER, WORSE, SAME, OPEN = "better", "worse", "no difference", "one seed"
LOWER, HIGHER = "lower", "higher"  # of tasks, of which nobody says here which way is better
_ENUMERATED = 8  # values: of so many all 6435 resamples are looked at, of more some are drawn


class Cell(NamedTuple):
    """What the finished runs of a cell reached. NaN where none finished, and as the spread of one."""

    name: str
    seeds: tuple[int, ...]  # of the finished runs
    scores: tuple[float, ...]  # of these
    mean: float
    spread: float  # standard deviation over seeds
    steps: tuple[int, ...]  # that finished runs took, each number once
    stopped: tuple[Outcome, ...]
    tokens: int  # of all models of all its runs, with those that were stopped
    flops: float
    equal: float  # mean loss at the FLOPs of the cheapest run; NaN: a run has no curve there


class Difference(NamedTuple):
    """A cell's scores less the control's, seed by seed.

    The seed is the pair: it decides the order of the data and what is drawn at the start, which both then have in
    common, and what it adds to both is no part of the difference.

    Two intervals at 95%, because neither is right by itself with as few seeds as a study has. The bootstrap's, of
    percentiles over all resamples, assumes nothing of the distribution and knows nothing beyond the values: that of
    three reaches from the least to the largest, and lies on one side of 0 whenever three signs agree, which happens to
    equal cells once in four times; two of 2^n signs are the same, so that less than six pairs cannot reach 1 in 20 by
    their signs. Student's t assumes that differences are normal, and given that is exact for any number: with
    three pairs it reaches 2.48 standard deviations to both sides of the mean. A difference is said where neither
    interval holds 0.
    """

    cell: str
    seeds: tuple[int, ...]  # that both have
    alone: tuple[int, ...]  # that only one of the two has, which are left out
    values: tuple[float, ...]
    mean: float
    bootstrap: Interval
    student: Interval
    verdict: str  # BETTER: lower loss; WORSE, SAME, OPEN; "": no pair; of a task LOWER and HIGHER


def summarise(outcomes: Sequence[Outcome]) -> list[Cell]:
    """Of each cell, in the order of their first runs."""
    budget = min((o.flops for o in outcomes if o.finished), default=math.nan)
    names = dict.fromkeys(o.cell for o in outcomes)
    return [_cell(name, [o for o in outcomes if o.cell == name], budget) for name in names]


def _cell(name: str, runs: Sequence[Outcome], budget: float) -> Cell:
    done = sorted((o for o in runs if o.finished), key=lambda o: o.seed)
    scores = np.array([o.score for o in done])
    tokens, flops = cost(runs)
    return Cell(
        name, tuple(o.seed for o in done), tuple(map(float, scores)), float(scores.mean()) if done else math.nan,
        float(scores.std(ddof=1)) if len(done) > 1 else math.nan, tuple(sorted({o.steps for o in done})),
        tuple(o for o in runs if o.stopped), tokens, flops,
        float(np.mean([loss_at(o, budget) for o in done])) if done else math.nan,
    )  # fmt: skip


def cost(outcomes: Sequence[Outcome]) -> tuple[int, float]:
    """Tokens and FLOPs of all models; what several runs have in common counts once."""
    found = {name: both for o in outcomes for name, both in o.costs.items()}
    return sum(tokens for tokens, _ in found.values()), sum((flops for _, flops in found.values()), 0.0)


def loss_at(outcome: Outcome, flops: float) -> float:
    """Validation loss when a run had taken so many FLOPs, on the line between two evaluations; NaN outside of them."""
    if not outcome.curve or not outcome.samples_N.size:
        return math.nan
    steps, losses = np.array(outcome.curve).T
    took = np.interp(steps * outcome.batch_size, [0, *outcome.samples_N], [0, *outcome.flops_N])
    # The last evaluation is that of the last step: rounding does not put it out of reach.
    return float(np.interp(flops, took, losses, right=math.nan if flops > took[-1] * (1 + 1e-9) else losses[-1]))


def scores(outcomes: Sequence[Outcome], cell: str, task: str = "") -> dict[int, float]:
    """By seed, of the finished runs of a cell: the loss, or what they reach on a task, of those that say."""
    done = [o for o in outcomes if o.cell == cell and o.finished]
    found = {o.seed: o.tasks.get(task, math.nan) if task else o.score for o in done}
    return {seed: value for seed, value in sorted(found.items()) if math.isfinite(value)}


def difference(outcomes: Sequence[Outcome], cell: str, control: str, task: str = "") -> Difference:
    """Of the finished runs: by their losses, or by a task."""
    ours, theirs = (scores(outcomes, name, task) for name in (cell, control))
    seeds = sorted(ours.keys() & theirs.keys())
    values = np.array([ours[seed] - theirs[seed] for seed in seeds])
    bootstrap, student = bootstrap_interval(values), student_interval(values)
    mean = float(values.mean()) if seeds else math.nan
    verdict = OPEN if len(seeds) == 1 else SAME if seeds else ""
    if len(seeds) > 1 and not any(found.low <= 0 <= found.high for found in (bootstrap, student)):
        verdict = ((LOWER, HIGHER) if task else (BETTER, WORSE))[mean > 0]
    alone = tuple(sorted(ours.keys() ^ theirs.keys()))
    return Difference(cell, tuple(seeds), alone, tuple(map(float, values)), mean, bootstrap, student, verdict)


def bootstrap_interval(values: np.ndarray) -> Interval:
    """The mean with the percentiles of the means of its resamples; NaN as bounds of one value.

    Of up to eight values all n^n resamples count; SciPy draws them (`scipy.stats.bootstrap(method="percentile")`).
    """
    n = len(values)
    if n > _ENUMERATED:
        return interval([[np.stack([values, np.ones(n)], 1)]], ratio)
    if n < 2:
        return Interval(float(values.mean()) if n else math.nan, math.nan, math.nan)
    # Which values are in a resample, whatever their order, and in how many orders they come.
    drawn = np.array(list(itertools.combinations_with_replacement(range(n), n)))
    counts = (drawn[:, :, None] == np.arange(n)).sum(1)
    orders = math.factorial(n) / np.vectorize(math.factorial, otypes=[float])(counts).prod(1)
    means = counts @ values / n
    order = np.argsort(means)
    # The p-th of n^n sorted means: the first until which there are as many.
    until = np.cumsum(orders[order])
    low, high = (float(means[order][np.searchsorted(until, p * n**n)]) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(values.mean()), low, high)


def student_interval(values: np.ndarray) -> Interval:
    """The mean with its t interval; NaN as bounds of one value."""
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    reach = t_quantile((1 + LEVEL) / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach)
