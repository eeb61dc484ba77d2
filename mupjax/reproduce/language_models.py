"""``mupjax reproduce llama-adam`` and its kin: the paper's language models, by width.

Llama with Adam over the learning rate and over both momenta, with Muon, and with Dion at two ranks;
GPT-2 with Adam and Muon. One sweep for each axis, all with the decomposition.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import xarray as xr

from mupjax.figures.decomposition import curves_figure, path_figure, profile_figure
from mupjax.figures.sweep_losses import loss_figure
from mupjax.reproduce.decomposed import DecomposedSweep, measure_sweep
from mupjax.reproduce.decomposed_findings import (
    CANNOT,
    broken_mechanism,
    faithful,
    imperfect_transfer,
    invariance,
    less_drift,
    mechanism,
    scaling,
    transfer,
)
from mupjax.reproduce.language_models_cost import estimate
from mupjax.reproduce.language_models_training import (
    EXPERIMENTS,
    PARAMETRIZATION,
    Axis,
    Sizes,
    check_sizes,
    corpus_of,
    hyperparameters,
    train,
)
from mupjax.reproduce.target import Claim, Finding, Outcome, Scale, Target

__all__ = ["TARGETS"]

_GWB = "GWB (arXiv 2512.22768)"
# Exponents of the printed fits of the loss in the width.
PUBLISHED_EXPONENTS = {"llama-adam": 0.524, "llama-muon": 0.503}
_TITLES = {
    "llama-adam": "Llama, Adam: the learning rate transfers, by a stable top-κ part of the loss",
    "adam-betas": "Llama, Adam: both momenta across width",
    "llama-muon": "Llama, Muon: imperfect transfer, less invariant top-k parts",
    "llama-dion": "Llama, Dion: a bounded rank restores transfer",
    "gpt2-adam": "GPT-2, Adam: the learning rate transfers",
    "gpt2-muon": "GPT-2, Muon: flat curves",
}
_NAMES = {"lr": "learning rate", "b1": "β1", "b2": "β2"}
# Which axes the paper shows to transfer imperfectly, their top-k parts to part early.
_IMPERFECT = {("llama-muon", "lr"), ("llama-dion", "proportional")}
# Where the paper says up to which k profiles agree.
_PUBLISHED_INVARIANCE = {
    ("llama-adam", "lr"): "up to k ≈ 60 at all widths",
    ("llama-muon", "lr"): "up to k ≈ 10 only",
}

_EXPLAINED = (
    "transfer is explained by a top-κ part of the loss that is the same at all widths, and a flat "
    "residual."
)
_BROKEN = "no top-κ part of the loss is the same at all widths and leaves a flat residual."

_LAPTOP_DURATIONS = {
    "llama-adam": "6 minutes on 2 cores",
    "adam-betas": "at most 11 minutes on 2 cores",
    "llama-muon": "10 minutes on 2 cores",
    "llama-dion": "12 minutes on 2 cores",
    "gpt2-adam": "4 minutes on 2 cores",
    "gpt2-muon": "7 minutes on 2 cores",
}


def _claims(name: str) -> tuple[Claim, ...]:
    experiment = EXPERIMENTS[name]
    source = f"{_GWB}, {experiment.model} with {experiment.optimizer}"
    claims = []
    for axis in experiment.axes:
        what = _NAMES.get(axis.label, f"learning rate, {axis.label} rank")
        claims.append(
            Claim(
                f"{axis.label}_faithful",
                f"Over the {what}: along averaged iterates the linearized loss follows the loss.",
                f"{_GWB}, section 4",
                "φ(ω) ≈ L(w_T) - L(w_0)",
            )
        )
        if name in PUBLISHED_EXPONENTS:
            claims.append(
                Claim(
                    f"{axis.label}_scaling",
                    "The loss at the optimum falls as a power of the width.",
                    source,
                    f"L - L_∞ ∝ n^-{PUBLISHED_EXPONENTS[name]}",
                )
            )
        imperfect = (name, axis.label) in _IMPERFECT
        claims.append(
            Claim(
                f"{axis.label}_transfer",
                f"The smallest width's optimal {what} is "
                + ("not quite optimal for larger ones." if imperfect else "near-optimal for all."),
                source,
                "imperfect transfer" if imperfect else "near-perfect transfer (no number given)",
            )
        )
        if (name, axis.label) in _PUBLISHED_INVARIANCE:
            claims.append(
                Claim(
                    f"{axis.label}_invariance",
                    "Leading components lower the loss "
                    + (
                        "alike at all widths only for few k."
                        if imperfect
                        else "alike at all widths."
                    ),
                    source,
                    _PUBLISHED_INVARIANCE[name, axis.label],
                )
            )
        claims.append(
            Claim(
                f"{axis.label}_mechanism",
                f"Over the {what}: {_BROKEN if imperfect else _EXPLAINED}",
                source,
                "top-k parts less alike than with Adam (no number given)"
                if imperfect
                else "top-κ curves alike, residuals flat",
            )
        )
    if name == "llama-dion":
        claims.append(
            Claim(
                "restored",
                "With a bounded rank the optimal learning rate moves less than with a rank "
                "proportional to the width.",
                source,
                "bounded rank restores transfer",
            )
        )
    return tuple(claims)


def _run(
    name: str,
    scale: Scale,
    folder: Path,
    progress: bool | None,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
    data: str | None = None,
) -> Outcome:
    sizes = check_sizes(name, scale, seeds=seeds, max_width=max_width, data=data)
    axes, corpus = EXPERIMENTS[name].axes, corpus_of(sizes, folder)
    grids = {axis.label: train(name, axis, scale, sizes, corpus, folder, progress) for axis in axes}
    found = {
        axis.label: measure_sweep(grids[axis.label], PARAMETRIZATION, hp=axis.hp, scale=axis.scale)
        for axis in axes
    }
    findings = _findings(name, found, sizes)
    if scale == "tiny":
        reason = f"{sizes.steps} steps at widths up to {sizes.widths[-1]} show nothing"
        findings = {k: Finding(f.measured, CANNOT, reason, f.values) for k, f in findings.items()}
    figures = {}
    for label, one in found.items():
        end = "" if len(found) == 1 else f"_{label}"
        figures[f"losses{end}"] = loss_figure(
            one.curves, one.summaries, one.scaling, one.scaling_losses, hp=one.hp, scale=one.scale
        )
        if one.mechanism is not None:
            figures[f"top_k{end}"] = curves_figure(one.mechanism)
            figures[f"profile{end}"] = profile_figure(one.mechanism)
            figures[f"path{end}"] = path_figure(one.mechanism)
    record = {
        label: {curve: summary.to_json() for curve, summary in one.summaries.items()}
        for label, one in found.items()
    }
    return Outcome(
        findings, _dataset(found, grids), figures, _notes(name, found, scale, sizes), record
    )


def _findings(name: str, found: Mapping[str, DecomposedSweep], sizes: Sizes) -> dict[str, Finding]:
    findings = {}
    for label, one in found.items():
        imperfect = (name, label) in _IMPERFECT
        findings[f"{label}_faithful"] = faithful(one)
        if name in PUBLISHED_EXPONENTS:
            findings[f"{label}_scaling"] = scaling(
                one, PUBLISHED_EXPONENTS[name], comparable=sizes.published
            )
        findings[f"{label}_transfer"] = (imperfect_transfer if imperfect else transfer)(one)
        if (name, label) in _PUBLISHED_INVARIANCE:
            findings[f"{label}_invariance"] = invariance(one, wide=not imperfect)
        findings[f"{label}_mechanism"] = (broken_mechanism if imperfect else mechanism)(one)
    if name == "llama-dion":
        findings["restored"] = less_drift(
            found["bounded"], found["proportional"], ("bounded", "proportional")
        )
    return findings


def _dataset(found: Mapping[str, DecomposedSweep], grids: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Losses of all sweeps; profiles and all are in the sweeps' own files."""
    parts = []
    for label, one in found.items():
        curves = one.curves.assign(faithfulness=one.faithfulness)
        if len(found) > 1:
            names = {str(v): f"{label}_{v}" for v in curves.data_vars}
            curves = curves.rename({**names, one.hp: f"{label}_{one.hp}"})
        parts.append(curves)
    return xr.merge(parts).assign_attrs(next(iter(grids.values())).attrs)


def _notes(
    name: str, found: Mapping[str, DecomposedSweep], scale: Scale, sizes: Sizes
) -> tuple[str, ...]:
    experiment = EXPERIMENTS[name]
    words = {
        "standard_library": "the text of Python's standard library, a token a byte (GWB: "
        "WikiText-103, FineWeb)",
        "wikitext103": "WikiText-103",
        "fineweb": "FineWeb",
    }[sizes.text]
    held = "; ".join(_held(experiment.axes, name, scale))
    notes = [
        f"{sizes.layers} layers, {sizes.heads} heads, muP with base width {sizes.widths[0]} and "
        f"1/d_head, on {words}; {sizes.steps} steps of {sizes.batch_size} sequences of "
        f"{sizes.context}, warmup-stable-decay (4 %, 20 %), {sizes.seeds} seeds. All losses and "
        f"gradients are of the same {sizes.validation_sequences} validation sequences. {held}.",
        "Linearized by the trapezoid rule (GWB: the gradient at the start of each step, which is "
        "less accurate).",
    ]
    if sizes.published:
        notes.append(
            "GWB do not name the tokenizer: byte pairs learned on the beginning of the training "
            "text, as many as GPT-2's."
        )
    for label, one in found.items():
        if one.mechanism is not None and one.mechanism.warnings:
            notes.append(f"On the top-κ part, {label}: " + "; ".join(one.mechanism.warnings) + ".")
    return tuple(notes)


def _held(axes: tuple[Axis, ...], name: str, scale: Scale) -> list[str]:
    texts = []
    for axis in axes:
        values = hyperparameters(EXPERIMENTS[name], axis, scale)
        fixed = ", ".join(f"{k} = {v:.4g}" for k, v in values.items() if isinstance(v, float))
        texts.append(f"Sweep {axis.label} over {axis.hp}" + (f" at {fixed}" if fixed else ""))
    return texts


TARGETS = tuple(
    Target(
        name=name,
        title=_TITLES[name],
        claims=_claims(name),
        duration={
            "tiny": "seconds",
            "laptop": _LAPTOP_DURATIONS[name],
            "paper": "hours on an accelerator (it says how many first); needs --data",
        },
        run=functools.partial(_run, name),
        options=frozenset({"seeds", "max_width", "data"}),
        check=functools.partial(check_sizes, name),
        estimate=functools.partial(estimate, name),
    )
    for name in EXPERIMENTS
)
