"""``mupjax reproduce adaptive-transfer``: Adaptive Transfer's table, recomputed and measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xarray as xr

from mupjax.figures.adaptive_transfer import adaptive_transfer_figure
from mupjax.reproduce.adaptive_transfer_findings import analyse, judge
from mupjax.reproduce.adaptive_transfer_measures import PUBLISHED_ERRORS
from mupjax.reproduce.adaptive_transfer_networks import Experiment, run_sweeps
from mupjax.reproduce.target import Claim, Finding, Outcome, Scale, Target

__all__ = ["TARGET"]

_SOURCE = (
    "Adaptive Transfer, table of transfer error and stability (base 256, 10M to 7B parameters)"
)
_CLAIMS = (
    Claim(
        "table",
        "Transferred by each scheme from width 256, the rate misses its optimum by these errors",
        _SOURCE,
        "; ".join(
            f"{width}: " + ", ".join(f"{scheme} {error:.3f}" for scheme, error in row.items())
            for width, row in PUBLISHED_ERRORS.items()
        ),
    ),
    Claim(
        "exponent",
        "The best learning rate falls as width^-0.85 when depth grows with width",
        _SOURCE,
        "-0.85 (assumed: the table follows from it)",
    ),
    Claim(
        "order_of_errors",
        "Adaptive Transfer has the smallest transfer error, then muP, then SP",
        _SOURCE,
        "at 16 times the base: 0.149, 0.340, 9.556",
    ),
    Claim(
        "stability",
        "At the transferred rate SP diverges, muP and Adaptive Transfer do not",
        _SOURCE,
        "fraction that does not diverge: SP 0.04 at 4 times the base and 0.00 at 16 times, the "
        "others 1.00",
    ),
    Claim(
        "order_of_losses",
        "So Adaptive Transfer is the scheme to train with: its loss is the lowest at the "
        "transferred rate (what the two quantities above stand for; the source gives no losses)",
        _SOURCE,
        "Adaptive Transfer before muP and SP",
    ),
)

_EXPERIMENTS: Mapping[Scale, tuple[Experiment, ...]] = MappingProxyType(
    {
        "tiny": (
            Experiment(
                widths=(8, 16),
                search=tuple(2.0**k for k in range(-9, -2)),
                offsets=(-1.0, 0.0, 1.0),
                near=(0.0,),
                seeds=2,
                steps=20,
                batch_size=32,
                validation_examples=256,
            ),
        ),
        "laptop": (Experiment(network="plain"), Experiment(network="residual")),
    }
)


def _verdict_note(findings: Mapping[str, Finding]) -> str:
    """The plain answer, first on the page."""
    answer = {
        "reproduced": "it survives",
        "not reproduced": "it does not survive",
        "cannot tell at this scale": "this run cannot tell",
    }
    errors, losses = findings["order_of_errors"], findings["order_of_losses"]
    return (
        "Does the source's ranking (Adaptive Transfer, muP, SP) survive measurement? By transfer "
        f"error {answer[errors.verdict]}: {errors.reason}. By the loss at the transferred rate, "
        f"which is what a user pays, {answer[losses.verdict]}: {losses.reason}."
    )


_NOTES = (
    "Figure, left to right: curves of the reference (dotted line: the rate tuned at the base) and "
    "the losses at the rates that the source's schemes transfer (an arrow: above the panel, or "
    "diverged); transfer error, dotted as the source assumes it; loss lost by training at the "
    "transferred rate; fraction of runs that train. Bars are 90 % intervals.",
    "eta*(w) is the best rate of a reference network whose matrices all start with std "
    "width^-1/2 and share one global Adam rate, with weight decay that does not scale: the "
    "source's muP in other units. It is read off by a least-squares parabola over 1.5 octaves on "
    "either side of the lowest point.",
    "The source's SP scales nothing, not even the initial std; its muP treats all matrices alike. "
    "Two controls are trained beside: SP as libraries have it, with std 1/sqrt(fan-in), and muP "
    "with its own rule for input and output matrices (Yang et al., arXiv 2203.03466, Table 3).",
    "Networks are bias-free, so every parameter is a matrix and has its rule. Each doubling of "
    "the width adds one hidden layer, by which parameters grow about as the source's do from 10M "
    "to 7B. The source trained language models; the two kinds of network here, plain ReLU nets "
    "with He's gain and residual nets with a norm before each matrix, stand for how much its "
    "exponent owes to the architecture.",
    "Stable means: neither diverged (not finite, a hundred times the first loss, or ended above "
    "the start) nor ended above the loss of the best constant guess. By divergence alone a net "
    "that starts at a loss of a thousand and ends at twenty, or whose units all died, would count "
    "as stable; that fraction is in the dataset as not_diverged. Runs are those within an octave "
    "of the transferred rate; intervals are exact binomial, with runs taken as independent.",
    "Other intervals are for the noise of seeds (90 %); the penalty takes the tuned rate as given. "
    "They do not hold the choice of task, length of training or depth, nor how the optimum is "
    "read: curves are lopsided, and the parabola through three points gave exponents that differ "
    "by up to 0.1.",
)


def _experiments(
    scale: Scale, *, seeds: int | None = None, max_width: int | None = None
) -> list[Experiment]:
    changes: dict[str, Any] = {} if seeds is None else {"seeds": seeds}
    experiments = []
    for experiment in _EXPERIMENTS[scale]:
        kept = tuple(w for w in experiment.widths if max_width is None or w <= max_width)
        if len(kept) < 2:
            raise ValueError(
                f"max_width {max_width} leaves {len(kept)} of the widths "
                f"{', '.join(map(str, experiment.widths))}: at least two are needed."
            )
        experiments.append(dataclasses.replace(experiment, widths=kept, **changes))
    return experiments


def _run(
    scale: Scale,
    folder: Path,
    progress: bool | None,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
) -> Outcome:
    experiments = _experiments(scale, seeds=seeds, max_width=max_width)
    first = experiments[0]
    measured = xr.concat(
        [run_sweeps(e, folder / e.network, progress) for e in experiments],
        "network",
        combine_attrs="drop_conflicts",
    ).assign_coords(network=[e.network for e in experiments])
    measured.attrs["base_width"] = first.base_width
    record = dataclasses.asdict(first) | {"network": [e.network for e in experiments]}
    measured.attrs["configuration"] = json.dumps(record)
    dataset = analyse(measured, first.guessing_loss())
    findings = judge(dataset)
    if scale == "tiny":
        findings = {
            key: finding
            if key == "table"
            else dataclasses.replace(
                finding, verdict="cannot tell at this scale", reason="this scale proves nothing"
            )
            for key, finding in findings.items()
        }
    return Outcome(
        findings,
        dataset,
        {"adaptive_transfer": adaptive_transfer_figure(dataset)},
        (_verdict_note(findings), *_NOTES),
        {"guessing_loss": first.guessing_loss()},
    )


TARGET = Target(
    "adaptive-transfer",
    "Adaptive Transfer: its table recomputed, and measured on networks that deepen with width",
    _CLAIMS,
    MappingProxyType({"tiny": "seconds", "laptop": "about 6 minutes on 2 cores"}),
    _run,
    frozenset({"seeds", "max_width"}),
    _experiments,
)
