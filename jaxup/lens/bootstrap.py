"""Intervals by the bootstrap: what a number would be, had other runs been made, and other layers been there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL, DRAWS, SEED = 0.95, 2000, 0
LEAST = 5  # units: fewer say nothing of how much they differ


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def interval(
    runs: Sequence[Sequence[np.ndarray]], statistic: Callable[[np.ndarray], np.ndarray], *, draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:  # fmt: skip
    """The statistic with its percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3).

    As many runs are drawn as there are, with replacement, and of each run that was drawn as many units of each of its
    groups, so that a group keeps its size. Units with a value that is not finite are left out.

    Args:
      runs: of each its groups of units, [units, F]: F numbers of which the statistic needs the sums.
      statistic: sums over the units, [..., F] -> [...]

    Returns:
      NaN where the statistic is not finite; as bounds, too, of fewer than `LEAST` units, or if more than one draw in
      ten has no statistic.
    """
    kept = [[group[np.isfinite(group).all(-1)] for group in groups] for groups in runs]
    kept = [groups for groups in kept if any(map(len, groups))]
    if not kept:
        return Interval(np.nan, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), draws)  # that each run is drawn
    times = np.concatenate([np.ones_like(times[:1]), times])  # as it is comes first
    sums = np.zeros(())
    for run, groups in enumerate(kept):
        for group in filter(len, groups):
            # A run that is drawn m times has m times as many units: m draws of n are one of m n.
            weights = rng.multinomial(times[:, run] * len(group), np.full(len(group), 1 / len(group)))
            weights[0] = 1
            sums = sums + weights @ group
    with np.errstate(all="ignore"):
        found = statistic(sums)
    value, drawn = float(found[0]), found[1:][np.isfinite(found[1:])]
    if not np.isfinite(value):
        return Interval(np.nan, np.nan, np.nan)
    if sum(len(group) for groups in kept for group in groups) < LEAST or len(drawn) < 0.9 * draws:
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
