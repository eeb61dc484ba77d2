"""``mupjax reproduce multi-index``: one learning rate for both layers, against one for each.

The network is that of ``ball-indicator``, whose choices GWB leave open. Its readout trains at 8/n
of the learning rate; that is taken to be the rate that GWB arrive at when they divide the readout's
by 50, so that "one learning rate" means 400/n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import optax
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from mupjax.figures.learning_rate import learning_rate_figure
from mupjax.reproduce import ball_indicator
from mupjax.reproduce.ball_indicator import DIMENSION, FIXED, NETWORK
from mupjax.reproduce.target import Claim, Finding, Outcome, Scale, Target
from mupjax.reproduce.two_layer_sweeps import (
    PUBLISHED_STEPS,
    Sizes,
    count_minima,
    half_octaves,
    sizes_at,
    standard_notes,
    too_short,
)
from mupjax.sweep import sweep
from synthetic.two_layer import multi_index, two_layer
from theory.drift import TransferSummary, transfer_summary

__all__ = ["TARGET"]

DIRECTIONS = 15
SLOWER = 50
BASE_WIDTH = SLOWER * ball_indicator.BASE_WIDTH
JUMP_AT = 8192
# Octaves between the optima of neighbouring widths from which on one may speak of a jump.
_JUMP = 1.5
_MULTIPLIER = "output_learning_rate_multiplier"
_ONE, _OWN = "One rate for both layers", f"Readout's rate divided by {SLOWER}"

_WIDTHS = tuple(2**k for k in range(7, 16))
_LARGEST_ON_CPU = 2048
SIZES: Mapping[Scale, Sizes] = MappingProxyType(
    {
        "tiny": Sizes((16, 32), half_octaves(-10, -4)[::4], 32, 2, 1024),
        "laptop": Sizes(_WIDTHS[:3], half_octaves(-14, -6)[::2], PUBLISHED_STEPS, 3),
        "paper": Sizes(_WIDTHS, half_octaves(-15, -5), PUBLISHED_STEPS, 3),
    }
)

_GWB = "GWB (arXiv 2512.22768), two-layer ReLU networks"
CLAIMS = (
    Claim(
        "jump",
        "With one learning rate for both layers the optimum jumps abruptly as the width grows",
        _GWB,
        f"a jump at width {JUMP_AT} (widths to 32768)",
    ),
    Claim(
        "unimodal",
        f"With the second layer's rate divided by {SLOWER} every learning-rate curve has one "
        "minimum",
        _GWB,
        "one minimum at every width",
    ),
    Claim(
        "better",
        f"With the second layer's rate divided by {SLOWER} the loss at the optimum is lower",
        _GWB,
        "lower at every width",
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
    """Sweep widths, learning rates and both rates of the readout (see ``Target``)."""
    sizes = _sizes(scale, seeds=seeds, max_width=max_width)
    found = sweep(
        two_layer(DIMENSION, **NETWORK),
        multi_index(DIMENSION, DIRECTIONS, validation_examples=sizes.validation_examples),
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=sizes.widths,
        base_width=BASE_WIDTH,
        hyperparameters={
            "learning_rate": sizes.learning_rates,
            _MULTIPLIER: (1 / SLOWER, 1.0),
            **FIXED,
        },
        steps=sizes.steps,
        seeds=sizes.seeds,
        evaluations=8,
        out=folder / "multi_index.nc",
        existing="resume",
        progress=progress,
    )
    return analyse(found, sizes)


def analyse(found: xr.Dataset, sizes: Sizes) -> Outcome:
    """The outcome of a finished sweep."""
    cells = (
        found[["loss", "status"]]
        .isel({_MULTIPLIER: [1, 0]})
        .rename({_MULTIPLIER: "parametrization"})
        .assign_coords(parametrization=[_ONE, _OWN])
        .transpose("parametrization", "width", "learning_rate", "seed", ...)
    )
    losses = cells["loss"].values.astype(np.float64)
    diverged = cells["status"].values != 0
    widths, rates = cells["width"].values, cells["learning_rate"].values
    summaries = {
        name: transfer_summary(widths, rates, losses[i], diverged[i])
        for i, name in enumerate((_ONE, _OWN))
    }
    each = np.where(diverged, np.inf, losses)
    minima = np.array([[count_minima(curve) for curve in variant] for variant in each])
    findings = {
        "jump": _judge_jump(summaries[_ONE], minima[0], sizes),
        "unimodal": _judge_unimodal(minima, sizes),
        "better": _judge_better(each, summaries, sizes),
    }
    figure = learning_rate_figure(cells, summaries)
    dataset = cells.assign(minima=(("parametrization", "width"), minima))
    record = {name: summary.to_json() for name, summary in summaries.items()}
    notes = (
        f"The readout's rate under muP is {BASE_WIDTH}/n times the learning rate; 'one rate' "
        f"leaves it at that, the other panel divides it by {SLOWER}. Losses are compared with one "
        "another and with no published number: GWB print none for this experiment.",
        *standard_notes(sizes, BASE_WIDTH),
    )
    return Outcome(findings, dataset, {"multi_index": figure}, notes, record)


def _judge_jump(summary: TransferSummary, minima: NDArray[np.int64], sizes: Sizes) -> Finding:
    steps = np.diff(np.log2(summary.optimal_lr))
    if not np.isfinite(steps).all():
        return Finding("no optimum at some width", "cannot tell at this scale", "all diverged")
    largest = int(np.argmax(np.abs(steps)))
    before, after = summary.widths[largest : largest + 2]
    measured = (
        f"largest change between neighbouring widths {steps[largest]:+.2f} octaves, from "
        f"{before} to {after}; curves with two minima at {_widths_where(summary, minima > 1)}"
    )
    values = {"octaves": steps, "minima": minima}
    if not sizes.as_published():
        return Finding(measured, "cannot tell at this scale", too_short(sizes), values)
    if abs(steps[largest]) >= _JUMP:
        reason = f"more than {_JUMP} octaves between neighbouring widths"
        return Finding(measured, "reproduced", reason, values)
    if summary.widths[-1] < JUMP_AT:
        reason = f"the jump is expected at width {JUMP_AT}, the largest here is {sizes.widths[-1]}"
        return Finding(measured, "cannot tell at this scale", reason, values)
    reason = f"no change of {_JUMP} octaves between neighbouring widths"
    return Finding(measured, "not reproduced", reason, values)


def _widths_where(summary: TransferSummary, chosen: NDArray[np.bool_]) -> str:
    named = [str(n) for n, yes in zip(summary.widths, chosen, strict=True) if yes]
    return f"width {', '.join(named)}" if named else "no width"


def _judge_unimodal(minima: NDArray[np.int64], sizes: Sizes) -> Finding:
    counts = ", ".join(f"{n}: {k}" for n, k in zip(sizes.widths, minima[1], strict=True))
    measured = f"minima of the curves by width {counts} (with one rate for both: {minima[0].max()})"
    values = {"minima_one_rate": minima[0], "minima_own_rate": minima[1]}
    if not sizes.as_published():
        return Finding(measured, "cannot tell at this scale", too_short(sizes), values)
    if (minima[1] != 1).any():
        return Finding(measured, "not reproduced", "some curve has not one minimum", values)
    if (minima[0] == 1).all():
        reason = "one minimum each, but so has every curve with one rate at these widths"
        return Finding(measured, "cannot tell at this scale", reason, values)
    return Finding(measured, "reproduced", "one minimum beyond the noise each", values)


def _judge_better(
    each: NDArray[np.float64], summaries: Mapping[str, TransferSummary], sizes: Sizes
) -> Finding:
    """Paired over seeds, at the grid point with the lowest mean loss of each variant."""
    best = each.mean(axis=-1).argmin(axis=-1)
    at = np.take_along_axis(each, best[:, :, None, None], axis=2)[:, :, 0]
    with np.errstate(invalid="ignore"):
        change = at[1] / at[0] - 1
    mean = change.mean(axis=-1)
    half = np.full_like(mean, math.inf)
    if (count := change.shape[-1]) > 1:
        quantile = float(stats.t.ppf(0.95, count - 1))
        half = quantile * change.std(axis=-1, ddof=1) / math.sqrt(count)
    measured = "change of the loss " + ", ".join(
        f"{n}: {100 * m:+.1f} % [{100 * (m - h):+.1f}, {100 * (m + h):+.1f}]"
        for n, m, h in zip(sizes.widths, mean, half, strict=True)
    )
    values = {"relative_change": mean, "half_width": half}
    if not sizes.as_published():
        return Finding(measured, "cannot tell at this scale", too_short(sizes), values)
    if any(any(summary.at_edge) for summary in summaries.values()):
        reason = "an optimum lies at the edge of the grid of learning rates"
        return Finding(measured, "cannot tell at this scale", reason, values)
    if (mean + half < 0).all():
        return Finding(measured, "reproduced", "every 90 % interval lies below 0", values)
    if (mean - half > 0).any():
        reason = "at some width the 90 % interval lies above 0"
        return Finding(measured, "not reproduced", reason, values)
    reason = "some 90 % interval holds 0; more seeds tell"
    return Finding(measured, "cannot tell at this scale", reason, values)


TARGET = Target(
    name="multi-index",
    title="Two-layer networks on multi-index regression: one learning rate is not enough",
    claims=CLAIMS,
    duration={
        "tiny": "seconds",
        "laptop": "about 11 minutes on 2 cores",
        "paper": "hours on a CPU, which stops at width 2048",
    },
    run=run,
    options=frozenset({"seeds", "max_width"}),
    check=_sizes,
)
