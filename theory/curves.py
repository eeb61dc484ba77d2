"""Where the minimum of a loss curve over one hyperparameter lies, between the points of a grid.

A sweep measures `phi(nu_i)` on a grid `nu_1 < … < nu_H`. With `x = log2(nu)` (or another scale, see
`Scale`) and `i` the grid's argmin, the exact parabola through the three points `i-1, i, i+1` is

    phi(x_i + t) = phi_i + b t + c t²,   h₋ = x_i − x_{i−1},   h₊ = x_{i+1} − x_i,
    d₋ = phi_{i−1} − phi_i ≥ 0,          d₊ = phi_{i+1} − phi_i ≥ 0,
    c = (d₋/h₋ + d₊/h₊) / (h₋ + h₊),     b = (d₊ h₋/h₊ − d₋ h₊/h₋) / (h₋ + h₊),

and its vertex `t* = −b/(2c)` lies in `[−h₋/2, h₊/2]`: the optimum never leaves the bracket, and it
is a continuous function of the losses while the argmin moves from one point to its neighbour.
Closed form; exact for a parabola in `x`, otherwise the vertex is off by `O(h² phi'''/phi'')`.

The loss at the vertex, `phi_i − b²/(4c)`, is another matter where one side is steep, as it is just
before training diverges: the losses .06, .051, .05, 5 give −.57. A convex curve lies above the
lines through its points `i−2, i−1` and `i+1, i+2`, so the loss reported is no lower than these
lines at the vertex (nor higher than `phi_i`): here .047. Nothing changes where the points lie on a
parabola. Where that is still below zero by more than a tenth of `phi_i`, though no loss is, three
points so far above one another are taken for a parabola in `log phi`.

The learning-rate optimum of Ghosh, Wu and Bietti (arXiv 2512.22768, section 2) is `nu*(n)` here,
with learning rates compared in `log2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

__all__ = [
    "Edge",
    "Optima",
    "Optimum",
    "Scale",
    "interpolate_loss",
    "locate_optima",
    "locate_optimum",
]

Scale = Literal["log2", "linear", "momentum"]
"""How a hyperparameter is compared: `log2(nu)`, `nu`, or, for momenta, `log2(1/(1−nu))`."""

Edge = Literal["", "low", "high", "both", "all diverged"]
"""The side on which no usable grid point brackets the optimum; `""` when both sides do."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


# Of the lowest loss: so far below zero the parabola through positive losses is wrong, and not just
# off by noise.
_NEGATIVE = 0.1


@dataclass(frozen=True)
class Optimum:
    """The minimum of one loss curve.

    Attributes:
      hp: hyperparameter at the minimum, in its own units; NaN when every grid point diverged.
      loss: loss at the minimum, in the units of the losses, at most the grid's smallest; `inf` when
        every grid point diverged.
      grid_index: index of the grid's argmin, the first among equals; −1 when every point diverged.
      edge: side on which no usable grid point brackets the minimum. Then `hp` and `loss` are those
        of the grid point itself, never extrapolated, and `hp` is only a bound.
      curvature: second derivative of the loss with respect to the scaled hyperparameter (loss per
        octave² under `"log2"`); 0 on a plateau, NaN at an edge.
      flat: several neighbouring grid points share the smallest loss. `hp` is the plateau's middle.
      bounds: lower and upper end of where the minimum can be if the curve is a parabola there: both
        equal `hp` inside the grid; the plateau's ends if three or more points tie; at an edge, from
        the midpoint between the grid point and its usable neighbour to the neighbour that diverged,
        or to the end of the scale where the grid ends.
    """

    hp: float
    loss: float
    grid_index: int
    edge: Edge
    curvature: float
    flat: bool
    bounds: tuple[float, float]

    @property
    def at_edge(self) -> bool:
        """True when the minimum is not bracketed on both sides by usable grid points."""
        return self.edge != ""


@dataclass(frozen=True)
class Optima:
    """Minima of many loss curves on one grid; every array has the losses' leading shape.

    `coordinate`, `coordinate_low` and `coordinate_high` are on the chosen scale (log2 of the
    hyperparameter under `"log2"`), the last two being `Optimum.bounds`; `low_edge` and `high_edge`
    are both True for edge `"both"` and, with `grid_index` −1, for `"all diverged"`; `logarithmic`
    says that the parabola is one of the logarithm of the loss. The other attributes are those of
    `Optimum`.
    """

    hp: FloatArray
    loss: FloatArray
    grid_index: NDArray[np.int64]
    low_edge: BoolArray
    high_edge: BoolArray
    curvature: FloatArray
    flat: BoolArray
    coordinate: FloatArray
    coordinate_low: FloatArray
    coordinate_high: FloatArray
    logarithmic: BoolArray

    @property
    def at_edge(self) -> BoolArray:
        """True where the minimum is not bracketed on both sides by usable grid points."""
        return self.low_edge | self.high_edge

    def edge(self, index: int | tuple[int, ...] = ()) -> Edge:
        """The edge of one curve, in the words of `Optimum.edge`."""
        if self.grid_index[index] < 0:
            return "all diverged"
        low, high = bool(self.low_edge[index]), bool(self.high_edge[index])
        return "both" if low and high else "low" if low else "high" if high else ""


def locate_optimum(hp_values: ArrayLike, losses: ArrayLike, *, scale: Scale = "log2") -> Optimum:
    """The minimum of one loss curve by the local parabola of this module's docstring.

    Args:
      hp_values: grid, shape (H,), H ≥ 3, strictly increasing; positive under `"log2"`, in [0, 1)
        under `"momentum"`. Non-uniform spacing is allowed.
      losses: shape (H,). NaN and infinite entries count as diverged and are never chosen.
      scale: the scale in which the curve is taken to be locally a parabola.

    Returns:
      The minimum. A grid end, or a neighbour that diverged, makes an edge in that direction.

    Raises:
      ValueError: the grid or the shapes are not as described.
    """
    curve = np.asarray(losses, dtype=np.float64)
    if curve.ndim != 1:
        raise ValueError(
            f"losses has shape {curve.shape}, expected one curve of shape (H,); "
            "use locate_optima for many curves at once"
        )
    optima = locate_optima(hp_values, curve, scale=scale)
    return Optimum(
        hp=float(optima.hp),
        loss=float(optima.loss),
        grid_index=int(optima.grid_index),
        edge=optima.edge(),
        curvature=float(optima.curvature),
        flat=bool(optima.flat),
        bounds=(
            float(from_scale(optima.coordinate_low, scale)),
            float(from_scale(optima.coordinate_high, scale)),
        )
        if optima.at_edge or optima.flat
        else (float(optima.hp), float(optima.hp)),
    )


def locate_optima(hp_values: ArrayLike, losses: ArrayLike, *, scale: Scale = "log2") -> Optima:
    """The minima of many loss curves that share a grid; `locate_optimum` is the case of one.

    Args:
      hp_values: grid, shape (H,), as for `locate_optimum`.
      losses: shape (..., H), any number of leading axes. Non-finite entries count as diverged.
      scale: the scale in which the curves are taken to be locally parabolas.

    Returns:
      Arrays of the leading shape.

    Raises:
      ValueError: the grid or the shapes are not as described.
    """
    grid, x = check_grid(hp_values, scale)
    raw = check_losses(losses, grid.size)
    leading, size = raw.shape[:-1], grid.size
    # One column more on each side: a grid's end then reads like a diverged neighbour.
    f = np.full((int(np.prod(leading)), size + 2), np.inf)
    f[:, 1:-1] = np.where(np.isfinite(raw), raw, np.inf).reshape(-1, size)
    x_padded = np.concatenate([[-np.inf], x, [np.inf]])
    rows = np.arange(f.shape[0])

    start = np.argmin(f[:, 1:-1], axis=1) + 1
    best = f[rows, start]
    alive = np.isfinite(best)
    after_plateau = (f != best[:, None]) & (np.arange(size + 2) > start[:, None])
    after_plateau[:, -1] = True
    stop = np.argmax(after_plateau, axis=1) - 1
    left, right = f[rows, start - 1], f[rows, stop + 1]
    low_edge, high_edge = ~np.isfinite(left), ~np.isfinite(right)
    tied = alive & (stop > start)
    inside = ~(low_edge | high_edge) & (stop - start <= 1)

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        h_minus, h_plus = (
            x_padded[start] - x_padded[start - 1],
            x_padded[start + 1] - x_padded[start],
        )
        after = f[rows, start + 1]
        offset, drop, bend = _vertex(h_minus, h_plus, left - best, after - best)
        vertex = x_padded[start] + offset
        # Where the minimum is inside, start − 2 and start + 2 are at most the padding.
        far = np.minimum(start + 2, size + 1)
        from_left = _line(x_padded, f, start - 2, start - 1, vertex)
        from_right = _line(x_padded, f, far, start + 1, vertex)
        convex_bound = np.minimum(np.fmax(from_left, from_right), best)
        vertex_loss = np.fmax(best - drop, convex_bound)
        below_zero = inside & (best > 0) & (vertex_loss < -_NEGATIVE * best)
        by_log, log_drop, log_bend = _vertex(
            h_minus, h_plus, np.log(left / best), np.log(after / best)
        )
        vertex = np.where(below_zero, x_padded[start] + by_log, vertex)
        vertex_loss = np.where(below_zero, best * np.exp(-log_drop), vertex_loss)
        vertex_loss = np.where(best > 0, np.fmax(vertex_loss, 0), vertex_loss)
        bend = np.where(below_zero, log_bend * vertex_loss, bend)
        middle = np.where(tied, (x_padded[start] + x_padded[stop]) / 2, x_padded[start])
        below = np.where(low_edge, x_padded[start - 1], (x_padded[start - 1] + x_padded[start]) / 2)
        above = np.where(high_edge, x_padded[stop + 1], (x_padded[stop] + x_padded[stop + 1]) / 2)

    nan = np.nan
    at_edge = low_edge | high_edge
    coordinate = np.where(alive, np.where(inside, vertex, middle), nan)
    loss = np.where(inside, vertex_loss, best)
    curvature = np.where(inside, bend, np.where(alive & ~at_edge, 0.0, nan))
    coordinate_low = np.where(
        alive, np.where(inside, vertex, np.where(at_edge, below, x_padded[start])), -np.inf
    )
    coordinate_high = np.where(
        alive, np.where(inside, vertex, np.where(at_edge, above, x_padded[stop])), np.inf
    )
    # A grid point is returned as it was given, not as the inverse of its logarithm.
    on_grid = alive & ~inside & ~tied
    hp = np.where(on_grid, grid[start - 1], from_scale(coordinate, scale))
    index = np.where(alive, start - 1, -1)

    return Optima(
        hp=hp.reshape(leading),
        loss=loss.reshape(leading),
        grid_index=index.reshape(leading),
        low_edge=low_edge.reshape(leading),
        high_edge=high_edge.reshape(leading),
        curvature=curvature.reshape(leading),
        flat=tied.reshape(leading),
        coordinate=coordinate.reshape(leading),
        coordinate_low=coordinate_low.reshape(leading),
        coordinate_high=coordinate_high.reshape(leading),
        logarithmic=below_zero.reshape(leading),
    )


def interpolate_loss(
    hp_values: ArrayLike, losses: ArrayLike, hp: ArrayLike, *, scale: Scale = "log2"
) -> FloatArray:
    """The loss at a hyperparameter between the grid points, one query for each curve.

    Between the neighbours of the grid's argmin the curve is the parabola of `locate_optima`, cut at
    the loss reported for its vertex; elsewhere it is the monotone piecewise cubic through the
    usable points (PCHIP, Fritsch and Butland 1984) in the chosen scale. So it is continuous, passes
    through every grid point, and is nowhere below the minimum that `locate_optima` reports.

    Args:
      hp_values: grid, shape (H,), as for `locate_optimum`.
      losses: shape (..., H). Non-finite entries count as diverged.
      hp: queries, shape (...), within the grid.
      scale: the scale in which the curves are interpolated.

    Returns:
      Losses, shape (...). `inf` where a grid point next to the query diverged (a query that hits a
      usable grid point has that point's loss), NaN where the query is NaN.

    Raises:
      ValueError: the grid or the shapes are not as described, or a query lies outside the grid.
    """
    grid, x = check_grid(hp_values, scale)
    raw = check_losses(losses, grid.size)
    queries = np.asarray(hp, dtype=np.float64)
    if queries.shape != raw.shape[:-1]:
        raise ValueError(
            f"hp has shape {queries.shape}, expected {raw.shape[:-1]}: one query for each curve of "
            f"losses, whose shape is {raw.shape}"
        )
    outside = (queries < grid[0]) | (queries > grid[-1])
    if outside.any():
        raise ValueError(
            f"hp={queries[outside].flat[0]:g} lies outside the grid [{grid[0]:g}, {grid[-1]:g}]; "
            "losses are never extrapolated, extend the grid"
        )
    optima = locate_optima(grid, raw, scale=scale)
    size = grid.size
    f = np.where(np.isfinite(raw), raw, np.inf).reshape(-1, size)
    q = to_scale(queries, scale).reshape(-1)
    out = np.where(np.isnan(q), np.nan, np.inf)

    usable = np.isfinite(f)
    for mask in np.unique(usable, axis=0):
        rows = np.flatnonzero((usable == mask).all(axis=1) & ~np.isnan(q))
        for first, last in finite_runs(mask):
            here = rows[(q[rows] >= x[first]) & (q[rows] <= x[last])]
            if here.size and last > first:
                curve = PchipInterpolator(x[first : last + 1], f[here, first : last + 1], axis=1)
                cell = np.clip(np.searchsorted(curve.x, q[here], "right") - 1, 0, last - first - 1)
                # Each curve is asked at its own point, which PPoly does not offer.
                coefficients = curve.c[:, cell, np.arange(here.size)]
                t = q[here] - curve.x[cell]
                out[here] = ((coefficients[0] * t + coefficients[1]) * t + coefficients[2]) * t
                out[here] += coefficients[3]

    index = np.clip(optima.grid_index.reshape(-1), 1, size - 2)
    curvature = optima.curvature.reshape(-1)
    logarithmic = optima.logarithmic.reshape(-1)
    in_bracket = (curvature > 0) & (q >= x[index - 1]) & (q <= x[index + 1])
    distance = q - optima.coordinate.reshape(-1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        best = optima.loss.reshape(-1)
        at_argmin = f[np.arange(q.size), index]
        offset = x[index] - optima.coordinate.reshape(-1)
        parabola = at_argmin + 0.5 * curvature * (distance**2 - offset**2)
        by_log = best * np.exp(np.where(logarithmic, curvature / best * distance**2 / 2, 0.0))
        parabola = np.where(logarithmic, by_log, parabola)
    out = np.where(in_bracket, np.maximum(parabola, best), out)

    nearest = np.clip(np.searchsorted(x, q), 0, size - 1)
    hit = x[nearest] == q
    out = np.where(hit, f[np.arange(q.size), nearest], out)
    return out.reshape(queries.shape)


def _vertex(
    h_minus: FloatArray, h_plus: FloatArray, d_minus: FloatArray, d_plus: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Vertex of the parabola through (−h_minus, d_minus), (0, 0) and (h_plus, d_plus).

    Its position, how far it lies below 0, and the second derivative.
    """
    # Dividing by the larger difference keeps tiny and huge losses from under- or overflowing.
    unit = np.maximum(d_minus, d_plus)
    p, q = d_minus / unit, d_plus / unit
    c = (p / h_minus + q / h_plus) / (h_minus + h_plus)
    b = (q * h_minus / h_plus - p * h_plus / h_minus) / (h_minus + h_plus)
    offset = np.clip(-b / (2 * c), -h_minus / 2, h_plus / 2)
    return offset, unit * b * b / (4 * c), 2 * c * unit


def _line(
    x: FloatArray, f: FloatArray, far: NDArray[np.int64], near: NDArray[np.int64], at: FloatArray
) -> FloatArray:
    """The line through two points of each curve, at `at`; −inf where the far one is not usable."""
    rows = np.arange(f.shape[0])
    slope = (f[rows, near] - f[rows, far]) / (x[near] - x[far])
    line = f[rows, near] + slope * (at - x[near])
    return np.where(np.isfinite(f[rows, far]), line, -np.inf)


def finite_runs(mask: BoolArray) -> list[tuple[int, int]]:
    """First and last index of every run of True."""
    steps = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    return list(
        zip(
            np.flatnonzero(steps == 1).tolist(),
            (np.flatnonzero(steps == -1) - 1).tolist(),
            strict=True,
        )
    )


def to_scale(values: FloatArray, scale: Scale) -> FloatArray:
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}.")
    if scale == "log2":
        return np.log2(values)
    return -np.log2(1 - values) if scale == "momentum" else values


def from_scale(coordinates: FloatArray, scale: Scale) -> FloatArray:
    with np.errstate(over="ignore"):
        if scale == "log2":
            return np.exp2(coordinates)
        # "Unbounded below" (−inf) is zero for a momentum.
        return np.maximum(1 - np.exp2(-coordinates), 0) if scale == "momentum" else coordinates


def check_losses(losses: ArrayLike, size: int) -> FloatArray:
    raw = np.asarray(losses, dtype=np.float64)
    if raw.ndim == 0 or raw.shape[-1] != size:
        raise ValueError(
            f"losses has shape {raw.shape}, expected (..., {size}): one loss for each of the "
            f"{size} hp_values on the last axis"
        )
    return raw


def check_grid(hp_values: ArrayLike, scale: Scale) -> tuple[FloatArray, FloatArray]:
    """The grid in its own units and on the scale, or an error that names the offending entry."""
    if scale not in ("log2", "linear", "momentum"):
        raise ValueError(f"scale={scale!r} is not known; use 'log2', 'linear' or 'momentum'")
    grid = np.asarray(hp_values, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 3:
        raise ValueError(
            f"hp_values has shape {grid.shape}, expected (H,) with H >= 3: a minimum needs a grid "
            "point on each side of it; add hyperparameter values"
        )
    usable = np.isfinite(grid)
    remedy = "give finite values"
    if scale == "log2":
        usable &= grid > 0
        remedy = "the log2 scale needs finite values above 0 (scale='linear' takes others)"
    elif scale == "momentum":
        usable &= (grid >= 0) & (grid < 1)
        remedy = "the momentum scale log2(1/(1-hp)) needs values in [0, 1)"
    if not usable.all():
        i = int(np.argmin(usable))
        raise ValueError(f"hp_values[{i}]={grid[i]:g} cannot be used; {remedy}")
    x = to_scale(grid, scale)
    # On the scale, because values a few ulp apart can share their logarithm.
    rising = np.diff(x) > 0
    if not rising.all():
        i = int(np.argmin(rising)) + 1
        raise ValueError(
            f"hp_values[{i}]={grid[i]:g} does not exceed hp_values[{i - 1}]={grid[i - 1]:g}; sort "
            "the grid in increasing order (and its losses with it) and drop duplicates"
        )
    return grid, x
