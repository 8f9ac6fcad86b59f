"""How one sample of weights was made of another: as it is, by a factor, or by training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jaxup.depth.arithmetic import rescale
from jaxup.depth.plan import DTYPES

_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}  # of a significand


class Cast(NamedTuple):
    """`DepthPlan.dtype` and `out_dtype`."""

    dtype: str | None
    out_dtype: str | None


class Fit(NamedTuple):
    """A sample y of a result beside the sample x of a source that it may have been made of."""

    yy: float  # inner products
    xy: float
    xx: float
    factors: tuple[float, ...] | None  # what gives y of x to the bit: () as it is, (0.0,) zeros; None: no factor does

    @property
    def similarity(self) -> float:
        """|cosine|; NaN where one of the two is zero."""
        return abs(self.xy) / math.sqrt(self.yy) / math.sqrt(self.xx) if self.yy and self.xx else math.nan

    @property
    def factor(self) -> float:
        """What x is best multiplied with."""
        return self.xy / self.xx if self.xx else 1.0

    def left(self, factor: float) -> float:
        """The square of |y - factor * x|."""
        return 0.0 if self.factors is not None else max(0.0, self.yy - 2 * factor * self.xy + factor**2 * self.xx)


def fit(y: np.ndarray, x: np.ndarray, cast: Cast) -> Fit:
    """y and x [n] as stored; what is not finite counts as 0 in the inner products."""
    a, b = finite(y), finite(x)
    moments = float(a @ a), float(a @ b), float(b @ b)
    if is_made(y, x, (), cast):
        return Fit(*moments, ())
    if not y.any():
        return Fit(*moments, (0.0,))
    for factor in _factors(y, x, cast, moments):
        if is_made(y, x, (factor,), cast):
            return Fit(*moments, (factor,))
    return Fit(*moments, None)


def finite(x: np.ndarray) -> np.ndarray:
    """As float64, with 0 for what is not finite."""
    x = x.astype(np.float64)
    return x if np.isfinite(x).all() else np.where(np.isfinite(x), x, 0.0)


def is_made(y: np.ndarray, x: np.ndarray, factors: tuple[float, ...], cast: Cast) -> bool:
    """Whether a plan that casts so and multiplies with these makes y of x; -0.0 is 0.0, as mergekit writes it."""
    made = rescale(x, factors, cast.dtype, cast.out_dtype)
    # float32 holds all three dtypes.
    same = made.dtype == y.dtype
    return same and np.array_equal(made.astype(np.float32), y.astype(np.float32), equal_nan=True)


def _factors(y: np.ndarray, x: np.ndarray, cast: Cast, moments: tuple[float, float, float]) -> Iterator[float]:
    """Factors that each value of y, rounded as it is, leaves possible: those that a person would write first."""
    yy, xy, xx = moments
    if not xx or yy - xy**2 / xx > 2.0**-12 * yy:  # more than rounding
        return
    x = x.astype(cast.dtype or x.dtype)
    # Where a value lies between its neighbours says where the product lay: by the coarsest dtype on the way.
    grid = np.dtype(min(y.dtype.name, x.dtype.name, key=_BITS.__getitem__))
    y = np.abs(y[(used := (x != 0) & np.isfinite(y.astype(np.float32)))].astype(grid))
    exact, size = y.astype(np.float64), np.abs(x[used].astype(np.float64))
    below, above = (np.nextafter(y, np.array(end, grid)).astype(np.float64) for end in (0, np.inf))
    above = np.where(np.isfinite(above), above, 2 * exact - below)
    rounding = 2.0**-22  # of the product and the factor in float32
    low = float(np.max((exact + below) / 2 / size)) * (1 - rounding)
    high = float(np.min((exact + above) / 2 / size)) * (1 + rounding)
    yield from (math.copysign(factor, xy) for factor in simple(low, high))


def simple(low: float, high: float) -> Iterator[float]:
    """Numbers between two positive ones: with up to 4 digits, the simplest fraction, then with more digits."""
    if not 0 < low <= high < math.inf:
        return
    for digits in (1, 2, 3, 4, 0, *range(5, 18)):
        if digits:
            number = float(f"{(low + high) / 2:.{digits}g}")
        elif (fraction := _simplest(Fraction(low), Fraction(high))).denominator < 1000:
            number = float(fraction)
        else:
            continue
        if low <= number <= high:
            yield number


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of the smallest denominator between two positive numbers (Stern and Brocot)."""
    whole = low.numerator // low.denominator
    if low == whole:
        return Fraction(whole)
    if whole + 1 <= high:
        return Fraction(whole + 1)
    return whole + 1 / _simplest(1 / (high - whole), 1 / (low - whole))


def casts(before: set[str], after: set[str]) -> list[Cast]:
    """The ways from the dtypes of the sources to those of the result, the simplest first."""
    if len(after) > 1:
        return [Cast(None, None)]
    (made,) = after
    plain = [Cast(None, None)] if before <= after else []
    others = [Cast(dtype, None if dtype == made else made) for dtype in DTYPES]
    return [*plain, *([] if plain else [Cast(None, made)]), *others]
