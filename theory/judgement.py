"""From exponents to a verdict in words, and from what is lacking to what would settle it.

With `ρ = 2β − α` (`theory.verdict`), at `confidence` 90 % (each side 5 %):

- fast: the interval of ρ lies above 0;
- weak: it lies below 0 and β > 0, or it lies within ±0.1, where `c_n/a_n` is as good as constant;
- no transfer: it lies below 0, and β is below 0.15: a gap shrinks by a tenth per doubling at most;
- fast, by size: the optimum does not move beyond its noise, which leaves β open, and at every width
  below the largest `c_n` is below 5 % of `a_n` with that confidence;
- cannot tell: everything else, and always with one seed, fewer than four widths with a bracketed
  optimum, an optimum at the edge of its grid, a loss that does not follow a power law in width, or
  if leaving out one width turns the answer round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from theory.diagnosis import Estimate, Verdict
from theory.rates import PowerLaw
from theory.rates_resampling import ResampledIntervals
from theory.readings import Readings

__all__ = ["NEGLIGIBLE", "Evidence", "judge", "warnings_of"]

# |ρ| at which c_n/a_n changes by 7 % per doubling: as good as constant.
_BORDER = 0.1
# β at which b_n shrinks by 10 % per doubling.
_STANDSTILL = 0.15
# c_n/a_n below which it does not matter whether transfer is fast.
NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class Evidence:
    """The fits and what they say together.

    Attributes:
      loss, hp, root: of `phi*_n`, `x*(n)` and `s(x*(n))` (`theory.gaps`).
      curvature: its exponent γ.
      advantage: `ρ = 2β − α`.
      kappa: `γ − ρ`.
      probability_fast: of ρ > 0.
      turning_widths: widths without which the estimate of ρ has the other sign.
      resampled: intervals of α, β and the rate of c_n from refits, by name.
    """

    loss: PowerLaw
    hp: PowerLaw
    root: PowerLaw
    curvature: Estimate
    advantage: Estimate
    kappa: Estimate
    probability_fast: float
    turning_widths: tuple[int, ...]
    resampled: dict[str, ResampledIntervals]


def judge(
    readings: Readings, evidence: Evidence, stays: float, confidence: float
) -> tuple[Verdict, str]:
    """The verdict by this module's docstring, and one sentence for it.

    Args:
      readings: optima and their edges.
      evidence: the fits.
      stays: probability that `c_n` is negligible beside `a_n` at every width; NaN where unknown.
      confidence: level of the intervals.
    """
    usable, widths = readings.usable, readings.table.widths
    if widths.size < 4:
        return "cannot tell", (
            f"{widths.size} width{'s' * (widths.size > 1)} cannot tell a rate from a limit; "
            f"measure at least {max(5, 2 * widths.size)} widths"
        )
    if not usable.all():
        where = ", ".join(
            f"{n} ({edge})" for n, edge in zip(widths, readings.edges, strict=True) if edge
        )
        return "cannot tell", f"the grid does not bracket the optimum at width {where}; extend it"
    if readings.near_edge.any():
        where = ", ".join(str(n) for n in widths[readings.near_edge])
        return "cannot tell", (
            f"with other seeds the optimum at width {where} might leave the grid; extend it there"
        )
    if readings.drawn_coordinate is None:
        return "cannot tell", (
            "one seed does not show how much of the optimum's movement is chance; run at least 3"
        )
    if evidence.loss.degenerate:
        return "cannot tell", f"the loss gap has no rate: {evidence.loss.reason}"
    sure = (1 + confidence) / 2
    if evidence.hp.degenerate:
        if stays >= sure:
            return "fast", (
                "by size: the optimum does not move beyond its noise, and at every width the loss "
                f"that transfer costs is below {100 * NEGLIGIBLE:g} % of the loss gap; the rate "
                "of its movement stays unknown"
            )
        return "cannot tell", f"the hyperparameter gap has no rate: {evidence.hp.reason}"
    rho, beta = evidence.advantage, evidence.hp
    said = f"2 beta - alpha = {rho.value:.2f} [{rho.interval[0]:.2f}, {rho.interval[1]:.2f}]"
    below = evidence.probability_fast <= 1 - sure
    open_sign = not below and evidence.probability_fast < sure
    if open_sign and max(-rho.interval[0], rho.interval[1]) < _BORDER:
        return "weak", f"{said}: c_n/a_n is as good as constant"
    if evidence.turning_widths:
        return "cannot tell", (
            f"{said}, but without width {', '.join(map(str, evidence.turning_widths))} its sign "
            "turns; more widths would tell"
        )
    if evidence.probability_fast >= sure:
        return "fast", f"{said}: tuning at a small width loses less than the width itself"
    if below and beta.exponent_interval[0] > 0:
        return "weak", f"{said}: the optimum converges, but no faster than the loss"
    if below and beta.exponent_interval[1] < _STANDSTILL:
        return "no transfer", f"{said}, and beta at most {_STANDSTILL:g}: the optimum moves on"
    if below:
        return "cannot tell", (
            f"{said}: not fast; whether the optimum converges at all is open, "
            f"beta = {beta.exponent:.2f} [{beta.exponent_interval[0]:.2f}, "
            f"{beta.exponent_interval[1]:.2f}]; more widths would tell"
        )
    if rho.interval[0] > -_BORDER and rho.interval[1] < _BORDER:
        return "weak", f"{said}: c_n/a_n is as good as constant"
    return "cannot tell", f"{said} includes 0; {_what_would_tell(readings, rho)}"


def _what_would_tell(readings: Readings, rho: Estimate) -> str:
    reach = rho.value - rho.interval[0] if rho.value > 0 else rho.interval[1] - rho.value
    factor = (reach / max(abs(rho.value), 1e-9)) ** 2
    seeds = math.ceil(readings.dof_per_width * factor) + 1
    if seeds > 100:
        return "too close to call with more seeds: add widths, by factors of 2, at both ends"
    return (
        f"if the estimate holds, about {seeds} seeds would tell, or "
        f"{math.ceil(readings.table.widths.size * max(factor, 1.2) ** 0.5)} widths"
    )


def warnings_of(readings: Readings, evidence: Evidence) -> tuple[str, ...]:
    """What a reader should know before trusting the numbers, one sentence each."""
    found: list[str] = []
    for name, fit in (("loss", evidence.loss), ("optimum", evidence.hp)):
        if fit.degenerate:
            found.append(f"no rate for the {name}: {fit.reason}")
        elif fit.misfits:
            found.append(
                f"the {name} departs from a power law by more than its noise: intervals are from "
                "that misfit"
            )
    counts = {len(grid) for grid in readings.table.grids}
    if min(counts) < 5:
        found.append(
            f"a grid of {min(counts)} values is coarse: the optimum lies between few points"
        )
    for width, edge in zip(readings.table.widths, readings.edges, strict=True):
        if edge:
            found.append(f"width {width}: the optimum is not bracketed ({edge})")
    if readings.drawn_coordinate is None:
        cells = "one seed per cell" if readings.table.seeds == 1 else "one seed in most cells"
        found.append(f"{cells}: intervals come from the misfit of the fits alone")
    if readings.borrowed.any():
        where = ", ".join(str(n) for n in readings.table.widths[readings.borrowed])
        found.append(
            f"one seed in most cells of width {where}: noise there is taken to be that of the "
            "nearest width with several seeds"
        )
    return tuple(found)
