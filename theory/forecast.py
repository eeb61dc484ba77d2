"""Where the optimum will be at a width not in the table, and what smaller widths' ones cost there.

The optimum and the loss at it are forecast by the average over models of `theory.forecast_models`,
or by a naive forecast where that did better on the table's own widths (`theory.forecast_choice`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.curves import from_scale, to_scale
from theory.forecast_choice import Method, choose
from theory.forecast_models import predict, predict_loss
from theory.rates import UNKNOWN, Interval
from theory.readings import Readings

__all__ = ["Forecast", "forecast_at"]

FloatArray = NDArray[np.float64]

_WORDS: dict[Method, str] = {
    "average": "the average over models",
    "last": "the largest width's",
    "line": "a straight line",
}


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
      method: of the optimum: `"average"`, `"last"` or `"line"` (`theory.forecast_choice`).
      loss_method: of the loss.
      reason: one sentence for both.
    """

    width: int
    in_table: bool
    optimal_hp: float
    optimal_hp_interval: Interval
    optimal_loss: float
    optimal_loss_interval: Interval
    transfer_penalty: tuple[float, ...]
    transfer_penalty_interval: tuple[Interval, ...]
    method: Method
    loss_method: Method
    reason: str

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
            "method": self.method,
            "loss_method": self.loss_method,
            "reason": self.reason,
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
            f"[{self.optimal_loss_interval[0]:.4g}, {self.optimal_loss_interval[1]:.4g}]",
            f"  by {_WORDS[self.method]} for the optimum, {_WORDS[self.loss_method]} for the loss",
        ]
        if (self.method, self.loss_method) != ("average", "average"):
            lines += [f"  {each}" for each in self.reason.split("; ")]
        for width, penalty, ends in zip(
            widths, self.transfer_penalty, self.transfer_penalty_interval, strict=True
        ):
            if not math.isnan(penalty):
                lines.append(
                    f"  with width {width}'s optimum there: {penalty:.2g} in loss "
                    f"[{ends[0]:.2g}, {ends[1]:.2g}]"
                )
            elif width < self.width and not np.isnan(self.transfer_penalty).all():
                lines.append(
                    f"  with width {width}'s optimum there: unknown (not bracketed, or farther off "
                    "than the largest width's curve reaches)"
                )
        return "\n".join(lines)


# Wider than any network, and exact as a float.
_WIDEST = 2**53


def forecast_at(readings: Readings, target: int, confidence: float) -> Forecast:
    """The forecast of a sweep at a target width.

    Args:
      readings: the sweep's optima.
      target: the width asked for.
      confidence: level of the intervals.

    Raises:
      ValueError: the target is no positive whole number.
    """
    if isinstance(target, bool) or int(target) != target or not 1 <= target <= _WIDEST:
        raise ValueError(
            f"target_width={target!r} must be a positive whole number, at most {_WIDEST}"
        )
    widths, usable = readings.table.widths, readings.usable
    in_table = bool((widths == target).any())
    if usable.sum() < 2:
        nothing = (math.nan,) * widths.size
        unknown = (UNKNOWN,) * widths.size
        return Forecast(
            width=int(target),
            in_table=in_table,
            optimal_hp=math.nan,
            optimal_hp_interval=UNKNOWN,
            optimal_loss=math.nan,
            optimal_loss_interval=UNKNOWN,
            transfer_penalty=nothing,
            transfer_penalty_interval=unknown,
            method="average",
            loss_method="average",
            reason="two widths need a bracketed optimum",
        )
    x = readings.coordinate
    noise = _variances(readings.drawn_coordinate, usable)
    unit = hp_unit(readings)
    optimum = choose(
        widths[usable],
        x[usable],
        noise + readings.resolution**2,
        target,
        predictor=lambda n, y, v, at: predict(n, y, at, variances=v, unit=unit),
        confidence=confidence,
    )
    y = readings.loss[usable]
    loss = choose(
        widths[usable],
        y,
        _variances(readings.drawn_loss, usable),
        target,
        predictor=lambda n, y, v, at: predict_loss(n, y, at, variances=v),
        confidence=confidence,
        logarithmic=bool((y > 0).all()),
    )
    least_loss = 0.0 if readings.table.nonnegative else -math.inf
    loss_low, loss_high = (max(end, least_loss) for end in loss.interval)
    centre, (low, high) = optimum.value, optimum.interval
    penalties, ranges = [], []
    for k, width in enumerate(widths):
        if width >= target or not usable[k] or not usable[-1]:
            penalties.append(math.nan)
            ranges.append(UNKNOWN)
            continue
        # Distances from the optimum at the target, laid on the curve of the largest width.
        away = x[-1] + x[k] - np.array([centre, high, low])
        penalty, *ends = (float(s) ** 2 for s in readings.s(away))
        least = 0.0 if low <= x[k] <= high else min(penalty, *ends)
        known = math.isfinite(penalty)
        penalties.append(penalty if known else math.nan)
        ranges.append((least, max(penalty, *ends)) if known else UNKNOWN)
    scale = readings.table.scale
    middle, bottom, top = (float(hp) for hp in from_scale(np.array([centre, low, high]), scale))
    return Forecast(
        width=int(target),
        in_table=in_table,
        optimal_hp=middle,
        optimal_hp_interval=(bottom, top),
        optimal_loss=max(loss.value, least_loss),
        optimal_loss_interval=(loss_low, loss_high),
        transfer_penalty=tuple(penalties),
        transfer_penalty_interval=tuple(ranges),
        method=optimum.method,
        loss_method=loss.method,
        reason=f"optimum: {optimum.reason}; loss: {loss.reason}",
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
