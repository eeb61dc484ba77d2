"""Does the best learning rate stay where it is when the network widens, and how sure is that?

For widths `n_1 < … < n_K`, learning rates `eta_1 < … < eta_H` and seeds `s = 1 … S`, let `eta*(n)`
be the minimum of the mean over seeds of the final loss (`theory.curves`: a parabola in `log2 eta`).
Reported are

    drift_octaves      = log2 eta*(n_K) − log2 eta*(n_1)                     [octaves]
    drift_per_doubling = least-squares slope of log2 eta*(n) on log2 n      [octaves per doubling]
    transfer_penalty   = phi_K(eta*(n_1)) − phi_K(eta*(n_K)), phi_K the mean loss at n_K    [loss]

`eta*(n) ∝ n^{-p}` has `drift_per_doubling = −p`: 0 is perfect transfer, −1 what hidden matrices ask
of Adam's rate when nothing scales it (Yang et al., arXiv 2203.03466, Table 3). Ghosh, Wu and Bietti
(arXiv 2512.22768) call `|log2 eta*(n) − log2 eta*(∞)|` the HP gap `b_n`, and the penalty `c_n`.

**Intervals.** Trials with one seed index share initialisation keys and batches at all widths and
learning rates (common random numbers), so seeds are resampled jointly: one bootstrap draw gives
weights `m_s/S` (`m` multinomial) to the seeds of every cell at once. A bootstrap of S seeds has
variance too small by `(S−1)/S`, so every resampled mean curve's deviation from the mean curve is
stretched by `sqrt(S/(S−1))`. The standard deviation of a statistic over the resamples, times
Student's t quantile with `S − 1` degrees of freedom, is the half-width. The percentile interval of
the same resamples is not used: at few seeds it covers far too rarely. Coverage at 90 % nominal,
measured over six settings (parabolas and curves with a steep right side; noise shared by a seed,
noise of single cells, noise in the optimum's position; `tests/test_theory_drift_intervals.py`, 1000
repetitions each, standard error .01), as the range over settings of optimum, drift and slope, and
of the optimal loss:

| seeds | this interval | its loss | percentile interval | its loss | jackknife × t |
|---|---|---|---|---|---|
| 3 | .88 to .98 | .88 to .92 | .68 to .85 | .51 to .72 | .83 to .93 |
| 5 | .88 to .97 | .88 to .92 | .80 to .93 | .67 to .83 | .79 to .94 |
| 10 | .88 to .95 | .88 to .91 | .85 to .95 | .76 to .87 | .74 to .93 |

The high ends belong to noise comparable with the depth of the curve. What is covered is the minimum
that `theory.curves` would find on the noise-free mean curve: the grid's own interpolation error is
not in it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from theory.curves import Edge, Optima, interpolate_loss, locate_optima
from theory.drift_judgement import DriftEvidence, judge_drift, warnings_of_drift
from theory.drift_summary import (
    Interval,
    TransferSummary,
    Verdict,
    format_edge,
    format_rate,
    format_rate_interval,
    format_with_interval,
)
from theory.losses import draw_floor, resampled_deviations

__all__ = [
    "Interval",
    "TransferSummary",
    "Verdict",
    "format_edge",
    "format_rate",
    "format_rate_interval",
    "format_with_interval",
    "transfer_summary",
]

FloatArray = NDArray[np.float64]

_UNKNOWN: Interval = (math.nan, math.nan)


def transfer_summary(
    widths: ArrayLike,
    learning_rates: ArrayLike,
    losses: ArrayLike,
    diverged: ArrayLike,
    *,
    confidence: float = 0.9,
    resamples: int = 2000,
    rng_seed: int = 0,
    tolerance: float = 0.25,
) -> TransferSummary:
    """How the optimal learning rate moves with width, by the estimators of the module docstring.

    A (width, learning rate) cell in which any seed diverged counts as diverged: its mean is
    infinite, in every resample too. An optimum that the grid does not bracket is one-sided
    evidence: if the curve is a parabola there, its minimum lies anywhere from the midpoint between
    the smallest usable point and its usable neighbour to the neighbour that diverged, or without
    bound where the grid ends. Intervals are widened to that range.

    Args:
      widths: shape (K,), positive, strictly increasing.
      learning_rates: shape (H,), H ≥ 3, positive, strictly increasing, the same at all widths.
      losses: final losses, shape (K, H, S) = (width, learning rate, seed); finite where not
        diverged, ignored where diverged. Seed s means the same random numbers in every cell.
      diverged: bool, same shape.
      confidence: nominal level of the two-sided intervals, in (0, 1).
      resamples: bootstrap draws, at least 100; 2000 leave a relative error of 1.6 % in a
        half-width.
      rng_seed: seed of the bootstrap.
      tolerance: octaves per doubling below which a drift counts as none, > 0. The default 0.25
        loses a factor 2 in learning rate over four doublings, a sixteen-fold width.

    Returns:
      The summary.

    Raises:
      ValueError: an argument is not as described; the message names it and its value.
    """
    n, rates, values, bad = _check(widths, learning_rates, losses, diverged)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, as 0.9 does")
    if resamples < 100:
        raise ValueError(
            f"resamples={resamples!r} is too few for a standard error; use 100 or more (2000)"
        )
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(
            f"tolerance={tolerance!r} must be a positive number of octaves per doubling, as 0.25 is"
        )
    seeds = values.shape[-1]

    cell_diverged = np.asarray(bad.any(axis=-1))
    values = np.where(cell_diverged[..., None], 0.0, values)
    mean = values.mean(axis=-1)
    curve = np.where(cell_diverged, np.inf, mean)
    optima = locate_optima(rates, curve)
    x = optima.coordinate
    slope_weights = _slope_weights(np.log2(n), np.isfinite(x))
    drift_weights = np.zeros(n.size)
    drift_weights[0], drift_weights[-1] = -1.0, 1.0
    drift_weights = drift_weights if n.size > 1 else np.full(1, np.nan)

    half_x = np.full(n.size, np.nan)
    half_loss = np.full(n.size, np.nan)
    half_drift = half_slope = math.nan
    near_edge = [False] * n.size
    if seeds > 1:
        rng = np.random.default_rng(rng_seed)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
        deviation = resampled_deviations(values, weights)
        floor = np.stack([draw_floor(*cells) for cells in zip(curve, values, strict=True)])
        drawn = locate_optima(rates, np.maximum(curve + deviation, floor))
        t = float(stats.t.ppf((1 + confidence) / 2, seeds - 1))
        half_x = t * drawn.coordinate.std(axis=0)
        # A width where everything diverged has infinite losses in every draw, and no spread.
        drawn_loss = np.where(np.isfinite(drawn.loss), drawn.loss, np.nan)
        half_loss = t * drawn_loss.std(axis=0)
        half_drift = t * float(_combine(drift_weights, drawn.coordinate).std())
        half_slope = t * float(_combine(slope_weights, drawn.coordinate).std())
        often = drawn.at_edge.mean(axis=0) > (1 - confidence) / 2
        near_edge = (often & ~optima.at_edge).tolist()

    drift = float(_combine(drift_weights, x))
    drift_interval = _combined_interval(drift_weights, optima, half_drift)
    slope = float(_combine(slope_weights, x))
    slope_interval = _combined_interval(slope_weights, optima, half_slope)
    edges: tuple[Edge, ...] = tuple(optima.edge(k) for k in range(n.size))
    penalty = (
        _transfer_penalty(rates, curve[-1], float(optima.hp[0]), float(optima.loss[-1]))
        if n.size > 1
        else math.nan
    )
    evidence = DriftEvidence(
        widths=tuple(int(width) for width in n),
        seeds=seeds,
        edges=edges,
        near_edge=tuple(near_edge),
        slope=slope,
        slope_interval=slope_interval,
        slope_half_width=half_slope,
        drift_interval=drift_interval,
        penalty=penalty,
        largest_step=float(np.diff(np.log2(rates)).max()),
    )
    verdict, reason = judge_drift(evidence, confidence, tolerance)
    return TransferSummary(
        widths=evidence.widths,
        optimal_lr=_floats(optima.hp),
        optimal_lr_interval=_intervals(
            np.exp2(optima.coordinate_low - half_x), np.exp2(optima.coordinate_high + half_x)
        ),
        optimal_loss=_floats(optima.loss),
        optimal_loss_interval=_intervals(optima.loss - half_loss, optima.loss + half_loss),
        edge=edges,
        drift_octaves=drift,
        drift_interval=drift_interval,
        drift_per_doubling=slope,
        drift_per_doubling_interval=slope_interval,
        transfer_penalty=penalty,
        stability=float(1 - bad.mean()),
        stability_per_width=_floats(1 - bad.mean(axis=(1, 2))),
        verdict=verdict,
        reason=reason,
        warnings=warnings_of_drift(evidence, float(rates[0])),
        confidence=float(confidence),
        tolerance=float(tolerance),
        seeds=seeds,
    )


def _slope_weights(log_width: FloatArray, known: NDArray[np.bool_]) -> FloatArray:
    """Weights w, `slope = Σ w_k x_k`, 0 at widths without an optimum; NaN if under two remain."""
    if known.sum() < 2:
        return np.full(log_width.size, np.nan)
    centred = np.where(known, log_width - log_width[known].mean(), 0.0)
    return centred / (centred**2).sum()


def _combine(weights: FloatArray, x: FloatArray) -> FloatArray:
    # 0 × NaN is NaN: a width that the statistic leaves out must not poison it.
    return (weights * np.where(weights == 0, 0.0, x)).sum(axis=-1)


def _combined_interval(weights: FloatArray, optima: Optima, half_width: float) -> Interval:
    """Range of `Σ w_k x_k` over what the grid leaves open at each width, plus sampling error."""
    if math.isnan(half_width):
        return _UNKNOWN
    low = np.where(weights > 0, optima.coordinate_low, optima.coordinate_high)
    high = np.where(weights > 0, optima.coordinate_high, optima.coordinate_low)
    return (
        float(_combine(weights, low) - half_width),
        float(_combine(weights, high) + half_width),
    )


def _transfer_penalty(
    rates: FloatArray, largest: FloatArray, rate: float, optimal_loss: float
) -> float:
    if math.isnan(rate) or math.isinf(optimal_loss):
        return math.nan
    # Rounding alone could make it −1e-17.
    return max(0.0, float(interpolate_loss(rates, largest, np.asarray(rate))) - optimal_loss)


def _floats(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _intervals(low: FloatArray, high: FloatArray) -> tuple[Interval, ...]:
    return tuple(
        _UNKNOWN if math.isnan(a) or math.isnan(b) else (float(a), float(b))
        for a, b in zip(low, high, strict=True)
    )


def _check(
    widths: ArrayLike, learning_rates: ArrayLike, losses: ArrayLike, diverged: ArrayLike
) -> tuple[NDArray[np.int64], FloatArray, FloatArray, NDArray[np.bool_]]:
    n = np.asarray(widths)
    if n.ndim != 1 or n.size == 0 or not np.issubdtype(n.dtype, np.integer):
        raise ValueError(
            f"widths has shape {n.shape} and dtype {n.dtype}, expected integers of shape (K,)"
        )
    if n[0] < 1 or (np.diff(n) <= 0).any():
        raise ValueError(f"widths={n.tolist()} must be positive and strictly increasing; sort them")
    rates = np.asarray(learning_rates, dtype=np.float64)
    if rates.ndim != 1 or rates.size < 3:
        raise ValueError(
            f"learning_rates has shape {rates.shape}, expected (H,) with H >= 3; add learning rates"
        )
    usable = np.isfinite(rates) & (rates > 0)
    if not usable.all() or (np.diff(rates) <= 0).any():
        raise ValueError(
            f"learning_rates={rates.tolist()} must be finite, positive and strictly increasing; "
            "sort them (and the losses with them) and drop duplicates"
        )
    values = np.asarray(losses, dtype=np.float64)
    bad = np.asarray(diverged)
    expected = (n.size, rates.size)
    if values.ndim != 3 or values.shape[:2] != expected or values.shape[2] == 0:
        raise ValueError(
            f"losses has shape {values.shape}, expected (width, learning_rate, seed) = "
            f"({n.size}, {rates.size}, S)"
        )
    if bad.shape != values.shape or bad.dtype != np.bool_:
        raise ValueError(
            f"diverged has shape {bad.shape} and dtype {bad.dtype}, expected bool of shape "
            f"{values.shape}; use status != 0"
        )
    unexplained = ~bad & ~np.isfinite(values)
    if unexplained.any():
        k, h, s = (int(i) for i in np.argwhere(unexplained)[0])
        raise ValueError(
            f"losses at width {n[k]}, learning rate {rates[h]:g}, seed {s} is {values[k, h, s]}, "
            "though not marked as diverged; mark it in diverged, or supply the loss"
        )
    return n.astype(np.int64), rates, values, bad
