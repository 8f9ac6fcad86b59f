"""What two arrays differ in: sums over blocks, and the metrics that they come to.

Products of a block are added in float32, by BLAS and in runs of 8192, everything else in float64: each run has a
relative error of some 1e-6, at random, and a tensor has many. Where that would not do (a value that is not finite, a
square that overflows or vanishes, a sum lost in a difference) the block is done again in float64.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

METRICS = ("mean_abs", "relative", "rms", "cosine", "largest", "changed")
RANK = "rank"  # what else there may be
ENERGY = 0.90  # the share of the squared singular values that the effective rank holds

BLOCK = 2**16  # values at a time: what is made of them stays in the cache, and a call of NumPy is worth it
_RUN = 8192  # of more, OpenBLAS makes threads
# Of a sum of squares in float32 from here on, what has vanished is less than 1e-7.
_LEAST = 1e-26


@dataclasses.dataclass
class Sums:
    """Over the values that are finite on both sides; a, b are those of the two sides, d is a - b."""

    count: int = 0
    changed: int = 0  # values that differ; 0.0 and -0.0 do not
    abs: float = 0.0  # of |d|
    aa: float = 0.0
    bb: float = 0.0
    dd: float = 0.0
    ab: float = 0.0
    ad: float = 0.0
    largest: float = 0.0
    not_finite: tuple[int, int] = (0, 0)  # values of a and of b

    def add(self, other: Sums) -> None:
        self.count += other.count
        self.changed += other.changed
        self.abs += other.abs
        self.aa += other.aa
        self.bb += other.bb
        self.dd += other.dd
        self.ab += other.ab
        self.ad += other.ad
        self.largest = max(self.largest, other.largest)
        self.not_finite = (self.not_finite[0] + other.not_finite[0], self.not_finite[1] + other.not_finite[1])

    def metrics(self) -> dict[str, float]:
        """By the names in METRICS; NaN where there is nothing to compare, inf for a change of what was zero."""
        if not self.count:
            return dict.fromkeys(METRICS, math.nan)
        a, b = math.sqrt(self.aa), math.sqrt(self.bb)
        return {
            "mean_abs": self.abs / self.count,
            "relative": 0.0 if not self.dd else math.sqrt(self.dd) / a if a else math.inf,
            "rms": math.sqrt(self.dd / self.count),
            "cosine": self._distance(a, b),
            "largest": self.largest,
            "changed": self.changed / self.count,
        }

    def _distance(self, a: float, b: float) -> float:
        """1 - cos of the angle between vectors of these lengths; NaN if one is zero and the other is not."""
        if not self.dd or not a or not b:
            return math.nan if self.dd else 0.0
        cos = self.ab / (a * b)
        if cos < 0.5 or max(a, b) > 30 * min(a, b):
            return min(1 - cos, 2.0)
        # Of vectors that are nearly the same, 1 and cos would be as well. |d|^2 = (|a| - |b|)^2 + 2 |a| |b| (1 - cos).
        longer = (2 * self.ad - self.dd) / (a + b)
        return max((self.dd - longer**2) / (2 * a * b), 0.0)


class Comparer:
    """Compares blocks, with buffers of its own: one for each thread."""

    def __init__(self) -> None:
        self._d, self._mask = np.empty(BLOCK, np.float32), np.empty(BLOCK, bool)

    def sums(self, a: np.ndarray, b: np.ndarray) -> Sums:
        """Of two float32 [n], n <= BLOCK. What overflows is seen: the caller hushes NumPy."""
        d, mask = self._d[: a.size], self._mask[: a.size]
        np.subtract(a, b, out=d)
        aa, ad, dd = _dot(a, a), _dot(a, d), _dot(d, d)
        bb = aa - 2 * ad + dd
        np.not_equal(d, 0, out=mask)
        changed = int(np.count_nonzero(mask))
        if not _sound(aa, a) or not (bb == 0 or _sound(bb, b)) or (changed and not _sound(dd, d)):
            return _exact(a, b)
        if bb < 1e-3 * aa and b.any():
            return _exact(a, b)
        np.abs(d, out=d)
        return Sums(a.size, changed, _sum(d), aa, bb, dd, aa - ad, ad, float(np.max(d)))


def widened(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The values, [n] of any of the dtypes of files, as float32: themselves, or in `out`."""
    if values.dtype == np.float32:
        return values
    out = out[: values.size]
    if values.dtype == ml_dtypes.bfloat16:  # the upper half of a float32
        bits = out.view(np.uint32)
        np.copyto(bits, values.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = values
    return out


def _sound(sum_of_squares: float, values: np.ndarray) -> bool:
    return _LEAST < sum_of_squares < math.inf or (sum_of_squares == 0 and not values.any())


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    whole = x.size - x.size % _RUN
    total = 0.0
    if whole:
        rows = np.vecdot(x[:whole].reshape(-1, _RUN), y[:whole].reshape(-1, _RUN))
        total = float(np.add.reduce(rows, dtype=np.float64))
    return total if whole == x.size else total + float(np.dot(x[whole:], y[whole:]))


def _sum(x: np.ndarray) -> float:
    """In columns, which is several times as fast as in a row."""
    whole = x.size - x.size % 512
    total = float(np.add.reduce(np.add.reduce(x[:whole].reshape(-1, 512)), dtype=np.float64)) if whole else 0.0
    return total if whole == x.size else total + float(np.add.reduce(x[whole:], dtype=np.float64))


def _exact(a: np.ndarray, b: np.ndarray) -> Sums:
    finite = np.isfinite(a), np.isfinite(b)
    both = finite[0] & finite[1]
    a, b = a[both].astype(np.float64), b[both].astype(np.float64)
    d = a - b
    lost = (int((~finite[0]).sum()), int((~finite[1]).sum()))
    largest = float(np.abs(d).max(initial=0.0))
    return Sums(
        a.size, int(np.count_nonzero(d)), float(np.abs(d).sum()), float(a @ a), float(b @ b), float(d @ d),
        float(a @ b), float(a @ d), largest, lost,
    )  # fmt: skip


class Rank:
    """The effective rank of a matrix that comes in blocks of rows: the least number of its singular values whose
    squares make up ENERGY of the sum (k* of Inheritune, arXiv 2404.08634). 0 for a matrix of zeros.

    The squares are the eigenvalues of the smaller Gram matrix, in float64. A matrix with fewer rows than columns is
    kept until all of it is there, in float32.
    """

    def __init__(self, rows: int, columns: int):
        self._wide = rows < columns
        self._gram = np.zeros((min(rows, columns),) * 2)
        self._kept = np.empty((rows, columns), np.float32) if self._wide else None

    def add(self, start: int, difference: np.ndarray) -> None:
        """Rows from `start` on, float32 [n, columns]; what is not finite counts as 0."""
        block = np.where(np.isfinite(difference), difference, 0)
        if self._kept is not None:
            self._kept[start : start + len(block)] = block
        else:
            block = block.astype(np.float64)
            self._gram += block.T @ block

    def value(self) -> float:
        if self._kept is not None:
            step = max(1, 2**20 // len(self._kept))
            for start in range(0, self._kept.shape[1], step):
                block = self._kept[:, start : start + step].astype(np.float64)
                self._gram += block @ block.T
        squares = np.linalg.eigvalsh(self._gram)[::-1].clip(0)
        total = squares.sum()
        return float(np.searchsorted(np.cumsum(squares), ENERGY * total) + 1) if total else 0.0
