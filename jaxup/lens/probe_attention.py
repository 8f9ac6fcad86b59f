"""How much of attention is there: Inheritune's rank and mass (arXiv 2404.08634), which find its "lazy layers"."""

from __future__ import annotations

import numpy as np

SHARE = 0.9
LAZY = 1.5  # a layer is lazy when no head has a mean rank of more: all are about 1


def ranks(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rank, mass) of matrices [..., S, S], each int [...].

    The rank is the least k for which the k largest singular values have SHARE of the sum of all squares; the mass the
    least number of columns that have SHARE of the squared Frobenius norm.
    """
    a = weights.astype(np.float64)
    squares = np.linalg.eigvalsh(a @ np.swapaxes(a, -1, -2))  # of the singular values
    return _fewest(np.maximum(squares, 0)), _fewest(np.square(a).sum(-2))


def _fewest(parts: np.ndarray) -> np.ndarray:
    """How many of the parts [..., n], the largest first, make up SHARE of their sum."""
    shares = np.cumsum(np.sort(parts, -1)[..., ::-1], -1)
    return 1 + (shares < SHARE * shares[..., -1:]).sum(-1)


def lazy(rank: np.ndarray) -> np.ndarray:
    """bool [layers]: which are lazy, by the mean rank of each head [layers, heads]."""
    return rank.max(-1) < LAZY
