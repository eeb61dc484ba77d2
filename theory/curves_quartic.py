"""The minimum of a loss curve by the quartic through five grid points.

On a lopsided curve the parabola of `theory.curves` puts the minimum off by `O(h² phi'''/phi'')`,
and by how much depends on where the minimum lies between the points, so that the error differs from
width to width and bends a power law. With `i` the grid's argmin, `t = x − x_i` and the two
neighbours on either side,

    phi(x_i + t) = phi_i + c_1 t + c_2 t² + c_3 t³ + c_4 t⁴   at t_{i−2}, …, t_{i+2},

the minimum is off by `O(h⁴ phi⁽⁵⁾/phi'')` only. Its noise is about 1.3 times that of the parabola
(weights (1, −8, 0, 8, −1)/12 of the derivative, against (−1, 0, 1)/2). On a parabola both agree.

Beside a wall, where a run is about to diverge, five points are too many. The quartic is used where
the curve rises on both sides, the outer points are no more than `_STEEPEST` times higher than a
parabola through the inner ones would be, and Newton's method finds the minimum in the bracket, not
below zero where no loss is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from theory.curves import Optima, Scale, to_scale

__all__ = ["quartic_minima"]

FloatArray = NDArray[np.float64]

# As for the spline of `theory.readings`: a run that blew up, and is finite, is no part of a bowl.
_STEEPEST = 2.0
# Newton's error squares in every step, and it starts within a quarter of a grid step or so.
_STEPS = 8


def quartic_minima(
    grid: FloatArray, curves: FloatArray, optima: Optima, scale: Scale
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Position, loss and curvature of the minima of many curves on one grid.

    Args:
      grid: hyperparameters, shape (H,).
      curves: losses, shape (R, H); not finite where a run diverged.
      optima: of `theory.curves.locate_optima`, for these curves.
      scale: of the grid.

    Returns:
      Three arrays of shape (R,), on the scale; NaN where the quartic is not to be used.
    """
    x = to_scale(grid, scale)
    found = np.full((3, curves.shape[0]), np.nan)
    for i in np.unique(optima.grid_index[optima.curvature > 0]):
        if not 2 <= i <= x.size - 3:
            continue
        rows = np.flatnonzero((optima.grid_index == i) & (optima.curvature > 0))
        unit = (x[i + 2] - x[i - 2]) / 4
        t = (x[i - 2 : i + 3] - x[i]) / unit
        with np.errstate(invalid="ignore", over="ignore"):
            rise = curves[rows, i - 2 : i + 3] - curves[rows, i, None]
            steep = np.maximum(rise[:, 1] / t[1] ** 2, rise[:, 3] / t[3] ** 2)
            bowl = np.isfinite(rise).all(axis=1)
            for outer, inner in ((0, 1), (4, 3)):
                bowl &= rise[:, outer] > rise[:, inner]
                bowl &= rise[:, outer] <= _STEEPEST * steep * t[outer] ** 2
        rows, rise = rows[bowl], rise[bowl]
        c: FloatArray = np.linalg.solve(np.vander(t, increasing=True), rise.T).astype(np.float64)
        d = (optima.coordinate[rows] - x[i]) / unit
        for _ in range(_STEPS):
            bend = _second(c, d)
            d = np.clip(d - _first(c, d) / np.where(bend > 0, bend, np.inf), t[1], t[3])
        bend = _second(c, d)
        good = (bend > 0) & (np.abs(_first(c, d)) <= 1e-9 * np.abs(bend) * (t[3] - t[1]))
        height = curves[rows, i] + d * (c[1] + d * (c[2] + d * (c[3] + d * c[4])))
        good &= (height >= 0) | (curves[rows, i] <= 0)
        found[:, rows[good]] = np.stack([x[i] + unit * d, height, bend / unit**2])[:, good]
    return found[0], found[1], found[2]


def _first(c: FloatArray, d: FloatArray) -> FloatArray:
    return c[1] + d * (2 * c[2] + d * (3 * c[3] + d * 4 * c[4]))


def _second(c: FloatArray, d: FloatArray) -> FloatArray:
    return 2 * c[2] + d * (6 * c[3] + d * 12 * c[4])
