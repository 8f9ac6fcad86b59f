"""How far the runs of a study go while its rule stops poor ones: all of a group until one step, then all further.

The rule decides by what was logged until a moment, so no run goes on from there before all of its group were there. To
stop and go on takes time, so runs pause more rarely than the rule looks: who should have stopped in between stops then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from jaxup.experiments.outcomes import Outcome
from jaxup.experiments.stopping import NORMS, Rule


def pauses(rule: Rule) -> list[float]:
    """The shares of their steps after which runs wait for each other."""
    if rule.stop != NORMS:
        return rule.moments()
    # Nothing is decided before a run was found poor so often; then when each has gone on for as long again.
    share, found = rule.stop_from + (rule.stop_checks - 1) * rule.stop_every, []
    while share < 1:
        found.append(share)
        share *= 2
    return found


def limits(
    outcomes: Sequence[Outcome],
    planned: Mapping[str, int],
    reached: Mapping[str, int],
    done: Collection[str],
    rule: Rule,
) -> dict[str, int]:
    """For each run that is not done the step until which it goes now: 0 if it waits for others of its group.

    Args:
      planned: the steps of each run that is not done, by name.
      reached: at which of them it paused last; 0 = it did not.
      done: the runs that do not go on.
    """
    shares = pauses(rule)
    stops = {name: [*(math.ceil(share * steps - 1e-9) for share in shares), steps] for name, steps in planned.items()}
    passed = {o.name: sum(step <= reached[o.name] for step in stops[o.name]) for o in outcomes if o.name not in done}
    found = {}
    for group in {o.group for o in outcomes}:
        names = [o.name for o in outcomes if o.group == group and o.name in passed]
        least = min((passed[name] for name in names), default=0)
        race = sum(o.group == group and not o.stopped for o in outcomes) > rule.stop_keep
        for name in names:
            found[name] = (stops[name][least] if passed[name] == least else 0) if race else planned[name]
    return found
