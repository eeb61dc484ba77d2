"""How each claim of ``mupjax reproduce mlp-sgd`` fared."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from mupjax.reproduce.decomposed import drift_by_seed, interval_over_seeds
from mupjax.reproduce.decomposed_findings import faithful, mechanism, scaling, transfer
from mupjax.reproduce.mlp_sgd_measures import Measures
from mupjax.reproduce.mlp_sgd_training import Sizes
from mupjax.reproduce.target import Finding
from theory.drift import format_with_interval
from theory.sample_groups import Overlap

__all__ = ["PUBLISHED_EXPONENT", "judge"]

PUBLISHED_EXPONENT = 0.77
_CANNOT = "cannot tell at this scale"
# Agreement means this share of all pairs of networks beyond chance.
_MOST_PAIRS = 0.95


def judge(found: Measures, sizes: Sizes, *, shown: bool) -> dict[str, Finding]:
    """The findings by claim; where ``shown`` is false the run is too small to judge anything."""
    findings = {
        "faithful": faithful(found),
        "scaling": scaling(found, PUBLISHED_EXPONENT, comparable=sizes.published_training),
        "transfer": transfer(found),
        "mechanism": mechanism(found),
        "overlap": _overlap(found),
        "easy_and_hard": _easy_and_hard(found),
    }
    if shown:
        return findings
    reason = f"{sizes.steps} steps at widths up to {sizes.widths[-1]} show nothing"
    return {key: Finding(f.measured, _CANNOT, reason, f.values) for key, f in findings.items()}


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
    difference = drift_by_seed(found, "hard") - drift_by_seed(found, "easy")
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
