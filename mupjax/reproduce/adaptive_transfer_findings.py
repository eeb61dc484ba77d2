"""From the losses of ``mupjax reproduce adaptive-transfer`` to a finding for each of its claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr

from mupjax.reproduce.adaptive_transfer_measures import (
    ASSUMED_EXPONENT,
    CONFIDENCE,
    PUBLISHED_ERRORS,
    RATE_EXPONENTS,
    Estimate,
    assumed_error,
    fraction_interval,
    mean_interval,
    measure_drift,
    order_of_errors,
    transfer_error,
)
from mupjax.reproduce.target import ClaimVerdict, Finding

__all__ = ["PUBLISHED_STABILITY", "analyse", "judge"]

_PUBLISHED_ORDER = ("Adaptive Transfer", "muP", "SP")
_PUBLISHED_BASE, _PUBLISHED_WIDTHS = 256, (256, 512, 1024, 2048, 4096)

PUBLISHED_STABILITY: Mapping[int, Mapping[str, float]] = MappingProxyType(
    {
        4: MappingProxyType({"SP": 0.04, "muP": 1.0, "Adaptive Transfer": 1.0}),
        16: MappingProxyType({"SP": 0.0, "muP": 1.0, "Adaptive Transfer": 1.0}),
    }
)
"""Fraction of runs that do not diverge, by width over base."""


def analyse(dataset: xr.Dataset, guessing_loss: float) -> xr.Dataset:
    """Everything derived from the losses, added to them.

    Args:
      dataset: of ``run_sweeps``, several joined along ``network``, with the attribute
        ``base_width``.
      guessing_loss: of the best constant prediction, in nats: a run that ends above it counts as
        unstable, beside those that diverged. (Dead ReLU nets end at ln 10 without ever diverging,
        and a net that starts at a loss of a thousand may end at twenty.)

    Returns:
      the dataset with the variables, each with a dimension ``bound`` (value, low, high):
      ``drift`` (network, width), log2 of ``eta*(w)`` over the base's; ``exponent`` (network);
      ``transfer_error`` (network, scheme, width), NaN for the controls;
      ``stability`` and ``penalty`` (network, scheme, width), the latter the loss at the transferred
      rate over the lowest loss of the reference, paired by seed; and, without bounds,
      ``not_diverged``, by the engine's own test alone, and ``assumed_error``, the source's formula.
    """
    networks, widths = dataset["network"].values, [int(w) for w in dataset["width"].values]
    base = int(dataset.attrs["base_width"])
    schemes = [str(s) for s in dataset["scheme"].values]
    shape = (len(networks), len(schemes), len(widths), 3)
    errors, stability, penalty = (np.full(shape, np.nan) for _ in range(3))
    exponents, drifts = [], []
    ratios = np.asarray(widths) / base
    assumed = np.stack(
        [
            assumed_error(ratios, s) if s in RATE_EXPONENTS else np.full(len(widths), np.nan)
            for s in schemes
        ]
    )
    for a, network in enumerate(networks):
        cells = dataset.sel(network=network)
        reference = cells["reference_loss"].where(cells["reference_status"] == 0, np.inf)
        tuned = float(np.log2(cells["tuned_rate"]))
        drift = measure_drift(
            [base, *widths],
            [
                np.log2(cells["base_rate"].values),
                *(tuned - math.log2(w / base) + cells["offset"].values for w in widths),
            ],
            [
                cells["base_loss"].where(cells["base_status"] == 0, np.inf).values,
                *reference.transpose("width", "offset", "seed").values,
            ],
        )
        exponents.append(_bounds(drift.exponent))
        drifts.append([_bounds(d) for d in drift.octaves[1:]])
        for c, width in enumerate(widths):
            at_best = reference.sel(width=width)
            lowest = at_best.isel(offset=int(at_best.mean("seed").argmin("offset")))
            for b, scheme in enumerate(schemes):
                if scheme in RATE_EXPONENTS:
                    error = transfer_error(width / base, scheme, drift.octaves[c + 1])
                    errors[a, b, c] = _bounds(error)
                one = cells.sel(scheme=scheme, width=width)
                loss = one["loss"].where(one["status"] == 0, np.inf)
                stability[a, b, c] = _bounds(fraction_interval(loss < guessing_loss))
                lost = loss.sel(near=0.0) - lowest
                penalty[a, b, c] = _bounds(mean_interval(lost.values))
    dims = ("network", "scheme", "width", "bound")
    return dataset.assign(
        drift=(("network", "width", "bound"), np.asarray(drifts), {"units": "octaves"}),
        exponent=(("network", "bound"), np.asarray(exponents)),
        transfer_error=(dims, errors),
        stability=(dims, stability),
        penalty=(dims, penalty, {"units": "nats"}),
        not_diverged=(dataset["status"] == 0).mean(["near", "seed"]),
        assumed_error=(("scheme", "width"), assumed),
    ).assign_coords(bound=["value", "low", "high"])


def judge(dataset: xr.Dataset) -> dict[str, Finding]:
    """The findings on all claims, from the dataset that :func:`analyse` returns."""
    return {
        "table": _judge_table(),
        "exponent": _judge_exponent(dataset),
        "order_of_errors": _judge_errors(dataset),
        "stability": _judge_stability(dataset),
        "order_of_losses": _judge_losses(dataset),
    }


def _judge_table() -> Finding:
    computed = {
        width: {s: float(assumed_error(width / _PUBLISHED_BASE, s)) for s in RATE_EXPONENTS}
        for width in _PUBLISHED_WIDTHS
    }
    agrees = all(
        round(computed[width][scheme], 3) == error
        for width, row in PUBLISHED_ERRORS.items()
        for scheme, error in row.items()
    )
    return Finding(
        "; ".join(
            f"{width}: " + ", ".join(f"{s} {e:.3f}" for s, e in row.items())
            for width, row in computed.items()
        ),
        "reproduced" if agrees else "not reproduced",
        "it is |m^(0.85 - c) - 1| with m = width/256 and c = 0, 1, 0.8: arithmetic on an assumed "
        "exponent, not a measurement",
        {str(width): row for width, row in computed.items()},
    )


def _judge_exponent(dataset: xr.Dataset) -> Finding:
    found = {n: _estimate(dataset["exponent"].sel(network=n)) for n in _networks(dataset)}
    excluded = [
        n for n, e in found.items() if e.low > ASSUMED_EXPONENT or e.high < ASSUMED_EXPONENT
    ]
    sharp = all(e.high - e.low <= 0.2 for e in found.values())
    held = all(ASSUMED_EXPONENT in e for e in found.values())
    level = f"{100 * CONFIDENCE:g} %"
    verdict: ClaimVerdict
    if excluded:
        verdict = "not reproduced"
        reason = f"the {level} interval of {_listed(excluded)} networks excludes -0.85"
        if holding := [n for n in found if n not in excluded]:
            reason += f", that of {_listed(holding)} networks holds it"
    elif held and sharp:
        verdict = "reproduced"
        reason = f"-0.85 is inside every {level} interval, and none is wider than 0.2"
    else:
        verdict = "cannot tell at this scale"
        reason = "an interval is wider than 0.2 and holds -0.85: more seeds would tell"
    return Finding(_by_network(found), verdict, reason, {n: _record(e) for n, e in found.items()})


def _judge_errors(dataset: xr.Dataset) -> Finding:
    width = int(dataset["width"].values[-1])
    ratio = width / int(dataset.attrs["base_width"])
    words: list[str] = []
    values: dict[str, Any] = {}
    orders: dict[str, list[tuple[str, ...]]] = {}
    as_published: list[str] = []
    for network in _networks(dataset):
        drift = _estimate(dataset["drift"].sel(network=network, width=width))
        cell = dataset["transfer_error"].sel(network=network, width=width)
        found = {s: _estimate(cell.sel(scheme=s)) for s in _PUBLISHED_ORDER}
        words.append(f"{network}: " + ", ".join(f"{s} {e}" for s, e in found.items()))
        values[network] = {s: _record(e) for s, e in found.items()}
        # Which of two schemes is nearer changes once along D: agreement at both ends settles it.
        ends = (drift.low, drift.high)
        if order_of_errors(ratio, drift.value) == _PUBLISHED_ORDER:
            as_published.append(network)
        orders[network] = [order_of_errors(ratio, d) for d in ends if math.isfinite(d)]
    pairs = [("Adaptive Transfer", "muP"), ("muP", "SP"), ("Adaptive Transfer", "SP")]
    reversed_in = {
        f"{b} is nearer than {a} in {network} networks"
        for network, ends in orders.items()
        for a, b in pairs
        if len(ends) == 2 and all(order.index(b) < order.index(a) for order in ends)
    }
    kept = all(len(o) == 2 and set(o) == {_PUBLISHED_ORDER} for o in orders.values())
    verdict: ClaimVerdict
    if reversed_in:
        verdict, reason = "not reproduced", "; ".join(sorted(reversed_in))
        if as_published:
            reason += f"; in {_listed(as_published)} networks the estimates are in published order"
    elif kept:
        verdict, reason = "reproduced", "the order is the same at both ends of the drift's interval"
    else:
        verdict = "cannot tell at this scale"
        reason = "the drift's interval allows several orders: more seeds would tell"
    return Finding(f"at {ratio:g} times the base: " + "; ".join(words), verdict, reason, values)


def _judge_stability(dataset: xr.Dataset) -> Finding:
    base = int(dataset.attrs["base_width"])
    words: list[str] = []
    values: dict[str, Any] = {}
    off: list[str] = []
    for width in dataset["width"].values:
        published = PUBLISHED_STABILITY.get(round(int(width) / base))
        if published is None or int(width) % base:
            continue
        for network in _networks(dataset):
            cell = dataset.sel(network=network, width=width)
            found = {s: _estimate(cell["stability"].sel(scheme=s)) for s in published}
            where = f"{int(width) // base} times the base, {network}"
            words.append(f"{where}: " + ", ".join(f"{s} {e}" for s, e in found.items()))
            values[where] = {s: _record(e) for s, e in found.items()}
            off += [f"{s} at {where}" for s, e in found.items() if published[s] not in e]
    if not words:
        return Finding(
            "nothing at 4 or 16 times the base",
            "cannot tell at this scale",
            "the published widths over base are not among those trained",
        )
    meaning = (
        "stable: neither diverged nor ended worse than guessing, within an octave of the "
        "transferred rate"
    )
    if off:
        return Finding(
            "; ".join(words),
            "not reproduced",
            f"the published value is outside the interval for {_listed(off)} ({meaning})",
            values,
        )
    return Finding(
        "; ".join(words),
        "reproduced",
        f"every interval holds its published value ({meaning})",
        values,
    )


def _judge_losses(dataset: xr.Dataset) -> Finding:
    width = int(dataset["width"].values[-1])
    words: list[str] = []
    values: dict[str, Any] = {}
    better: list[str] = []
    clear = True
    for network in _networks(dataset):
        cell = dataset.sel(network=network, width=width)
        found = {s: _estimate(cell["penalty"].sel(scheme=s)) for s in dataset["scheme"].values}
        words.append(f"{network}: " + ", ".join(f"{s} {e}" for s, e in found.items()))
        values[network] = {str(s): _record(e) for s, e in found.items()}
        loss = cell["loss"].sel(near=0.0).where(cell["status"].sel(near=0.0) == 0, np.inf)
        for other in ("muP", "SP"):
            behind = mean_interval(
                (loss.sel(scheme="Adaptive Transfer") - loss.sel(scheme=other)).values
            )
            if behind.low > 0:
                better.append(f"{other} in {network} networks, by {behind} nats")
            clear &= behind.high < 0
    measured = "loss lost at the transferred rate, nats: " + "; ".join(words)
    if better:
        reason = f"lower loss than Adaptive Transfer, paired by seed: {_listed(better)}"
        return Finding(measured, "not reproduced", reason, values)
    if clear:
        reason = "its loss is below those of muP and SP in all networks, paired by seed"
        return Finding(measured, "reproduced", reason, values)
    reason = "a difference between two schemes is within its interval: more seeds would tell"
    return Finding(measured, "cannot tell at this scale", reason, values)


def _networks(dataset: xr.Dataset) -> list[str]:
    return [str(name) for name in dataset["network"].values]


def _bounds(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _estimate(cell: xr.DataArray) -> Estimate:
    return Estimate(*(float(x) for x in cell.sel(bound=["value", "low", "high"]).values))


def _record(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}


def _by_network(found: Mapping[str, Estimate]) -> str:
    return "; ".join(f"{network} networks {estimate}" for network, estimate in found.items())


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
