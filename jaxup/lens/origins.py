"""Which layer of which model each layer of a result came from, as samples of their weights say.

L layers of the result, S layers of all sources, n values of a sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxup.depth.plan import PARTS
from jaxup.lens.fitting import finite
from jaxup.model.spec import PART_OF, STACK, is_kernel

# What a plan may zero, and what training then fills with something else than the origin had.
SILENCED = ("self_attn.o_proj.kernel", "mlp.down_proj.kernel")

Values = Mapping[str, np.ndarray]  # of one layer, by path inside a block: [n]


class Place(NamedTuple):
    """A layer of a source."""

    source: str
    layer: int


class Match(NamedTuple):
    """Where one layer of the result comes from."""

    place: Place
    parts: tuple[str, ...]  # that come from there; () if the layer is new
    nearest: float  # the largest cosine that a part of it has with that of any layer
    elsewhere: Mapping[str, Place]  # of the parts that do not come from `place`, those that come from another layer
    alike: tuple[Place, ...]  # all layers that it may as well come from


def match(
    result: Sequence[Values], sources: Mapping[Place, Values], fills: Mapping[str, float],
    kinds: Callable[[int, Place], bool],
) -> list[Match]:  # fmt: skip
    """The origin of each layer of the result.

    Args:
      fills: the first value of each norm's scale, which is that of all its elements.
      kinds: whether a layer of the result computes with the constants of a source's layer.
    """
    places = [*sources]
    scores = {part: _scores(part, result, [*sources.values()]) for part in ("attention", "mlp")}
    known = {part: np.where(score >= _limit(score, part, result[0]), score, 0.0) for part, score in scores.items()}
    total_LS = sum(known.values(), start=np.zeros((len(result), len(places))))
    alike: list[list[int]] = []
    for layer, values in enumerate(result):
        best = total_LS[layer].max()
        if best > 0:
            near = [int(s) for s in np.flatnonzero(total_LS[layer] >= best - 0.1)]
            distances = [_distance(values, sources[places[s]]) for s in near]
            alike.append([s for s, far in zip(near, distances) if far <= min(distances) + 1e-9])
        else:  # norms alone are alike in many layers: they must be the same to the bit
            alike.append([s for s, place in enumerate(places) if _same_norms(values, sources[place])])
    used = {places[s].source for near in alike for s in near} or {places[0].source}
    free = [s for s, place in enumerate(places) if place.source in used]
    # A new layer brings the constants of a source's along.
    chosen = _longest_runs(
        [near or [s for s in free if kinds(i, places[s])] or free for i, near in enumerate(alike)], places
    )
    matches = []
    for layer, s in enumerate(chosen):
        here = {part: bool(known[part][layer, s]) or math.isnan(scores[part][layer, s]) for part in scores}
        here["norms"] = _norms_inherited(result[layer], sources[places[s]], fills)
        parts = tuple(part for part in PARTS if here[part]) if alike[layer] else ()
        elsewhere = {
            part: places[int(known[part][layer].argmax())]
            for part in scores if part not in parts and known[part][layer].any()
        }  # fmt: skip
        nearest = max(float(np.nan_to_num(score[layer]).max()) for score in scores.values())
        matches.append(Match(places[s], parts, nearest, elsewhere, tuple(places[s] for s in alike[layer])))
    return matches


def _scores(part: str, result: Sequence[Values], sources: Sequence[Values]) -> np.ndarray:
    """|cosine| [L, S] of the part's kernels, on average; NaN where the layer's are zero.

    Those that plans zero count only where there is nothing else: after training they are not their origin's.
    """
    paths = [path for path in result[0] if is_kernel(path) and PART_OF[STACK + path] == part]
    found = np.full((len(result), len(sources)), math.nan)
    for group in ([p for p in paths if p not in SILENCED], [p for p in paths if p in SILENCED]):
        several = np.array([_cosines([r[path] for r in result], [s[path] for s in sources]) for path in group])
        there = ~np.isnan(several)
        mean = np.where(there, several, 0.0).sum(0) / np.maximum(there.sum(0), 1)
        found = np.where(np.isnan(found) & there.any(0), mean, found)
    # A source's zeros are no origin of what is not zero.
    zero = np.array([not any(layer[path].any() for path in paths) for layer in result])
    return np.where(np.isnan(found) & ~zero[:, None], 0.0, found)


def _cosines(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """|cosine| [len(a), len(b)]; NaN where one of the two is zero."""

    def units(several: Sequence[np.ndarray]) -> np.ndarray:
        x = np.stack([finite(each) for each in several])
        size = np.linalg.norm(x, axis=1, keepdims=True)
        return np.divide(x, size, out=np.full_like(x, math.nan), where=size > 0)

    return np.abs(units(a) @ units(b).T)


def _limit(scores: np.ndarray, part: str, layer: Values) -> float:
    """The cosine from which on two layers are not strangers: six standard deviations, and at least 0.5.

    The deviation is that of independent values, or what most pairs of layers show, unless most are related.
    """
    n = min(layer[path].size for path in layer if is_kernel(path) and PART_OF[STACK + path] == part)
    there = scores[~np.isnan(scores)]
    shown = float(np.quantile(there, 0.25)) / 0.32 if there.size else 0.0  # a quarter lies within 0.32 deviations
    return min(0.95, max(0.5, 6 / math.sqrt(n), 6 * shown if shown < 0.5 else 0.0))


def _distance(y: Values, x: Values) -> float:
    """How much of a layer another does not explain, over all its tensors: 0 if they are equal."""
    return sum(_tensor_distance(y[path], x[path]) for path in y)


def _tensor_distance(y: np.ndarray, x: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        if np.array_equal(x.astype(y.dtype).astype(np.float32), y.astype(np.float32), equal_nan=True):
            return 0.0
    a, b = finite(y), finite(x)
    yy, xy, xx = a @ a, a @ b, b @ b
    if not xx:
        return 0.5  # trained from zeros
    if not yy:
        return 1.0  # zeroed
    # What fits as it is comes before what fits with a factor.
    return 1e-6 + math.sqrt(max(0.0, 1 - xy**2 / (xx * yy))) + 0.25 * (abs(xy / xx - 1) > 0.2)


def _norms(values: Values) -> list[str]:
    return [path for path in values if PART_OF[STACK + path] == "norms"]


def _same_norms(y: Values, x: Values) -> bool:
    varied = any(np.ptp(finite(y[path])) for path in _norms(y))
    return varied and all(_tensor_distance(y[path], x[path]) == 0 for path in _norms(y))


def _norms_inherited(y: Values, x: Values, fills: Mapping[str, float]) -> bool:
    """Whether the norms are nearer to the origin's, by a factor or as they are, than to new ones."""
    for path, fill in fills.items():
        a, b, new = finite(y[path]), finite(x[path]), np.full(y[path].size, fill)
        if not a.any() and fill:  # zeroed
            return True
        if np.linalg.norm(a - b) <= np.linalg.norm(a - new) or _angle(a, b) <= _angle(a, new):
            return True
    return False


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """The sine of the angle between two vectors, 1 where one is zero."""
    size = (a @ a) * (b @ b)
    return math.sqrt(max(0.0, 1 - (a @ b) ** 2 / size)) if size else 1.0


def _longest_runs(alike: Sequence[Sequence[int]], places: Sequence[Place]) -> list[int]:
    """One of the candidates of each layer, so that as many as can be follow the one before in the source."""
    numbers = {place: s for s, place in enumerate(places)}
    next_of = [numbers.get(Place(place.source, place.layer + 1), -1) for place in places]
    ahead: list[dict[int, int]] = [{}]
    for near in reversed(alike):
        ahead.insert(0, {s: 1 + ahead[0].get(next_of[s], 0) for s in near})
    chosen: list[int] = []
    for near, runs in zip(alike, itertools.islice(ahead, len(alike))):
        follows = next_of[chosen[-1]] if chosen else -1
        chosen.append(follows if follows in near else max(near, key=lambda s: (runs[s], -s)))
    return chosen
