"""One number at a width not measured: the average over models of how it moves with width.

With `h_e(n) = n^{-e}` (or `log n` at e = 0), scaled to change by 1 over the widths measured, each
model says

    y(n) = p + q h_e(n) + ω B(log2 n) + noise,   q ~ N(0, τ²),   noise variance v_n + σ²,

with `v_n` the seeds' variance, B a Wiener process that starts at the smallest width, and p free.
Exponent, τ, the wandering ω and the scatter σ run over short lists with equal prior weight; given
them all is linear and Gaussian, so the evidence and the prediction are closed forms (Gaussian
process regression; Rasmussen and Williams 2006, section 2.7), and the forecast is the mixture of
the predictions by evidence. τ = ω = 0 is a quantity that stays, ω alone forecasts the last value
measured, large τ with e = 0 a straight line, e > 0 a power law with a limit: the data say how much
of each.

A positive loss may also follow such a law in its logarithm, as a loss does that falls by the same
factor with each doubling; both readings share the prior, and the evidence (with the Jacobian
`1/y`) tells them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from theory.losses import check_widths
from theory.rates import Interval

__all__ = ["LOSS", "OPTIMUM", "Prediction", "Prior", "predict", "predict_loss"]

FloatArray = NDArray[np.float64]

# Weight below which a component moves no quantile that is asked for.
_NEGLIGIBLE_WEIGHT = 1e-9


@dataclass(frozen=True)
class Prior:
    """What a quantity may do with width, in units of `unit`; wanderings per root of a doubling."""

    exponents: tuple[float, ...]
    spreads: tuple[float, ...]
    scatters: tuple[float, ...]
    wanderings: tuple[float, ...] = (0.0,)


OPTIMUM = Prior(
    exponents=(-0.5, 0.0, 0.25, 0.5, 1.0, 2.0),
    spreads=(0.0, 0.125, 0.5, 2.0, 8.0),
    scatters=(0.0, 0.1),
    wanderings=(0.0, 0.03, 0.1, 0.3, 0.6, 1.0),
)
"""An optimum, in octaves. An exponent below 0 is one that moves ever faster."""

LOSS = Prior(
    exponents=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    spreads=(0.0, 0.3, 1.0, 3.0),
    scatters=(0.0,),
    wanderings=(0.01, 0.03, 0.1, 0.3),
)
"""A loss, or its logarithm, in units of its range over the widths measured."""

LOSS_OF_SINGLE_RUNS = replace(LOSS, scatters=(0.0, 0.1, 0.3), wanderings=(0.03, 0.1, 0.3, 1.0))
"""The same where no width has two seeds, so that nothing shows how much of a loss is chance."""


@dataclass(frozen=True)
class Prediction:
    """A mixture of normal (or, where `logarithms`, log-normal) predictions: components (M,)."""

    weights: FloatArray
    means: FloatArray
    deviations: FloatArray
    logarithms: bool | NDArray[np.bool_] = False

    @property
    def median(self) -> float:
        """Median of the mixture: inside every central interval, which its mean need not be."""
        return self._quantile(0.5)

    def interval(self, confidence: float) -> Interval:
        """Central interval of the mixture."""
        tail = (1 - confidence) / 2
        return self._quantile(tail), self._quantile(1 - tail)

    def _quantile(self, level: float) -> float:
        kept = self.weights > _NEGLIGIBLE_WEIGHT
        weights = self.weights[kept] / self.weights[kept].sum()
        means, spread = self.means[kept], np.maximum(self.deviations[kept], 1e-300)
        logs = np.broadcast_to(self.logarithms, kept.shape)[kept]

        def natural(z: FloatArray) -> FloatArray:
            return np.where(logs, np.exp(np.minimum(np.where(logs, z, 0.0), 700.0)), z)

        def excess(y: float) -> float:
            x = np.where(logs, math.log(y) if y > 0 else -math.inf, y)
            return float(weights @ stats.norm.cdf((x - means) / spread)) - level

        # A mixture's quantile lies between those of its components.
        ends = natural(means + float(stats.norm.ppf(level)) * spread)
        low, high = float(ends.min()), float(ends.max())
        if not excess(low) < 0 < excess(high):
            return low if excess(low) >= 0 else high
        # Log-normal components may end hundreds of orders of magnitude apart: sought is the inverse
        # hyperbolic sine, in units of the likeliest component.
        likeliest = int(weights.argmax())
        unit = abs(float(natural(means)[likeliest])) or float(spread[likeliest])
        bracket = (math.asinh(low / unit), math.asinh(high / unit))
        found = optimize.root_scalar(
            lambda s: excess(unit * math.sinh(s)), bracket=bracket, method="brentq", xtol=1e-13
        )
        return min(max(unit * math.sinh(found.root), low), high)


def predict(
    widths: ArrayLike,
    values: ArrayLike,
    target: float,
    *,
    variances: ArrayLike,
    prior: Prior = OPTIMUM,
    unit: float = 1.0,
) -> Prediction:
    """Predict a quantity at another width by the average over models of this module's docstring.

    Args:
      widths: shape (W,), W ≥ 2.
      values: shape (W,), finite.
      target: the width asked for.
      variances: of the values' noise, shape (W,).
      prior: lists of exponents, spreads τ, scatters σ and wanderings ω.
      unit: of the spreads, scatters and wanderings, in the values' units.

    Raises:
      ValueError: fewer than two widths.
    """
    evidence, means, deviations = _each_model(widths, values, target, variances, prior, unit)
    weights = np.exp(evidence - evidence.max())
    return Prediction(weights / weights.sum(), means, deviations)


def predict_loss(
    widths: ArrayLike, values: ArrayLike, target: float, *, variances: ArrayLike
) -> Prediction:
    """Predict a loss, by the models for it and, where all values are positive, for its logarithm.

    Args:
      widths, values, target: as for `predict`.
      variances: of the values' noise, shape (W,); all 0 where it is not known.

    Raises:
      ValueError: fewer than two widths.
    """
    y, v = np.asarray(values, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    prior = LOSS if (v > 0).any() else LOSS_OF_SINGLE_RUNS
    readings = [(y, v, False)]
    if (y > 0).all():
        readings.append((np.log(y), v / y**2, True))
    evidence, means, deviations, logs = [], [], [], []
    for z, noise, logarithm in readings:
        unit = float(np.ptp(z)) or 1.0
        each, mean, deviation = _each_model(widths, z, target, noise, prior, unit)
        # Densities of the loss itself: the prior of p is flat in the unit, the rest scales with it.
        evidence.append(each - (y.size - 1) * math.log(unit) - (z.sum() if logarithm else 0.0))
        means.append(mean)
        deviations.append(deviation)
        logs.append(np.full(mean.size, logarithm))
    weights = np.exp(np.concatenate(evidence) - np.concatenate(evidence).max())
    return Prediction(
        weights / weights.sum(),
        np.concatenate(means),
        np.concatenate(deviations),
        np.concatenate(logs),
    )


def _each_model(
    widths: ArrayLike,
    values: ArrayLike,
    target: float,
    variances: ArrayLike,
    prior: Prior,
    unit: float,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Log evidence (of the values in units), mean and deviation of every model, shape (M,)."""
    n, y = check_widths(widths), np.asarray(values, dtype=np.float64) / unit
    if n.size < 2:
        raise ValueError(f"widths={n.tolist()}: a forecast needs at least two widths")
    v = np.asarray(variances, dtype=np.float64) / unit**2
    e, tau, sigma, omega = (
        axis.reshape(-1)
        for axis in np.meshgrid(
            prior.exponents, prior.spreads, prior.scatters, prior.wanderings, indexing="ij"
        )
    )
    logs = np.log(np.append(n, target) / n[0])
    span = logs[-2]
    # Falls from 0 at the first width to −1 at the last one measured.
    h = np.where(
        e[:, None] == 0,
        -logs / span,
        np.expm1(-np.outer(e, logs)) / -np.expm1(-e * span + (e == 0))[:, None],
    )
    covariance = (tau**2)[:, None, None] * h[:, :, None] * h[:, None, :]
    covariance = covariance + (omega**2)[:, None, None] * _wiener(logs / math.log(2))
    noise = v + sigma[:, None] ** 2 + 1e-8
    size = n.size
    among = covariance[:, :size, :size] + noise[:, :, None] * np.eye(size)
    beside, alone = covariance[:, :size, size], covariance[:, size, size]
    factor = np.linalg.cholesky(among)
    right = np.stack([np.broadcast_to(c, beside.shape) for c in (np.ones(size), y)] + [beside], -1)
    # Whitened: products of these columns are products with the inverse covariance between.
    white = np.linalg.solve(factor, right)
    ones, whole, at = (white[..., k] for k in range(3))
    total = (ones**2).sum(1)
    level = (ones * whole).sum(1) / total
    rest = whole - level[:, None] * ones
    evidence = -np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
    evidence = evidence - 0.5 * np.log(total) - 0.5 * (rest**2).sum(1)
    mean = level + (at * rest).sum(1)
    missing = 1 - (at * ones).sum(1)
    variance = alone - (at**2).sum(1) + missing**2 / total + sigma**2
    return evidence, mean * unit, np.sqrt(np.maximum(variance, 0.0)) * unit


def _wiener(doublings: FloatArray) -> FloatArray:
    """Covariance of a Wiener process that is 0 at the first width; a target may lie below it."""
    side = doublings[:, None] * doublings > 0
    return np.where(side, np.minimum.outer(np.abs(doublings), np.abs(doublings)), 0.0)
