"""Which examples are easy and which are hard, and do networks agree on it? Numbers in and out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["Overlap", "extreme", "overlap"]

IntArray = NDArray[np.int64]
End = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Overlap:
    """How far several rankings of the same examples agree on one end.

    Attributes:
      end: which end.
      count: number of examples at that end.
      shares: |A ∩ B| / count for every pair of rankings, shape (R, R); 1 on the diagonal.
      chance: what independent rankings share on average, count / samples.
      chance_interval: what they share in 90 of 100 pairs (hypergeometric distribution).
    """

    end: End
    count: int
    shares: NDArray[np.float64]
    chance: float
    chance_interval: tuple[float, float]


def extreme(index: ArrayLike, share: float, end: End) -> IntArray:
    """The examples at one end of a ranking, in increasing order of their position.

    Args:
      index: mean component index (or another score), shape (samples,); nan ranks nowhere.
      share: of the examples, in (0, 1]; rounded up to whole examples.
      end: ``"lowest"`` (easy, if the score is a mean component index) or ``"highest"`` (hard).

    Raises:
      ValueError: a share or an end that is none, or more nan than leave enough examples.
    """
    scores = np.asarray(index, dtype=np.float64)
    if scores.ndim != 1 or not 0 < share <= 1:
        raise ValueError(
            f"index must have shape (samples,) and share lie in (0, 1], got {scores.shape} and "
            f"{share!r}."
        )
    if end not in ("lowest", "highest"):
        raise ValueError(f"end must be 'lowest' or 'highest', got {end!r}.")
    count = math.ceil(share * scores.size - 1e-9)
    if (ranked := int(np.isfinite(scores).sum())) < count:
        raise ValueError(
            f"only {ranked} of {scores.size} examples have a finite score, fewer than the {count} "
            "asked for: leave diverged runs out."
        )
    sign = 1 if end == "lowest" else -1
    # Stable, and nan last in either order.
    order = np.argsort(sign * scores, kind="stable")
    return np.sort(order[:count])


def overlap(index: ArrayLike, share: float, end: End) -> Overlap:
    """Overlap of one end between several rankings.

    Args:
      index: (R, samples), a ranking (a width and seed) per row, on the same examples.
      share, end: as for `extreme`.

    Raises:
      ValueError: as `extreme`, or not of that shape.
    """
    scores = np.asarray(index, dtype=np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"index must have shape (rankings, samples), got {scores.shape}.")
    member = np.zeros(scores.shape)
    for row, each in zip(member, scores, strict=True):
        row[extreme(each, share, end)] = 1
    count = int(member[0].sum())
    law = stats.hypergeom(scores.shape[1], count, count)
    low, high = (float(law.ppf(q)) / count for q in (0.05, 0.95))
    return Overlap(end, count, member @ member.T / count, count / scores.shape[1], (low, high))
