"""Top-k profiles side by side: up to which k are they alike?

A profile is the change of loss `φ^k` that the k leading components alone make, k = 1 … n (see
`theory.alignment`). Ghosh, Wu and Bietti (arXiv 2512.22768, section 5) call a range of k over which
the profiles of all widths lie on one another *top-k invariance* and read its end off figures ("up
to k ≈ 60"). Here it is a number: the k from which on they lie apart for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Parting", "parting_component"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Parting:
    """Where two profiles part.

    Attributes:
      component: largest k at which they agree within the tolerance, from which on they never do
        again; 0 where they never agree; the smaller of the two sizes where they agree to the end.
      interval: percentiles of the same over draws of seeds; NaN with one seed.
      censored: they agree to the end of the shorter profile, so that `component` is a lower bound.
      largest_difference: the largest difference at or below `component`, relative to the whole
        change; NaN where `component` is 0.
    """

    component: int
    interval: tuple[float, float]
    censored: bool
    largest_difference: float


def parting_component(
    profile: ArrayLike,
    reference: ArrayLike,
    *,
    tolerance: float = 0.02,
    confidence: float = 0.9,
    resamples: int = 500,
    rng_seed: int = 0,
) -> Parting:
    """Up to which k two profiles agree.

    Differences are of means over seeds, relative to the whole change of loss of `reference`. Seeds
    are drawn in pairs: seed s means the same random numbers in both.

    Args:
      profile, reference: `φ^k`, shapes (S, n) and (S, m), or (n,) and (m,) for one seed.
      tolerance: relative difference up to which they agree, > 0.
      confidence: of the interval.
      resamples: draws.
      rng_seed: of the draws.

    Raises:
      ValueError: shapes not as described, values that are not finite, a reference that does not
        change, or a tolerance that is not positive.
    """
    one, other = (np.atleast_2d(np.asarray(a, dtype=np.float64)) for a in (profile, reference))
    if one.ndim != 2 or other.ndim != 2 or len(one) != len(other) or not one.size * other.size:
        raise ValueError(
            f"profile and reference have shapes {np.shape(profile)} and {np.shape(reference)}, "
            "expected (S, n) and (S, m), of as many seeds."
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("profile and reference must be finite: leave diverged trials out.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}.")
    if not other[:, -1].mean():
        raise ValueError("the reference's whole change of loss is 0: nothing to compare with.")
    shorter = min(one.shape[1], other.shape[1])

    def part(rows: NDArray[np.int64]) -> tuple[int, FloatArray]:
        mean, base = one[rows].mean(axis=0), other[rows].mean(axis=0)
        off = np.abs(mean[:shorter] - base[:shorter]) / abs(base[-1])
        alike = np.flatnonzero(off <= tolerance)
        return (int(alike[-1]) + 1 if alike.size else 0), off

    seeds = len(one)
    component, off = part(np.arange(seeds))
    interval = (float("nan"), float("nan"))
    if seeds > 1:
        rng = np.random.default_rng(rng_seed)
        draws = [part(rng.integers(seeds, size=seeds))[0] for _ in range(resamples)]
        tail = (1 - confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        interval = (float(low), float(high))
    return Parting(
        component=component,
        interval=interval,
        censored=component == shorter,
        largest_difference=float(off[:component].max()) if component else float("nan"),
    )
