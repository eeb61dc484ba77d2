"""Power laws with a limit, `y(n) = L + B n^{-e}`: fitted, with honest intervals, or refused.

For a fixed exponent the model is linear in the other two parameters, so they are eliminated
(variable projection, Golub and Pereyra 1973): with `u = log(n / n0)`, `n0` the geometric mean,

    y = p + q g_e(u),   g_e(u) = (exp(−e u) − 1)/e,   g_0(u) = −u,
    L = p − q/e,        B = (q/e) n0^e,                               for e > 0,

whose weighted residual sum `RSS(e)` is one function of one variable: it is tabulated over the whole
range of exponents (so every start is tried) and its best minima are polished. `g_e` is continuous
through `e = 0`, a straight line in `log n`, and beyond: `e ≤ 0` is a quantity with no limit.

**Noise.** `y_k` has variance `s² v_k`. The `v_k` come from seeds where there are seeds, each shrunk
towards their mean (`moderated_variances`), `s² = 1`; `RSS/(W−3)` says the same thing from the
misfit, with `W − 3` degrees of freedom. The two are pooled, unless the misfit is beyond what the
seeds explain (5 % level of chi²): then a power law is not the whole truth, and the misfit alone
counts. Without seeds the misfit is all there is.

**Intervals.** The exponents `e` with `(RSS(e) − min RSS)/s² ≤ t²`, `t` Student's quantile with the
degrees of freedom of `s²` (a profile likelihood). A bootstrap of the exponent would need
a nonlinear fit per draw, and its percentiles do not cover where the limit is poorly known: the
likelihood is then far from a parabola, as `RSS(e)` shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from theory.losses import check_widths

__all__ = ["Interval", "PowerLaw", "fit_power_law", "fit_slope", "moderated_variances"]

Interval = tuple[float, float]
FloatArray = NDArray[np.float64]

UNKNOWN: Interval = (math.nan, math.nan)
EXPONENT_STEP = 0.01
# Degrees of freedom that the mean variance counts for in each width's own (a guess; limma,
# Smyth 2004, estimates it and finds about 4 where variances differ by factors of two or three).
_PRIOR_DOF = 4.0
# Significance below which the misfit is blamed on the power law and no longer on the seeds.
_MISFIT_LEVEL = 0.05
# By which factor seeds are not multiplied.
_HOPELESS = 20.0


@dataclass(frozen=True)
class PowerLaw:
    """A fit of `y = limit + prefactor n^{-exponent}` and how well it is known.

    Attributes:
      exponent, limit, prefactor: the least-squares fit; NaN where there is none.
      exponent_interval, limit_interval, prefactor_interval: at level `confidence`; clipped to
        `exponent_range`, NaN where there is none.
      reason: why the data do not determine a power law; empty if they do.
      misfit: `RSS/(W−3)` in units of the variances given; about 1 if a power law and they are
        right.
      misfits: the misfit is beyond what the given variances explain (5 % level).
      dof: degrees of freedom of the noise estimate.
      residuals: data minus fit, shape (W,).
      exponents: grid over `exponent_range`, shape (E,).
      deviance: `(RSS(e) − min RSS)/s²` on it, shape (E,); empty where there is no fit.
      confidence: level of the intervals.
    """

    exponent: float
    limit: float
    prefactor: float
    exponent_interval: Interval
    limit_interval: Interval
    prefactor_interval: Interval
    reason: str
    misfit: float
    misfits: bool
    dof: float
    residuals: FloatArray
    exponents: FloatArray = field(repr=False)
    deviance: FloatArray = field(repr=False)
    confidence: float

    @property
    def degenerate(self) -> bool:
        """True where the data do not determine a power law; `reason` says why."""
        return self.reason != ""

    def __call__(self, widths: ArrayLike) -> FloatArray:
        """The fitted curve at widths of any shape."""
        return self.limit + self.prefactor * np.asarray(widths, dtype=np.float64) ** -self.exponent


def moderated_variances(variances: ArrayLike, dof: float) -> FloatArray:
    """Variances of W noise estimates with `dof` degrees of freedom each, shrunk to their mean.

    `(dof v_k + 4 mean(v)) / (dof + 4)` (Smyth 2004): with three seeds a variance is known to a
    factor of about three, and a width that is lucky must not dominate a fit.
    """
    v = np.asarray(variances, dtype=np.float64)
    return (dof * v + _PRIOR_DOF * v.mean()) / (dof + _PRIOR_DOF)


def fit_power_law(
    widths: ArrayLike,
    values: ArrayLike,
    *,
    variances: ArrayLike | None = None,
    shared_variance: float = 0.0,
    shared_dof: float = math.inf,
    dof: float = 0.0,
    resolution: float = 0.0,
    exponent_range: Interval = (0.02, 4.0),
    lowest_limit: float = -math.inf,
    falling: bool = False,
    confidence: float = 0.9,
) -> PowerLaw:
    """Fit `y = L + B n^{-e}` by weighted least squares over L, B and e, by this module's docstring.

    Args:
      widths: shape (W,), positive, strictly increasing.
      values: shape (W,), finite.
      variances: of each value's noise, shape (W,), positive; None: equal and unknown.
      shared_variance: of a shift common to all values, which only the limit's interval feels.
      shared_dof: degrees of freedom behind it.
      dof: degrees of freedom behind the variances (seeds less one, times widths); 0 with None.
      resolution: standard deviation, in the values' units, below which differences mean nothing.
      exponent_range: exponents considered. A range that starts at 0 or below includes quantities
        without a limit, which grow like `log n` or a power.
      lowest_limit: `L` is at least this where `e > 0` (0 for a loss that cannot be negative).
      falling: refuse fits with `B ≤ 0` (a loss should fall with width).
      confidence: level of the intervals.

    Returns:
      The fit; with NaNs and a `reason` where the data do not determine one: fewer than 4 widths,
      no change beyond the noise, a rise where a fall is asked for, an exponent at the end of its
      range or bounded neither above nor below.

    Raises:
      ValueError: an argument is not as described.
    """
    n = check_widths(widths)
    y = np.asarray(values, dtype=np.float64)
    if y.shape != n.shape or not np.isfinite(y).all():
        raise ValueError(f"values={y.tolist()} must be finite, one for each of the {n.size} widths")
    low, high = exponent_range
    if not low < high:
        raise ValueError(f"exponent_range={exponent_range!r} must be (low, high) with low < high")
    known = variances is not None
    v = np.ones(n.size) if variances is None else np.asarray(variances, dtype=np.float64)
    if v.shape != n.shape or not (np.isfinite(v).all() and (v >= 0).all()):
        raise ValueError(f"variances={v.tolist()} must be finite and not negative, one per width")
    if known and dof <= 0:
        raise ValueError(f"dof={dof!r} must be positive where variances are given")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, as 0.9 does")

    tiny = 64 * np.finfo(np.float64).eps * float(np.abs(y).max(initial=0.0))
    least = max(resolution, tiny, float(np.finfo(np.float64).tiny) ** 0.25)
    steps = np.arange(round(low / EXPONENT_STEP), round(high / EXPONENT_STEP) + 1)
    grid = steps.astype(np.float64) * EXPONENT_STEP
    no_fit = PowerLaw(
        exponent=math.nan,
        limit=math.nan,
        prefactor=math.nan,
        exponent_interval=UNKNOWN,
        limit_interval=UNKNOWN,
        prefactor_interval=UNKNOWN,
        reason="",
        misfit=math.nan,
        misfits=False,
        dof=math.nan,
        residuals=np.full(n.size, np.nan),
        exponents=grid,
        deviance=np.empty(0),
        confidence=confidence,
    )
    if n.size < 4:
        return replace(
            no_fit,
            reason=f"limit, prefactor and exponent need 4 widths or more, there are {n.size}",
        )
    problem = _Problem(n, y, 1 / (v + least**2 if known else v), lowest_limit)
    exponent, smallest = _polish(problem, grid)
    grid = refined(grid, exponent)
    rss = problem.eliminate(grid)[0]
    noise, freedom, misfits = _noise(smallest, n.size - 3, dof if known else None, least**2)
    fit = replace(
        no_fit,
        misfit=smallest / (n.size - 3) if known else math.nan,
        misfits=misfits,
        dof=freedom,
        exponents=grid,
        deviance=np.maximum(rss - smallest, 0.0) / noise,
    )
    gain = problem.constant_rss() - smallest
    needed = 2 * noise * float(stats.f.ppf(confidence, 2, freedom))
    if gain < needed:
        coarse = known and least**2 > float(v.mean())
        return replace(fit, reason=_unseen(needed / gain if gain > 0 else math.inf, coarse))
    _, p, q, _ = problem.eliminate(np.array([exponent]))
    if falling and q[0] <= 0:
        return replace(fit, reason="it rises with width")
    threshold = float(stats.t.ppf((1 + confidence) / 2, freedom)) ** 2
    if (fit.deviance[[0, -1]] <= threshold).all():
        reason = f"all exponents from {grid[0]:g} to {grid[-1]:g} fit within the noise"
        return replace(fit, reason=reason)
    if exponent >= grid[-1] - EXPONENT_STEP:
        reason = f"the best exponent is the largest considered, {grid[-1]:g}"
        return replace(fit, reason=reason)
    if exponent <= grid[0] + EXPONENT_STEP:
        reason = f"the best exponent is the smallest considered, {grid[0]:g}: no limit shows"
        return replace(fit, reason=reason)
    limit, prefactor = problem.natural(np.array([exponent]), p, q)
    fit = replace(fit, exponent=exponent, limit=float(limit[0]), prefactor=float(prefactor[0]))
    shift = float(stats.t.ppf((1 + confidence) / 2, shared_dof)) * math.sqrt(shared_variance)
    limit_interval, prefactor_interval = _projected(problem, fit, noise, threshold, shift)
    return replace(
        fit,
        exponent_interval=crossings(grid, fit.deviance, threshold, exponent),
        limit_interval=limit_interval,
        prefactor_interval=prefactor_interval,
        residuals=y - (p[0] + q[0] * _basis(np.array([exponent]), problem.u)[0]),
    )


def fit_slope(
    widths: ArrayLike,
    values: ArrayLike,
    *,
    variances: ArrayLike | None = None,
    dof: float = 0.0,
    confidence: float = 0.9,
) -> tuple[float, Interval]:
    """The exponent of `y = C n^e` without a limit: slope of `log y` on `log n`, and its interval.

    Args:
      widths: shape (W,), W ≥ 3.
      values: shape (W,), positive.
      variances: of `log y`; None: equal and unknown.
      dof: degrees of freedom behind the variances.
      confidence: level of the interval.

    Returns:
      NaNs where there are fewer than three positive values.
    """
    n, y = check_widths(widths), np.asarray(values, dtype=np.float64)
    if n.size < 3 or not (np.isfinite(y) & (y > 0)).all():
        return math.nan, UNKNOWN
    logs, target = np.log(n), np.log(y)
    w = np.ones(n.size) if variances is None else 1 / np.maximum(variances, 1e-24)
    centred = logs - np.average(logs, weights=w)
    squares = float((w * centred**2).sum())
    slope = float((w * centred * target).sum()) / squares
    residuals = target - np.average(target, weights=w) - slope * centred
    noise, freedom, _ = _noise(
        float((w * residuals**2).sum()), n.size - 2, None if variances is None else dof, 1e-24
    )
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(noise / squares)
    return slope, (slope - half, slope + half)


def refined(grid: FloatArray, best: float) -> FloatArray:
    """The grid with points added on both sides of `best`, at distances from 1e-7 to 1.

    A profile may be as narrow as the data are good; its width is not known beforehand.
    """
    distances = np.geomspace(1e-7, 1.0, 160)
    more = np.concatenate([best - distances, [best], best + distances])
    return np.unique(np.concatenate([grid, more[(more > grid[0]) & (more < grid[-1])]]))


def crossings(grid: FloatArray, deviance: FloatArray, threshold: float, best: float) -> Interval:
    """The outermost points of a grid with `deviance ≤ threshold`, linear between grid points."""
    inside = np.flatnonzero(deviance <= threshold)
    if inside.size == 0:  # narrower than the grid: the step is all that is known
        step = float(grid[1] - grid[0])
        return best - step, best + step
    ends = []
    for edge, side in ((int(inside[0]), -1), (int(inside[-1]), 1)):
        beyond = edge + side
        end = float(grid[edge])
        if 0 <= beyond < grid.size:
            share = (threshold - deviance[edge]) / (deviance[beyond] - deviance[edge])
            end += share * float(grid[beyond] - grid[edge])
        ends.append(end)
    return float(min(ends[0], best)), float(max(ends[1], best))


class _Problem:
    """The weighted least-squares problem with the two linear parameters eliminated."""

    def __init__(
        self, widths: NDArray[np.int64], y: FloatArray, weights: FloatArray, lowest_limit: float
    ) -> None:
        logs = np.log(widths)
        self.centre = float(logs.mean())
        self.u = logs - self.centre
        self.y = y
        self.w = weights
        self.lowest_limit = lowest_limit

    def constant_rss(self) -> float:
        """Residual sum of the best constant."""
        return float((self.w * (self.y - np.average(self.y, weights=self.w)) ** 2).sum())

    def eliminate(self, e: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """RSS, p, q and the unit variance of the limit, each of shape (E,)."""
        basis = _basis(e, self.u)
        total = self.w.sum()
        mean = basis @ self.w / total
        centred = basis - mean[:, None]
        squares = centred**2 @ self.w
        q = centred @ (self.w * self.y) / squares
        p = np.average(self.y, weights=self.w) - q * mean
        with np.errstate(divide="ignore", invalid="ignore"):
            # L = p − q/e = mean(y) − q (mean(g) + 1/e), and mean(y) and q are uncorrelated.
            variance = 1 / total + (mean + 1 / e) ** 2 / squares
            bounded = (e > 0) & (p - q / e < self.lowest_limit)
            # At the bound, y − L = (q/e) exp(−e u) has one parameter.
            powers = np.exp(-np.outer(e, self.u)) / e[:, None]
            alone = (powers @ (self.w * (self.y - self.lowest_limit))) / (powers**2 @ self.w)
            q = np.where(bounded, alone, q)
            p = np.where(bounded, self.lowest_limit + q / e, p)
        rss = ((self.y - p[:, None] - q[:, None] * basis) ** 2) @ self.w
        return rss, p, q, np.where(bounded, 0.0, variance)

    def natural(self, e: FloatArray, p: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Limit and prefactor; NaN where the exponent is not above 0, so that there is no limit."""
        positive = np.where(e > EXPONENT_STEP / 2, e, np.nan)
        return p - q / positive, q / positive * np.exp(positive * self.centre)


def _basis(e: FloatArray, u: FloatArray) -> FloatArray:
    """`g_e(u)`, shape (E, W)."""
    product = np.outer(e, u)
    small = np.abs(product) < 1e-8
    ratio = np.expm1(-product) / np.where(e == 0, 1.0, e)[:, None]
    # (exp(−x) − 1)/e = −u (1 − x/2 + …): without dividing by an exponent of 0.
    return np.where(small, -u * (1 - product / 2), ratio)


def _polish(problem: _Problem, grid: FloatArray) -> tuple[float, float]:
    """The best exponent, off the grid, and its residual sum."""
    rss = problem.eliminate(grid)[0]
    padded = np.concatenate([[np.inf], rss, [np.inf]])
    minima = np.flatnonzero((rss <= padded[:-2]) & (rss <= padded[2:]))
    minima = minima[np.argsort(rss[minima], kind="stable")][:3]

    def objective(e: float) -> float:
        return float(problem.eliminate(np.array([e]))[0][0])

    best, smallest = float(grid[minima[0]]), float(rss[minima[0]])
    for i in minima:
        bounds = (float(grid[max(i - 1, 0)]), float(grid[min(i + 1, grid.size - 1)]))
        found: Any = optimize.minimize_scalar(
            objective, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        )
        if found.fun < smallest:
            best, smallest = float(found.x), float(found.fun)
    return best, smallest


def _unseen(factor: float, coarse: bool) -> str:
    """Why no change is seen, and what would show one if the estimate is right.

    Args:
      factor: by which the variance is too large.
      coarse: whether the resolution is more of it than the noise.
    """
    cause = "what the grid resolves" if coarse else "the noise"
    text = f"no change with width beyond {cause}"
    if factor > _HOPELESS:
        return text
    if coarse:
        return f"{text}; a grid {max(math.sqrt(factor), 1.1):.2g} times finer would show one"
    return f"{text}; {max(math.ceil(factor), 2)} times as many seeds would show one"


def _noise(rss: float, free: int, dof: float | None, floor: float) -> tuple[float, float, bool]:
    """Noise scale s², its degrees of freedom, and whether the misfit exceeds the variances."""
    if dof is None:
        return max(rss / free, floor), float(free), False
    if stats.chi2.sf(rss, free) < _MISFIT_LEVEL:
        return rss / free, float(free), True
    return (dof + rss) / (dof + free), dof + free, False


def _projected(
    problem: _Problem, fit: PowerLaw, noise: float, threshold: float, shift: float
) -> tuple[Interval, Interval]:
    """Intervals of limit and prefactor: their ranges over the joint confidence set.

    For the limit at a given exponent the deviance rises by `(L − L(e))²/(s² var)`; the prefactor
    moves with the exponent far more than at a fixed one, whose spread is left out.
    """
    inside = (fit.deviance <= threshold) & (fit.exponents > EXPONENT_STEP / 2)
    if not inside.any() or math.isnan(fit.limit):
        return UNKNOWN, UNKNOWN
    e, slack = fit.exponents[inside], threshold - fit.deviance[inside]
    _, p, q, variance = problem.eliminate(e)
    limit, prefactor = problem.natural(e, p, q)
    room = np.sqrt(noise * variance * slack)
    low, high = float((limit - room).min()), float((limit + room).max())
    # A shift common to all values adds in quadrature to each side.
    best = fit.limit
    low = best - math.hypot(best - min(low, best), shift)
    high = best + math.hypot(max(high, best) - best, shift)
    return (max(low, problem.lowest_limit), high), (float(prefactor.min()), float(prefactor.max()))
