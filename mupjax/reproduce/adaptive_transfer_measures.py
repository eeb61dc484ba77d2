"""What Adaptive Transfer's table says, and the same quantities from measured losses.

With ``m = w / base`` a scheme transfers the base's rate as ``eta(w) = eta*(base) m^-c``. Its
transfer error is ``|eta(w) / eta*(w) - 1|``. The source takes ``eta*(w) ∝ w^-0.85`` for granted:

    error = |m^(0.85 - c) - 1|,    c = 0 (SP), 1 (muP), 0.8 (Adaptive Transfer).

Measured, with ``D = log2 eta*(w) - log2 eta*(base)``, it is ``|2^(-c log2 m - D) - 1|``, and of two
schemes ``c < c'`` the first is the nearer one if and only if ``2^-D < 2 / (m^-c + m^-c')``: all
errors and their order follow from D and its interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "ASSUMED_EXPONENT",
    "CONFIDENCE",
    "PUBLISHED_ERRORS",
    "RATE_EXPONENTS",
    "Estimate",
    "OptimumDrift",
    "assumed_error",
    "fitted_optimum",
    "fraction_interval",
    "mean_interval",
    "measure_drift",
    "order_of_errors",
    "transfer_error",
]

FloatArray = NDArray[np.float64]

ASSUMED_EXPONENT = -0.85
RATE_EXPONENTS: Mapping[str, float] = MappingProxyType(
    {"SP": 0.0, "muP": 1.0, "Adaptive Transfer": 0.8}
)
PUBLISHED_ERRORS: Mapping[int, Mapping[str, float]] = MappingProxyType(
    {
        1024: MappingProxyType({"SP": 2.249, "muP": 0.188, "Adaptive Transfer": 0.072}),
        4096: MappingProxyType({"SP": 9.556, "muP": 0.340, "Adaptive Transfer": 0.149}),
    }
)
"""The source's table (base 256), the two rows at hand; three decimals."""

CONFIDENCE = 0.9
_RESAMPLES = 2000
_USABLE_RESAMPLES = 0.95
# Octaves on either side of the lowest point that the parabola is fitted to.
_WINDOW = 1.5


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its interval at level :data:`CONFIDENCE`; NaN where unknown."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "unknown"
        if math.isnan(self.low):
            return f"{self.value:.3g} [no interval]"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def assumed_error(ratio: ArrayLike, scheme: str) -> FloatArray:
    """The source's transfer error at ``ratio = w / base``: ``|m^(0.85 - c) - 1|``."""
    power = -ASSUMED_EXPONENT - RATE_EXPONENTS[scheme]
    return np.abs(np.asarray(ratio, dtype=np.float64) ** power - 1)


def transfer_error(ratio: float, scheme: str, drift: Estimate) -> Estimate:
    """``|2^(-c log2 m - D) - 1|`` for the drift D in octaves, with the range over D's interval."""

    def signed(d: float) -> float:
        return 2.0 ** (-RATE_EXPONENTS[scheme] * math.log2(ratio) - d) - 1

    ends = signed(drift.low), signed(drift.high)
    sizes = [abs(end) for end in ends]
    low = 0.0 if ends[0] * ends[1] <= 0 else min(sizes)
    return Estimate(abs(signed(drift.value)), low, max(sizes))


def order_of_errors(ratio: float, drift: float) -> tuple[str, ...]:
    """The schemes by their transfer error, smallest first, if the optimum drifts by D octaves."""
    exact = Estimate(drift, drift, drift)
    return tuple(sorted(RATE_EXPONENTS, key=lambda s: transfer_error(ratio, s, exact).value))


def fitted_optimum(octaves: ArrayLike, losses: ArrayLike) -> float:
    """Minimum of a mean loss curve, by a least-squares parabola about its lowest point.

    It is fitted to all grid points within 1.5 octaves of the lowest one. On a grid of half octaves
    the noise of its vertex is a quarter of that of the parabola through three points
    (``theory.curves``): independent errors sigma of the points make
    ``sigma / (2 c sqrt(sum x^2))``, with ``sum x^2`` 7 instead of 1/2. The price is bias: a
    lopsided curve pulls the vertex to its flat side, and a drift is free of that only as far as
    curves are alike in shape.

    Args:
      octaves: log2 of the rates, shape (H,), increasing.
      losses: shape (H, S), averaged over seeds; not finite means diverged.

    Returns:
      the vertex, in octaves; NaN where the lowest point has no usable neighbour on both sides, the
      parabola opens downwards, or its vertex is outside the window.
    """
    curve = np.asarray(losses, dtype=np.float64).mean(axis=-1)
    return float(_vertices(np.asarray(octaves, dtype=np.float64), curve[None])[0])


def _vertices(x: FloatArray, curves: FloatArray) -> FloatArray:
    """Vertices of curves (R, H) that are draws of one: the window is that of the first."""
    nowhere = np.full(len(curves), np.nan)
    finite = np.asarray(np.isfinite(curves).all(axis=0))
    if not finite.any():
        return nowhere
    lowest = int(np.argmin(np.where(finite, curves[0], np.inf)))
    inside = 0 < lowest < x.size - 1
    if not (inside and finite[lowest - 1] and finite[lowest + 1]):
        return nowhere
    near = (np.abs(x - x[lowest]) <= _WINDOW + 1e-9) & finite
    t = x[near] - x[lowest]
    _, slope, bend = np.polynomial.polynomial.polyfit(t, curves[:, near].T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -slope / (2 * bend)
    usable = (bend > 0) & (vertex >= t[0]) & (vertex <= t[-1])
    return np.where(usable, x[lowest] + vertex, np.nan)


@dataclasses.dataclass(frozen=True)
class OptimumDrift:
    """How the best global rate moves with the width.

    Attributes:
      octaves: per width, log2 of ``eta*(w)`` over ``eta*(base)``.
      exponent: p of ``eta* ∝ w^p``, the least-squares slope over all widths in log-log.
    """

    octaves: tuple[Estimate, ...]
    exponent: Estimate


def measure_drift(
    widths: Sequence[int],
    octaves: Sequence[ArrayLike],
    losses: Sequence[ArrayLike],
    *,
    rng_seed: int = 0,
) -> OptimumDrift:
    """Drift of the optimum and its exponent, with intervals from a bootstrap over seeds.

    Seeds share batches across widths and rates, so they are resampled jointly; half-widths are the
    bootstrap's standard error, corrected for its bias ``(S - 1)/S``, times Student's t with S - 1
    degrees of freedom (as in ``theory.drift``, where the coverage is measured).

    Args:
      widths: W of them, the base first.
      octaves: for each width, log2 of the global rates tried, shape (H,).
      losses: for each width, shape (H, S); not finite means diverged.
      rng_seed: of the resampling.

    Returns:
      estimates; NaN at a width whose grid does not bracket the optimum, and without bounds where
      the resamples often do not.
    """
    seeds = np.shape(losses[0])[-1]
    rng = np.random.default_rng(rng_seed)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=_RESAMPLES) / seeds
    # The first "draw" is the mean itself. With one seed there is no spread to judge by.
    stretch = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0.0
    weights = 1 / seeds + np.vstack([np.zeros(seeds), (drawn - 1 / seeds) * stretch])
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) if seeds > 1 else math.nan
    optima = np.stack(
        [
            _vertices(np.asarray(x, dtype=np.float64), _weighted(np.asarray(y), weights))
            for x, y in zip(octaves, losses, strict=True)
        ]
    )
    doublings = np.log2(np.asarray(widths, dtype=np.float64) / widths[0])
    centred = doublings - doublings.mean()
    slope = centred @ optima / (centred @ centred)
    drift = tuple(_estimate(row, t) for row in optima - optima[0])
    return OptimumDrift(drift, _estimate(slope, t))


def _weighted(losses: FloatArray, weights: FloatArray) -> FloatArray:
    """Means over seeds under every row of weights, (R, H); infinite where a seed diverged."""
    diverged = np.asarray(~np.isfinite(losses).all(axis=-1))
    means = np.where(diverged[:, None], 0.0, losses) @ weights.T
    return np.where(diverged[:, None], np.inf, means).T


def _estimate(draws: FloatArray, t: float) -> Estimate:
    """The first entry is the value; the spread of the others its standard error.

    Resamples without an optimum are left out if they are few; otherwise nothing bounds the value.
    """
    value, others = float(draws[0]), draws[1:]
    known = np.isfinite(others)
    half = t * float(others[known].std()) if known.mean() >= _USABLE_RESAMPLES else math.inf
    return Estimate(value, value - half, value + half)


def mean_interval(samples: ArrayLike) -> Estimate:
    """Mean over seeds with Student's t interval; an infinite sample makes all of it infinite."""
    x = np.asarray(samples, dtype=np.float64)
    if not np.isfinite(x).all():
        # One infinite side decides a difference; two leave it open.
        sides = set(np.sign(x[np.isinf(x)])) if not np.isnan(x).any() else set()
        value = sides.pop() * math.inf if len(sides) == 1 else math.nan
        return Estimate(value, value, value)
    if x.size < 2:
        return Estimate(float(x.mean()), math.nan, math.nan)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def fraction_interval(good: ArrayLike) -> Estimate:
    """Share of good runs with its exact binomial (Clopper-Pearson) interval.

    A bootstrap over seeds has no width at all where every run is good, which is the common case.
    Runs count as independent.
    """
    flags = np.asarray(good, dtype=bool)
    count = int(flags.sum())
    interval = stats.binomtest(count, flags.size).proportion_ci(CONFIDENCE, method="exact")
    return Estimate(count / flags.size, float(interval.low), float(interval.high))
