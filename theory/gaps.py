"""Optima of every width, and how far each is from the best: the gaps of hyperparameter transfer.

With `phi_n(nu)` the mean loss at width n and hyperparameter nu, compared on a scale `x(nu)` (log2
for learning rates), `nu*(n)` its optimum, `phi*_n` the loss there and `∞` the largest width
measured or an extrapolated limit (Ghosh, Wu and Bietti, arXiv 2512.22768, section 2):

    loss gap                   a_n = |phi*_n − phi*_∞|
    hyperparameter gap         b_n = |x*(n) − x*(∞)|
    transfer suboptimality     c_n = phi_∞(nu*(n)) − phi*_∞

Nobody has measured `phi_∞`, so its shape is that of the largest width N. There

    s(x) = sign(x − x*(N)) sqrt(phi_N(x) − phi*_N)

is a coordinate in which the loss is exactly quadratic, and `c_n = (s(x*(n)) − s_∞)²` with `s_∞` = 0
if the largest width stands for infinity, or else the limit to which `s(x*(n))` extrapolates. `s`
has a sign and noise without bias, where an estimate of `c_n` itself can only err upward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.curves import Scale
from theory.losses import loss_table
from theory.rates import PowerLaw
from theory.readings import OptimumRule, Readings, read_optima

__all__ = ["Gaps", "Infinity", "gaps_of", "transfer_gaps"]

FloatArray = NDArray[np.float64]

Infinity = Literal["auto", "largest", "limit"]
"""What stands for n = ∞: the largest width; the limit of a power law, gaps being NaN where none is
determined; or (`"auto"`) that limit where it is determined and the largest width where not."""


@dataclass(frozen=True)
class Gaps:
    """The three gaps of every width; arrays of shape (W,).

    An optimum that the grid does not bracket is only a bound: `b_n` and `c_n` are NaN at its width,
    and at all widths if the largest one stands for infinity and is such a width.

    Attributes:
      widths: as given.
      loss_gap: `a_n`, in the units of the loss; NaN where every run diverged.
      hp_gap: `b_n`, on the scale: octaves under `"log2"`.
      suboptimality: `c_n`; `inf` where the largest width diverges at, or was not run around, the
        optimum of width n.
      infinity: what stood for ∞ in `loss_gap`: `"largest"` or `"limit"`.
      hp_infinity: what stood for ∞ in `hp_gap` and `suboptimality`.
    """

    widths: NDArray[np.int64]
    loss_gap: FloatArray
    hp_gap: FloatArray
    suboptimality: FloatArray
    infinity: Literal["largest", "limit"]
    hp_infinity: Literal["largest", "limit"]


def gaps_of(
    readings: Readings, infinity: Infinity, losses: PowerLaw, optima: PowerLaw, roots: PowerLaw
) -> Gaps:
    """Gaps from readings and their fits."""
    if infinity not in ("auto", "largest", "limit"):
        raise ValueError(f"infinity={infinity!r} is not known; use 'auto', 'largest' or 'limit'")
    loss = np.where(np.isfinite(readings.loss), readings.loss, np.nan)
    x = np.where(readings.usable, readings.coordinate, np.nan)
    # Roots are measured from the largest width's optimum: without one c_n is unknown either way.
    rooted = _has_limit(roots) or not readings.usable[-1]
    converges, stops = _has_limit(losses), _has_limit(optima) and rooted
    by_loss, by_hp = _taken(infinity, converges), _taken(infinity, stops)
    loss_infinity = loss[-1] if by_loss == "largest" else losses.limit if converges else math.nan
    if by_hp == "largest":
        x_infinity, s_infinity = x[-1], 0.0 if readings.usable[-1] else math.nan
    else:
        x_infinity, s_infinity = (optima.limit, roots.limit) if stops else (math.nan, math.nan)
    return Gaps(
        widths=readings.table.widths,
        loss_gap=np.abs(loss - loss_infinity),
        hp_gap=np.abs(x - x_infinity),
        suboptimality=(readings.s(x) - s_infinity) ** 2,
        infinity=by_loss,
        hp_infinity=by_hp,
    )


def _taken(infinity: Infinity, determined: bool) -> Literal["largest", "limit"]:
    if infinity == "auto":
        return "limit" if determined else "largest"
    return infinity


def _has_limit(fit: PowerLaw) -> bool:
    # An interval that holds 0 says that the quantity may go on for ever.
    return math.isfinite(fit.limit) and fit.exponent_interval[0] > 0


def transfer_gaps(
    widths: ArrayLike,
    hp_values: ArrayLike,
    losses: ArrayLike,
    *,
    observed: ArrayLike | None = None,
    scale: Scale = "log2",
    infinity: Infinity = "auto",
    optimum: OptimumRule = "quartic",
    midpoint_tolerance: float = 0.01,
) -> Gaps:
    """Loss gap, hyperparameter gap and transfer suboptimality of every width.

    Args:
      widths, hp_values, losses, observed, scale: as for `theory.losses.loss_table`.
      infinity: `"largest"`: the largest width measured; gaps against it vanish there and are too
        small near it. `"limit"`: the limit of a power law (`theory.rates`), and gaps are NaN where
        none is determined, that is, where the interval of an exponent holds 0. `"auto"`: the limit
        where one is determined, else the largest width; `Gaps` says which.
      optimum, midpoint_tolerance: how an optimum is read off a curve.

    Raises:
      ValueError: an argument is not as described.
    """
    table = loss_table(widths, hp_values, losses, observed=observed, scale=scale)
    readings = read_optima(table, optimum=optimum, midpoint_tolerance=midpoint_tolerance)
    return gaps_of(
        readings, infinity, readings.fit_loss(), readings.fit_optimum(), readings.fit_root()
    )
