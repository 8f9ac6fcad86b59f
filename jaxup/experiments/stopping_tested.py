"""The rules that stop poor runs, tested on runs that went to their ends: do the signals say how those end, and what
would have been saved and lost?"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxup.experiments import stopping
from jaxup.experiments.outcomes import Outcome
from jaxup.experiments.stopping import DIVERGED, HALVING, NORMS, Rule, Stop, decide
from jaxup.lens.bootstrap import DRAWS, LEAST, LEVEL, SEED, Interval

MOMENTS = (0.1, 0.2, 0.3)
NORM, LOSS, VALIDATION = "gradient norm", "training loss", "validation loss"
CORRECTED = "gradient norm without the batch's noise"
# What the paper says of the first two: rank correlation with the loss at the end.
SIGNS = {NORM: 1, CORRECTED: 1, LOSS: -1, VALIDATION: 1}
RANDOM = "random"


class Correlation(NamedTuple):
    """Spearman's rank correlation of an early signal with the loss at the end."""

    signal: str
    at: float
    across: bool  # ranks are those among all runs of a seed; else among those of a group
    runs: int
    cells: int
    rho: Interval  # drawn are cells, with all their seeds; NaN as bounds of fewer than `LEAST`


class Pruning(NamedTuple):
    """What a rule would have done; of `RANDOM` the mean over draws. Shares are NaN where there is nothing to share."""

    rule: str
    runs: int
    stopped: float
    precision: float  # share of the stopped that end worse than the median of their group
    recall: float  # share of those that it stops
    won: float  # seeds whose best run it stops
    seeds: int
    regret: float  # nats by which the best that is left is worse than the best, mean over seeds
    saved: float  # share of the FLOPs


class Tested(NamedTuple):
    correlations: tuple[Correlation, ...]
    prunings: tuple[Pruning, ...]

    @property
    def reproduced(self) -> bool | None:
        """Whether within groups a low norm and a high loss go with a good end at each moment; None: cannot be told."""
        found = [c for c in self.correlations if not c.across and c.signal in (NORM, LOSS)]
        if not found or any(math.isnan(c.rho.low) for c in found):
            return None
        return all(min(SIGNS[c.signal] * c.rho.low, SIGNS[c.signal] * c.rho.high) > 0 for c in found)


def examine(outcomes: Sequence[Outcome], rule: Rule) -> Tested | None:
    """On the runs that finished, whose group has two or more of them; None if there are none."""
    sizes = collections.Counter(o.group for o in outcomes if o.finished)
    runs = sorted((o for o in outcomes if o.finished and sizes[o.group] > 1), key=lambda o: (o.cell, o.seed))
    if not runs:
        return None
    by_norms, by_halving = (decide(runs, dataclasses.replace(rule, stop=stop)) for stop in (NORMS, HALVING))
    stopped = _at(runs, by_norms)
    prunings = (
        prune(NORMS, runs, stopped), prune(HALVING, runs, _at(runs, by_halving)),
        prune(RANDOM, runs, at_random(runs, stopped)),
    )  # fmt: skip
    return Tested(tuple(_correlations(runs)), prunings)


# ---- correlations


def _correlations(runs: Sequence[Outcome]) -> list[Correlation]:
    signals: dict[str, Callable[[Outcome, float], float]] = {
        NORM: stopping.norm_at, LOSS: stopping.loss_at,
        VALIDATION: lambda o, at: next(iter(stopping.validation_at([o], at).values()), math.nan),
    }  # fmt: skip
    several = len({o.batch_size for o in runs}) > 1
    if several and all(o.micro_rows for o in runs):
        signals[CORRECTED] = lambda o, at: stopping.norm_at(o, at, corrected=True)
    scores = np.array([o.score for o in runs])
    found = []
    for signal, measure in signals.items():
        for at in MOMENTS:
            values = np.array([measure(o, at) for o in runs])
            for across in (False, True) if several else (False,):
                rho = _interval(values, scores, runs, across=across)
                found.append(Correlation(signal, at, across, len(runs), len({o.cell for o in runs}), rho))
    return found


def _interval(values: np.ndarray, scores: np.ndarray, runs: Sequence[Outcome], *, across: bool) -> Interval:
    """Cells are drawn, as many of each batch size as there are: seeds of one cell say little of the others."""
    batches = {o.cell: o.batch_size for o in runs}
    rng, weights = np.random.default_rng(SEED), dict[str, np.ndarray]()
    for batch in sorted(set(batches.values())):
        cells = [cell for cell in batches if batches[cell] == batch]
        drawn = rng.multinomial(len(cells), np.full(len(cells), 1 / len(cells)), DRAWS)
        weights |= dict(zip(cells, drawn.T))
    weights_DN = np.stack([weights[o.cell] for o in runs], 1)
    weights_DN = np.concatenate([np.ones_like(weights_DN[:1]), weights_DN])  # as it is comes first
    races = [str(o.seed) if across else o.group for o in runs]  # what a seed adds to all is no part of either
    found = rank_correlation(values, scores, races, weights_DN)
    drawn = found[1:][np.isfinite(found[1:])]
    if len(batches) < LEAST or len(drawn) < 0.9 * DRAWS:
        return Interval(float(found[0]), math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(found[0]), float(low), float(high))


def rank_correlation(x_N: np.ndarray, y_N: np.ndarray, races: Sequence[str], weights_DN: np.ndarray) -> np.ndarray:
    """Spearman's, of ranks within each race, [D]: each of D times some units count so often. NaN: all are level.

    Of several races the covariances of ranks from 0 to 1 add up.
    """
    covariance, of_x, of_y = (np.zeros(len(weights_DN)) for _ in range(3))
    for race in dict.fromkeys(races):
        mine = [index for index, other in enumerate(races) if other == race]
        w_Dn = weights_DN[:, mine].astype(float)
        count_D1 = np.maximum(w_Dn.sum(1, keepdims=True), 1)
        ranks = []
        for values in (x_N[mine], y_N[mine]):
            below_nn = (values[:, None] < values) + 0.5 * (values[:, None] == values)
            rank_Dn = np.where(np.isnan(values), np.nan, w_Dn @ below_nn / count_D1)
            ranks.append(rank_Dn - (w_Dn * rank_Dn).sum(1, keepdims=True) / count_D1)
        x_Dn, y_Dn = ranks
        covariance += (w_Dn * x_Dn * y_Dn).sum(1)
        of_x += (w_Dn * x_Dn**2).sum(1)
        of_y += (w_Dn * y_Dn**2).sum(1)
    with np.errstate(all="ignore"):
        return covariance / np.sqrt(of_x * of_y)


# ---- what rules would have done


def _at(runs: Sequence[Outcome], stops: Sequence[Stop]) -> np.ndarray:
    """[1, N]: when each stops by the rule; NaN: it does not. What diverges is no merit of it."""
    at = {(stop.cell, stop.seed): stop.at for stop in stops if stop.kind != DIVERGED}
    return np.array([[at.get((o.cell, o.seed), math.nan) for o in runs]])


def at_random(runs: Sequence[Outcome], at_1N: np.ndarray) -> np.ndarray:
    """[D, N]: in each group as many stop as do, at the same moments, whoever they are."""
    rng, at_DN = np.random.default_rng(SEED), np.repeat(at_1N, DRAWS, 0)
    for group in sorted({o.group for o in runs}):
        mine = [index for index, o in enumerate(runs) if o.group == group]
        at_DN[:, mine] = rng.permuted(at_DN[:, mine], axis=1)
    return at_DN


def prune(rule: str, runs: Sequence[Outcome], at_DN: np.ndarray) -> Pruning:
    """Of finished runs, the mean over D times that runs stop at `at_DN` of their steps; NaN: they do not."""
    scores = np.array([o.score for o in runs])
    groups = np.array([o.group for o in runs])
    medians = {group: np.median(scores[groups == group]) for group in set(groups)}
    poor_N = np.array([o.score > medians[o.group] for o in runs])
    stopped_DN = np.isfinite(at_DN)
    hits_D, stops_D = (stopped_DN & poor_N).sum(1), stopped_DN.sum(1)
    seeds = np.array([o.seed for o in runs])
    regrets, won = [], []
    for seed in sorted(set(seeds)):
        mine = seeds == seed
        left_D = np.where(stopped_DN[:, mine], np.inf, scores[mine]).min(1)
        regrets.append(left_D - scores[mine].min())
        won.append(left_D > scores[mine].min())
    saved_D = np.zeros(len(at_DN))
    for index, o in enumerate(runs):
        took_D = np.interp(at_DN[:, index] * o.planned * o.batch_size, [0, *o.samples_N], [0, *o.flops_N])
        saved_D += np.where(stopped_DN[:, index], o.flops - took_D, 0.0)
    total, poor = sum(o.flops for o in runs), int(poor_N.sum())
    precision = float(hits_D.sum() / stops_D.sum()) if stops_D.any() else math.nan
    return Pruning(
        rule, len(runs), float(stops_D.mean()), precision, float(hits_D.mean() / poor) if poor else math.nan,
        float(np.sum(won, 0).mean()), len(regrets), float(np.mean(regrets)),
        float(saved_D.mean() / total) if total else 0.0,
    )  # fmt: skip
