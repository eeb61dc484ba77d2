"""What the two targets on two-layer networks share: their sizes, and how the CPU bounds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import signal

from mupjax.reproduce.sizes import restricted
from mupjax.reproduce.target import Scale

__all__ = [
    "PUBLISHED_STEPS",
    "Sizes",
    "count_minima",
    "half_octaves",
    "sizes_at",
    "standard_notes",
    "too_short",
]

PUBLISHED_STEPS = 2**14


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a target trains.

    Attributes:
      widths: n, increasing.
      learning_rates: grid, increasing.
      steps: T.
      seeds: S.
      validation_examples: of the fixed validation batch.
      left_out: widths of the published experiment that were left out.
    """

    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    steps: int
    seeds: int
    validation_examples: int = 16384
    left_out: tuple[int, ...] = ()

    def as_published(self) -> bool:
        """Whether losses can be compared with the published ones: the training is as long."""
        return self.steps == PUBLISHED_STEPS


def half_octaves(low: float, high: float) -> tuple[float, ...]:
    """Learning rates from 2^low to 2^high in factors of sqrt(2)."""
    return tuple(2.0**x for x in np.arange(2 * low, 2 * high + 0.5) / 2)


def sizes_at(
    scales: Mapping[Scale, Sizes],
    scale: Scale,
    seeds: int | None,
    max_width: int | None,
    largest_on_cpu: int,
) -> Sizes:
    """The sizes of a scale, with the options of the command line.

    Args:
      scales: sizes by scale.
      scale: which.
      seeds, max_width, largest_on_cpu: see `mupjax.reproduce.sizes.restricted`, which raises.
    """
    whole = scales[scale]
    kept = restricted(whole, scale, seeds=seeds, max_width=max_width, largest_on_cpu=largest_on_cpu)
    left_out = tuple(n for n in whole.widths if n not in kept.widths)
    return dataclasses.replace(kept, left_out=left_out)


def too_short(sizes: Sizes) -> str:
    """Why a short training says nothing of the published one."""
    return f"{sizes.steps} steps show nothing of trainings of {PUBLISHED_STEPS}"


def standard_notes(sizes: Sizes, base_width: int) -> tuple[str, ...]:
    """Which choices were made where the paper makes none, and what was left out."""
    notes = [
        "GWB do not state initial scales, the treatment of the biases, the base width, a schedule, "
        "or whether weights are averaged. Chosen here: w_i ~ N(0, I/d), a_i ~ N(0, 1/n²), biases "
        f"trained from 0 with 1/16 of the learning rate, base width {base_width} (the readout's "
        f"rate is {base_width}/n times that of w), constant learning rate, Adam with 0.9 and "
        "0.999, no averaging. Of what was tried, a readout's rate of 8/n came closest to the "
        "published optimum and loss of the ball indicator at widths 181 and 512 "
        "(docs/two_layer.md); the published curve is steeper on the right.",
    ]
    if sizes.left_out:
        left_out = ", ".join(map(str, sizes.left_out))
        notes.append(
            f"Widths {left_out} of the published experiment were left out; --max-width sets the "
            "largest width to train."
        )
    return tuple(notes)


def count_minima(losses: ArrayLike) -> int:
    """Local minima of a mean learning-rate curve that are no noise.

    A minimum counts if the ridge between it and a lower one is higher by 2 % of the lowest loss, so
    that a flat valley is one minimum, and by twice the standard error over seeds of the difference
    between the two minima.

    Args:
      losses: shape (H, S); infinite where a run diverged.

    Returns:
      the number of minima; 0 where every learning rate diverged.
    """
    each = np.asarray(losses, dtype=np.float64)
    mean = each.mean(axis=-1)
    usable = np.isfinite(mean)
    if not usable.any():
        return 0
    # A diverged cell is a wall, and so are the ends of the grid: a curve may fall to its end.
    wall = 2 * float(np.abs(mean[usable]).max()) + 1.0
    walled = np.concatenate([[wall], np.where(usable, mean, wall), [wall]])
    lowest = int(np.argmin(walled)) - 1
    minima, found = signal.find_peaks(-walled, prominence=0.02 * abs(float(mean[lowest])))
    kept = 0
    for minimum, prominence in zip(minima - 1, found["prominences"], strict=True):
        difference = each[minimum] - each[lowest]
        spread = float(difference.std(ddof=1)) if difference.size > 1 else 0.0
        kept += bool(prominence > 2 * spread / math.sqrt(difference.size))
    return kept
