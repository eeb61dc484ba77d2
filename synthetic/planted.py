"""Losses split into components of which everything is known: the mechanism, kept or broken.

With `t = ν − ν_0` on `|t| ≤ 2` (octaves from the best learning rate), K leading components and
`N` the largest width, the change of loss at width n is the sum of n components. Write
`b(t) = μ t²/2 − D` for the bowl, R for what the other components take off. Per family

| family | the K leading components add up to | the others add up to |
|---|---|---|
| `"holds"` | `b(t)` | `−R (1 − n^{-α})`: deeper with width, the same at all t |
| `"convexity"` | `−(μ t²/2 + D)`: a hill | `μ t² − R (1 − n^{-α})`: what makes the bowl |
| `"invariance"` | `b(t − m n^{-α})`: a bowl that moves | `−R (1 − n^{-α})` |
| `"flatness"` | `b(t)` | `−R (1 − n^{-α}) + q (2 n^{-α} − 1) t`: a slope that turns |

The leading K have the weights `w_j ∝ 2^{-j}`, every other component the same share of its sum; in
`"convexity"` the share grows as the component's index to the eighth, so that the bowl is made by
the last ones. The truncation κ = K meets all of the mechanism's conditions in the first family
(Ghosh, Wu and Bietti, arXiv 2512.22768, section 4); in each other one the condition of its name
fails at K and at every other κ up to n ≤ N/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["FAMILIES", "Family", "PlantedLosses"]

FloatArray = NDArray[np.float64]
Family = Literal["holds", "convexity", "invariance", "flatness"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class PlantedLosses:
    """A family of the module docstring.

    Attributes:
      family: which condition is broken, or `"holds"`.
      leading: K, at least 1.
      curvature: μ > 0, loss per octave².
      depth: D, loss that the leading components take off at the optimum.
      rest: R, loss that the others take off at infinite width.
      alpha: α > 0.
      shift: m, octaves, of `"invariance"`.
      slope: q, loss per octave, of `"flatness"`.
    """

    family: Family
    leading: int = 4
    curvature: float = 0.5
    depth: float = 3.0
    rest: float = 1.0
    alpha: float = 0.5
    shift: float = 6.0
    slope: float = 0.5

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}.")
        if self.leading < 1:
            raise ValueError(f"leading must be at least 1, got {self.leading!r}.")
        for name in ("curvature", "alpha"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}.")

    def top(self, t: ArrayLike, width: int) -> FloatArray:
        """`φ_n^K(t)` in closed form, the shape of t."""
        x, mu, n = np.asarray(t, dtype=np.float64), self.curvature, width**-self.alpha
        if self.family == "convexity":
            return -(mu * x**2 / 2 + self.depth)
        moved = x - self.shift * n if self.family == "invariance" else x
        return mu * moved**2 / 2 - self.depth

    def residual(self, t: ArrayLike, width: int) -> FloatArray:
        """`φ_n^{−K}(t)` in closed form, the shape of t."""
        x, n = np.asarray(t, dtype=np.float64), width**-self.alpha
        flat = np.full_like(x, -self.rest * (1 - n))
        if self.family == "convexity":
            return flat + self.curvature * x**2
        if self.family == "flatness":
            return flat + self.slope * (2 * n - 1) * x
        return flat

    def optimum(self, width: int) -> float:
        """`ν*(n) − ν_0` in octaves."""
        n = width**-self.alpha
        if self.family == "invariance":
            return self.shift * n
        if self.family == "flatness":
            return -self.slope * (2 * n - 1) / self.curvature
        return 0.0

    def profile(self, t: ArrayLike, width: int) -> FloatArray:
        """`φ_n^k(t)` for k = 1 … n, shape (g, n).

        Args:
          t: octaves from ν_0, shape (g,).
          width: n > K.

        Raises:
          ValueError: the width is not larger than K.
        """
        if width <= self.leading:
            raise ValueError(
                f"width must exceed the {self.leading} leading components, got {width}."
            )
        first = 0.5 ** np.arange(self.leading)
        later = np.arange(self.leading + 1, width + 1, dtype=np.float64)
        power = 8.0 if self.family == "convexity" else 0.0
        others = (later / width) ** power
        x = np.asarray(t, dtype=np.float64)
        parts = np.concatenate(
            [
                np.multiply.outer(self.top(x, width), first / first.sum()),
                np.multiply.outer(self.residual(x, width), others / others.sum()),
            ],
            axis=-1,
        )
        return np.cumsum(parts, axis=-1)

    def noisy_profiles(
        self, t: ArrayLike, width: int, *, seeds: int, noise: float, rng: np.random.Generator
    ) -> FloatArray:
        """Profiles of several seeds: every hyperparameter and seed has one error, as a run has.

        The error is spread over the components as their parts' sizes are, so that it is in the
        leading ones mostly; the whole curve's has the standard deviation `noise`.

        Args:
          t: octaves from ν_0, shape (g,).
          width: n > K.
          seeds: S.
          noise: standard deviation of the loss between seeds.
          rng: of the errors.

        Returns:
          shape (S, g, n).
        """
        phi = self.profile(t, width)
        parts = np.abs(np.diff(phi, axis=-1, prepend=0.0))
        share = np.sqrt(parts / parts.sum(axis=-1, keepdims=True))
        errors = noise * share * rng.normal(size=(seeds, *phi.shape))
        return phi + np.cumsum(errors, axis=-1)
