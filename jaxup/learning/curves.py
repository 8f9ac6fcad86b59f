"""Curves over the number of samples: pass@k, the best of N by each guide, and the majority's; as table and picture.

Shape suffixes: P problems, N samples of each, K numbers of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxup.learning import statistics
from jaxup.learning.guides import Guide
from jaxup.learning.problem import Task
from jaxup.learning.statistics import Band
from jaxup.learning.tree import Search, drive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxup.learning.problem import Writer

DRAWS, ORDERS, SEED = 2000, 20, 0  # of the bootstrap; random orders of the samples, for votes


class Curves(NamedTuple):
    sizes: list[int]  # 1, 2, 4, ... and all samples
    values: dict[str, np.ndarray]  # float64 [P, K], by name: pass@k, majority, best by GUIDE
    bands: dict[str, Band]  # their means over problems, with intervals
    unread: int  # samples of which it cannot be said whether they are right; they count as wrong


def sizes(n: int) -> list[int]:
    return sorted({*(2**i for i in range(n.bit_length())), n})


def curves(task: Task, searches: Sequence[Search], guides: Sequence[Guide], writer: Writer) -> Curves:
    """What the samples among `finished` of each search say, which are as many for each.

    Args:
      guides: those that draw nothing and say of each sample by itself what it is worth.
      writer: what would answer them if they did.
    """
    nodes = [search.finished for search in searches]
    n = len(nodes[0])
    ks = sizes(n)
    said = [[task.verify(s.problem, node.text) for node in s.finished] for s in searches]
    right_PN = np.array([[float((value or 0) >= 1) for value in row] for row in said])
    c_P = right_PN.sum(1).astype(np.int64)
    values = {"pass@k": np.stack([statistics.pass_at_k(n, c_P, k) for k in ks], 1)}
    finals = [[task.final(s.problem, node.text) for node in s.finished] for s in searches]
    values["majority"] = statistics.vote(finals, np.ones_like(right_PN), right_PN, ks, orders=ORDERS, seed=SEED)
    for guide in guides:
        scores = drive(writer, [guide.value(s, s.finished) for s in searches])
        scores_PN = np.array(scores, np.float64)
        values[f"best by {guide.name}"] = np.stack([statistics.best_of(scores_PN, right_PN, k) for k in ks], 1)
    bands = {name: statistics.bootstrap(of_PK, draws=DRAWS, seed=SEED) for name, of_PK in values.items()}
    return Curves(ks, values, bands, sum(value is None for row in said for value in row))


def table(found: Curves) -> str:
    """As Markdown: a row for each number of samples, in percent, with the 95% intervals."""
    names = list(found.bands)
    lines = [f"| samples | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    for i, k in enumerate(found.sizes):
        cells = (f"{100 * b.mean[i]:.1f} [{100 * b.low[i]:.1f}, {100 * b.high[i]:.1f}]" for b in found.bands.values())
        lines.append(f"| {k} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(found: Curves, title: str) -> Figure:
    """A picture of the curves with their bands, without pyplot, whose figures are a notebook's own."""
    from matplotlib.figure import Figure

    from jaxup.depth.picture import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
    from jaxup.text import escaped

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    palette = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
    for number, (name, band) in enumerate(found.bands.items()):
        color, marker = palette[number % len(palette)], "osD^vP"[number // len(palette) % 6]
        (line,) = axes.plot(found.sizes, 100 * band.mean, color=color, marker=marker, markersize=4, label=escaped(name))
        if number == 0:  # what bounds the others lies above them, in dashes, as it may be the same
            line.set(linestyle=(0, (4, 2)), zorder=3)
        axes.fill_between(found.sizes, 100 * band.low, 100 * band.high, color=color, alpha=0.07, linewidth=0)
        for edge in (band.low, band.high):
            axes.plot(found.sizes, 100 * edge, color=color, linewidth=0.5, alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.sizes, [str(k) for k in found.sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=escaped(title).replace("$", r"\$"), xlabel="samples of each problem",
             ylabel="% solved (bands: 95% over problems)")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
