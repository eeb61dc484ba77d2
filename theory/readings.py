"""The optimum of every width, read off the mean curve and off bootstrap curves, with its errors.

Three errors are told apart. What seeds do to an optimum is seen in the bootstrap. What lies between
the grid's points is not: two interpolations, the parabola of `theory.curves` and a cubic spline,
are compared, and what they differ by counts as `resolution`; where five points form a bowl at
every width, the quartic through them (`theory.curves_quartic`) makes that allowance needless. And
an optimum that the grid does not bracket is only a bound (`edges`), and takes no part in any fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, PchipInterpolator

from theory.curves import (
    Edge,
    Optima,
    Scale,
    finite_runs,
    from_scale,
    locate_optima,
    to_scale,
)
from theory.curves_quartic import quartic_minima
from theory.losses import LossTable
from theory.midpoints import locate_midpoints
from theory.rates import PowerLaw, fit_power_law, moderated_variances

__all__ = ["OptimumRule", "Readings", "read_optima"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

OptimumRule = Literal["quartic", "parabola", "midpoint"]
"""`theory.curves_quartic.quartic_minima` if all widths allow it, or else as `"parabola"`:
`theory.curves.locate_optima`; or `theory.midpoints.locate_midpoints`."""

EXPONENTS_OF_OPTIMUM = (-1.0, 4.0)
"""Exponents β considered: at 0 the optimum moves like `log n`, below faster."""

# The position of an optimum is never trusted beyond this fraction of the grid's spacing. By the
# quartic, with .01 the intervals of β covered 98 % of quiet sweeps (100 % on a coarse grid), with
# .003 they cover 90 to 96 % (docs/forecast.md).
_GRID_FRACTION = {"quartic": 0.003, "parabola": 0.01, "midpoint": 0.01}
# A spline is off by something as well: with 1 the intervals of exponents covered 77 to 83 % on
# quiet or coarse lopsided sweeps, with 1.5 at least 92 % (benchmarks/forecast_study.py).
_SPLINE_TOO = 1.5
# Neighbours of the argmin, on either side, that the spline sees, and how many times higher than a
# parabola they may be: a run that blew up, and is finite, would ripple through it.
_REACH = 2
_STEEPEST = 2.0


@dataclass(frozen=True)
class Readings:
    """Optima of every width, and of every bootstrap draw where there are seeds.

    Arrays run over widths (W,), those of draws over (R, W); `drawn_*` are None for one seed. A
    width with one seed among others with several borrows their noise (`borrowed`).

    Attributes:
      table: what was read.
      rule: how.
      coordinate: optimum on the scale; NaN if every value diverged.
      loss, curvature: there.
      low, high: range in which the grid leaves the optimum (`theory.curves.Optima`).
      edges: side on which it is not bracketed.
      resolution: of `coordinate`, what the interpolation between grid points is off by (standard
        deviation): at least 1 % of the grid's spacing, or 0.3 % by quartics.
      loss_resolution: the same of `loss`.
      root_resolution: the same of `s`, from the position and from the height of the largest width's
        minimum, whose error moves roots half a grid step away by itself over the curve's slope.
      borrowed: widths with one seed, whose draws scatter as those of the nearest width with several
        would for one seed.
      near_edge: it is bracketed, but not so in more than 5 % of the draws.
    """

    table: LossTable
    rule: OptimumRule
    coordinate: FloatArray
    loss: FloatArray
    curvature: FloatArray
    low: FloatArray
    high: FloatArray
    edges: tuple[Edge, ...]
    resolution: float
    loss_resolution: float
    root_resolution: float
    borrowed: BoolArray
    near_edge: BoolArray
    drawn_coordinate: FloatArray | None
    drawn_loss: FloatArray | None
    drawn_curvature: FloatArray | None

    @property
    def usable(self) -> BoolArray:
        """Widths whose optimum is bracketed."""
        return np.array([edge == "" for edge in self.edges])

    @property
    def dof_per_width(self) -> int:
        """Seeds less one, of widths with several: degrees of freedom of one width's noise."""
        seeds = self.table.replicates
        return int(np.median(seeds[seeds > 1])) - 1 if (seeds > 1).any() else 0

    def noise_dof(self, which: BoolArray) -> int:
        """Degrees of freedom of the noise of the widths given, one of which the limit takes."""
        several = int((which & ~self.borrowed).sum())
        return self.dof_per_width * max(min(several, int(which.sum()) - 1), 1)

    def s(self, coordinate: FloatArray) -> FloatArray:
        """The signed root `s(x)` of `theory.gaps`, any shape; ±inf where it diverges."""
        grid, curve = self.table.grids[-1], self.table.curves[-1]
        best, x = self.coordinate[-1], to_scale(grid, self.table.scale)
        queries = np.asarray(coordinate, dtype=np.float64)
        away = queries - best
        out = np.where(np.isfinite(away) & (away != 0), np.copysign(np.inf, away), away)
        near = np.searchsorted(x, best)
        for first, last in finite_runs(np.isfinite(curve)):
            if last == first or not first <= min(near, grid.size - 1) <= last + 1:
                continue
            # The root of a parabola is a straight line, which a monotone cubic reproduces.
            root = np.sign(x - best) * np.sqrt(np.maximum(curve - self.loss[-1], 0.0))
            knots = np.append(x[first : last + 1], best)
            knots, index = np.unique(knots, return_index=True)
            heights = np.append(root[first : last + 1], 0.0)[index]
            inside = (queries >= x[first]) & (queries <= x[last])
            out[inside] = PchipInterpolator(knots, heights)(queries[inside])
        return out

    def variances(
        self, drawn: FloatArray | None, which: BoolArray
    ) -> tuple[FloatArray | None, float]:
        """Noise variances of a drawn quantity at the widths given: of each, and of their mean.

        With common random numbers a seed moves all widths alike. A free limit absorbs that, so a
        fit weighs the rest: each draw's deviations from its mean over widths. None where there
        are no draws, or where the quantity is finite in fewer than half of them.
        """
        count = int(which.sum())
        if drawn is None or count < 2:
            return None, 0.0
        moved = drawn[:, which]
        moved = moved[np.isfinite(moved).all(axis=1)]
        if 2 * moved.shape[0] < drawn.shape[0]:
            return None, 0.0
        mean = moved.mean(axis=1)
        alone = (moved - mean[:, None]).var(axis=0) * count / (count - 1)
        shared = max(float(mean.var()) - float(alone.mean()) / count, 0.0)
        # Variances of means: what widths have in common is the variance of one seed.
        seeds = self.table.replicates[which]
        return moderated_variances(alone * seeds, self.dof_per_width) / seeds, shared

    def fit(
        self,
        values: FloatArray,
        drawn: FloatArray | None,
        *,
        which: BoolArray | None = None,
        exponent_range: tuple[float, float] = EXPONENTS_OF_OPTIMUM,
        resolution: float = 0.0,
        lowest_limit: float = -math.inf,
        falling: bool = False,
        confidence: float = 0.9,
    ) -> PowerLaw:
        """A power law with a limit through a quantity at the usable widths (or those given)."""
        chosen = self.usable & np.isfinite(values)
        chosen &= np.ones_like(chosen) if which is None else which
        variances, shared = self.variances(drawn, chosen)
        count = int(chosen.sum())
        law = fit_power_law(
            self.table.widths[chosen] if count else self.table.widths[:1],
            values[chosen] if count else np.zeros(1),
            variances=variances,
            shared_variance=shared,
            shared_dof=self.dof_per_width if variances is not None else math.inf,
            dof=self.noise_dof(chosen) if variances is not None else 0,
            resolution=resolution,
            exponent_range=exponent_range,
            lowest_limit=lowest_limit,
            falling=falling,
            confidence=confidence,
        )
        if count >= 4:
            return law
        return replace(
            law,
            reason=(
                f"the optimum is bracketed at {count} of {self.table.widths.size} widths; limit, "
                "prefactor and exponent need 4 or more"
            ),
        )

    def fit_loss(self, confidence: float = 0.9, which: BoolArray | None = None) -> PowerLaw:
        """`phi*_n = L + B n^{-α}`, B > 0; L ≥ 0 if no loss in the table is negative."""
        return self.fit(
            self.loss,
            self.drawn_loss,
            which=which,
            resolution=self.loss_resolution,
            exponent_range=(0.02, 4.0),
            lowest_limit=0.0 if self.table.nonnegative else -math.inf,
            falling=True,
            confidence=confidence,
        )

    def fit_optimum(self, confidence: float = 0.9, which: BoolArray | None = None) -> PowerLaw:
        """`x*(n) = x_∞ + C n^{-β}`."""
        return self.fit(
            self.coordinate,
            self.drawn_coordinate,
            which=which,
            resolution=self.resolution,
            confidence=confidence,
        )

    def fit_root(self, confidence: float = 0.9, which: BoolArray | None = None) -> PowerLaw:
        """`s(x*(n)) = s_∞ + D n^{-δ}`, so that c_n falls as `n^{-2δ}`."""
        drawn = None if self.drawn_coordinate is None else self.s(self.drawn_coordinate)
        return self.fit(
            self.s(self.coordinate),
            drawn,
            which=which,
            resolution=self.root_resolution,
            confidence=confidence,
        )


def read_optima(
    table: LossTable,
    *,
    optimum: OptimumRule = "quartic",
    midpoint_tolerance: float = 0.01,
    resamples: int = 1000,
    rng_seed: int = 0,
) -> Readings:
    """Read every width's optimum off its mean curve and off `resamples` bootstrap curves.

    Raises:
      ValueError: the rule is unknown or the tolerance is not in (0, 1).
    """
    if optimum not in ("quartic", "parabola", "midpoint"):
        raise ValueError(
            f"optimum={optimum!r} is not known; use 'quartic', 'parabola' or 'midpoint'"
        )

    def locate(grid: FloatArray, curves: FloatArray) -> Optima:
        if optimum == "midpoint":
            return locate_midpoints(grid, curves, tolerance=midpoint_tolerance, scale=table.scale)
        return locate_optima(grid, curves, scale=table.scale)

    read = [locate(*pair) for pair in zip(table.grids, table.curves, strict=True)]
    if optimum == "quartic":
        quartics = _by_quartics(table, read)
        read, optimum = (read, "parabola") if quartics is None else (quartics, "quartic")
    drawn: list[Optima] = []
    borrowed = table.replicates < 2
    if borrowed.all():
        borrowed = np.zeros_like(borrowed)
    else:
        draws = table.draws(resamples, rng_seed)
        drawn = [locate(*pair) for pair in zip(table.grids, draws, strict=True)]
        if optimum == "quartic":
            drawn = [
                _refined(one, quartic_minima(grid, curves, one, table.scale), table.scale)
                for grid, curves, one in zip(table.grids, draws, drawn, strict=True)
            ]
    edges: tuple[Edge, ...] = tuple(one.edge() for one in read)
    open_draws = np.array([one.at_edge.mean() for one in drawn] or [0.0] * len(read))
    spacing = [np.diff(to_scale(grid, table.scale)) for grid in table.grids]

    bracketed = np.array([edge == "" for edge in edges])
    donors = _donors(table, bracketed, borrowed)
    rng = np.random.default_rng(rng_seed)
    orders = {k: rng.permutation(resamples) for k in donors}

    def stacked(name: str) -> FloatArray | None:
        if not drawn:
            return None
        each = np.stack([getattr(one, name) for one in drawn], axis=-1)
        for k, j in donors.items():
            moved = each[orders[k], j] - float(getattr(read[j], name))
            # The noise of one seed is that of a mean over S of them, times sqrt(S).
            each[:, k] += math.sqrt(table.replicates[j]) * moved
        return each

    x = np.array([float(one.coordinate) for one in read])
    loss = np.array([float(one.loss) for one in read])
    drawn_x, drawn_loss = stacked("coordinate"), stacked("loss")
    # The quartic's error is of higher order, and below what can be told from the noise.
    finer = np.array(
        [
            (math.nan, math.nan) if optimum == "quartic" else _spline_minimum(*pair, table.scale)
            for pair in zip(table.grids, table.curves, strict=True)
        ]
    )
    step = float(np.median(np.concatenate(spacing)))
    curvature = np.array([float(one.curvature) for one in read])
    resolution = max(_GRID_FRACTION[optimum] * step, _spread(finer[:, 0] - x))
    steepness = math.sqrt(max(float(np.nan_to_num(curvature[-1])), 0.0) / 2)
    lifted = abs(float(np.nan_to_num(finer[-1, 1] - loss[-1], posinf=0.0, neginf=0.0)))
    return Readings(
        table=table,
        rule=optimum,
        coordinate=x,
        loss=loss,
        curvature=curvature,
        low=np.array([float(one.coordinate_low) for one in read]),
        high=np.array([float(one.coordinate_high) for one in read]),
        edges=edges,
        resolution=resolution,
        loss_resolution=_spread(finer[:, 1] - loss),
        root_resolution=math.hypot(
            resolution * steepness, lifted / (steepness * step) if steepness > 0 else 0.0
        ),
        borrowed=borrowed,
        near_edge=(open_draws > 0.05) & bracketed,
        drawn_coordinate=drawn_x,
        drawn_loss=drawn_loss,
        drawn_curvature=stacked("curvature"),
    )


def _by_quartics(table: LossTable, read: list[Optima]) -> list[Optima] | None:
    """The optima by quartics; None unless every bracketed width has one, and there is such a width.

    One interpolation serves all widths: an error that they share moves the limit and no rate.
    """
    if all(one.at_edge for one in read):
        return None
    found: list[Optima] = []
    for grid, curve, one in zip(table.grids, table.curves, read, strict=True):
        many = replace(one, **{f.name: getattr(one, f.name)[None] for f in fields(one)})
        minima = quartic_minima(grid, curve[None], many, table.scale)
        if not one.at_edge and np.isnan(minima[0][0]):
            return None
        new = _refined(many, minima, table.scale)
        found.append(replace(new, **{f.name: getattr(new, f.name)[0] for f in fields(new)}))
    return found


def _refined(
    optima: Optima, minima: tuple[FloatArray, FloatArray, FloatArray], scale: Scale
) -> Optima:
    """Minima by quartics where there is one, else those given; shape (R,)."""
    position, height, curvature = minima
    known = np.isfinite(position)
    coordinate = np.where(known, position, optima.coordinate)
    return replace(
        optima,
        hp=np.where(known, from_scale(coordinate, scale), optima.hp),
        loss=np.where(known, height, optima.loss),
        curvature=np.where(known, curvature, optima.curvature),
        coordinate=coordinate,
        coordinate_low=np.where(known, position, optima.coordinate_low),
        coordinate_high=np.where(known, position, optima.coordinate_high),
    )


def _donors(table: LossTable, bracketed: BoolArray, borrowed: BoolArray) -> dict[int, int]:
    """For every width that borrows its noise, the nearest that has some, if possible bracketed."""
    several = ~borrowed & bracketed if (~borrowed & bracketed).any() else ~borrowed
    places = np.arange(borrowed.size)
    return {int(k): int(min(places[several], key=lambda j: abs(j - k))) for k in places[borrowed]}


def _spline_minimum(grid: FloatArray, curve: FloatArray, scale: Scale) -> tuple[float, float]:
    """Position and loss of the minimum of a cubic spline beside the argmin; NaN at an edge.

    It passes through the argmin and up to `_REACH` usable neighbours on either side, as far as the
    curve rises like a parabola; NaN if these are fewer than 4 points, in which it is none.
    """
    index = int(np.argmin(curve))
    runs = [run for run in finite_runs(np.isfinite(curve)) if run[0] < index < run[1]]
    if not runs:
        return math.nan, math.nan
    x = to_scale(grid, scale)
    beside = [index - 1, index + 1]
    rise, square = curve - curve[index], (x - x[index]) ** 2
    highest = _STEEPEST * float((rise[beside] / square[beside]).max()) * square
    ends = []
    for step, limit in ((-1, runs[0][0]), (1, runs[0][1])):
        end = index + step
        while (
            end != limit and abs(end - index) < _REACH and rise[end + step] <= highest[end + step]
        ):
            end += step
        ends.append(end)
    first, last = ends
    if last - first < 3:
        return math.nan, math.nan
    spline = CubicSpline(x[first : last + 1], curve[first : last + 1])
    roots = spline.derivative().roots(extrapolate=False)
    near = roots[(roots > x[index - 1]) & (roots < x[index + 1])]
    if near.size == 0:
        return math.nan, math.nan
    best = float(near[np.argmin(spline(near))])
    # As in `theory.curves`: beside a wall the interpolation dips below what a convex curve can.
    lines = [
        curve[near] + (curve[near] - curve[far]) / (x[near] - x[far]) * (best - x[near])
        for near, far in ((index - 1, index - 2), (index + 1, index + 2))
        if runs[0][0] <= far <= runs[0][1]
    ]
    least = min(max(lines, default=-math.inf), float(curve[index]))
    return best, max(float(spline(best)), least)


def _spread(differences: FloatArray) -> float:
    """Standard deviation between widths of what two interpolations differ by, times `_SPLINE_TOO`.

    What they differ by at all widths alike moves the limit and no rate.
    """
    known = differences[np.isfinite(differences)]
    return _SPLINE_TOO * float(known.std(ddof=1)) if known.size > 1 else 0.0
