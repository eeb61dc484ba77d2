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

from theory.curves import Edge, Optima, Scale, from_scale, interpolate_loss, locate_optima, to_scale
from theory.losses import LossTable, loss_table
from theory.midpoints import locate_midpoints
from theory.rates import PowerLaw, fit_power_law, moderated_variances

__all__ = ["Gaps", "Infinity", "OptimumRule", "Readings", "read_optima", "transfer_gaps"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

OptimumRule = Literal["parabola", "midpoint"]
"""`theory.curves.locate_optima`, or `theory.midpoints.locate_midpoints`."""

Infinity = Literal["auto", "largest", "limit"]
"""What stands for n = ∞: `"auto"` takes the limit where a power law determines it."""

EXPONENTS_OF_OPTIMUM = (-1.0, 4.0)
"""Exponents β considered: at 0 the optimum moves like `log n`, below faster."""

# The interpolation between grid points is not trusted beyond this fraction of their distance.
_GRID_FRACTION = 0.01


@dataclass(frozen=True)
class Readings:
    """Optima of every width, and of every bootstrap draw where there are seeds.

    Arrays run over widths (W,), those of draws over (R, W); `drawn_*` are None for one seed.

    Attributes:
      table: what was read.
      rule: how.
      coordinate: optimum on the scale; NaN if every value diverged.
      loss, curvature: there.
      low, high: range in which the grid leaves the optimum (`theory.curves.Optima`).
      edges: side on which it is not bracketed.
      resolution: of `coordinate`: 1 % of the grid's spacing.
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
        """Seeds less one: degrees of freedom of one width's noise."""
        return int(np.median(self.table.replicates)) - 1

    def s(self, coordinate: FloatArray) -> FloatArray:
        """The signed root `s(x)` of this module's docstring, any shape; ±inf where it diverges."""
        grid, curve = self.table.grids[-1], self.table.curves[-1]
        x = to_scale(grid, self.table.scale)
        flat = np.asarray(coordinate, dtype=np.float64).reshape(-1)
        inside = (flat >= x[0]) & (flat <= x[-1])
        hp = np.clip(from_scale(np.where(inside, flat, x[0]), self.table.scale), grid[0], grid[-1])
        curves = np.broadcast_to(curve, (flat.size, curve.size))
        there = np.where(inside, interpolate_loss(grid, curves, hp, scale=self.table.scale), np.inf)
        excess = np.maximum(there - self.loss[-1], 0.0)
        out = np.sign(flat - self.coordinate[-1]) * np.sqrt(excess)
        return out.reshape(np.shape(coordinate))

    def variances(self, drawn: FloatArray | None, which: BoolArray) -> FloatArray | None:
        """Noise variance of a drawn quantity at the widths given, beyond what widths share.

        With common random numbers a seed moves all widths alike; a limit that is free absorbs
        that, so only each draw's deviation from its mean over widths counts.
        """
        if drawn is None or which.sum() < 2:
            return None
        moved = drawn[:, which]
        moved = np.where(np.isfinite(moved), moved, np.nan)
        moved = moved - np.nanmean(moved, axis=1, keepdims=True)
        count = int(which.sum())
        return moderated_variances(
            np.nanvar(moved, axis=0) * count / (count - 1), self.dof_per_width
        )

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
        variances = self.variances(drawn, chosen)
        count = int(chosen.sum())
        return fit_power_law(
            self.table.widths[chosen] if count else self.table.widths[:1],
            values[chosen] if count else np.zeros(1),
            variances=variances,
            dof=self.dof_per_width * (count - 1) if variances is not None else 0,
            resolution=resolution,
            exponent_range=exponent_range,
            lowest_limit=lowest_limit,
            falling=falling,
            confidence=confidence,
        )

    def fit_loss(self, confidence: float = 0.9, which: BoolArray | None = None) -> PowerLaw:
        """`phi*_n = L + B n^{-α}`, B > 0; L ≥ 0 if no loss in the table is negative."""
        positive = all((curve >= 0).all() for curve in self.table.curves)
        return self.fit(
            self.loss,
            self.drawn_loss,
            which=which,
            exponent_range=(0.02, 4.0),
            lowest_limit=0.0 if positive else -math.inf,
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

    def fit_root(self, confidence: float = 0.9) -> PowerLaw:
        """`s(x*(n)) = s_∞ + D n^{-δ}`, so that c_n falls as `n^{-2δ}`."""
        drawn = None if self.drawn_coordinate is None else self.s(self.drawn_coordinate)
        steepness = math.sqrt(max(float(np.nan_to_num(self.curvature[-1])), 0.0) / 2)
        return self.fit(
            self.s(self.coordinate),
            drawn,
            resolution=self.resolution * steepness,
            confidence=confidence,
        )


@dataclass(frozen=True)
class Gaps:
    """The three gaps of every width; arrays of shape (W,).

    Attributes:
      widths: as given.
      loss_gap: `a_n`, in the units of the loss.
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


def read_optima(
    table: LossTable,
    *,
    optimum: OptimumRule = "parabola",
    midpoint_tolerance: float = 0.01,
    resamples: int = 1000,
    rng_seed: int = 0,
) -> Readings:
    """Read every width's optimum off its mean curve and off `resamples` bootstrap curves.

    Raises:
      ValueError: the rule is unknown or the tolerance is not in (0, 1).
    """
    if optimum not in ("parabola", "midpoint"):
        raise ValueError(f"optimum={optimum!r} is not known; use 'parabola' or 'midpoint'")

    def locate(grid: FloatArray, curves: FloatArray) -> Optima:
        if optimum == "parabola":
            return locate_optima(grid, curves, scale=table.scale)
        return locate_midpoints(grid, curves, tolerance=midpoint_tolerance, scale=table.scale)

    read = [locate(*pair) for pair in zip(table.grids, table.curves, strict=True)]
    drawn: list[Optima] = []
    if table.replicates.min() > 1:
        draws = table.draws(resamples, rng_seed)
        drawn = [locate(*pair) for pair in zip(table.grids, draws, strict=True)]
    edges: tuple[Edge, ...] = tuple(one.edge() for one in read)
    open_draws = np.array([one.at_edge.mean() for one in drawn] or [0.0] * len(read))
    spacing = [np.diff(to_scale(grid, table.scale)) for grid in table.grids]

    def stacked(name: str) -> FloatArray | None:
        return np.stack([getattr(one, name) for one in drawn], axis=-1) if drawn else None

    return Readings(
        table=table,
        rule=optimum,
        coordinate=np.array([float(one.coordinate) for one in read]),
        loss=np.array([float(one.loss) for one in read]),
        curvature=np.array([float(one.curvature) for one in read]),
        low=np.array([float(one.coordinate_low) for one in read]),
        high=np.array([float(one.coordinate_high) for one in read]),
        edges=edges,
        resolution=_GRID_FRACTION * float(np.median(np.concatenate(spacing))),
        near_edge=(open_draws > 0.05) & np.array([edge == "" for edge in edges]),
        drawn_coordinate=stacked("coordinate"),
        drawn_loss=stacked("loss"),
        drawn_curvature=stacked("curvature"),
    )


def gaps_of(
    readings: Readings, infinity: Infinity, losses: PowerLaw, optima: PowerLaw, roots: PowerLaw
) -> Gaps:
    """Gaps from readings and their fits; `"limit"` is taken where a fit has one."""
    if infinity not in ("auto", "largest", "limit"):
        raise ValueError(f"infinity={infinity!r} is not known; use 'auto', 'largest' or 'limit'")
    extrapolate = infinity != "largest"
    loss_limit = extrapolate and math.isfinite(losses.limit)
    hp_limit = extrapolate and math.isfinite(optima.limit) and math.isfinite(roots.limit)
    loss_infinity = losses.limit if loss_limit else readings.loss[-1]
    x_infinity = optima.limit if hp_limit else readings.coordinate[-1]
    s_infinity = roots.limit if hp_limit else 0.0
    return Gaps(
        widths=readings.table.widths,
        loss_gap=np.abs(readings.loss - loss_infinity),
        hp_gap=np.abs(readings.coordinate - x_infinity),
        suboptimality=(readings.s(readings.coordinate) - s_infinity) ** 2,
        infinity="limit" if loss_limit else "largest",
        hp_infinity="limit" if hp_limit else "largest",
    )


def transfer_gaps(
    widths: ArrayLike,
    hp_values: ArrayLike,
    losses: ArrayLike,
    *,
    observed: ArrayLike | None = None,
    scale: Scale = "log2",
    infinity: Infinity = "auto",
    optimum: OptimumRule = "parabola",
    midpoint_tolerance: float = 0.01,
) -> Gaps:
    """Loss gap, hyperparameter gap and transfer suboptimality of every width.

    Args:
      widths, hp_values, losses, observed, scale: as for `theory.losses.loss_table`. infinity:
      `"largest"`: the largest width measured. `"limit"` and `"auto"`: the limit of a power
        law (`theory.rates`) where one is determined, else the largest width; `Gaps` says which.
        Gaps against the largest width vanish there and are too small near it.
      optimum, midpoint_tolerance: how an optimum is read off a curve.

    Raises:
      ValueError: an argument is not as described.
    """
    table = loss_table(widths, hp_values, losses, observed=observed, scale=scale)
    readings = read_optima(table, optimum=optimum, midpoint_tolerance=midpoint_tolerance)
    return gaps_of(
        readings, infinity, readings.fit_loss(), readings.fit_optimum(), readings.fit_root()
    )
