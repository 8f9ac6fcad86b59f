"""Which continuous tokens are drawn together: how many in each set, and which are masked in training."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

from jaxup.errors import UserError, nearest

SCHEDULES = ("nova", "mar")
_RATIO = NormalDist(1.0, 0.25)  # of masked tokens, of which what lies in this range is kept
_LOWEST, _HIGHEST = 0.7, 1.0


@functools.lru_cache(maxsize=64)
def sizes(count: int, sets: int, schedule: str) -> tuple[int, ...]:
    """How many of `count` tokens each set has, at most `sets` of them: after k sets `count * cos(pi/2 * k / sets)` are
    left, so that the first are few, which see little, and the last are many.

    "nova" rounds what is left (arXiv 2412.14169), "mar" takes its floor, and at least one token a set while there are
    two (arXiv 2406.11838). Sets that come out empty are left out. UserError for a schedule or number that is none.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule!r} is not one of {SCHEDULES}{nearest(schedule, SCHEDULES)}")
    if not 1 <= sets <= count:
        raise UserError(f"sets={sets} is no number of sets for {count} tokens", hint=f"from 1 to {count}")
    left, found = count, []
    for k in range(1, sets + 1):
        after = count * math.cos(math.pi / 2 * k / sets)
        after = round(after) if schedule == "nova" else max(1, min(left - 1, math.floor(after)))
        after = 0 if k == sets else after
        found.append(left - after)
        left = after
    return tuple(size for size in found if size)


def drawn_together(count: int, sets: int, schedule: str) -> float:
    """How likely two of `count` tokens, in a random order, are in one set: then they are drawn independently."""
    return sum(size * (size - 1) for size in sizes(count, sets, schedule)) / (count * max(1, count - 1))


def masked(uniform: float | np.ndarray, order: np.ndarray) -> np.ndarray:
    """bool [..., N]: the tokens to be predicted from the others: the first of `order`, random permutations of the N.

    Their share is normal around 1 with deviation .25, of which what lies in [.7, 1] is kept (MAR's): `uniform`, [...]
    from 0 to 1, is how much of that lies below it. At least one is masked.
    """
    low, high = _RATIO.cdf(_LOWEST), _RATIO.cdf(_HIGHEST)
    shares = [_RATIO.inv_cdf(low + each * (high - low)) for each in np.ravel(uniform).tolist()]
    count = np.ceil(np.reshape(shares, (*np.shape(uniform), 1)) * order.shape[-1])
    mask = np.zeros(order.shape, bool)
    np.put_along_axis(mask, order, np.arange(order.shape[-1]) < count, axis=-1)
    return mask
