"""Training rows in phases, one after the other, instead of all mixed.

Each example is of one phase, no row has examples of two, and a store holds the rows of one phase after those of
another: so their numbers alone say which is which. Within a phase rows are shuffled, and a share of those of all phases
before is seen again among them. A phase is gone through as often as there are epochs before the next begins, as in
"Unveiling the Secret Recipe" (Pareja et al. 2024, arXiv 2412.13337) and LAB (Sudalairaj et al. 2024, arXiv 2403.01081).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

STACKED, FILES, DIFFICULTY = PHASES = "", "files", "difficulty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    names: tuple[str, ...]
    examples: tuple[int, ...]  # of each
    rows: tuple[int, ...]  # of each; in the store they follow each other in this order
    replay: float  # the share of the rows of all phases before that is seen again in each pass over a phase
    passes: int  # over a phase before the next; after the last phase the first begins again

    @property
    def before(self) -> tuple[int, ...]:
        """How many rows are of the phases before each."""
        return tuple(itertools.accumulate(self.rows[:-1], initial=0))

    @property
    def replayed(self) -> tuple[int, ...]:
        """How many of those are seen again in a pass over each."""
        return tuple(round(self.replay * count) for count in self.before)

    def lengths(self) -> list[int]:
        """Rows of all passes over all phases, in their order."""
        whole = [own + again for own, again in zip(self.rows, self.replayed)]
        return [length for length in whole for _ in range(self.passes)]

    def ends(self) -> Iterator[int]:
        """How many rows were seen when each phase is at its end, on and on."""
        passes = itertools.accumulate(itertools.cycle(self.lengths()))
        return itertools.islice(passes, self.passes - 1, None, self.passes)

    def schedule(self, batch_size: int, steps: int) -> list[str]:
        """Which of `steps` steps see what, a line for each phase."""
        lines, begin = [], 0
        for at, end in zip(range(len(self.rows)), self.ends()):
            first, last = begin // batch_size + 1, min(-(-end // batch_size), steps)
            when = f"steps {first:,} to {last:,}" if first <= steps else f"not in {steps:,} steps"
            again = f" and {count:,} rows of those before again" if (count := self.replayed[at]) else ""
            times = f", {self.passes} times" if self.passes > 1 else ""
            what = f"{self.examples[at]:,} conversations in {self.rows[at]:,} rows{again}{times}"
            lines.append(f"  phase {at + 1} of {len(self.rows)}, {self.names[at]}: {what}; {when}")
            begin = end
        return lines


def phase_of(how: str, keys: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """int [N], the phase of each of N examples, and the phases' names; a phase may have no example.

    Args:
      how: one of PHASES.
      keys: int [N]: which entry of the files it is of, or how many of its tokens are trained on. The shorter half is
        the first phase; ties go by index.
      names: of the entries.
    """
    if how == FILES:
        return keys.astype(np.int64), tuple(names)
    phase = np.zeros(len(keys), np.int64)
    if how == DIFFICULTY:
        shortest = np.argsort(keys, kind="stable")
        halves = np.split(shortest, [-(-len(keys) // 2)])
        phase[halves[1]] = 1
        ends = [(keys[half].min(), keys[half].max()) if len(half) else (0, 0) for half in halves]
        return phase, tuple(f"{least:,} to {most:,} tokens trained on" for least, most in ends)
    return phase, ("",)
