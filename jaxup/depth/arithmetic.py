"""The arithmetic of scales on numpy arrays. `jaxup.depth.apply` has it for whole stacks of layers in jax."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np

DType = np.dtype | str | None  # None: the dtype that it has


def rescale(x: np.ndarray, factors: Sequence[float], dtype: DType = None, out_dtype: DType = None) -> np.ndarray:
    """The array cast to `dtype`, multiplied with each factor in turn, and cast to `out_dtype`.

    Products are computed in float32 and rounded to `dtype`; a factor of 0 gives +0.0, whatever the array
    holds. This is mergekit's arithmetic for `scale`, but for the sign of zero.
    """
    dtype = np.dtype(dtype or x.dtype)
    if tuple(factors) == (0.0,):
        return np.zeros(x.shape, out_dtype or dtype)
    with np.errstate(over="ignore"):
        x = x.astype(dtype, copy=False)
        for factor in factors:
            x = (x.astype(np.float32) * np.float32(factor)).astype(dtype)
        return x.astype(out_dtype or dtype, copy=False)
