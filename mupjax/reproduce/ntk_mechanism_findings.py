"""What ``ntk-mechanism`` concludes from its dataset, claim by claim."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mupjax.reproduce.ntk_mechanism_curves import FAMILIES, SET_WITHIN
from mupjax.reproduce.target import Finding, Scale

__all__ = ["judge"]

FloatArray = NDArray[np.float64]

_STRUCTURED = ("power law", "digits", "isotropic")
# Of β − α/2: structured problems have 0.3 and more.
_WEAK = 0.1
# Of t_n relative to the best learning rate: a quarter of an octave or so.
_SMALL = 0.2
# Of all modes, for κ of them to be few.
_FEW = 0.25
# In float64: some 1e4 roundings.
_EXACT = 1e-11


def judge(dataset: xr.Dataset, layer: dict[str, float], scale: Scale) -> dict[str, Finding]:
    """A finding for every claim.

    Args:
      dataset: what the target measured.
      layer: of `linear_layer`.
      scale: at `"tiny"` nothing but identities is judged.
    """
    return {
        "sums": _sums_finding(dataset),
        "training": _training_finding(dataset),
        "fast": _fast_finding(dataset, scale),
        "noise": _weak_finding(dataset, scale, "noise"),
        "hidden_mode": _weak_finding(dataset, scale, "hidden mode"),
        "few_modes": _few_modes_finding(dataset, scale),
        "invariance": _invariance_finding(dataset, scale),
        "bound": _bound_finding(dataset, scale),
        "two_bases": _bases_finding(dataset, layer),
    }


def _exact_finding(error: float, what: str, values: dict[str, object]) -> Finding:
    holds = error < _EXACT
    return Finding(
        measured=f"largest relative difference {error:.0e}, {what}",
        verdict="reproduced" if holds else "not reproduced",
        reason=f"{'below' if holds else 'above'} {_EXACT:g}, in float64",
        values=values,
    )


def _sums_finding(dataset: xr.Dataset) -> Finding:
    errors = dataset["sum_error"]
    by_name = {str(name): float(errors.sel(optimizer=name)) for name in errors["optimizer"].values}
    what = f"a two-layer net under {', '.join(by_name)}, kernel followed along the way"
    return _exact_finding(float(errors.max()), what, {"error": by_name})


def _training_finding(dataset: xr.Dataset) -> Finding:
    widths = dataset["trained_width"].values.tolist()
    what = (
        f"every mode's change, {' and '.join(FAMILIES)}, widths {', '.join(map(str, widths))}, "
        f"{dataset['trained_rate'].size} learning rates up to the best"
    )
    error = float(dataset["training_difference"].max())
    return _exact_finding(error, what, {"error": error, "widths": widths})


def _rate_draws(dataset: xr.Dataset, family: str, problem: str) -> FloatArray:
    """(α, β, β − α/2) of bootstrap draws, (draws, 3), from widths of `fit_from` on."""
    wide = dataset["width"].values >= dataset.attrs["fit_from"]
    log_width = np.log(dataset["width"].values[wide])
    centred = log_width - log_width.mean()
    draws = dataset["gap_draws"].sel(family=family, problem=problem)
    gaps = draws.transpose("draw", "width", "gap").values[:, wide]
    slopes = np.einsum("w,dwg->dg", centred, -np.log(np.maximum(gaps, 1e-300))) / np.sum(centred**2)
    return np.stack([slopes[:, 0], slopes[:, 1], slopes[:, 1] - slopes[:, 0] / 2], axis=1)


def _rates(dataset: xr.Dataset, problem: str) -> dict[str, dict[str, list[float]]]:
    found = {}
    for family in FAMILIES:
        draws = _rate_draws(dataset, family, problem)
        middle, low, high = np.quantile(draws, [0.5, 0.05, 0.95], axis=0)
        found[family] = {
            name: [float(middle[i]), float(low[i]), float(high[i])]
            for i, name in enumerate(("alpha", "beta", "margin"))
        }
    return found


def _rates_in_words(rates: dict[str, dict[str, list[float]]]) -> str:
    def number(values: list[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    return "; ".join(
        f"{family}: α = {number(own['alpha'])}, β = {number(own['beta'])}, "
        f"β - α/2 = {number(own['margin'])}"
        for family, own in rates.items()
    )


def _fast_finding(dataset: xr.Dataset, scale: Scale) -> Finding:
    rates = {problem: _rates(dataset, problem) for problem in _STRUCTURED}
    measured = "power-law data: " + _rates_in_words(rates["power law"])
    margins = [own["margin"] for problem in rates.values() for own in problem.values()]
    lowest = min(margin[1] for margin in margins)
    fast = sum(margin[1] > 0 for margin in margins)
    measured += (
        f"; of {len(margins)} families and structured problems, {fast} have their 90 % interval of "
        f"β - α/2 above 0 (lowest end {lowest:.2f})"
    )
    values = {"rates": rates}
    if scale == "tiny":
        return Finding(measured, "cannot tell at this scale", "too few, too small", values)
    if fast == len(margins):
        return Finding(measured, "reproduced", "every interval lies above 0", values)
    slow = sum(margin[2] < 0 for margin in margins)
    return Finding(
        measured,
        "not reproduced" if slow else "cannot tell at this scale",
        "some interval lies below 0" if slow else "some interval holds 0",
        values,
    )


def _weak_finding(dataset: xr.Dataset, scale: Scale, problem: str) -> Finding:
    rates = _rates(dataset, problem)
    widest = dataset.sel(problem=problem).isel(width=-1)
    ratio = (widest["suboptimality"] / widest["loss_gap"]).values
    measured = (
        _rates_in_words(rates)
        + f"; c/a at n = {int(widest['width'])}: {', '.join(f'{r:.2f}' for r in ratio)}"
    )
    values = {"rates": rates, "c_over_a": ratio}
    if scale == "tiny":
        return Finding(measured, "cannot tell at this scale", "too few, too small", values)
    margins = [own["margin"] for own in rates.values()]
    if all(margin[2] < _WEAK for margin in margins) and (ratio > 0.5).all():
        reason = f"both intervals of β - α/2 lie below {_WEAK:g}, and c is above a/2"
        return Finding(measured, "reproduced", reason, values)
    if all(margin[1] > 0 for margin in margins):
        reason = "both intervals of β - α/2 lie above 0: transfer is fast"
        return Finding(measured, "not reproduced", reason, values)
    reason = f"neither both above 0, nor both below {_WEAK:g} with c above a/2"
    return Finding(measured, "cannot tell at this scale", reason, values)


def _few_modes_finding(dataset: xr.Dataset, scale: Scale) -> Finding:
    octaves = dataset["octaves"].values
    whole = octaves[dataset["total"].argmin("octaves").values]
    top = octaves[dataset["top_kappa"].argmin("octaves").values]
    order = dataset["total"].isel(octaves=0, drop=True)
    away = xr.DataArray(np.abs(whole - top), dims=order.dims, coords=order.coords)
    kappa = dataset["kappa"]
    words, values = [], {}
    for problem in dataset["problem"].values:
        counts = [int(kappa.sel(family=f, problem=problem)) for f in FAMILIES]
        far = float(away.sel(problem=problem).max())
        words.append(f"{problem}: κ = {', '.join(map(str, counts))}, at most {far:.3g}")
        values[str(problem)] = {"kappa": counts, "largest_distance": far}
    measured = (
        f"fewest of {dataset.attrs['points']} modes that do so at infinite width "
        f"({', '.join(FAMILIES)}), and their largest distance in octaves at any width: "
        + "; ".join(words)
    )
    if scale == "tiny":
        return Finding(measured, "cannot tell at this scale", "too few, too small", values)
    few = _FEW * dataset.attrs["points"]
    holds = all(
        values[problem]["largest_distance"] <= SET_WITHIN and max(values[problem]["kappa"]) <= few
        for problem in _STRUCTURED
    )
    return Finding(
        measured,
        "reproduced" if holds else "not reproduced",
        f"structured problems, every width: {'' if holds else 'not always '}within {SET_WITHIN:g} "
        f"octaves by at most {_FEW:.0%} of the modes",
        values,
    )


def _invariance_finding(dataset: xr.Dataset, scale: Scale) -> Finding:
    regions = {"below": "half an octave or more below the optimum", "at": "at the optimum"}
    values: dict[str, object] = {}
    words, ends = [], []
    for family in FAMILIES:
        for region, where in regions.items():
            draws = dataset["share_draws"].sel(family=family, problem="power law", region=region)
            shares = draws.transpose("draw", "width").values
            middle, low, high = np.quantile(shares, [0.5, 0.05, 0.95], axis=0)
            values[f"{family}, {where}"] = {
                "width": dataset["width"].values,
                "share": middle,
                "interval": np.stack([low, high], axis=1),
            }
            ends.append((low, high))
            words.append(
                f"{family}, {where}: "
                + ", ".join(
                    f"{middle[i]:.2f} [{low[i]:.2f}, {high[i]:.2f}] at "
                    f"n = {int(dataset['width'][i])}"
                    for i in (0, -1)
                )
            )
    noise = dataset["share_draws"].sel(problem="noise", region="below").quantile(0.95, ["draw"])
    measured = (
        "top-κ over whole difference to infinite width, power-law data; "
        + "; ".join(words)
        + f". With random labels, below the optimum: at most {float(noise.max()):.2g}"
    )
    if scale == "tiny":
        return Finding(measured, "cannot tell at this scale", "too few, too small", values)
    if all((high < 0.5).all() for _, high in ends):
        return Finding(measured, "reproduced", "every interval lies below 1/2", values)
    if any((low > 0.5).any() for low, _ in ends):
        reason = "some intervals lie above 1/2: top modes hold the difference too (see the notes)"
        return Finding(measured, "not reproduced", reason, values)
    return Finding(measured, "cannot tell at this scale", "intervals hold 1/2", values)


def _bound_finding(dataset: xr.Dataset, scale: Scale) -> Finding:
    bound, gap = dataset["bound"], dataset["relative_hp_gap"]
    broken = int((gap > bound + dataset["bound_slack"]).sum())
    widest = dataset.isel(width=-1)
    fast = widest["bound"].sel(problem=[*_STRUCTURED, "noise"])
    slow = float(widest["bound"].sel(problem="hidden mode").min())
    ratio = fast / widest["relative_hp_gap"].sel(problem=fast["problem"])
    few = widest["bound_parts"].sel(problem=fast["problem"], parts=1)
    kappa = widest["bound_kappa"].sel(problem=fast["problem"])
    measured = (
        f"b_n ≤ t_n in {bound.size - broken} of {bound.size} cases. At n = {int(widest['width'])}, "
        f"relative to the best learning rate: t_n = {float(fast.min()):.2g} to "
        f"{float(fast.max()):.2g}, {float(ratio.min()):.1f} to {float(ratio.max()):.1f} times b_n, "
        f"where transfer is fast (by {float(kappa.min()):.0f} to {float(kappa.max()):.0f} modes; "
        f"{float(few.min()):.2g} to {float(few.max()):.2g} by the top mode alone), at least "
        f"{slow:.2g} for the hidden mode"
    )
    values = {
        "broken": broken,
        "cases": bound.size,
        "fast": {"bound": fast.values, "over_gap": ratio.values, "top_mode_alone": few.values},
        "hidden_mode": slow,
    }
    if scale == "tiny":
        return Finding(measured, "cannot tell at this scale", "too few, too small", values)
    if broken:
        return Finding(measured, "not reproduced", "the inequality fails", values)
    separates = bool((fast < _SMALL).all()) and slow > 1
    reason = (
        f"it holds, is below {_SMALL:g} at the largest width wherever transfer is fast, and says "
        "nothing (above 1) where it is not"
        if separates
        else f"it holds, but is not below {_SMALL:g} just where transfer is fast"
    )
    return Finding(measured, "reproduced" if separates else "not reproduced", reason, values)


def _bases_finding(dataset: xr.Dataset, layer: dict[str, float]) -> Finding:
    needed = {}
    for name in dataset["optimizer"].values:
        own = dataset.sel(optimizer=name)
        modes, components = own["mode_share"].values, own["alignment_share"].values
        needed[str(name)] = [_needed(components), _needed(modes)]
    words = "; ".join(f"{name}: {a} and {m}" for name, (a, m) in needed.items())
    measured = (
        f"white inputs: equal to {layer['white']:.0e}; Gaussian inputs of unequal variances: the "
        f"first component holds {layer['alignment']:.0%} of the change by alignment, "
        f"{layer['modes']:.0%} by modes. Two-layer net in training: components from which on 90 to "
        f"110 % of the change is held, by alignment and by modes: {words}"
    )
    return Finding(
        measured,
        "not reproduced",
        "true only if the gradient maps the inputs' principal directions to orthogonal vectors "
        "(white or single inputs, aligned targets); the modes are the diagonal of the alignment "
        "matrix in that basis, its eigenvalues majorise them",
        {"linear_layer": layer, "components_needed": needed},
    )


def _needed(shares: FloatArray) -> int:
    """The least k from which on the share stays within 10 % of the whole."""
    far = np.flatnonzero(~(np.abs(shares - 1) <= 0.1))
    return int(far[-1]) + 2 if far.size else 1
