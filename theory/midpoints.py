"""The other way to read an optimum off a curve: the middle of what is good enough.

Ghosh, Wu and Bietti (arXiv 2512.22768, figures of section 6) star, on curves with a flat bottom,
the midpoint of the interval of learning rates whose loss is within a fraction of the curve's range:

    I = {x : phi(x) ≤ min phi + tolerance (max phi − min phi)},   x* = (inf I + sup I)/2,

with tolerance .01 for Adam and .05 for Muon. It moves less with noise than the argmin, and is
another number: on a lopsided curve it lies on the shallower side, by up to .3 octaves on theirs.
Here `phi` is the monotone piecewise cubic (PCHIP) through the usable grid points, `min` and `max`
are taken over those points, and `I` is its connected part around the argmin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from theory.curves import (
    Optima,
    Scale,
    check_grid,
    check_losses,
    finite_runs,
    from_scale,
    locate_optima,
)

__all__ = ["locate_midpoints"]

FloatArray = NDArray[np.float64]

# Each halving of a grid cell gains one bit: 52 reach double precision.
_HALVINGS = 52


def locate_midpoints(
    hp_values: ArrayLike, losses: ArrayLike, *, tolerance: float = 0.01, scale: Scale = "log2"
) -> Optima:
    """Midpoints of the good intervals of many curves that share a grid.

    Args:
      hp_values: grid, shape (H,), as for `theory.curves.locate_optima`.
      losses: shape (..., H). Non-finite entries count as diverged.
      tolerance: fraction of the curve's range, in (0, 1).
      scale: where the midpoint is taken.

    Returns:
      As `locate_optima`, but `coordinate` and `hp` are the midpoint and `loss` the loss there. An
      end of the interval that the usable grid cuts off makes an edge on its side, and that bound
      is open as far as the next grid point (or without end).

    Raises:
      ValueError: the grid or the shapes are not as described, or the tolerance is not.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must lie between 0 and 1, as 0.01 does")
    grid, x = check_grid(hp_values, scale)
    raw = check_losses(losses, grid.size)
    leading = raw.shape[:-1]
    at_argmin = locate_optima(grid, raw, scale=scale)
    f = np.where(np.isfinite(raw), raw, np.inf).reshape(-1, grid.size)
    count = f.shape[0]
    finite = np.isfinite(f)
    best = np.where(finite, f, np.inf).min(axis=1)
    highest = np.where(finite, f, -np.inf).max(axis=1)
    argmin = np.argmin(f, axis=1)
    with np.errstate(invalid="ignore"):
        level = best + tolerance * (highest - best)

    low, high, loss = (np.full(count, np.nan) for _ in range(3))
    low_edge, high_edge = np.ones(count, dtype=bool), np.ones(count, dtype=bool)
    low_open, high_open = np.full(count, -np.inf), np.full(count, np.inf)
    for mask in np.unique(finite, axis=0):
        for first, last in finite_runs(mask):
            rows = np.flatnonzero(
                (finite == mask).all(axis=1) & (argmin >= first) & (argmin <= last)
            )
            if rows.size == 0:
                continue
            low[rows] = high[rows] = x[first]
            loss[rows] = f[rows, first]
            low_open[rows] = x[first - 1] if first > 0 else -np.inf
            high_open[rows] = x[last + 1] if last + 1 < grid.size else np.inf
            if last == first:
                continue
            curve = PchipInterpolator(x[first : last + 1], f[rows, first : last + 1], axis=1)
            above = f[rows, first : last + 1] > level[rows, None]
            start = argmin[rows] - first
            low[rows], low_edge[rows] = _crossing(curve, above, start, level[rows], -1)
            high[rows], high_edge[rows] = _crossing(curve, above, start, level[rows], 1)
            loss[rows] = _at(curve, (low[rows] + high[rows]) / 2)

    alive = np.isfinite(best)
    middle = np.where(alive, (low + high) / 2, np.nan)
    low_bound = np.where(low_edge, (low_open + high) / 2, middle)
    high_bound = np.where(high_edge, (low + high_open) / 2, middle)
    inside = ~(low_edge | high_edge)
    return Optima(
        hp=from_scale(middle, scale).reshape(leading),
        loss=np.where(alive, loss, np.inf).reshape(leading),
        grid_index=np.where(alive, argmin, -1).reshape(leading),
        low_edge=low_edge.reshape(leading),
        high_edge=high_edge.reshape(leading),
        curvature=np.where(inside, at_argmin.curvature.reshape(-1), np.nan).reshape(leading),
        flat=np.zeros(leading, dtype=bool),
        coordinate=middle.reshape(leading),
        coordinate_low=np.where(alive, low_bound, -np.inf).reshape(leading),
        coordinate_high=np.where(alive, high_bound, np.inf).reshape(leading),
        logarithmic=at_argmin.logarithmic,
    )


def _crossing(
    curve: PchipInterpolator,
    above: NDArray[np.bool_],
    start: NDArray[np.int64],
    level: FloatArray,
    side: int,
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Where each curve first rises above its level on one side, and whether it never does."""
    size = above.shape[1]
    position = np.arange(size)
    beyond = above & (position * side > start[:, None] * side)
    found = beyond.any(axis=1)
    far = np.argmax(beyond, axis=1) if side > 0 else size - 1 - np.argmax(beyond[:, ::-1], axis=1)
    far = np.where(found, far, start)
    near = np.where(found, far - side, start)
    inner, outer = curve.x[near].copy(), curve.x[far].copy()
    for _ in range(_HALVINGS):
        half = (inner + outer) / 2
        high = _at(curve, half) > level
        outer, inner = np.where(high, half, outer), np.where(high, inner, half)
    end = curve.x[-1] if side > 0 else curve.x[0]
    return np.where(found, inner, end), ~found


def _at(curve: PchipInterpolator, queries: FloatArray) -> FloatArray:
    """Each curve at its own query, which PPoly does not offer."""
    cell = np.clip(np.searchsorted(curve.x, queries, "right") - 1, 0, curve.x.size - 2)
    c = curve.c[:, cell, np.arange(queries.size)]
    t = queries - curve.x[cell]
    return ((c[0] * t + c[1]) * t + c[2]) * t + c[3]
