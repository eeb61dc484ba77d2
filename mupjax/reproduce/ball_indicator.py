"""``mupjax reproduce ball-indicator``: two-layer ReLU networks whose optimum moves slowly.

GWB state the model, muP, Adam, the batch size and the number of steps, but no initial scale, no
treatment of the biases, no base width, no schedule and no averaging of weights. :data:`NETWORK`,
:data:`BASE_WIDTH` and :data:`FIXED` are the choice that came closest to the published optima and
losses of those that were tried: ``docs/two_layer.md`` has the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import optax
import xarray as xr
from scipy import stats

from mupjax.figures.two_layer import NO_FIT, ball_indicator_figure
from mupjax.reproduce.target import Claim, Finding, Outcome, Scale, Target
from mupjax.reproduce.two_layer_sweeps import (
    PUBLISHED_STEPS,
    Sizes,
    half_octaves,
    sizes_at,
    standard_notes,
    too_short,
)
from mupjax.sweep import sweep
from synthetic.two_layer import ball_indicator, two_layer
from theory.diagnosis import TransferDiagnosis
from theory.drift import TransferSummary, format_with_interval, transfer_summary
from theory.rates import PowerLaw, fit_power_law
from theory.verdict import diagnose_transfer

__all__ = ["PUBLISHED_OPTIMA", "TARGET"]

PUBLISHED_OPTIMA: Mapping[int, tuple[float, float]] = MappingProxyType(
    {
        181: (0.004543, 0.24085),
        256: (0.004808, 0.21340),
        362: (0.005189, 0.18885),
        512: (0.005491, 0.17157),
        724: (0.005813, 0.15569),
        1024: (0.006273, 0.14424),
    }
)
"""GWB's starred optimum and its loss by width, read off their figure (0.1 %)."""
# Limit, prefactor and exponent.
_PUBLISHED_LOSS_FIT = (0.108, 6.37, 0.742)
_PUBLISHED_RATE_FIT = (-6.78, -7.80, 0.388)

DIMENSION = 64
NETWORK: Mapping[str, Any] = MappingProxyType(
    {"input_std": DIMENSION**-0.5, "readout_std": 1.0, "biases": "trained", "bias_std": 0.0}
)
BASE_WIDTH = 8
FIXED: Mapping[str, float] = MappingProxyType({"vector_learning_rate_multiplier": 1 / 16})
# What counts as agreement, width by width.
_LOSS_WITHIN, _OCTAVES_WITHIN = 0.05, 0.25

_WIDTHS = tuple(round(181.02 * 2 ** (k / 2)) for k in range(14))
_LARGEST_ON_CPU = 2048
SIZES: Mapping[Scale, Sizes] = MappingProxyType(
    {
        "tiny": Sizes((16, 24, 32, 48), half_octaves(-8, -5)[::2], 48, 2, 1024),
        "laptop": Sizes(_WIDTHS[:4], half_octaves(-9, -5), PUBLISHED_STEPS, 3),
        "paper": Sizes(_WIDTHS, half_octaves(-11, -5), PUBLISHED_STEPS, 3),
    }
)

_GWB = "GWB (arXiv 2512.22768), two-layer ReLU networks"
CLAIMS = (
    Claim(
        "rises",
        "Under muP the best learning rate is not constant: it rises with width",
        _GWB,
        "from 2^-7.78 at width 181 to 2^-7.32 at width 1024, 0.19 octaves per doubling",
    ),
    Claim(
        "loss",
        "The loss at the optimum falls with width as a power law with a floor",
        _GWB,
        "6.37 n^-0.742 + 0.108 (14 widths, 181 to 16384)",
    ),
    Claim(
        "optimum",
        "The optimum converges as a power of the width",
        _GWB,
        "log2 lr = -7.80 n^-0.388 - 6.78 (14 widths, 181 to 16384)",
    ),
    Claim(
        "weak",
        "Transfer is weak and no more: b_n goes as the square root of a_n",
        _GWB,
        "exponents 0.388 of b_n and 0.742 of a_n: half of it is 0.371",
    ),
    Claim(
        "per-width",
        "Optimum and loss, width by width",
        _GWB,
        ", ".join(
            f"{n}: 2^{math.log2(lr):.2f}, {loss:.3f}" for n, (lr, loss) in PUBLISHED_OPTIMA.items()
        ),
    ),
)


def _sizes(scale: Scale, *, seeds: int | None = None, max_width: int | None = None) -> Sizes:
    return sizes_at(SIZES, scale, seeds, max_width, _LARGEST_ON_CPU)


def run(
    scale: Scale,
    folder: Path,
    progress: bool | None,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
) -> Outcome:
    """Sweep widths and learning rates, fit, compare (see ``Target``)."""
    sizes = _sizes(scale, seeds=seeds, max_width=max_width)
    found = sweep(
        two_layer(DIMENSION, **NETWORK),
        ball_indicator(DIMENSION, validation_examples=sizes.validation_examples),
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=sizes.widths,
        base_width=BASE_WIDTH,
        hyperparameters={"learning_rate": sizes.learning_rates, **FIXED},
        steps=sizes.steps,
        seeds=sizes.seeds,
        evaluations=8,
        out=folder / "ball_indicator.nc",
        existing="resume",
        progress=progress,
    )
    return analyse(found, sizes)


def analyse(found: xr.Dataset, sizes: Sizes) -> Outcome:
    """The outcome of a finished sweep."""
    cells = found[["loss", "status"]].transpose("width", "learning_rate", "seed", ...)
    widths, rates = cells["width"].values, cells["learning_rate"].values
    losses, diverged = cells["loss"].values.astype(np.float64), cells["status"].values != 0
    diagnosis = diagnose_transfer(widths, rates, np.where(diverged, np.inf, losses))
    summary = transfer_summary(widths, rates, losses, diverged)
    law = _fit_optimum(summary)
    findings = {
        "rises": _judge_rise(summary, sizes),
        "loss": _judge_loss(diagnosis, sizes),
        "optimum": _judge_optimum(law, summary, sizes),
        "weak": _judge_weak(diagnosis, sizes),
        "per-width": _judge_widths(summary, sizes),
    }
    dataset = cells.assign(
        optimal_learning_rate=("width", np.asarray(summary.optimal_lr), {"long_name": "optimum"}),
        optimal_loss=("width", np.asarray(summary.optimal_loss), {"long_name": "loss there"}),
    )
    figure = ball_indicator_figure(
        dataset,
        summary,
        loss_fit=(
            diagnosis.loss_floor.value,
            diagnosis.loss_prefactor.value,
            diagnosis.alpha.value,
        ),
        rate_fit=NO_FIT if law is None else (law.limit, law.prefactor, law.exponent),
        published=PUBLISHED_OPTIMA if sizes.as_published() else {},
        published_loss_fit=_PUBLISHED_LOSS_FIT,
        published_rate_fit=_PUBLISHED_RATE_FIT,
    )
    record = {"diagnosis": diagnosis.to_json(), "optima": summary.to_json()}
    return Outcome(
        findings, dataset, {"ball_indicator": figure}, standard_notes(sizes, BASE_WIDTH), record
    )


def _fit_optimum(summary: TransferSummary) -> PowerLaw | None:
    """Power law with a limit of log2 of the optimum; weights from the seeds where there are some.

    One variance for all widths: with a few seeds their own are too poorly known. None where every
    training diverged.
    """
    position = np.log2(summary.optimal_lr)
    known = np.isfinite(position)
    if not known.any():
        return None
    widths, position = np.asarray(summary.widths)[known], position[known]
    exponents = (-1.0, 4.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.log2(np.asarray(summary.optimal_lr_interval)[known]).T
    half = (high - low) / 2
    if summary.seeds < 2 or not np.isfinite(half).all():
        return fit_power_law(widths, position, exponent_range=exponents)
    quantile = float(stats.t.ppf((1 + summary.confidence) / 2, summary.seeds - 1))
    return fit_power_law(
        widths,
        position,
        variances=np.full(half.size, float(np.mean((half / quantile) ** 2))),
        dof=float((summary.seeds - 1) * half.size),
        exponent_range=exponents,
    )


def _judge_rise(summary: TransferSummary, sizes: Sizes) -> Finding:
    slope, (low, high) = summary.drift_per_doubling, summary.drift_per_doubling_interval
    first, last = summary.widths[0], summary.widths[-1]
    measured = (
        f"{format_with_interval(slope, (low, high))} octaves per doubling, widths {first} to {last}"
    )
    values = {"drift_per_doubling": slope, "interval": [low, high]}
    if not sizes.as_published():
        return Finding(measured, "cannot tell at this scale", too_short(sizes), values)
    if low > 0:
        verdict, reason = "reproduced", "the 90 % interval lies above 0"
    elif high < 0:
        verdict, reason = "not reproduced", "the 90 % interval lies below 0: the optimum falls"
    else:
        verdict, reason = "cannot tell at this scale", "the 90 % interval holds 0; more seeds tell"
    return Finding(measured, verdict, reason, values)


def _judge_loss(diagnosis: TransferDiagnosis, sizes: Sizes) -> Finding:
    alpha, floor = diagnosis.alpha, diagnosis.loss_floor
    if math.isnan(alpha.value):
        measured = "no power law: the losses do not determine one"
    else:
        measured = (
            f"{diagnosis.loss_prefactor.value:.3g} n^-{alpha.value:.3f} + {floor.value:.3f}; "
            f"exponent {_within(alpha.interval)}, floor {_within(floor.interval, 3)}"
        )
    return _judge_exponent(
        measured, alpha.value, alpha.interval, _PUBLISHED_LOSS_FIT[2], sizes, "losses"
    )


def _judge_optimum(law: PowerLaw | None, summary: TransferSummary, sizes: Sizes) -> Finding:
    if law is None or any(summary.at_edge):
        reason = "an optimum lies at the edge of the grid of learning rates"
        return Finding("no power law", "cannot tell at this scale", reason)
    if law.degenerate:
        measured = f"no power law: {law.reason}"
    else:
        sign = "+" if law.prefactor >= 0 else "-"
        measured = (
            f"log2 lr = {law.limit:.2f} {sign} {abs(law.prefactor):.3g} n^-{law.exponent:.3f}; "
            f"exponent {_within(law.exponent_interval)}, limit {_within(law.limit_interval)}"
        )
    return _judge_exponent(
        measured,
        law.exponent,
        law.exponent_interval,
        _PUBLISHED_RATE_FIT[2],
        sizes,
        "optima",
    )


def _judge_exponent(
    measured: str,
    value: float,
    interval: tuple[float, float],
    published: float,
    sizes: Sizes,
    what: str,
) -> Finding:
    """Reproduced if the interval holds the published exponent and neither half nor twice of it."""
    low, high = interval
    values = {"exponent": value, "interval": [low, high], "published": published}
    if not sizes.as_published():
        return Finding(measured, "cannot tell at this scale", too_short(sizes), values)
    if math.isnan(low) or math.isnan(high):
        reason = f"{len(sizes.widths)} widths do not determine the exponent of the {what}"
        return Finding(measured, "cannot tell at this scale", reason, values)
    if not low <= published <= high:
        reason = f"the 90 % interval does not hold the published exponent {published}"
        return Finding(measured, "not reproduced", reason, values)
    if low < published / 2 or high > 2 * published:
        reason = (
            f"the 90 % interval holds the published exponent {published}, but is too wide to tell "
            "it from another; more widths and seeds would"
        )
        return Finding(measured, "cannot tell at this scale", reason, values)
    return Finding(measured, "reproduced", f"the 90 % interval holds {published}", values)


def _judge_weak(diagnosis: TransferDiagnosis, sizes: Sizes) -> Finding:
    probability = diagnosis.probability_fast
    measured = f"verdict {diagnosis.verdict!r}"
    if not math.isnan(probability):
        measured += f", probability of fast transfer {probability:.2f}"
    values = {"verdict": diagnosis.verdict, "probability_fast": probability}
    if not sizes.as_published():
        return Finding(measured, "cannot tell at this scale", too_short(sizes), values)
    if diagnosis.verdict == "cannot tell":
        return Finding(measured, "cannot tell at this scale", diagnosis.reason, values)
    verdict = "reproduced" if diagnosis.verdict == "weak" else "not reproduced"
    return Finding(measured, verdict, diagnosis.reason, values)


def _judge_widths(summary: TransferSummary, sizes: Sizes) -> Finding:
    rows = {
        n: (lr, loss)
        for n, lr, loss in zip(
            summary.widths, summary.optimal_lr, summary.optimal_loss, strict=True
        )
    }
    measured = ", ".join(
        f"{n}: 2^{math.log2(lr):.2f}, {loss:.3f}" if math.isfinite(loss) else f"{n}: all diverged"
        for n, (lr, loss) in rows.items()
    )
    shared = sorted(set(rows) & set(PUBLISHED_OPTIMA))
    if not sizes.as_published() or not shared:
        return Finding(measured, "cannot tell at this scale", too_short(sizes), {})
    if any(summary.at_edge):
        reason = "an optimum lies at the edge of the grid of learning rates"
        return Finding(measured, "cannot tell at this scale", reason)
    octaves = {n: math.log2(rows[n][0] / PUBLISHED_OPTIMA[n][0]) for n in shared}
    relative = {n: rows[n][1] / PUBLISHED_OPTIMA[n][1] - 1 for n in shared}
    off = max(octaves.values(), key=abs)
    worst = max(relative.values(), key=abs)
    agrees = abs(off) <= _OCTAVES_WITHIN and abs(worst) <= _LOSS_WITHIN
    reason = (
        f"largest differences {off:+.2f} octaves and {100 * worst:+.1f} % of the loss; agreement "
        f"is within {_OCTAVES_WITHIN} octaves and {100 * _LOSS_WITHIN:.0f} %"
    )
    values = {"octaves": octaves, "relative_loss": relative}
    return Finding(measured, "reproduced" if agrees else "not reproduced", reason, values)


def _within(interval: tuple[float, float], digits: int = 2) -> str:
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "without an interval"
    return f"in [{low:.{digits}f}, {high:.{digits}f}]"


TARGET = Target(
    name="ball-indicator",
    title="Two-layer networks on the ball indicator: the optimal learning rate moves slowly",
    claims=CLAIMS,
    duration={
        "tiny": "seconds",
        "laptop": "about 10 minutes on 2 cores",
        "paper": "hours on a CPU, which stops at width 2048",
    },
    run=run,
    options=frozenset({"seeds", "max_width"}),
    check=_sizes,
)
