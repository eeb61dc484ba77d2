"""Is transfer explained by a top-κ part that is the same at all widths? From profiles with seeds.

For a width n against the largest, and for every truncation κ tried (each constant one, and κ̂(n)
where there is one), three conditions are looked at on a window around the optima:

1. **convexity**: the top-κ curves are convex and make most of the bowl,
   `min_{n, max} μ(φ^κ)/μ(φ) ≥ least_share`;
2. **invariance**: they agree, `sup |φ_n^κ − φ_max^κ| ≤ most_instability · (height of the bowl)`;
   one less this ratio is called their overlap;
3. **flatness**: what is left is flat, `max_{n, max} spread(φ^{−κ})/spread(φ^κ) ≤ most_unevenness`.

The mechanism *holds* if some κ meets all three. Otherwise the condition *broken* is the first, in
this order, that no κ meets together with those before it: if no top-κ part makes the bowl, it is
convexity; if some do, but none of them agree between widths, invariance; if some of these agree,
but all leave a residual that is not flat, flatness. (κ = n leaves nothing at width n; it is no way
out, since the whole curve agrees with `φ_max^n` only where the residual's part does.)

Each bootstrap draw over seeds (common to all widths) is judged anew. "explained" and "not
explained" need `confidence` of the draws on one side, in both tails; anything else, fewer than
three seeds, or an optimum at the end of the grid, is "cannot tell". All thresholds are arguments,
as conventions are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.losses import resampled_deviations
from theory.mechanism import mechanism_terms, transfer_bound, window_around
from theory.mechanism_curves import Reading
from theory.truncation import Truncation, candidate_penalties, select_truncation

__all__ = ["Conditions", "Explanation", "MechanismReport", "Number", "explain_transfer"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Two seeds have three different bootstrap draws: they cannot disagree enough to be believed.
_LEAST_SEEDS = 3

Outcome = Literal["holds", "convexity", "invariance", "flatness"]
Verdict = Literal["explained", "not explained", "cannot tell"]


@dataclass(frozen=True)
class Conditions:
    """Thresholds of the three conditions, and where they are read.

    Attributes:
      least_share: of the bowl's curvature that the top-κ part must make.
      most_instability: largest disagreement of the top-κ curves, as a share of their height.
      most_unevenness: largest spread of a residual, as a share of the top-κ curve's.
      reach: of the window around both optima, in units of the hyperparameter's scale.
      reading: how curvature and slope are read off the grid, see `theory.mechanism_curves`.
    """

    least_share: float = 0.5
    most_instability: float = 0.25
    most_unevenness: float = 1 / 3
    reach: float | None = 2.0
    reading: Reading = "parabola"

    def __post_init__(self) -> None:
        for name in ("least_share", "most_instability", "most_unevenness"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}.")


@dataclass(frozen=True)
class Number:
    """A value from the mean over seeds, with the bootstrap's interval; NaN where there is none."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Explanation:
    """One width against the largest.

    Attributes:
      width: n.
      verdict, reason: and why, in one sentence.
      broken: the condition broken on the mean over seeds, or None where all hold.
      probability: share of the draws in which the mechanism holds; NaN with one seed.
      outcomes: share of the draws by outcome.
      kappa: the truncation at which the numbers below are read, a single integer or κ̂(n) where it
        varies; of those that meet the conditions up to the broken one, the one with the smallest
        J (where J is infinite for all, the one with the smallest instability).
      window: first and last hyperparameter read.
      hp_gap: b_n.
      loss_gap: `φ_n − φ_max` at the optima, a_n with its sign.
      bound: t_n.
      invariance, flatness: `2 √ε_inv` and ε_flat at `kappa`, in units of the hyperparameter's
        scale.
      overlap: `1 − sup |φ_n^κ − φ_max^κ| / height`, at most 1; negative where they lie farther
        apart than they are high.
      flatness_ratio: `max spread(φ^{−κ})/spread(φ^κ)`.
      top_share: `min μ(φ^κ)/μ(φ)`.
      whole_overlap: the overlap of the whole curves.
      displacement: from the top-κ curve's minimum to the whole curve's, the larger of both widths.
      top_gap: between the minima of the two top-κ curves.
      truncation: κ̂(n) by the paper's algorithm, on the mean over seeds.
      kappa_hat: κ̂(n) at the whole curve's optimum; NaN and why in `truncation.reason`.
    """

    width: int
    verdict: Verdict
    reason: str
    broken: Outcome | None
    probability: float
    outcomes: Mapping[str, float]
    kappa: IntArray
    window: tuple[float, float]
    hp_gap: Number
    loss_gap: Number
    bound: Number
    invariance: Number
    flatness: Number
    overlap: Number
    flatness_ratio: Number
    top_share: Number
    whole_overlap: Number
    displacement: Number
    top_gap: Number
    truncation: Truncation
    kappa_hat: Number


@dataclass(frozen=True)
class MechanismReport:
    """Every width against the largest.

    Attributes:
      hp_values: what was compared, on its scale, shape (g,); rates left out are not in it.
      widths: all of them; the last one stands for infinity.
      explanations: one for each width but the last.
      verdict: "explained" if it is for every width; "not explained" if it is not for some.
      seeds: S.
      dropped: hyperparameters left out at all widths because a run diverged at some width.
      warnings: what to doubt.
    """

    hp_values: FloatArray
    widths: tuple[int, ...]
    explanations: tuple[Explanation, ...]
    verdict: Verdict
    seeds: int
    dropped: tuple[float, ...]
    warnings: tuple[str, ...]


def explain_transfer(
    hp_grid: ArrayLike,
    profiles: Mapping[int, ArrayLike],
    *,
    conditions: Conditions | None = None,
    convexity_tolerance: float = 0.25,
    argmin_tolerance: float | None = None,
    confidence: float = 0.9,
    resamples: int = 200,
    rng_seed: int = 0,
) -> MechanismReport:
    """Judge from top-k profiles at several widths whether a stable top-κ part explains transfer.

    Args:
      hp_grid: shape (g,), increasing, on the scale on which the hyperparameter is compared.
      profiles: width → `φ_n^k`, shape (S, g, n) or, for one seed, (g, n): seed, hyperparameter,
        component k − 1. NaN or infinite at hyperparameters at which a run diverged: these are left
        out at all widths.
      conditions: thresholds; None for the defaults.
      convexity_tolerance, argmin_tolerance: of κ̂(n), see `theory.truncation.select_truncation`;
        None as the second allows one step of the grid.
      confidence: level of intervals and verdict.
      resamples: bootstrap draws over seeds; fewer are computed where fewer differ.
      rng_seed: of the draws.

    Raises:
      ValueError: arguments not as described, or fewer than 3 hyperparameters without divergence.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples!r}.")
    told = Conditions() if conditions is None else conditions
    grid, tables, dropped = _common(hp_grid, profiles)
    widths = tuple(tables)
    seeds = next(iter(tables.values())).shape[0]
    draws, counts = _distinct_draws(seeds, resamples, rng_seed)
    if argmin_tolerance is None:
        argmin_tolerance = float(np.diff(grid).max())
    largest = _resample(tables[widths[-1]], draws)
    options = (convexity_tolerance, argmin_tolerance)
    explanations = tuple(
        _explain(
            n, grid, _resample(tables[n], draws), largest, counts, told, options, seeds, confidence
        )
        for n in widths[:-1]
    )
    verdicts = {e.verdict for e in explanations}
    overall: Verdict = (
        "not explained"
        if "not explained" in verdicts
        else "cannot tell"
        if "cannot tell" in verdicts
        else "explained"
    )
    return MechanismReport(
        hp_values=grid,
        widths=widths,
        explanations=explanations,
        verdict=overall,
        seeds=seeds,
        dropped=dropped,
        warnings=tuple(_warnings(explanations, widths, seeds, dropped, told)),
    )


def _common(
    hp_grid: ArrayLike, profiles: Mapping[int, ArrayLike]
) -> tuple[FloatArray, dict[int, FloatArray], tuple[float, ...]]:
    """Profiles as (S, g, n) without the hyperparameters at which something diverged."""
    grid = np.asarray(hp_grid, dtype=np.float64)
    if grid.ndim != 1 or not np.isfinite(grid).all() or not (np.diff(grid) > 0).all():
        raise ValueError(f"hp_grid must be finite, strictly increasing numbers, got {hp_grid!r}.")
    if len(profiles) < 2:
        raise ValueError(f"profiles holds {len(profiles)} widths; a comparison needs at least 2.")
    tables = {}
    for n in sorted(profiles):
        table = np.asarray(profiles[n], dtype=np.float64)
        table = table[None] if table.ndim == 2 else table
        if table.ndim != 3 or table.shape[1] != grid.size or 0 in table.shape:
            raise ValueError(
                f"profiles[{n}] has shape {np.shape(profiles[n])}, expected (seed, {grid.size}, "
                "component) or the same without seeds"
            )
        tables[n] = table
    shapes = {n: table.shape[0] for n, table in tables.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"profiles must have the same seeds at all widths, got {shapes}.")
    alive = np.all([np.isfinite(t).all(axis=(0, 2)) for t in tables.values()], axis=0)
    if alive.sum() < 3:
        raise ValueError(
            f"{int(alive.sum())} of {grid.size} hyperparameters trained at every width and seed, "
            "and a curve needs 3: leave out a width or add values where training is stable."
        )
    kept = {n: table[:, alive] for n, table in tables.items()}
    return grid[alive], kept, tuple(grid[~alive].tolist())


def _distinct_draws(seeds: int, resamples: int, rng_seed: int) -> tuple[FloatArray, IntArray]:
    """Weights of the bootstrap draws that differ, and how often each was drawn.

    Three seeds have only 10 different draws. The first row is the mean itself, drawn 0 times.
    """
    rng = np.random.default_rng(rng_seed)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    rows, counts = np.unique(drawn, axis=0, return_counts=True)
    weights = np.concatenate([np.ones((1, seeds)), rows.astype(np.float64)])
    return weights, np.concatenate([np.zeros(1, np.int64), counts])


def _resample(table: FloatArray, draws: FloatArray) -> FloatArray:
    """Mean profiles of every draw, shape (R, g, n)."""
    values = np.moveaxis(table, 0, -1)
    return values.mean(axis=-1) + resampled_deviations(values, draws)


@dataclass(frozen=True)
class _Reading:
    """One draw: what came out and the numbers of `Explanation`."""

    outcome: Outcome
    kappa: IntArray
    window: tuple[float, float]
    open_edge: bool
    numbers: dict[str, float]


def _explain(
    width: int,
    grid: FloatArray,
    ours: FloatArray,
    largest: FloatArray,
    counts: IntArray,
    told: Conditions,
    options: tuple[float, float],
    seeds: int,
    confidence: float,
) -> Explanation:
    penalties = candidate_penalties(grid)

    def truncate(r: int) -> Truncation:
        return select_truncation(
            grid,
            ours[r],
            largest[r],
            penalties=penalties,
            convexity_tolerance=options[0],
            argmin_tolerance=options[1],
        )

    # Draws tell how sure a κ̂ is; where there is none they would only tell so again, at length.
    truncation = truncate(0)
    redrawn = range(1, counts.size) if truncation.accepted else []
    hats = [truncation.kappa, *(truncate(r).kappa for r in redrawn)]
    hats += [None] * (counts.size - len(hats))
    readings = [_read(grid, ours[r], largest[r], hats[r], told) for r in range(counts.size)]
    mean, weights = readings[0], counts / counts.sum()
    outcomes: dict[str, float] = dict.fromkeys(get_args(Outcome), 0.0)
    for reading, weight in zip(readings, weights, strict=True):
        outcomes[reading.outcome] += float(weight)

    def number(values: list[float]) -> Number:
        interval = (math.nan, math.nan)
        if seeds > 1:
            interval = _interval(np.array(values), counts, confidence)
        return Number(values[0], interval)

    numbers = {k: number([r.numbers[k] for r in readings]) for k in mean.numbers}
    verdict, reason = _judge(mean, outcomes, seeds, confidence)
    return Explanation(
        width=width,
        verdict=verdict,
        reason=reason,
        broken=None if mean.outcome == "holds" else mean.outcome,
        probability=outcomes["holds"] if seeds > 1 else math.nan,
        outcomes=outcomes,
        kappa=mean.kappa,
        window=mean.window,
        truncation=truncation,
        kappa_hat=number(
            [
                math.nan if hat is None else float(hat[ours[r, :, -1].argmin()])
                for r, hat in enumerate(hats)
            ]
        ),
        **numbers,
    )


def _read(
    grid: FloatArray, ours: FloatArray, largest: FloatArray, hat: IntArray | None, told: Conditions
) -> _Reading:
    window = window_around(grid, ours, largest, told.reach)
    x, f, g = grid[window], ours[window], largest[window]
    n = ours.shape[1]
    kappas = np.repeat(np.arange(1, n + 1)[:, None], x.size, axis=1)
    if hat is not None:
        kappas = np.concatenate([kappas, hat[window][None]])
    terms = mechanism_terms(x, f, g, kappas, reading=told.reading)
    conditions: list[tuple[Outcome, NDArray[np.bool_]]] = [
        ("convexity", terms.top_share >= told.least_share),
        ("invariance", terms.instability <= told.most_instability),
        ("flatness", terms.unevenness <= told.most_unevenness),
    ]
    left, outcome = np.ones(kappas.shape[0], dtype=bool), "holds"
    for name, met in conditions:
        if not (left & met).any():
            outcome = name
            break
        left &= met
    score = np.where(left, terms.objective, np.inf)
    if not np.isfinite(score).any():
        score = np.where(left, terms.instability, np.inf)
    i = int(np.argmin(score))
    bound = transfer_bound(grid, ours, largest, reach=told.reach, reading=told.reading, kappa=hat)
    distance = np.abs(terms.top_argmin[i] - terms.argmin)
    single = np.ones(x.size, dtype=np.int64)
    whole = mechanism_terms(x, f[:, -1:], g[:, -1:], single, reading=told.reading)
    wholes = ours[:, -1], largest[:, -1]
    best = [int(whole.argmin()) for whole in wholes]
    return _Reading(
        outcome=outcome,
        kappa=kappas[i],
        window=(float(x[0]), float(x[-1])),
        open_edge=any(b in (0, grid.size - 1) for b in best),
        numbers={
            "hp_gap": float(abs(terms.argmin[0] - terms.argmin[1])),
            "loss_gap": float(wholes[0].min() - wholes[1].min()),
            "bound": bound.bound,
            "invariance": 2 * math.sqrt(float(terms.invariance[i])),
            "flatness": float(terms.flatness[i]),
            "overlap": 1 - float(terms.instability[i]),
            "flatness_ratio": float(terms.unevenness[i]),
            "top_share": float(terms.top_share[i]),
            "whole_overlap": 1 - float(whole.instability),
            "displacement": float(distance.max()),
            "top_gap": float(abs(terms.top_argmin[i, 0] - terms.top_argmin[i, 1])),
        },
    )


_SAYS: dict[Outcome, str] = {
    "convexity": "no top-κ part makes the bowl at both widths (convexity)",
    "invariance": "the top-κ parts that make the bowl differ between widths (invariance)",
    "flatness": "the residual of the top-κ parts that agree between widths is not flat (flatness)",
}


def _judge(
    mean: _Reading, outcomes: Mapping[str, float], seeds: int, confidence: float
) -> tuple[Verdict, str]:
    found = "a stable top-κ part with a flat residual" if mean.outcome == "holds" else None
    found = found or _SAYS[mean.outcome]
    if mean.open_edge:
        return "cannot tell", "an optimum lies at the end of the grid: widen it"
    if seeds < _LEAST_SEEDS:
        few = "one seed" if seeds == 1 else f"{seeds} seeds"
        return "cannot tell", f"{few}, fewer than {_LEAST_SEEDS}; on their mean: {found}"
    tail, share = (1 - confidence) / 2, outcomes["holds"]
    if share >= 1 - tail and mean.outcome == "holds":
        return "explained", found
    if share <= tail and mean.outcome != "holds":
        failed = 1 - share
        named = outcomes[mean.outcome] / failed if failed > 0 else 1.0
        # Draws may agree that some condition breaks and not on which.
        doubt = f"; the draws agree that one breaks, and {named:.0%} of them on which"
        if named >= 1 - 2 * tail:
            doubt = ""
        return "not explained", found + doubt
    return (
        "cannot tell",
        f"the seeds leave it open ({share:.0%} of draws hold); their mean: {found}",
    )


def _warnings(
    explanations: tuple[Explanation, ...],
    widths: tuple[int, ...],
    seeds: int,
    dropped: tuple[float, ...],
    told: Conditions,
) -> list[str]:
    found = []
    if seeds < _LEAST_SEEDS:
        few = "one seed: no intervals, and" if seeds == 1 else f"{seeds} seeds:"
        found.append(f"{few} every verdict is 'cannot tell'; run at least {_LEAST_SEEDS} seeds")
    if dropped:
        found.append(
            "left out at every width, as a run diverged there or has no decomposition: "
            + _listed(dropped)
        )
    for e in explanations:
        if e.whole_overlap.value >= 1 - told.most_instability:
            found.append(
                f"width {e.width}: the whole curves agree with the largest width's as well "
                f"(overlap {e.whole_overlap.value:.2f}): little is left to explain"
            )
        if e.kappa.size < 5 and told.reading == "parabola":
            found.append(
                f"width {e.width}: the window holds {e.kappa.size} points; a parabola through so "
                "few smooths little"
            )
        if not e.truncation.accepted:
            found.append(f"width {e.width}: no κ̂: {e.truncation.reason}")
    return found


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _interval(values: FloatArray, counts: IntArray, confidence: float) -> tuple[float, float]:
    """Quantiles of values drawn `counts` times; NaN where some are not defined."""
    drawn = np.sort(np.repeat(values, counts))
    if np.isnan(drawn).any():
        return (math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = (drawn[round(q * (drawn.size - 1))] for q in (tail, 1 - tail))
    return float(low), float(high)
