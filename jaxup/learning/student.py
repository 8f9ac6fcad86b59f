"""Student's t in closed form (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""

from __future__ import annotations

import functools
import math


def t_within(t: float, freedom: int) -> float:
    """The probability that |T| < t, for t >= 0."""
    return _within(math.atan2(t, math.sqrt(freedom)), freedom)


@functools.cache
def t_quantile(share: float, freedom: int) -> float:
    """For a share above a half: halving the angle whose closed form has it."""
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * share - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """That |T| < sqrt(freedom) tan(angle)."""
    cosine, term, total = math.cos(angle), 1.0, 0.0
    for k in range(freedom // 2):
        # Even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ...; odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ...
        first = cosine if freedom % 2 else 1.0
        total += term * first
        term *= cosine**2 * (2 * k + 1 + freedom % 2) / (2 * k + 2 + freedom % 2)
    if freedom % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
