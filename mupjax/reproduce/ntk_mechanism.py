"""``mupjax reproduce ntk-mechanism``: the mechanism of fast transfer in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from mupjax.figures.ntk_mechanism import bases_figure, gaps_figure, mechanism_figure
from mupjax.reproduce.ntk_mechanism_curves import FAMILIES, SET_WITHIN, Size, closed_form
from mupjax.reproduce.ntk_mechanism_training import confirm_by_training, linear_layer, two_bases
from mupjax.reproduce.target import Claim, Finding, Outcome, Scale, Target

__all__ = ["TARGET"]

FloatArray = NDArray[np.float64]

_SECTION = "GWB (arXiv 2512.22768), section 4"
_STRUCTURED = ("power law", "digits", "isotropic")
# Of β − α/2: structured problems have 0.3 and more.
_WEAK = 0.1
# Of t_n relative to the best learning rate: a quarter of an octave or so.
_SMALL = 0.2
_CLAIMS = (
    Claim(
        "sums",
        "By modes of a tangent kernel, the contributions of any update add up to the linearized "
        "change of the loss.",
        "identity behind " + _SECTION,
        "equal, for gradient descent, momentum and Adam along an averaged trajectory",
    ),
    Claim(
        "training",
        "With a frozen kernel the loss curves of all modes are known without training.",
        "closed form (Jacot et al., arXiv 1806.07572); infinite width, and every finite one",
        "equal to training in float64",
    ),
    Claim(
        "fast",
        "With structured targets the learning rate transfers fast from finite width to the limit.",
        "GWB (arXiv 2512.22768), section 2: fast iff β > α/2",
        "β - α/2 > 0",
    ),
    Claim(
        "noise",
        "With random targets it does not: there is no structure for top modes to hold.",
        "what the account of " + _SECTION + " suggests",
        "β = α/2 (weak)",
    ),
    Claim(
        "hidden_mode",
        "Nor where a mode that sets the optimum of finite widths holds nothing at infinite width, "
        "so that the top-κ curves cannot agree.",
        "what the account of " + _SECTION + " predicts",
        "β = α/2 (weak), c of the order of a",
    ),
    Claim(
        "few_modes",
        "A few top modes set the optimal learning rate, at every width.",
        _SECTION,
        f"minimum of the top-κ curve within {SET_WITHIN:g} octaves of the whole curve's",
    ),
    Claim(
        "invariance",
        "The top-κ loss curves at different widths agree better than the whole curves.",
        _SECTION + " (top-κ invariance)",
        "difference of top-κ curves well below that of whole curves",
    ),
    Claim(
        "bound",
        "The distance of the optima is at most t_n.",
        _SECTION + ": b_n ≤ t_n = min_κ (2 √ε_inv + ε_flat)",
        "b_n ≤ t_n, and t_n small where transfer is fast",
    ),
    Claim(
        "two_bases",
        "For one linear layer under gradient descent, modes of the kernel and eigenvalues of the "
        "alignment matrix are the same numbers.",
        "expectation from " + _SECTION,
        "identical",
    ),
)

_SIZES: dict[Scale, Size] = {
    "tiny": Size(16, 6, 4, (8, 32, 128, 512), 6, 32, (8,), 2),
    "laptop": Size(128, 32, 16, tuple(2**i for i in range(6, 14)), 100, 256, (64, 256), 3),
    "paper": Size(256, 64, 16, tuple(2**i for i in range(6, 16)), 400, 256, (64, 256, 1024), 5),
}


def _run(scale: Scale, folder: Path, progress: bool | None) -> Outcome:
    del folder, progress  # minutes; nothing to resume
    size = _SIZES[scale]
    # BLAS threads cost more than they give on matrices this small, most of all on a busy machine.
    with threadpool_limits(limits=1, user_api="blas"):
        dataset, curves = closed_form(size)
    trained, bases = confirm_by_training(size, curves), two_bases(size)
    layer = linear_layer()
    dataset = dataset.merge(trained).merge(bases)
    dataset.attrs.update(
        points=size.points,
        input_dim=size.input_dim,
        steps=size.steps,
        initialisations=size.initialisations,
        fit_from=size.fit_from,
    )
    findings = {
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
    figures = {
        "mechanism": mechanism_figure(dataset),
        "hidden_mode": mechanism_figure(dataset, "hidden mode"),
        "gaps": gaps_figure(dataset),
        "bases": bases_figure(dataset),
    }
    return Outcome(findings=findings, dataset=dataset, figures=figures, notes=_NOTES)


def _exact_finding(error: float, what: str, values: dict[str, object]) -> Finding:
    holds = error < 1e-11
    return Finding(
        measured=f"largest relative difference {error:.0e}, {what}",
        verdict="reproduced" if holds else "not reproduced",
        reason=f"{'below' if holds else 'above'} 1e-11, in float64",
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


def rate_draws(dataset: xr.Dataset, family: str, problem: str) -> FloatArray:
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
        draws = rate_draws(dataset, family, problem)
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
    if all(margin[1] > 0 for margin in margins):
        reason = "both intervals of β - α/2 lie above 0: transfer is fast"
        return Finding(measured, "not reproduced", reason, values)
    if all(margin[2] < _WEAK for margin in margins) and (ratio > 0.5).all():
        reason = f"both intervals of β - α/2 lie below {_WEAK:g}, and c is above a/2"
        return Finding(measured, "reproduced", reason, values)
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
    holds = all(values[problem]["largest_distance"] <= SET_WITHIN for problem in _STRUCTURED)
    return Finding(
        measured,
        "reproduced" if holds else "not reproduced",
        "structured problems, every width: "
        + ("within" if holds else "not always within")
        + f" {SET_WITHIN:g} octaves",
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
    measured = "top-κ over whole difference to infinite width, power-law data; " + "; ".join(words)
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


_NOTES = (
    "Full-batch gradient descent on P points, squared loss, T steps, f = 0 at the start (two-layer "
    "nets are centred: their random initial function is left out). Losses are means over initial "
    "weights; the limit has no randomness. Inputs have mean squared norm 4. Random features use "
    "erf, two-layer nets ReLU. Kernels are float64; bands and intervals are 90 % bootstrap "
    "intervals over initial weights.",
    "The optimum lies near the edge of stability of the top mode, ηκ_1/P between 1.8 and 2.4: "
    "below it all modes gain from a higher rate, beyond it the loss grows as (ηκ_1/P - 1)^2T. So a "
    "few top modes do set the optimum; but what moves it with the width is that their eigenvalues "
    "are random at finite width. They spread by about √(2/n), and where T √(2/n) is not small the "
    "mean over initial weights is made by its largest eigenvalues. Hence fits use n ≥ T².",
    "At the optimum the difference between widths therefore sits in the top modes, not in the "
    "residual. Below it, energy passes between modes of nearby eigenvalues across the cut at κ, "
    "which shifts the top-κ curve and the residual by opposite constants: harmless for the "
    "optimum, but counted by a supremum. With random labels all modes hold alike, nothing passes, "
    "and top-κ curves agree below the optimum. Top-κ invariance in the sense of smaller "
    "differences is thus neither needed here nor what sets transfer apart: it is fast because a, b "
    "and c are smooth in the kernel's deviation (a, b ~ 1/n, c ~ 1/n²).",
    "What it takes is that the mode which sets the wall holds part of the targets at infinite "
    "width. In the hidden mode's problem it holds nothing there and a little of order 1/n at width "
    "n, enough to diverge: the optimum then moves like n^(1/2T), slower than any gap that one "
    "would measure as fast. One draw of random labels may come close to this by accident, which is "
    "why they are averaged over.",
    "t_n is computed in the learning rate itself, in which each mode's loss is convex, on the "
    "interval between the two optima (any that holds both will do) at 49 points; the figure shows "
    "it in octaves. On the usual grid of octaves around the optimum it is infinite or beyond 10 "
    "octaves: top-κ curves are a flat bottom with a wall there, with next to no curvature.",
    "κ is the least number of modes from which on the top-k curve at infinite width has its "
    f"minimum within {SET_WITHIN:g} octaves of the whole curve's. The dataset also holds κ̂(n) by "
    "GWB's Algorithms 1 and 2 (NaN where no penalties were accepted).",
)

TARGET = Target(
    name="ntk-mechanism",
    title="Frozen kernels: which modes set the learning rate, and does it transfer (closed form)",
    claims=_CLAIMS,
    duration={
        "tiny": "40 seconds",
        "laptop": "4 minutes on 2 cores",
        "paper": "2 hours on 2 cores",
    },
    run=_run,
)
