"""Changes of layers as the sums that ratios are made of: copies and originals, layers in order, epochs in turn."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxup.lens.differences import Differences

MEASURES = ("mean_abs", "relative")
FIRST = 2  # layers, which are held against all others
_COPIES = "Xz"  # roles


class Layers(NamedTuple):
    """Which rows belong together."""

    pairs: tuple[tuple[int, tuple[int, ...]], ...]  # an original, and its copies
    slices: tuple[tuple[int, ...], ...]
    modules: tuple[str, ...]

    @classmethod
    def of(cls, found: Differences) -> Layers:
        originals: dict[tuple[str, int | None], int] = {}
        copies: dict[tuple[str, int | None], list[int]] = collections.defaultdict(list)
        slices: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
        for row, origin in enumerate(found.origins):
            if origin.role == "=":
                originals.setdefault((origin.source, origin.layer), row)
            elif origin.role in _COPIES:
                key = origin.source, origin.layer
                slices[origin.source, len(copies[key])].append(row)
                copies[key].append(row)
        pairs = tuple((originals[key], tuple(rows)) for key, rows in copies.items() if key in originals)
        return cls(pairs, tuple(tuple(rows) for rows in slices.values()), found.modules)


Changes = Mapping[str, np.ndarray]  # total, and each epoch that there is -> [layers, modules]; NaN: it did not train


def changes(found: Differences, layers: Layers) -> Mapping[str, Changes]:
    """By measure."""
    last = len(found.models) - 1
    spans = {"total": (0, last), **({"1": (0, 1), "2": (1, 2)} if last > 1 else {})}
    at = {span: found.pairs.index(pair) for span, pair in spans.items()}
    rms, relative = (found.values[metric][at["total"]] for metric in ("rms", "relative"))
    with np.errstate(all="ignore"):
        size = rms / relative  # root of the mean square of what it began as
    size = np.where(np.isfinite(size) & (size > 0), size, np.nan)
    for original, copies in layers.pairs:  # what was zeroed is compared with what it would have been
        for copy in copies:
            size[copy] = np.where(np.isnan(size[copy]), size[original], size[copy])
    found_by: dict[str, dict[str, np.ndarray]] = {measure: {} for measure in MEASURES}
    for span, index in at.items():
        mean, rms = found.values["mean_abs"][index], found.values["rms"][index]
        frozen = ~(np.nan_to_num(mean) > 0).any(1, keepdims=True)
        found_by["mean_abs"][span] = np.where(frozen, np.nan, mean)
        found_by["relative"][span] = np.where(frozen, np.nan, np.where(rms == 0, 0.0, rms / size))
    return found_by


# Of the changes of one run its groups of units, for a statistic of their sums: see `interval`.
Units = Callable[[Changes], Sequence[np.ndarray]]
Statistic = Callable[[np.ndarray], np.ndarray]


def beside(layers: Layers, column: int, changes: Changes) -> list[np.ndarray]:
    """Mean of the copies, and their original: [source layers, 2]."""
    total = changes["total"][:, column]
    both = [(total[list(copies)].mean(), total[original]) for original, copies in layers.pairs]
    return [np.array(both).reshape(-1, 2)]


def along(rows: Sequence[int], column: int, changes: Changes) -> list[np.ndarray]:
    """What a line through the logarithms takes. Runs that change more as a whole are not steeper: each has its mean."""
    with np.errstate(all="ignore"):
        logs = np.log(changes["total"][list(rows), column])
    logs = np.where(np.isfinite(logs), logs, np.nan)
    y, x = logs - (np.nanmean(logs) if np.isfinite(logs).any() else 0), np.arange(len(rows))
    return [np.stack([np.ones(len(rows)), x, y, x * x, x * y], 1)]


def slope(rows: Sequence[int], sums: np.ndarray) -> np.ndarray:
    """By least squares, as the ratio of the last to the first."""
    n, x, y, xx, xy = np.moveaxis(sums, -1, 0)
    return np.exp((n * xy - x * y) / (n * xx - x * x) * (len(rows) - 1))


def apart(rows: Sequence[int], column: int, changes: Changes) -> list[np.ndarray]:
    """The first layers and all others, as two groups."""
    total = changes["total"][list(rows), column]
    one, none = np.ones_like(total), np.zeros_like(total)
    return [np.stack([total, one, none, none], 1)[:FIRST], np.stack([none, none, total, one], 1)[FIRST:]]


def ratio_of_means(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


def in_turn(column: int, changes: Changes) -> list[np.ndarray]:
    """Epoch 2, and epoch 1."""
    return [np.stack([changes["2"][:, column], changes["1"][:, column]], 1)] if "2" in changes else []


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def all_beside(layers: Layers, columns: Sequence[int], changes: Changes) -> list[np.ndarray]:
    return [np.concatenate([beside(layers, column, changes)[0] for column in columns], 1)]


def against_others(sums: np.ndarray) -> np.ndarray:
    """The first of several ratios over the geometric mean of the others."""
    logs = np.log(sums[..., ::2] / sums[..., 1::2])
    return np.exp(logs[..., 0] - logs[..., 1:].mean(-1))
