"""From a drift and its interval to `"stays"`, `"drifts"` or `"cannot tell"`, and to warnings.

The slope's interval decides (`theory.drift`); an optimum at or near an edge of its grid, or a width
at which everything diverged, keeps the answer from being `"stays"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from theory.curves import Edge
from theory.drift_summary import Interval, Verdict, fixed

__all__ = ["DriftEvidence", "judge_drift", "warnings_of_drift"]

_MOST_SEEDS_TO_SUGGEST = 100
# In octaves, and a little for grids whose values were rounded.
_COARSE_STEP = 1.1


@dataclass(frozen=True)
class DriftEvidence:
    """What the verdict and the warnings are drawn from; `largest_step` of the grid in octaves."""

    widths: tuple[int, ...]
    seeds: int
    edges: tuple[Edge, ...]
    near_edge: tuple[bool, ...]
    slope: float
    slope_interval: Interval
    slope_half_width: float
    drift_interval: Interval
    penalty: float
    largest_step: float

    def widths_with(self, *edges: Edge) -> list[int]:
        """Widths whose optimum has one of these edges."""
        return [n for n, edge in zip(self.widths, self.edges, strict=True) if edge in edges]

    @property
    def widths_near_edge(self) -> list[int]:
        """Widths whose resampled optima often reach an edge."""
        return [n for n, near in zip(self.widths, self.near_edge, strict=True) if near]


_EXTEND = "extend the grid there, or refine it towards the rates that diverged"


def warnings_of_drift(evidence: DriftEvidence, smallest_rate: float) -> tuple[str, ...]:
    """What a reader should know before trusting the numbers, one sentence each."""
    found: list[str] = []
    if evidence.seeds == 1:
        found.append("one seed: no interval can be given; run at least 3 seeds")
    elif evidence.seeds == 2:
        found.append("two seeds: intervals rest on one degree of freedom; run at least 3 seeds")
    if evidence.largest_step > _COARSE_STEP:
        found.append(
            f"the grid has steps of {evidence.largest_step:.2g} octaves: optima between them are "
            "rough estimates, whose own error is in no interval; refine the grid to one octave"
        )
    if lacking := evidence.widths_with("all diverged"):
        found.append(
            f"{_named(lacking)}: every learning rate diverged, so there is no optimum and the "
            f"drift per doubling leaves that out; add learning rates below {smallest_rate:.3g}"
        )
    sides: tuple[tuple[Edge, str], ...] = (
        ("low", "the low side"),
        ("high", "the high side"),
        ("both", "either side"),
    )
    for edge, side in sides:
        if open_widths := evidence.widths_with(edge):
            found.append(
                f"{_named(open_widths)}: no usable learning rate brackets the optimum on {side}, "
                f"so it is only a bound; {_EXTEND}"
            )
    if near := evidence.widths_near_edge:
        found.append(
            f"{_named(near)}: resampled optima often reach the grid's edge, so the interval may be "
            "too short; extend the grid or add seeds"
        )
    smallest, largest = evidence.widths[0], evidence.widths[-1]
    if math.isinf(evidence.penalty):
        found.append(
            f"the optimum of width {smallest} lies where training at width {largest} diverged: the "
            "transfer penalty is infinite"
        )
    elif evidence.edges[-1] and not math.isnan(evidence.penalty):
        found.append(
            f"the optimum of width {largest} is not bracketed: the penalty is a lower bound"
        )
    return tuple(found)


def judge_drift(
    evidence: DriftEvidence, confidence: float, tolerance: float
) -> tuple[Verdict, str]:
    """The verdict at a confidence and a tolerance in octaves per doubling, and a reason for it."""
    lacking = evidence.widths_with("all diverged")
    if len(evidence.widths) < 2:
        return "cannot tell", "one width shows no drift; run at least two widths"
    if math.isnan(evidence.slope):
        return "cannot tell", (
            f"fewer than two widths have an optimum (every learning rate diverged at "
            f"{_named(lacking)}); add smaller learning rates"
        )
    if evidence.seeds == 1:
        return "cannot tell", (
            f"the best learning rate moves by {fixed(evidence.slope)} octaves per doubling of the "
            "width, but one seed does not show how much of that is chance; run at least 3 seeds"
        )
    low, high = evidence.slope_interval
    open_widths = evidence.widths_with("low", "high", "both")
    doublings = math.log2(evidence.widths[-1] / evidence.widths[0])
    what = "drift"
    if not (math.isfinite(low) or math.isfinite(high)):
        # Edges at the widths in between can leave the fitted slope open on both sides although the
        # smallest and the largest width alone bound the drift.
        low, high = (end / doublings for end in evidence.drift_interval)
        what = "drift from the smallest to the largest width"
    level = f"{100 * confidence:g} % confidence"
    if low > tolerance or high < -tolerance:
        where = "beyond" if open_widths else "wholly outside"
        return "drifts", (f"the {what} is {_range(low, high)} at {level}, {where} ±{tolerance:g}")
    measured = f"the {what} is {_range(low, high)} at {level}"
    if weak := sorted({*open_widths, *evidence.widths_near_edge}):
        return "cannot tell", (
            f"{measured}, and at {_named(weak)} the optimum is at or near the edge of the usable "
            f"learning rates; {_EXTEND}"
        )
    if lacking:
        return "cannot tell", (
            f"{measured}, but every learning rate diverged at {_named(lacking)}; add smaller "
            "learning rates"
        )
    if low > -tolerance and high < tolerance:
        return "stays", f"{measured}, wholly inside ±{tolerance:g}"
    wanted = _seeds_needed(
        evidence.seeds,
        evidence.slope_half_width,
        abs(abs(evidence.slope) - tolerance),
        confidence,
    )
    remedy = (
        f"about {wanted} seeds would tell, if the estimate {fixed(evidence.slope)} holds"
        if wanted
        else "that is too close to call with more seeds; add wider or narrower networks"
    )
    return "cannot tell", f"{measured}, which reaches across ±{tolerance:g}; {remedy}"


def _seeds_needed(seeds: int, half_width: float, distance: float, confidence: float) -> int | None:
    """Fewest seeds whose half-width, by `t_{S−1}/sqrt(S)`, is below the distance given."""
    count = np.arange(seeds, max(seeds, _MOST_SEEDS_TO_SUGGEST) + 1)
    scaled = stats.t.ppf((1 + confidence) / 2, count - 1) / np.sqrt(count)
    enough = half_width * scaled / scaled[0] < distance
    return int(count[np.argmax(enough)]) if enough.any() else None


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "not bounded by these learning rates"
    unit = "octaves per doubling of the width"
    if math.isinf(low):
        return f"at most {fixed(high)} {unit}"
    if math.isinf(high):
        return f"at least {fixed(low)} {unit}"
    return f"{fixed(low)} to {fixed(high)} {unit}"


def _named(widths: Sequence[int]) -> str:
    return ("width " if len(widths) == 1 else "widths ") + ", ".join(str(n) for n in widths)
