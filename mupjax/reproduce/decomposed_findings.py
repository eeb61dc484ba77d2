"""How claims about a sweep with the decomposition fared: the judgements that targets share."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from mupjax.reproduce.decomposed import (
    DecomposedSweep,
    drift_by_seed,
    interval_over_seeds,
    positive,
)
from mupjax.reproduce.target import ClaimVerdict, Finding
from theory.drift import format_with_interval
from theory.rates import PowerLaw

__all__ = [
    "CANNOT",
    "broken_mechanism",
    "faithful",
    "imperfect_transfer",
    "invariance",
    "less_drift",
    "mechanism",
    "scaling",
    "transfer",
]

CANNOT: Final = "cannot tell at this scale"
FAITHFUL = 0.05
# Loss beyond the optimum that still counts as near-optimal, of the loss at the optimum.
NEAR = 0.02
# Of the whole change: what profiles that lie on one another may differ by.
APART = 0.1


def faithful(found: DecomposedSweep) -> Finding:
    """Over all trials that trained, with the range in which the optima lie set apart."""
    alive = ~found.curves["diverged"]
    off = found.faithfulness.where(alive)
    taken = positive(found.curves[found.hp].values, found.scale)
    optima = np.array(found.summaries["ema"].optimal_lr)
    near = (taken >= np.nanmin(optima) / 2) & (taken <= 2 * np.nanmax(optima))
    inside = off.isel({found.hp: np.flatnonzero(near)})
    worst, everywhere = float(inside.max()), float(off.max())
    beyond = float((off > FAITHFUL).sum() / alive.sum())
    measured = (
        f"|φ - ΔL|/|ΔL| at most {worst:.2g} within an octave of the optima, at most "
        f"{everywhere:.2g} anywhere; above {FAITHFUL:.0%} in {beyond:.0%} of the trials"
    )
    values = {"worst_near_optima": worst, "worst": everywhere, "share_above": beyond}
    if not worst <= FAITHFUL:
        reason = f"near the optima the linearized change is off by more than {FAITHFUL:.0%}"
        return Finding(measured, "not reproduced", reason, values)
    reason = f"off by at most {FAITHFUL:.0%} wherever the optima may lie (trapezoid rule)"
    return Finding(measured, "reproduced", reason, values)


def scaling(found: DecomposedSweep, published: float, *, comparable: bool) -> Finding:
    """The power law of the loss in the width.

    Args:
      found: the sweep.
      published: exponent, positive.
      comparable: whether data and training are those of the publication.
    """
    optimal, transferred = found.scaling["optimal"], found.scaling["transferred"]
    losses = found.scaling_losses["optimal"]
    pairs = zip(found.curves["width"].values, losses, strict=True)
    measured = (
        f"at ν*(n) {_law(optimal)}; at the smallest width's optimum {_law(transferred)}; losses "
        + ", ".join(f"{n}: {v:.4g}" for n, v in pairs)
    )
    values = {
        name: {"exponent": law.exponent, "interval": law.exponent_interval, "limit": law.limit}
        for name, law in found.scaling.items()
    }
    if optimal.degenerate:
        return Finding(measured, CANNOT, optimal.reason, values)
    low, high = optimal.exponent_interval
    if not comparable:
        reason = (
            "another data set and a shorter training have an exponent of their own; --scale paper "
            "has the published ones"
        )
        return Finding(measured, CANNOT, reason, values)
    if low <= published <= high:
        wide = high - low > published
        reason = "the 90 % interval holds the published exponent" + (
            ", but is wider than the exponent itself" if wide else ""
        )
        return Finding(measured, CANNOT if wide else "reproduced", reason, values)
    reason = "the 90 % interval leaves out the published exponent"
    return Finding(measured, "not reproduced", reason, values)


def _law(law: PowerLaw) -> str:
    if law.degenerate:
        return f"no power law ({law.reason})"
    exponent = format_with_interval(-law.exponent, _negated(law.exponent_interval))
    return f"L = {law.limit:.3g} + {law.prefactor:.3g} n^({exponent})"


def _negated(interval: tuple[float, float]) -> tuple[float, float]:
    return -interval[1], -interval[0]


def transfer(found: DecomposedSweep) -> Finding:
    """Loss beyond the optimum at the largest width, by seed, relative to the optimum's."""
    summary = found.summaries["ema"]
    excess = found.scaling_losses["transferred"] / found.scaling_losses["optimal"] - 1
    drift = format_with_interval(summary.drift_per_doubling, summary.drift_per_doubling_interval)
    measured = (
        f"loss above the optimum's {', '.join(f'{100 * e:.2g} %' for e in excess[1:])} at widths "
        f"{', '.join(map(str, summary.widths[1:]))}; the optimum moves by {drift} octaves per "
        "doubling"
    )
    values = {"excess": excess, "summary": summary.to_json()}
    if not np.isfinite(excess).all() or any(summary.at_edge):
        reason = "an optimum lies at the edge of the grid"
        return Finding(measured, CANNOT, reason, values)
    if summary.seeds < 2:
        return Finding(measured, CANNOT, "one seed has no interval", values)
    if float(np.max(excess)) > NEAR:
        reason = f"more than {NEAR:.0%} of the loss is lost at some width"
        return Finding(measured, "not reproduced", reason, values)
    reason = f"at most {NEAR:.0%} of the loss is lost at every width"
    return Finding(measured, "reproduced", reason, values)


def mechanism(found: DecomposedSweep) -> Finding:
    """What `theory.mechanism_report` says of the top-κ part."""
    if found.mechanism is None:
        return Finding("no comparison", CANNOT, found.mechanism_error)
    report = found.mechanism.report
    words, values = [], {}
    for e in report.explanations:
        hat = e.kappa_hat
        kappa = f"{hat.value:.0f}" if math.isfinite(hat.value) else "none accepted"
        words.append(
            f"{e.width}: κ̂ {kappa}, overlap of the top-κ curves {e.overlap.value:.2f}, residual "
            f"{e.flatness_ratio.value:.2f} as uneven as the top ({e.verdict})"
        )
        values[str(e.width)] = {
            "verdict": e.verdict,
            "kappa_hat": hat.value,
            "kappa_hat_interval": hat.interval,
            "overlap": e.overlap.value,
            "flatness_ratio": e.flatness_ratio.value,
            "hp_gap": e.hp_gap.value,
            "bound": e.bound.value,
        }
    measured = f"against width {report.widths[-1]}: " + "; ".join(words)
    reasons = {e.reason for e in report.explanations if e.verdict == report.verdict}
    reason = f"{report.verdict}: {sorted(reasons)[0]}" if reasons else report.verdict
    if report.verdict == "explained":
        return Finding(measured, "reproduced", reason, values)
    if report.verdict == "not explained":
        return Finding(measured, "not reproduced", reason, values)
    return Finding(measured, CANNOT, reason, values)


_OPPOSITE: dict[ClaimVerdict, ClaimVerdict] = {
    "reproduced": "not reproduced",
    "not reproduced": "reproduced",
    CANNOT: CANNOT,
}


def imperfect_transfer(found: DecomposedSweep) -> Finding:
    """The opposite of `transfer`: the optimum drifts, or the smallest width's costs much."""
    one = transfer(found)
    if found.summaries["ema"].verdict == "drifts":
        return Finding(one.measured, "reproduced", "the optimum drifts", one.values)
    return dataclasses.replace(one, verdict=_OPPOSITE[one.verdict])


def broken_mechanism(found: DecomposedSweep) -> Finding:
    """The opposite of `mechanism`: no stable top-κ part leaves a flat residual."""
    one = mechanism(found)
    return dataclasses.replace(one, verdict=_OPPOSITE[one.verdict])


def invariance(found: DecomposedSweep, *, wide: bool) -> Finding:
    """How far the top-k profiles are from the largest width's, in parts of the whole change.

    Args:
      found: the sweep.
      wide: whether they are said to lie on one another at every width, or not at some. The border
        is a tenth: on the authors' own curves Llama's profiles differ by at most .09, .04, .02 and
        .01 with Adam, and by .14, .15, .08 and .07 with Muon (widths 128 to 1024).
    """
    if not found.profile_differences:
        return Finding("no profiles", CANNOT, found.mechanism_error)
    words, values, sides = [], {}, []
    for n, apart in found.profile_differences.items():
        low, high = apart.interval
        words.append(f"{n}: {format_with_interval(apart.largest, apart.interval)}")
        values[str(n)] = {
            "largest_difference": apart.largest,
            "component": apart.component,
            "interval": apart.interval,
        }
        sides.append("within" if high <= APART else "beyond" if low > APART else "unclear")
    measured = (
        "largest difference of the profiles from the largest width's, of the whole change, at "
        "width " + ", ".join(words)
    )
    if any(math.isnan(apart.interval[0]) for apart in found.profile_differences.values()):
        return Finding(measured, CANNOT, "one seed has no interval", values)
    if "beyond" in sides:
        verdict, reason = not wide, f"it is above {APART:g} at some width"
    elif all(side == "within" for side in sides):
        verdict, reason = wide, f"it is at most {APART:g} at every width"
    else:
        reason = f"whether it is above {APART:g} is within the seeds' spread at some width"
        return Finding(measured, CANNOT, reason, values)
    return Finding(measured, "reproduced" if verdict else "not reproduced", reason, values)


def less_drift(steady: DecomposedSweep, other: DecomposedSweep, names: tuple[str, str]) -> Finding:
    """Whether the optimum moves less with width in one sweep than in another, seed by seed."""
    if not (steady.summaries["ema"].seeds == other.summaries["ema"].seeds > 1):
        return Finding("no comparison", CANNOT, "fewer than two seeds in common")
    drifts = [drift_by_seed(found, "ema") for found in (steady, other)]
    mean, low, high = interval_over_seeds(np.abs(drifts[1]) - np.abs(drifts[0]))
    words = [
        f"{name} "
        + format_with_interval(
            found.summaries["ema"].drift_per_doubling,
            found.summaries["ema"].drift_per_doubling_interval,
        )
        for name, found in zip(names, (steady, other), strict=True)
    ]
    measured = (
        f"drift of the optimum, octaves per doubling: {', '.join(words)}; |{names[1]}| - "
        f"|{names[0]}| = {format_with_interval(mean, (low, high))}"
    )
    values = {"difference": mean, "difference_interval": (low, high)}
    if not np.isfinite([mean, low, high]).all():
        return Finding(measured, CANNOT, "some seed has no optimum inside the grid", values)
    if low > 0:
        return Finding(measured, "reproduced", "the interval lies above 0", values)
    if high < 0:
        return Finding(measured, "not reproduced", "the interval lies below 0", values)
    return Finding(measured, CANNOT, "the interval holds 0: more seeds would tell", values)
