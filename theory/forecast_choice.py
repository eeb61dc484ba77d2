"""Which forecast to use: the average over models, or a naive one that the table itself prefers.

Two naive forecasts are what anybody would do: the last value measured, and a straight line against
`log n` (for a positive loss, in log–log). Each width from the third on is forecast from the smaller
ones by all three, and a naive forecast is used where its root-mean-square error in that test is
below half of the average's. One test is luck, so the average stands below four widths.

The naive forecast's interval is that of the average, moved to it: the test says that it errs less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from theory.forecast_models import Prediction
from theory.rates import Interval

__all__ = ["Choice", "Method", "choose"]

FloatArray = NDArray[np.float64]
Predictor = Callable[[NDArray[np.int64], FloatArray, FloatArray, float], Prediction]

Method = Literal["average", "last", "line"]
"""The average over models of `theory.forecast_models`; the largest width's value; a straight line
in log n, of the logarithm if it is a positive loss."""

# On planted sweeps 0.7 and 1 take the line where an optimum that converges has not yet bent, and
# double the error there; 0.5 and 0.3 do about alike (docs/forecast.md).
_MUCH_BETTER = 0.5
_FEWEST_TESTS = 2
_SMALLER_WIDTHS = 2


@dataclass(frozen=True)
class Choice:
    """A forecast of one number.

    Attributes:
      method: used.
      value, interval: forecast.
      tests: widths of the table that were forecast from smaller ones.
      errors: root mean square of each method's errors there, in units of the number (of its
        logarithm for a positive loss); NaN without tests.
    """

    method: Method
    value: float
    interval: Interval
    tests: int
    errors: dict[Method, float]

    @property
    def reason(self) -> str:
        """One sentence for the choice."""
        if self.tests < _FEWEST_TESTS:
            return "too few widths to test forecasts on the table itself"
        said = ", ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
        widths = f"its {self.tests} largest widths forecast from smaller ones, errors: {said}"
        return (
            f"a naive forecast errs less on the table itself ({widths})"
            if self.method != "average"
            else f"no naive forecast errs much less on the table itself ({widths})"
        )


def choose(
    widths: NDArray[np.int64],
    values: FloatArray,
    variances: FloatArray,
    target: float,
    *,
    predictor: Predictor,
    confidence: float,
    logarithmic: bool = False,
) -> Choice:
    """Forecast by the method that this module's docstring prefers.

    Args:
      widths: shape (W,), W ≥ 2.
      values: shape (W,), finite.
      variances: of their noise, shape (W,).
      target: the width asked for.
      predictor: the average: widths, values, variances and target to a prediction.
      confidence: level of the interval.
      logarithmic: lines and errors are those of the logarithm; values are positive.
    """
    prediction = predictor(widths, values, variances, target)
    value, (low, high) = prediction.median, prediction.interval(confidence)
    methods: tuple[Method, ...] = ("average", "last", "line")
    missed = []
    # A target below the largest width is no extrapolation, and naive forecasts are for these.
    if target > widths[-1] and widths.size >= _SMALLER_WIDTHS + _FEWEST_TESTS:
        for k in range(_SMALLER_WIDTHS, widths.size):
            average = predictor(widths[:k], values[:k], variances[:k], float(widths[k])).median
            found = [average, *_naive(widths[:k], values[:k], float(widths[k]), logarithmic)]
            actual = float(values[k])
            missed.append([_distance(one, actual, logarithmic) for one in found])
    if not missed:
        none: dict[Method, float] = dict.fromkeys(methods, math.nan)
        return Choice("average", value, (low, high), 0, none)
    roots = np.sqrt(np.square(missed).mean(axis=0)).tolist()
    errors: dict[Method, float] = dict(zip(methods, roots, strict=True))
    last, line = _naive(widths, values, target, logarithmic)
    naive: dict[Method, float] = {"last": last, "line": line}
    best = min(naive, key=lambda name: errors[name])
    if errors[best] < _MUCH_BETTER * errors["average"]:
        shift = naive[best] - value
        return Choice(best, naive[best], (low + shift, high + shift), len(missed), errors)
    return Choice("average", value, (low, high), len(missed), errors)


def _naive(
    widths: NDArray[np.int64], values: FloatArray, target: float, logarithmic: bool
) -> tuple[float, float]:
    """The last value, and the least-squares line in log n, at the target."""
    z = np.log(values) if logarithmic else values
    slope, level = np.polyfit(np.log2(widths), z, 1)
    line = float(level + slope * math.log2(target))
    return float(values[-1]), math.exp(min(line, 700.0)) if logarithmic else line


def _distance(found: float, actual: float, logarithmic: bool) -> float:
    if not logarithmic:
        return found - actual
    # An average that falls to 0 or below is off by any factor; a large one will do.
    return math.log(max(found, 1e-3 * actual) / actual)
