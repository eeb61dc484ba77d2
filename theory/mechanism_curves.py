"""Curvature, slope, size and minimum of loss curves on an interval, read off a grid.

Two readings of the values `f_i` at `x_1 < … < x_g`, for many curves at once:

`GridCurves` takes differences as they are:

    μ(f) = min_i 2 f[x_{i−1}, x_i, x_{i+1}],   Lip(f) = max_i |f[x_i, x_{i+1}]|

(divided differences). For a smooth f the first is an average of `f''` and the second of `f'`, so
`μ ≥ inf f''` and `Lip ≤ sup |f'|`, with equality as the grid is refined. Independent noise of
standard deviation σ on values h apart moves the second differences by `2.4 σ/h²` and the slopes by
`1.4 σ/h`, and an extremum is taken over them: μ comes out too small and Lip too large.

`Parabolas` fits `c_0 + c_1 t + c_2 t²` by least squares and reads the parabola: `μ = 2 c_2`, `Lip`
the steeper of the slopes at the ends. Noise on g points a span L apart moves μ by about
`27 σ/(L² √g)`, without a bias; the price is that a curve that is no parabola there is taken for
one. The fit is linear in the values, so that a sum of curves is fitted by the sum of their fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["GridCurves", "Parabolas", "Reading", "read_curves"]

FloatArray = NDArray[np.float64]
Reading = Literal["differences", "parabola"]


@dataclass(frozen=True)
class GridCurves:
    """Curves by their values (..., g) at x (g,), g ≥ 3; all results have the leading shape."""

    x: FloatArray
    values: FloatArray

    @cached_property
    def curvature(self) -> FloatArray:
        """μ: the smallest second derivative."""
        bends = np.diff(self._slopes, axis=-1) / (0.5 * (self.x[2:] - self.x[:-2]))
        return bends.min(axis=-1)

    @cached_property
    def slope(self) -> FloatArray:
        """Lip: the largest slope without its sign."""
        return np.abs(self._slopes).max(axis=-1)

    @cached_property
    def size(self) -> FloatArray:
        """`sup |f|`."""
        return np.abs(self.values).max(axis=-1)

    @cached_property
    def spread(self) -> FloatArray:
        """`sup f − inf f`."""
        return np.ptp(self.values, axis=-1)

    @cached_property
    def argmin(self) -> FloatArray:
        """Where the curve is smallest: a grid point."""
        return self.x[self.values.argmin(axis=-1)]

    @cached_property
    def _slopes(self) -> FloatArray:
        return np.diff(self.values, axis=-1) / np.diff(self.x)


@dataclass(frozen=True)
class Parabolas:
    """Curves by their least-squares parabolas on [x_1, x_g], the attributes as in `GridCurves`."""

    x: FloatArray
    values: FloatArray

    @cached_property
    def curvature(self) -> FloatArray:
        """μ: the second derivative."""
        return 2 * self._coefficients[..., 2]

    @cached_property
    def slope(self) -> FloatArray:
        """Lip: the steeper end."""
        c = self._coefficients
        return np.abs(c[..., 1, None] + 2 * c[..., 2, None] * self._ends).max(axis=-1)

    @cached_property
    def size(self) -> FloatArray:
        """`sup |f|`."""
        return np.abs(self._extremes).max(axis=-1)

    @cached_property
    def spread(self) -> FloatArray:
        """`sup f − inf f`."""
        return np.ptp(self._extremes, axis=-1)

    @cached_property
    def argmin(self) -> FloatArray:
        """Where the parabola is smallest on the interval."""
        return self._centre + np.take_along_axis(
            self._places, self._extremes.argmin(axis=-1)[..., None], axis=-1
        ).squeeze(-1)

    @cached_property
    def _centre(self) -> float:
        return float(self.x[0] + self.x[-1]) / 2

    @cached_property
    def _ends(self) -> FloatArray:
        return self.x[[0, -1]] - self._centre

    @cached_property
    def _coefficients(self) -> FloatArray:
        powers = np.vander(self.x - self._centre, 3, increasing=True)
        return self.values @ np.linalg.pinv(powers).T

    @cached_property
    def _places(self) -> FloatArray:
        """Both ends and the vertex, moved to the nearer end where it lies outside, (..., 3)."""
        c = self._coefficients
        bent = c[..., 2] != 0
        vertex = np.where(bent, -c[..., 1] / np.where(bent, 2 * c[..., 2], 1), 0.0)
        ends = np.broadcast_to(self._ends, (*vertex.shape, 2))
        return np.concatenate([ends, np.clip(vertex, *self._ends)[..., None]], axis=-1)

    @cached_property
    def _extremes(self) -> FloatArray:
        c, t = self._coefficients[..., None, :], self._places
        return c[..., 0] + t * (c[..., 1] + t * c[..., 2])


def read_curves(x: FloatArray, values: FloatArray, reading: Reading) -> GridCurves | Parabolas:
    """Curves (..., g) on a grid (g,), g ≥ 3, in the reading named.

    Raises:
      ValueError: the reading is unknown.
    """
    if reading not in ("differences", "parabola"):
        raise ValueError(f"reading must be 'differences' or 'parabola', got {reading!r}.")
    return (GridCurves if reading == "differences" else Parabolas)(x, values)
