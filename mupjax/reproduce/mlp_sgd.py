"""``mupjax reproduce mlp-sgd``: two-layer networks by momentum SGD, example by example."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from mupjax.figures.decomposition import curves_figure, path_figure, profile_figure
from mupjax.figures.samplewise import index_figure, restricted_figure
from mupjax.figures.sweep_losses import loss_figure
from mupjax.reproduce.decomposed import best_value
from mupjax.reproduce.mlp_sgd_findings import PUBLISHED_EXPONENT, judge
from mupjax.reproduce.mlp_sgd_measures import (
    EASY,
    ENDS,
    HARD,
    Measures,
    measure,
)
from mupjax.reproduce.mlp_sgd_training import (
    MOMENTUM,
    SIZES,
    Sizes,
    check_sizes,
    train_grid,
    train_samplewise,
)
from mupjax.reproduce.target import Claim, Outcome, Scale, Target

__all__ = ["TARGET"]

_GWB = "GWB (arXiv 2512.22768), two-layer networks on CIFAR-10"
CLAIMS = (
    Claim(
        "faithful",
        "Along averaged iterates the linearized loss follows the loss, at every learning rate that "
        "matters.",
        "GWB (arXiv 2512.22768), section 4",
        "φ(ω) ≈ L(w_T) - L(w_0)",
    ),
    Claim(
        "scaling",
        "The loss at the optimal learning rate falls as a power of the width.",
        _GWB,
        f"L - L_∞ ∝ n^-{PUBLISHED_EXPONENT}",
    ),
    Claim(
        "transfer",
        "The smallest width's optimal learning rate is near-optimal for every width.",
        _GWB,
        "loss against width alike at both (no number given)",
    ),
    Claim(
        "mechanism",
        "Transfer is explained by a top-κ part of the loss that is the same at all widths, and a "
        "flat residual.",
        _GWB,
        "top-κ curves alike, residuals flat, κ̂(n) well below n",
    ),
    Claim(
        "overlap",
        f"Networks of other widths and seeds agree on which {ENDS:.0%} of the examples are easiest "
        "and which are hardest, by the mean component index.",
        _GWB,
        "overlaps far above chance",
    ),
    Claim(
        "easy_and_hard",
        f"On the easiest {EASY:.0%} of the examples the optimal learning rate transfers, on the "
        f"hardest {HARD:.0%} it does not.",
        _GWB,
        "easy samples transfer, hard ones do not",
    ),
)


def run(
    scale: Scale,
    folder: Path,
    progress: bool | None,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
    data: str | None = None,
) -> Outcome:
    """Two sweeps: all learning rates, and the best one example by example (see ``Target``)."""
    sizes = check_sizes(scale, seeds=seeds, max_width=max_width, data=data)
    grid = train_grid(sizes, folder, progress)
    samplewise = train_samplewise(sizes, best_value(grid), folder, progress)
    found = measure(grid, samplewise, sizes.classes())
    findings = judge(found, sizes, shown=scale != "tiny")
    figures = {
        "losses": loss_figure(found.curves, found.summaries, found.scaling, found.scaling_losses)
    }
    if found.mechanism is not None:
        figures |= {
            "top_k": curves_figure(found.mechanism),
            "profile": profile_figure(found.mechanism),
            "path": path_figure(found.mechanism),
        }
    figures |= {
        "examples": index_figure(found.index, found.overlaps),
        "easy_and_hard": restricted_figure(
            found.curves,
            found.summaries,
            {"easy": len(found.easy), "hard": len(found.hard)},
        ),
    }
    record = {name: summary.to_json() for name, summary in found.summaries.items()}
    return Outcome(findings, _dataset(found, grid), figures, _notes(found, sizes), record)


def _dataset(found: Measures, grid: xr.Dataset) -> xr.Dataset:
    """What the findings and figures are made from; profiles and all are in the sweeps' files."""
    return found.curves.assign(
        faithfulness=found.faithfulness, mean_component_index=found.index
    ).assign_attrs(grid.attrs)


def _notes(found: Measures, sizes: Sizes) -> tuple[str, ...]:
    data = {
        "digits": "the handwritten digits of scikit-learn (GWB: CIFAR-10)",
        "cifar10": "CIFAR-10 with random resized crops and mixup",
    }[sizes.dataset]
    notes = [
        f"Two-layer ReLU networks without biases on {data}, muP with base width "
        f"{sizes.widths[0]}, SGD with momentum {MOMENTUM:g}, batch {sizes.batch_size}, "
        f"{sizes.steps} steps, warmup-stable-decay (4 %, 20 %), "
        f"{sizes.seeds} seeds; batches drawn with replacement. All losses and gradients are of the "
        f"same {sizes.validation_examples} validation examples.",
        "GWB do not state the base width, the parameters of crops and mixup, or at which learning "
        "rate and width examples are ranked. Here: crops of 8 to 100 % of the area, ratio 3/4 to "
        "4/3, mixup with Beta(1, 1); the largest width's best learning rate of the grid "
        f"({found.index_rate:.4g}) at all widths; examples in restricted sweeps are easy or hard "
        "by the mean index of the largest width's seeds.",
        "Linearized by the trapezoid rule (GWB: the gradient at the start of each step, which is "
        "less accurate).",
    ]
    if left_out := sorted(set(_all_widths(sizes)) - set(sizes.widths)):
        notes.append(
            f"Widths {', '.join(map(str, left_out))} were left out; --max-width sets the largest "
            "width to train."
        )
    if found.mechanism is not None and found.mechanism.warnings:
        notes.append("On the top-κ part: " + "; ".join(found.mechanism.warnings) + ".")
    return tuple(notes)


def _all_widths(sizes: Sizes) -> tuple[int, ...]:
    return next(s.widths for s in SIZES.values() if s.steps == sizes.steps)


TARGET = Target(
    name="mlp-sgd",
    title="Two-layer networks by momentum SGD: which part of the loss transfers, on which examples",
    claims=CLAIMS,
    duration={
        "tiny": "seconds",
        "laptop": "about 6 minutes on 2 cores",
        "paper": "days on a CPU, which stops at width 256; needs --data with CIFAR-10",
    },
    run=run,
    options=frozenset({"seeds", "max_width", "data"}),
    check=check_sizes,
)
