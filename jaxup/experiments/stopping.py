"""Poor runs of a study stopped early: from what was logged so far, who stops, when and why.

"Unveiling the Secret Recipe" (arXiv 2412.13337) finds that of runs of supervised fine-tuning those end better that have
early in training *lower gradient norms and higher losses*. Both are partly mechanical: a large batch lowers the norm
(its square is |G|^2 + tr(Sigma) / B), and a low learning rate keeps the loss high for lack of progress. So only runs of
one batch size, base and order of the data are compared, at equal numbers of rows seen, and a run has to show both signs
several times in a row. The numbers are no part of the paper.

All is a function of what was logged until the moment that is looked at: whoever looks later, or at finished runs, finds
the same stops.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxup.errors import UserError, suggest
from jaxup.experiments.outcomes import Outcome

T = TypeVar("T", float, np.ndarray)
NORMS, HALVING, DIVERGED = "norms", "halving", "diverged"
_SPAN = 0.02  # of the run: the window in which signals are smoothed
_MARGIN = 1.0  # nats above its first losses: a run that gets there has diverged
_SMOOTH = 10.0  # steps, at least, over which its loss is smoothed for that: those of a few rows differ by a nat
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The keys of the section `study` that begin with stop."""

    stop: str  # NORMS, HALVING or "": nobody stops
    stop_from: float  # share of a run's steps after which it is looked first
    stop_every: float  # and then after so much more; HALVING: each time after `stop_factor` times as much
    stop_keep: int  # runs of a group that go on in any case
    stop_norm: float  # by which share of the group's median the gradient norm is above it
    stop_loss: float  # by how many nats the training loss is below the group's median
    stop_checks: int  # how often in a row
    stop_factor: int  # HALVING: one of so many goes on

    def __post_init__(self) -> None:
        if self.stop not in (known := (NORMS, HALVING, "")):
            what = f"unknown {self.stop!r}{suggest(self.stop, known)}"
            raise UserError(what, at="study.stop", hint=f"{NORMS}, {HALVING}, or nothing: all runs go to their ends")
        for key, least, most in (
            ("stop_from", 0, 1), ("stop_every", 0, 1), ("stop_norm", -_ROUNDING, math.inf),
            ("stop_loss", -_ROUNDING, math.inf), ("stop_keep", 0, math.inf), ("stop_checks", 0, math.inf),
            ("stop_factor", 1, math.inf),
        ):  # fmt: skip
            if not least < (value := getattr(self, key)) < most:
                between = f"above {max(0, least):g}" if least >= 0 else "at least 0"
                below = "" if most == math.inf else f" and below {most:g}"
                raise UserError(f"must be {between}{below}, not {value}", at=f"study.{key}")

    @classmethod
    def of(cls, section: Any) -> Rule:
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})

    def moments(self) -> list[float]:
        """When it is looked, as shares of a run's steps: nothing that is logged after one decides at it."""
        if self.stop == HALVING:
            count = math.floor(math.log(1 / self.stop_from) / math.log(self.stop_factor) - _ROUNDING)
            return [self.stop_from * self.stop_factor**k for k in range(count + 1)]
        if self.stop == NORMS:
            count = math.ceil((1 - self.stop_from) / self.stop_every - _ROUNDING)
            return [self.stop_from + k * self.stop_every for k in range(count)]
        return []


class Stop(NamedTuple):
    cell: str
    seed: int
    at: float  # share of its steps
    step: int
    kind: str  # NORMS, HALVING, DIVERGED
    why: str  # a sentence without its end


def decide(outcomes: Sequence[Outcome], rule: Rule) -> list[Stop]:
    """The runs that stop by what is known so far, in the order of their moments; none if `rule.stop` is "".

    `outcomes` are all runs of the study, those that have not begun included (`Outcome.to_come`): a group is looked at
    as soon as all of its runs that go on have been there. Runs that were stopped before are found again.
    """
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in sorted(outcomes, key=lambda o: (o.cell, o.seed)):  # their order is no reason for anything
        groups[outcome.group].append(outcome)
    stops = [stop for group in groups.values() for stop in _race(group, rule)] if rule.stop else []
    return sorted(stops, key=lambda stop: (stop.at, stop.cell, stop.seed))


def _race(runs: Sequence[Outcome], rule: Rule) -> Iterator[Stop]:
    """Of one group."""
    failed = {o.name: _diverged(o) for o in runs}
    going, poor = list(runs), collections.Counter[str]()
    for at in rule.moments():
        for outcome in list(going):
            if (stop := failed[outcome.name]) is not None and stop.at <= at:
                going.remove(outcome)
                yield stop
        going = [o for o in going if _known(o, at) or not o.stopped]  # those that ended before, whatever ended them
        spare = len(going) - rule.stop_keep
        if spare <= 0 or not all(_known(o, at) for o in going):
            break
        for outcome, why in (_by_norms if rule.stop == NORMS else _by_halving)(going, at, rule, poor)[:spare]:
            going.remove(outcome)
            yield Stop(outcome.cell, outcome.seed, at, math.ceil(at * outcome.planned - _ROUNDING), rule.stop, why)
    yield from (stop for o in going if (stop := failed[o.name]) is not None)


def _by_norms(
    going: Sequence[Outcome], at: float, rule: Rule, poor: collections.Counter[str]
) -> list[tuple[Outcome, str]]:
    """Those to stop, the worst first; `poor` counts how often in a row each was found so."""
    corrected = len({o.batch_size for o in going}) > 1
    norms = {o.name: norm_at(o, at, corrected=corrected) for o in going}
    losses = {o.name: loss_at(o, at) for o in going}
    norm, loss = float(np.median([*norms.values()])), float(np.median([*losses.values()]))
    validation, found = validation_at(going, at), []
    best = min(validation.values(), default=0.0)
    for o in going:
        high = norms[o.name] > (1 + rule.stop_norm) * norm and losses[o.name] < loss - rule.stop_loss
        poor[o.name] = poor[o.name] + 1 if high else 0
        if poor[o.name] >= rule.stop_checks and validation.get(o.name, best) > best:
            why = (
                f"gradient norm {norms[o.name]:.3g}, that is {norms[o.name] / norm - 1:.0%} above the median of its "
                f"group, and training loss {losses[o.name]:.4f}, that is {loss - losses[o.name]:.4f} below it, for "
                f"{poor[o.name]} checks in a row"
            )
            found.append((o, why))
    return sorted(found, key=lambda one: (-norms[one[0].name], losses[one[0].name], one[0].name))


def _by_halving(
    going: Sequence[Outcome], at: float, rule: Rule, _: collections.Counter[str]
) -> list[tuple[Outcome, str]]:
    """Successive halving (Jamieson and Talwalkar 2016) on validation loss. What is level with one that goes on does."""
    losses = validation_at(going, at)
    if not losses:
        return []
    stay = max(rule.stop_keep, math.ceil(len(going) / rule.stop_factor))
    last = sorted(losses.values())[stay - 1]
    found = [
        (o, f"validation loss {losses[o.name]:.4f}, and the {stay} that go on have at most {last:.4f}")
        for o in going if losses[o.name] > last
    ]  # fmt: skip
    return sorted(found, key=lambda one: (-losses[one[0].name], one[0].name))


def _diverged(outcome: Outcome) -> Stop | None:
    """When a run did: a number that is none, or a smoothed loss far above where it began."""
    steps_N, total, weight = outcome.samples_N / outcome.batch_size, 0.0, 0.0
    start = max((*map(float, outcome.loss_N[:1]), *(loss for _, loss in outcome.curve[:1])), default=0.0)
    for step, gap, loss, norm in zip(steps_N, np.diff(steps_N, prepend=0), outcome.loss_N, outcome.norm_N):
        kept = _kept(outcome, _SMOOTH) ** gap
        total, weight = kept * total + loss, kept * weight + 1
        what = f"loss {loss:.4g} and gradient norm {norm:.4g} are not finite"
        if math.isfinite(loss) and math.isfinite(norm):
            if not total / weight > start + _MARGIN:
                continue
            what = f"training loss {total / weight:.4f}, and {start:.4f} at first"
        at = float(step / outcome.planned)
        return Stop(outcome.cell, outcome.seed, at, round(step), DIVERGED, f"{DIVERGED}: {what}")
    return None


# ---- signals: what of a run is known at a moment


def _known(outcome: Outcome, at: float) -> bool:
    """Whether all is there that is logged until then: what comes next comes after it."""
    if outcome.finished:
        return True
    until = at * outcome.planned * (1 + _ROUNDING)
    logged = [0.0, *(outcome.samples_N / outcome.batch_size)], [float(step) for step, _ in outcome.curve]
    return all(len(steps) > 1 and steps[-1] + max(np.diff(steps)) > until for steps in logged)


def _smoothed(outcome: Outcome, values_N: np.ndarray, at: float) -> float:
    """The bias-corrected moving average: weights that fall by the same factor with each step, logged or not."""
    steps_N = outcome.samples_N / outcome.batch_size
    until_N = steps_N <= at * outcome.planned * (1 + _ROUNDING)
    if not until_N.any():
        return math.nan
    weights = _kept(outcome) ** (steps_N[until_N][-1] - steps_N[until_N])
    return float(weights @ values_N[until_N] / weights.sum())


def _kept(outcome: Outcome, least: float = 1.0) -> float:
    """Of the weight of a value after a step; `least` steps are the window at least."""
    span = max(least, _SPAN * outcome.planned)
    return (span - 1) / (span + 1)


def loss_at(outcome: Outcome, at: float) -> float:
    return _smoothed(outcome, outcome.loss_N, at)


def norm_at(outcome: Outcome, at: float, *, corrected: bool = False) -> float:
    """Of the gradient; `corrected`: of what it would be of all data, which batches of different sizes have in common.

    NaN if that was not logged.
    """
    if not corrected:
        return _smoothed(outcome, outcome.norm_N, at)
    if not 0 < outcome.micro_rows < outcome.batch_size:
        return math.nan
    micro, whole = (_smoothed(outcome, v_N, at) for v_N in (outcome.micro_N, outcome.norm_N**2))
    found = squared_gradient(micro, whole, outcome.micro_rows, outcome.batch_size)
    return math.sqrt(max(0.0, found)) if math.isfinite(found) else math.nan


def validation_at(outcomes: Sequence[Outcome], at: float) -> dict[str, float]:
    """By name, at the last evaluation that all have had until then; none if there is none."""
    curves = [{step / o.planned: loss for step, loss in o.curve} if o.planned else {} for o in outcomes]
    common = set.intersection(*map(set, curves)) if curves else set()
    last = max((share for share in common if share <= at * (1 + _ROUNDING)), default=None)
    return {} if last is None else {o.name: curve[last] for o, curve in zip(outcomes, curves)}


def squared_gradient(micro: T, whole: T, rows: int, batch: int) -> T:
    """|G|^2 without the noise of the batch (McCandlish et al., arXiv 1812.06162, appendix A.1).

    A gradient over n rows has E|g_n|^2 = |G|^2 + tr(Sigma) / n, with Sigma the covariance of one row's.

    Args:
      micro: mean squared norm of gradients over `rows` rows; a number or an array, as the next.
      whole: squared norm of the gradient over `batch` rows.
    """
    return (batch * whole - rows * micro) / (batch - rows)


def gradient_noise(micro: T, whole: T, rows: int, batch: int) -> T:
    """tr(Sigma), see `squared_gradient`."""
    return (micro - whole) / (1 / rows - 1 / batch)
