"""Intervals of a fitted exponent from refits: seeds resampled, and each width left out in turn.

They stand beside the profile likelihood of `theory.rates`, and use less of the model.

**Seeds.** Every bootstrap draw gives each width another value; the power law is fitted to them with
the weights of the first fit, and with `q_p` the quantiles of the refitted exponents at the two ends
of the interval,

    [e − r (e − q_low), e + r (q_high − e)],   r = t/z,

Student's quantile over the normal one: S seeds know their noise to S − 1 degrees of freedom only.

**Widths.** With `e_(k)` the exponent without width k, the jackknife (Tukey 1958)

    V = (W−1)/W Σ_k (e_(k) − mean)²,   e ± t_{W−3} sqrt(V),

knows nothing of seeds or of the law's truth: it is how much the answer hangs on single widths. It
needs 5 widths, so that 4 are left, and all refits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from theory.rates import UNKNOWN, Interval, PowerLaw

__all__ = ["ResampledIntervals", "bootstrap_interval", "jackknife_interval", "refit_exponents"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ResampledIntervals:
    """Of one exponent, at the confidence of its fit; NaN where there is none.

    Attributes:
      bootstrap: seeds resampled.
      leave_one_width_out: jackknife over widths.
    """

    bootstrap: Interval = UNKNOWN
    leave_one_width_out: Interval = UNKNOWN


def refit_exponents(
    widths: NDArray[np.int64],
    draws: FloatArray,
    variances: FloatArray,
    exponents: FloatArray,
    lowest_limit: float = -math.inf,
) -> FloatArray:
    """The least-squares exponent of `y = L + B n^{-e}` for each of many data sets.

    Args:
      widths: shape (W,).
      draws: values, shape (R, W).
      variances: of their noise, shape (W,), positive.
      exponents: those tried, shape (E,); the result is one of them.
      lowest_limit: `L` is at least this where `e > 0`.

    Returns:
      Shape (R,).
    """
    w = 1 / variances
    u = np.log(widths) - np.log(widths).mean()
    e = np.where(exponents == 0, 1.0, exponents)[:, None]
    # Any multiple of n^{-e} plus a constant spans the same model.
    basis = np.where(exponents[:, None] == 0, -u, np.expm1(-e * u) / e)
    mean = basis @ w / w.sum()
    centred = basis - mean[:, None]
    squares = centred**2 @ w
    y_mean = draws @ w / w.sum()
    moved = draws - y_mean[:, None]
    slope = (centred * w) @ moved.T / squares[:, None]
    rss = moved**2 @ w - slope**2 * squares[:, None]
    if math.isfinite(lowest_limit):
        limit = y_mean - slope * (mean[:, None] + 1 / e)
        powers = np.exp(-exponents[:, None] * u)
        above = draws - lowest_limit
        explained = ((powers * w) @ above.T) ** 2 / (powers**2 @ w)[:, None]
        bounded = (exponents[:, None] > 0) & (limit < lowest_limit)
        rss = np.where(bounded, above**2 @ w - explained, rss)
    return exponents[rss.argmin(axis=0)]


def bootstrap_interval(fit: PowerLaw, refits: FloatArray, dof: float) -> Interval:
    """The interval from the exponents of bootstrap draws, by this module's docstring.

    Args:
      fit: of the data as they are.
      refits: shape (R,).
      dof: degrees of freedom behind the noise.
    """
    if math.isnan(fit.exponent) or refits.size == 0 or dof <= 0:
        return UNKNOWN
    high = (1 + fit.confidence) / 2
    stretch = float(stats.t.ppf(high, dof) / stats.norm.ppf(high))
    ends = np.quantile(refits, [1 - high, high])
    low, top = fit.exponent + stretch * (ends - fit.exponent)
    return float(min(low, fit.exponent)), float(max(top, fit.exponent))


def jackknife_interval(fit: PowerLaw, refits: Sequence[PowerLaw]) -> Interval:
    """The interval from fits without each of the W widths, by this module's docstring."""
    left = np.array([one.exponent for one in refits])
    if left.size < 5 or not np.isfinite([fit.exponent, *left]).all():
        return UNKNOWN
    deviation = math.sqrt((left.size - 1) / left.size * float(((left - left.mean()) ** 2).sum()))
    half = float(stats.t.ppf((1 + fit.confidence) / 2, left.size - 3)) * deviation
    return fit.exponent - half, fit.exponent + half
