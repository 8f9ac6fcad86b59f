"""Models that answered the same test problems, compared problem by problem: what a study says of runs that learned.

Shape suffixes: P problems, K sizes of a subset of the answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxup.depth.picture import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from jaxup.errors import UserError
from jaxup.experiments.answered import AFTER, ANSWERS, BEFORE, SIZES, banded, draw, line, panels, told_of
from jaxup.learning import curves
from jaxup.learning.statistics import Band, pass_at_k
from jaxup.text import read_json

_COLORS = (SKY, BLUE, GREEN, RED, ORANGE, PURPLE)
_ABOUT = """The share of the test problems that have a right one among k answers, and in brackets 95% bootstrap \
intervals over problems, of which each has the mean over the seeds: they say how far the result hangs on these \
problems, and the tables by seed how far on the training. Differences are paired problem by problem."""


def compared(directory: Path, runs: Mapping[str, Sequence[Path]], control: str) -> list[str]:
    """Lines of STUDY.md, and plots/pass_at_k.png; nothing where fewer than two cells have answers.

    Args:
      runs: the directories of the finished runs of each cell.
      control: the cell that the others are compared with.

    Raises:
      UserError: an answers.json is damaged, or is of other problems than the others.
    """
    found: dict[str, list[dict]] = {cell: [a for a in map(_answers, paths) if a] for cell, paths in runs.items()}
    found = {cell: of for cell, of in found.items() if of}
    if len(found) < 2 or control not in found:
        return []
    first = found[control][0]
    for cell, of in found.items():
        if any((a["problems"], a["samples"]) != (first["problems"], first["samples"]) for a in of):
            return ["", f"Runs of `{cell}` were asked other problems than those of `{control}`: they are not paired."]
    count = first["samples"]
    sizes = curves.sizes(count)
    before, after = ({cell: _passed(of, name, sizes) for cell, of in found.items()} for name in (BEFORE, AFTER))
    same = all(np.array_equal(of, before[control]) for of in before.values())
    passed = {BEFORE: before[control]} if same else {f"{cell}, {BEFORE}": of for cell, of in before.items()}
    passed |= after
    bands = {name: banded(values_PK) for name, values_PK in passed.items()}
    figure, (axes,) = panels(1)
    for (name, drawn), color in zip(bands.items(), itertools.cycle(_COLORS)):
        line(axes, np.array(sizes), drawn, color, name)
    axes.set(xlabel="k", ylabel="pass@k on test problems", ylim=(0, 1))
    axes.legend(frameon=False)
    draw(directory, {"pass_at_k": figure})

    shown = [at for at, size in enumerate(sizes) if size in SIZES or size == sizes[-1]]
    head = [f"|  | {' | '.join(f'pass@{sizes[at]}' for at in shown)} |", f"|---|{'---:|' * len(shown)}"]

    def rows(bands: Mapping[str, Band], sign: str = "") -> list[str]:
        return [f"| `{name}` | {' | '.join(told_of(of, at, sign) for at in shown)} |" for name, of in bands.items()]

    lines = ["", "## Test problems", "", _ABOUT, "", *head, *rows(bands), "", "![pass@k](plots/pass_at_k.png)"]
    gained = {cell: banded(of - before[cell]) for cell, of in after.items()}
    less = {cell: banded(of - after[control]) for cell, of in after.items() if cell != control}
    lines += ["", "More than before:", "", *head, *rows(gained, "+")]
    lines += ["", f"More than `{control}`:", "", *head, *rows(less, "+")]
    return lines


def _answers(directory: Path) -> dict | None:
    path = directory / ANSWERS
    kinds = {"samples": int, "problems": list[str], BEFORE: list[float], AFTER: list[float]}
    read = read_json(path, kinds, "delete the run's finished.json to have it written again")
    if read and len({len(read[name]) for name in ("problems", BEFORE, AFTER)}) > 1:
        raise UserError("damaged: not a number for each problem", at=str(path))
    return read


def _passed(answers: Sequence[Mapping], name: str, sizes: Sequence[int]) -> np.ndarray:
    """float64 [P, K], the mean over the seeds."""
    counts = [np.array(a[name]).astype(int) for a in answers]
    of_seeds = [np.stack([pass_at_k(a["samples"], c, k) for k in sizes], 1) for a, c in zip(answers, counts)]
    return np.mean(of_seeds, axis=0)
