"""Where the optimum will be at a width not in the table, and what smaller widths' ones cost there.

The forecast averages over how the optimum could move. With `h_e(n) = n^{-e}` (or `log n` at e = 0),
scaled to change by 1 over the widths measured, each model says

    y(n) = p + q h_e(n) + noise,   q ~ N(0, τ²),   noise variance v_n + σ²,

with `v_n` the seeds' variance, σ a scatter that no law explains, and p free. Exponent, τ and σ run
over short lists with equal prior weight; given them all is linear and Gaussian, so the evidence and
the prediction are closed forms (Bayesian linear regression; MacKay 1992), and the forecast is the
mixture of the predictions by evidence. τ = 0 is an optimum that stays, large τ with e = 0 a
straight line in log–log, e > 0 a power law with a limit: the data say how much of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from theory.curves import from_scale, to_scale
from theory.losses import check_widths
from theory.rates import UNKNOWN, Interval
from theory.readings import Readings

__all__ = ["Forecast", "Prediction", "forecast_at", "predict"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """What a quantity may do with width, in units of `unit`."""

    exponents: tuple[float, ...]
    spreads: tuple[float, ...]
    scatters: tuple[float, ...]


OPTIMUM = Prior(
    exponents=(-0.5, 0.0, 0.25, 0.5, 1.0, 2.0),
    spreads=(0.0, 0.125, 0.5, 2.0, 8.0),
    scatters=(0.0, 0.03, 0.1, 0.3, 0.6),
)
"""An optimum, in octaves. An exponent below 0 is one that moves ever faster."""

LOSS = Prior(
    exponents=(-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    spreads=(0.0, 0.3, 1.0, 3.0),
    scatters=(0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
)
"""A loss, in units of its range over the widths measured."""


@dataclass(frozen=True)
class Prediction:
    """A mixture of normal predictions of one number: components (M,)."""

    weights: FloatArray
    means: FloatArray
    deviations: FloatArray

    @property
    def median(self) -> float:
        """Median of the mixture: inside every central interval, which its mean need not be."""
        return self._quantile(0.5)

    def interval(self, confidence: float) -> Interval:
        """Central interval of the mixture."""
        tail = (1 - confidence) / 2
        return self._quantile(tail), self._quantile(1 - tail)

    def _quantile(self, level: float) -> float:
        reach = 12 * np.maximum(self.deviations, 1e-300)
        low, high = float((self.means - reach).min()), float((self.means + reach).max())

        def excess(y: float) -> float:
            z = (y - self.means) / np.maximum(self.deviations, 1e-300)
            return float(self.weights @ stats.norm.cdf(z)) - level

        return optimize.root_scalar(
            excess, bracket=(low, high), method="brentq", xtol=1e-12 * (high - low)
        ).root


@dataclass(frozen=True)
class Forecast:
    """What to expect at a width, as a rule one that the table does not hold.

    Values are medians of the prediction, intervals central.

    Attributes:
      width: the target.
      in_table: it is a width measured: then this is what the others and it say together.
      optimal_hp: predicted optimum, in the hyperparameter's units; NaN if fewer than two widths
        have one.
      optimal_loss: predicted loss there; not negative if no loss in the table is.
      transfer_penalty: per measured width, the loss lost at the target by using its optimum: the
        largest width's curve, shifted to the predicted optimum. NaN for widths that are not
        smaller than the target, and where that curve does not reach so far.
    """

    width: int
    in_table: bool
    optimal_hp: float
    optimal_hp_interval: Interval
    optimal_loss: float
    optimal_loss_interval: Interval
    transfer_penalty: tuple[float, ...]
    transfer_penalty_interval: tuple[Interval, ...]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values; penalties in the order of the widths measured."""
        return {
            "width": self.width,
            "in_table": self.in_table,
            "optimal_hp": json_number(self.optimal_hp),
            "optimal_hp_interval": json_interval(self.optimal_hp_interval),
            "optimal_loss": json_number(self.optimal_loss),
            "optimal_loss_interval": json_interval(self.optimal_loss_interval),
            "transfer_penalty": [json_number(penalty) for penalty in self.transfer_penalty],
            "transfer_penalty_interval": [
                json_interval(ends) for ends in self.transfer_penalty_interval
            ],
        }

    def table(self, widths: Sequence[int]) -> str:
        """Lines for a terminal; `widths` are those measured."""
        named = f"forecast for width {self.width}{' (in the table)' * self.in_table}"
        if math.isnan(self.optimal_hp):
            return f"{named}: none, two widths need a bracketed optimum"
        lines = [
            f"{named}: optimum {self.optimal_hp:.4g} "
            f"[{self.optimal_hp_interval[0]:.3g}, {self.optimal_hp_interval[1]:.3g}], loss "
            f"{self.optimal_loss:.4g} "
            f"[{self.optimal_loss_interval[0]:.4g}, {self.optimal_loss_interval[1]:.4g}]"
        ]
        for width, penalty, ends in zip(
            widths, self.transfer_penalty, self.transfer_penalty_interval, strict=True
        ):
            if not math.isnan(penalty):
                lines.append(
                    f"  with width {width}'s optimum there: {penalty:.2g} in loss "
                    f"[{ends[0]:.2g}, {ends[1]:.2g}]"
                )
        return "\n".join(lines)


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
      prior: lists of exponents, spreads τ and scatters σ.
      unit: of the spreads and scatters, in the values' units.

    Raises:
      ValueError: fewer than two widths.
    """
    n, y = check_widths(widths), np.asarray(values, dtype=np.float64) / unit
    if n.size < 2:
        raise ValueError(f"widths={n.tolist()}: a forecast needs at least two widths")
    v = np.asarray(variances, dtype=np.float64) / unit**2
    e, tau, sigma = (
        axis.reshape(-1)
        for axis in np.meshgrid(prior.exponents, prior.spreads, prior.scatters, indexing="ij")
    )
    logs = np.log(np.append(n, target) / n[0])
    span = logs[-2]
    # Falls from 0 at the first width to −1 at the last one measured.
    raw = np.where(
        e[:, None] == 0,
        -logs / span,
        np.expm1(-np.outer(e, logs)) / -np.expm1(-e * span + (e == 0))[:, None],
    )
    h, h_target = raw[:, :-1], raw[:, -1]
    w = 1 / (v + sigma[:, None] ** 2 + 1e-8)
    # Weighted mean and slope; a prior of variance τ² on the slope, none on the mean.
    total = w.sum(1)
    h_mean, y_mean = (w * h).sum(1) / total, (w @ y) / total
    hc, yc = h - h_mean[:, None], y - y_mean[:, None]
    shh, shy, syy = (w * hc**2).sum(1), (w * hc * yc).sum(1), (w * yc**2).sum(1)
    gain = tau**2 / (1 + tau**2 * shh)
    slope = gain * shy
    evidence = 0.5 * (
        np.log(w).sum(1) - np.log(total) - np.log1p(tau**2 * shh) - syy + gain * shy**2
    )
    lever = h_target - h_mean
    variance = 1 / total + gain * lever**2 + sigma**2
    weights = np.exp(evidence - evidence.max())
    return Prediction(
        weights / weights.sum(), (y_mean + slope * lever) * unit, np.sqrt(variance) * unit
    )


def forecast_at(readings: Readings, target: int, confidence: float) -> Forecast:
    """The forecast of a sweep at a target width.

    Args:
      readings: the sweep's optima.
      target: the width asked for.
      confidence: level of the intervals.

    Raises:
      ValueError: the target is no positive whole number.
    """
    if isinstance(target, bool) or int(target) != target or target < 1:
        raise ValueError(f"target_width={target!r} must be a positive whole number")
    widths, usable = readings.table.widths, readings.usable
    in_table = bool((widths == target).any())
    if usable.sum() < 2:
        nothing = (math.nan,) * widths.size
        unknown = (UNKNOWN,) * widths.size
        return Forecast(
            int(target), in_table, math.nan, UNKNOWN, math.nan, UNKNOWN, nothing, unknown
        )
    x = readings.coordinate
    noise = _variances(readings.drawn_coordinate, usable)
    optimum = predict(
        widths[usable],
        x[usable],
        target,
        variances=noise + readings.resolution**2,
        unit=hp_unit(readings),
    )
    y = readings.loss[usable]
    loss = predict(
        widths[usable],
        y,
        target,
        variances=_variances(readings.drawn_loss, usable),
        prior=LOSS,
        unit=float(np.ptp(y)) or 1.0,
    )
    least_loss = 0.0 if readings.table.nonnegative else -math.inf
    loss_low, loss_high = (max(end, least_loss) for end in loss.interval(confidence))
    centre, (low, high) = optimum.median, optimum.interval(confidence)
    penalties, ranges = [], []
    for k, width in enumerate(widths):
        if width >= target or not usable[k] or not usable[-1]:
            penalties.append(math.nan)
            ranges.append(UNKNOWN)
            continue
        # Distances from the optimum at the target, laid on the curve of the largest width.
        away = x[-1] + x[k] - np.array([centre, high, low])
        penalty, *ends = (float(s) ** 2 for s in readings.s(away))
        least = 0.0 if low <= x[k] <= high else min(ends)
        known = math.isfinite(penalty)
        penalties.append(penalty if known else math.nan)
        ranges.append((least, max(ends)) if known else UNKNOWN)
    scale = readings.table.scale
    middle, bottom, top = (float(hp) for hp in from_scale(np.array([centre, low, high]), scale))
    return Forecast(
        width=int(target),
        in_table=in_table,
        optimal_hp=middle,
        optimal_hp_interval=(bottom, top),
        optimal_loss=max(loss.median, least_loss),
        optimal_loss_interval=(loss_low, loss_high),
        transfer_penalty=tuple(penalties),
        transfer_penalty_interval=tuple(ranges),
    )


def hp_unit(readings: Readings) -> float:
    """The step of a hyperparameter that counts as one octave does for learning rates."""
    if readings.table.scale != "linear":
        return 1.0
    x = to_scale(readings.table.grids[-1], "linear")
    # A usual learning-rate grid spans about eight octaves.
    return float(x[-1] - x[0]) / 8


def _variances(drawn: FloatArray | None, usable: NDArray[np.bool_]) -> FloatArray:
    if drawn is None:
        return np.zeros(int(usable.sum()))
    return np.nanvar(np.where(np.isfinite(drawn), drawn, np.nan)[:, usable], axis=0)


def json_number(value: float) -> float | None:
    """A number for strict JSON: null for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def json_interval(interval: Interval) -> list[float | None] | None:
    """An interval for strict JSON: null where there is none, null ends where it is open."""
    return None if math.isnan(interval[0]) else [json_number(end) for end in interval]
