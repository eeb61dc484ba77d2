"""Top-k profiles side by side: how far are they apart?

A profile is the change of loss `φ^k` that the k leading components alone make, k = 1 … n (see
`theory.alignment`). Ghosh, Wu and Bietti (arXiv 2512.22768, section 5) call it *top-k invariance*
that the profiles of all widths lie on one another, and read off figures up to which k they do ("up
to k ≈ 60"). That k is no number to judge by: profiles that lie apart at small k may cross, and at
the end they meet wherever two widths reach the same loss. The largest difference at any k is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ProfileDifference", "profile_difference"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ProfileDifference:
    """How far two profiles lie apart.

    Attributes:
      largest: the largest difference at a k that both have, as a part of the reference's whole
        change.
      component: that k, from 1 on.
      interval: percentiles of `largest` over draws of seeds; NaN with one seed. What seeds scatter
        is part of any largest difference, so both ends are rather too high than too low.
    """

    largest: float
    component: int
    interval: tuple[float, float]


def profile_difference(
    profile: ArrayLike,
    reference: ArrayLike,
    *,
    confidence: float = 0.9,
    resamples: int = 500,
    rng_seed: int = 0,
) -> ProfileDifference:
    """The largest difference of two profiles.

    Differences are of means over seeds. Seeds are drawn in pairs: seed s means the same random
    numbers in both.

    Args:
      profile, reference: `φ^k`, shapes (S, n) and (S, m), or (n,) and (m,) for one seed.
      confidence: of the interval.
      resamples: draws.
      rng_seed: of the draws.

    Raises:
      ValueError: shapes not as described, values that are not finite, or a reference that does not
        change.
    """
    one, other = (np.atleast_2d(np.asarray(a, dtype=np.float64)) for a in (profile, reference))
    if one.ndim != 2 or other.ndim != 2 or len(one) != len(other) or not one.size * other.size:
        raise ValueError(
            f"profile and reference have shapes {np.shape(profile)} and {np.shape(reference)}, "
            "expected (S, n) and (S, m), of as many seeds."
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("profile and reference must be finite: leave diverged trials out.")
    if not other[:, -1].mean():
        raise ValueError("the reference's whole change of loss is 0: nothing to compare with.")
    shorter = min(one.shape[1], other.shape[1])

    def apart(rows: NDArray[np.int64]) -> FloatArray:
        mean, base = one[rows].mean(axis=0), other[rows].mean(axis=0)
        return np.abs(mean[:shorter] - base[:shorter]) / abs(base[-1])

    seeds = len(one)
    differences = apart(np.arange(seeds))
    interval = (float("nan"), float("nan"))
    if seeds > 1:
        rng = np.random.default_rng(rng_seed)
        draws = [apart(rng.integers(seeds, size=seeds)).max() for _ in range(resamples)]
        tail = (1 - confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        interval = (float(low), float(high))
    component = int(differences.argmax())
    return ProfileDifference(float(differences[component]), component + 1, interval)
