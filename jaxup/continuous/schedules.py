"""The noise of denoising diffusion: the cosine schedule, fewer of its steps, and what a step back does.

Nichol & Dhariwal (arXiv 2102.09672), whose code MAR takes: x_t = sqrt(A_t) x + sqrt(1 - A_t) noise, with beta_t =
1 - A_t / A_{t-1}. Tables are float64, made on the host.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from jaxup.errors import UserError


class Schedule(NamedTuple):
    """One number for each step that is kept, the one with the least noise first."""

    times: np.ndarray  # which of the steps that a net is trained on: 0 to total - 1
    signal: np.ndarray  # A: the share of the variance that is signal
    # The mean of x_{t-1} given x_t and x is clean * x + noisy * x_t.
    clean: np.ndarray
    noisy: np.ndarray
    # The logarithms of the two variances between which the learned one is: that of x_{t-1} given x_t and x, right if x
    # is known, and beta, right if x is white noise. The former is 0 at the first step, which takes the second's.
    log_posterior: np.ndarray
    log_beta: np.ndarray


@functools.lru_cache(maxsize=16)
def cosine(total: int, kept: int) -> Schedule:
    """The cosine schedule of `total` steps, or `kept` of them, as far apart as can be."""
    if not 1 <= kept <= total:
        raise UserError(f"{kept} steps of diffusion: it has been learned in {total}", at="head_steps")

    def remaining(t):  # cos^2, with an offset so that the first steps are not too small to learn
        return np.cos((t / total + 0.008) / 1.008 * np.pi / 2) ** 2

    step = np.arange(total)
    signal = np.cumprod(1 - np.minimum(1 - remaining(step + 1) / remaining(step), 0.999))
    times = np.linspace(total - 1, 0, kept).round().astype(np.int32)[::-1]
    signal = signal[times]
    before = np.concatenate([[1.0], signal[:-1]])
    beta = 1 - signal / before
    posterior = beta * (1 - before) / (1 - signal)
    posterior[0] = posterior[1] if kept > 1 else beta[0]
    clean = beta * np.sqrt(before) / (1 - signal)
    noisy = (1 - before) * np.sqrt(signal / before) / (1 - signal)
    return Schedule(times, signal, clean, noisy, np.log(posterior), np.log(beta))
