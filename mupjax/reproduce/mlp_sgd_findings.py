"""How each claim of ``mupjax reproduce mlp-sgd`` fared."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from mupjax.reproduce.mlp_sgd_measures import Measures, interval_over_seeds
from mupjax.reproduce.mlp_sgd_training import Sizes
from mupjax.reproduce.target import Finding
from theory.drift import format_with_interval, transfer_summary
from theory.rates import PowerLaw
from theory.sample_groups import Overlap

__all__ = ["PUBLISHED_EXPONENT", "judge"]

PUBLISHED_EXPONENT = 0.77
FAITHFUL = 0.05
_CANNOT = "cannot tell at this scale"
# Loss beyond the optimum that still counts as near-optimal, of the loss at the optimum.
_NEAR = 0.02
# Agreement means this share of all pairs of networks beyond chance.
_MOST_PAIRS = 0.95


def judge(found: Measures, sizes: Sizes, *, shown: bool) -> dict[str, Finding]:
    """The findings by claim; where ``shown`` is false the run is too small to judge anything."""
    findings = {
        "faithful": _faithful(found),
        "scaling": _scaling(found, sizes),
        "transfer": _transfer(found),
        "mechanism": _mechanism(found),
        "overlap": _overlap(found),
        "easy_and_hard": _easy_and_hard(found),
    }
    if shown:
        return findings
    reason = f"{sizes.steps} steps at widths up to {sizes.widths[-1]} show nothing"
    return {key: Finding(f.measured, _CANNOT, reason, f.values) for key, f in findings.items()}


def _faithful(found: Measures) -> Finding:
    """Over all trials that trained, with the range in which the optima lie set apart."""
    alive = ~found.curves["diverged"]
    off = found.faithfulness.where(alive)
    rates = found.curves["learning_rate"].values
    optima = np.array(found.summaries["ema"].optimal_lr)
    near = (rates >= np.nanmin(optima) / 2) & (rates <= 2 * np.nanmax(optima))
    inside = off.isel(learning_rate=np.flatnonzero(near))
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


def _scaling(found: Measures, sizes: Sizes) -> Finding:
    optimal, transferred = found.scaling["optimal"], found.scaling["transferred"]
    losses = found.scaling_losses["optimal"]
    measured = f"at ν*(n) {_law(optimal)}; at the smallest width's optimum {_law(transferred)}" + (
        f"; losses {', '.join(f'{n}: {v:.4g}' for n, v in zip(sizes.widths, losses, strict=True))}"
    )
    values = {
        name: {"exponent": law.exponent, "interval": law.exponent_interval, "limit": law.limit}
        for name, law in found.scaling.items()
    }
    if optimal.degenerate:
        return Finding(measured, _CANNOT, optimal.reason, values)
    low, high = optimal.exponent_interval
    if not sizes.published_training:
        reason = (
            "another data set and a shorter training have an exponent of their own; --scale paper "
            "has the published ones"
        )
        return Finding(measured, _CANNOT, reason, values)
    if low <= PUBLISHED_EXPONENT <= high:
        wide = high - low > PUBLISHED_EXPONENT
        reason = "the 90 % interval holds the published exponent" + (
            ", but is wider than the exponent itself" if wide else ""
        )
        return Finding(measured, _CANNOT if wide else "reproduced", reason, values)
    reason = "the 90 % interval leaves out the published exponent"
    return Finding(measured, "not reproduced", reason, values)


def _law(law: PowerLaw) -> str:
    if law.degenerate:
        return f"no power law ({law.reason})"
    exponent = format_with_interval(-law.exponent, _negated(law.exponent_interval))
    return f"L = {law.limit:.3g} + {law.prefactor:.3g} n^({exponent})"


def _negated(interval: tuple[float, float]) -> tuple[float, float]:
    return -interval[1], -interval[0]


def _transfer(found: Measures) -> Finding:
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
        reason = "an optimum lies at the edge of the grid of learning rates"
        return Finding(measured, _CANNOT, reason, values)
    if summary.seeds < 2:
        return Finding(measured, _CANNOT, "one seed has no interval", values)
    if float(np.max(excess)) > _NEAR:
        reason = f"more than {_NEAR:.0%} of the loss is lost at some width"
        return Finding(measured, "not reproduced", reason, values)
    reason = f"at most {_NEAR:.0%} of the loss is lost at every width"
    return Finding(measured, "reproduced", reason, values)


def _mechanism(found: Measures) -> Finding:
    if found.mechanism is None:
        return Finding("no comparison", _CANNOT, found.mechanism_error)
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
    return Finding(measured, _CANNOT, reason, values)


def _overlap(found: Measures) -> Finding:
    widths, seeds = found.index.sizes["width"], found.index.sizes["seed"]
    words, values, above, on_average = [], {}, {}, {}
    for end, name in (("lowest", "easiest"), ("highest", "hardest")):
        agreed = found.overlaps[end]
        kinds = _by_kind(agreed, widths, seeds)
        values[name] = dict(kinds)
        values[name] |= {"chance": agreed.chance, "chance_interval": agreed.chance_interval}
        parts = [
            f"{np.mean(shares):.2f} [{shares.min():.2f}, {shares.max():.2f}] {kind}"
            for kind, shares in kinds.items()
            if shares.size
        ]
        words.append(f"{name} {agreed.count}: {', '.join(parts)}")
        everything = np.concatenate([shares for shares in kinds.values() if shares.size])
        beyond = everything > agreed.chance_interval[1]
        above[name] = float(beyond.mean()) if everything.size else math.nan
        on_average[name] = bool(
            all(np.mean(s) > agreed.chance_interval[1] for s in kinds.values() if s.size)
        )
    chance = found.overlaps["lowest"]
    low, high = chance.chance_interval
    measured = (
        "mean [range over pairs] of the shared part, "
        + "; ".join(words)
        + f"; by chance {chance.chance:.2f} [{low:.2f}, {high:.2f}]; the class of an example makes "
        f"{found.class_share:.0%} of the index's variance"
    )
    values["class_share"] = found.class_share
    if seeds < 2:
        return Finding(measured, _CANNOT, "one seed has no pairs of seeds", values)
    shares = ", ".join(f"{part:.0%} of pairs on the {name}" for name, part in above.items())
    reason = f"{shares} share more than 95 of 100 independent pairs would"
    if min(above.values()) > _MOST_PAIRS:
        return Finding(measured, "reproduced", reason, values)
    if all(on_average.values()):
        reason = "more than chance on average, but far from all pairs: " + reason
    return Finding(measured, "not reproduced", reason, values)


def _by_kind(agreed: Overlap, widths: int, seeds: int) -> dict[str, NDArray[np.float64]]:
    """Shares of pairs that differ in the width alone, the seed alone, or both."""
    kinds: dict[str, list[float]] = {
        "across widths": [],
        "across seeds": [],
        "across both": [],
    }
    rows = list(itertools.product(range(widths), range(seeds)))
    for (i, (n, s)), (j, (m, t)) in itertools.combinations(enumerate(rows), 2):
        kind = "across widths" if s == t else "across seeds" if n == m else "across both"
        kinds[kind].append(float(agreed.shares[i, j]))
    return {kind: np.array(values) for kind, values in kinds.items()}


def _easy_and_hard(found: Measures) -> Finding:
    """The drift of the optimum on hard examples beyond that on easy ones, seed by seed."""
    easy, hard = found.summaries["easy"], found.summaries["hard"]
    drifts = {
        name: format_with_interval(s.drift_per_doubling, s.drift_per_doubling_interval)
        for name, s in (("easy", easy), ("hard", hard))
    }
    difference = _by_seed(found, "hard") - _by_seed(found, "easy")
    mean, low, high = interval_over_seeds(difference)
    penalty = {
        name: s.transfer_penalty / s.optimal_loss[-1]
        for name, s in (("easy", easy), ("hard", hard))
    }
    measured = (
        f"drift of the optimum, octaves per doubling: easiest quarter {drifts['easy']} "
        f"({easy.verdict}), hardest 5 % {drifts['hard']} ({hard.verdict}), difference "
        f"{format_with_interval(mean, (low, high))}; lost at width {easy.widths[-1]} with the "
        f"smallest width's optimum: {100 * penalty['easy']:.2g} % and "
        f"{100 * penalty['hard']:.2g} % of the loss"
    )
    values = {
        "easy": easy.to_json(),
        "hard": hard.to_json(),
        "difference": mean,
        "difference_interval": (low, high),
        "relative_penalty": penalty,
    }
    if not np.isfinite([mean, low, high]).all() or any(easy.at_edge) or any(hard.at_edge):
        reason = "some optimum lies at the edge of the grid, or there is one seed only"
        return Finding(measured, _CANNOT, reason, values)
    stays = easy.verdict == "stays"
    if stays and hard.verdict == "drifts":
        reason = "the optimum of the easy examples stays, that of the hard ones drifts"
        return Finding(measured, "reproduced", reason, values)
    if stays and hard.verdict == "stays":
        apart = "" if low <= 0 <= high else ", though not alike"
        reason = f"both optima stay within 0.25 octaves per doubling{apart}"
        return Finding(measured, "not reproduced", reason, values)
    reason = f"easy: {easy.reason}; hard: {hard.reason}"
    return Finding(measured, _CANNOT, reason, values)


def _by_seed(found: Measures, name: str) -> NDArray[np.float64]:
    """Drift per doubling of every seed alone."""
    curves = found.curves
    dead = curves["diverged"].values
    losses = curves[name].values.astype(np.float64)
    return np.array(
        [
            transfer_summary(
                curves["width"].values,
                curves["learning_rate"].values,
                losses[..., s : s + 1],
                dead[..., s : s + 1],
            ).drift_per_doubling
            for s in range(losses.shape[-1])
        ]
    )
