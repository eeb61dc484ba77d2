"""``mupjax reproduce ntk-mechanism``: the mechanism of fast transfer in closed form."""

from __future__ import annotations

from pathlib import Path

from threadpoolctl import threadpool_limits

from mupjax.figures.ntk_mechanism import bases_figure, gaps_figure, mechanism_figure
from mupjax.reproduce.ntk_mechanism_curves import SET_WITHIN, Size, closed_form
from mupjax.reproduce.ntk_mechanism_findings import judge
from mupjax.reproduce.ntk_mechanism_training import confirm_by_training, linear_layer, two_bases
from mupjax.reproduce.target import Claim, Outcome, Scale, Target

__all__ = ["TARGET"]

_SECTION = "GWB (arXiv 2512.22768), section 4"
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
    findings = judge(dataset, layer, scale)
    figures = {
        "mechanism": mechanism_figure(dataset),
        "hidden_mode": mechanism_figure(dataset, "hidden mode"),
        "gaps": gaps_figure(dataset),
        "bases": bases_figure(dataset),
    }
    return Outcome(findings=findings, dataset=dataset, figures=figures, notes=_NOTES)


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
        "tiny": "1 minute on 2 cores",
        "laptop": "3 minutes on 2 cores",
        "paper": "2 hours on 2 cores",
    },
    run=_run,
)
