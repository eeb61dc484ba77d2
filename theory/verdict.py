"""Does a hyperparameter transfer fast from small widths to large ones, and how sure is that?

With `a_n ~ n^{-α}` (what width buys) and `b_n ~ n^{-β}` (how far the optimum still is), transfer is
**fast** iff `β > α/2`: then `c_n = Θ(b_n²) = o(a_n)`, and tuning at a small width loses less than
the width itself (Ghosh, Wu and Bietti, arXiv 2512.22768, section 2); **weak** if the optimum
converges no faster than that; **no transfer** if it does not converge.

What decides is `ρ = 2β − α`, the rate at which `c_n/a_n` vanishes. Both exponents come with a
profile likelihood (`theory.rates`), losses and positions of minima have nearly independent noise,
so

    D(ρ) = min_α [D_α(α) + D_β((ρ + α)/2)]

is the profile of ρ; its interval is `D ≤ t²`, and `P(fast) = F_t(±sqrt(D(0)))`, + where the
estimate of ρ is positive, is one minus the p-value of the other hypothesis. Where β is not
determined D is flat and the probability is near one half, whatever range of β was considered.

The rival measure κ = α − 2β + γ of Kalra and Barkeshli (arXiv 2605.21486) takes in a curvature of
the optimum that changes like `n^γ`: `c_n/a_n ~ n^κ`, fast iff κ < 0. The two agree at γ = 0.

The verdicts are those of `theory.judgement`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from theory.curves import Scale, from_scale, to_scale
from theory.diagnosis import Estimate, TransferDiagnosis, Verdict
from theory.forecast import forecast_at
from theory.gaps import Gaps, Infinity, gaps_of
from theory.judgement import NEGLIGIBLE, Evidence, judge, warnings_of
from theory.losses import LossTable, loss_table
from theory.rates import UNKNOWN, Interval, PowerLaw, crossings, fit_slope, refined
from theory.rates_resampling import (
    ResampledIntervals,
    bootstrap_interval,
    jackknife_interval,
    refit_exponents,
)
from theory.readings import OptimumRule, Readings, read_optima

__all__ = ["Estimate", "TransferDiagnosis", "Verdict", "diagnose_transfer"]

FloatArray = NDArray[np.float64]

_RHO: FloatArray = np.arange(-80.0, 161.0) * 0.05


def diagnose_transfer(
    widths: ArrayLike,
    hp_values: ArrayLike,
    losses: ArrayLike,
    *,
    observed: ArrayLike | None = None,
    scale: Scale = "log2",
    infinity: Infinity = "auto",
    optimum: OptimumRule = "quartic",
    midpoint_tolerance: float = 0.01,
    confidence: float = 0.9,
    target_width: int | None = None,
    resamples: int = 1000,
    rng_seed: int = 0,
) -> TransferDiagnosis:
    """Gaps, rates, verdict and forecast of a sweep over widths and one hyperparameter.

    Args:
      widths: shape (W,), positive whole numbers, strictly increasing.
      hp_values: grid, shape (H,), or (W, H) with one for each width; strictly increasing.
      losses: final losses, shape (W, H, S); NaN or infinite where a run diverged. Seed s should
        mean the same random numbers in every cell, where that can be arranged.
      observed: bool, the losses' shape; False where the table holds no such run.
      scale: how hyperparameters are compared.
      infinity: what the gaps are measured against (`theory.gaps.transfer_gaps`). The exponents do
        not depend on it: they are always fitted with a free limit, because gaps against the largest
        width, `n^{-α} − N^{-α}`, fall faster than `n^{-α}`.
      optimum, midpoint_tolerance: how an optimum is read off a curve.
      confidence: level of the two-sided intervals.
      target_width: also forecast at this width.
      resamples: bootstrap draws of the seeds.
      rng_seed: seed of the bootstrap.

    Returns:
      The diagnosis. Intervals of optima and losses are `t` times the bootstrap standard error
      (`theory.drift`), those of exponents profile likelihoods (`theory.rates`).

    Raises:
      ValueError: an argument is not as described; the message names it and its value.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, as 0.9 does")
    if resamples < 100:
        raise ValueError(f"resamples={resamples!r} is too few for a standard error; use 1000")
    if infinity not in ("auto", "largest", "limit"):
        raise ValueError(f"infinity={infinity!r} is not known; use 'auto', 'largest' or 'limit'")
    table = loss_table(widths, hp_values, losses, observed=observed, scale=scale)
    readings = read_optima(
        table,
        optimum=optimum,
        midpoint_tolerance=midpoint_tolerance,
        resamples=resamples,
        rng_seed=rng_seed,
    )
    evidence = _gather(readings, confidence)
    gaps = gaps_of(readings, infinity, evidence.loss, evidence.hp, evidence.root)
    stays = _probability_negligible(readings, evidence, confidence)
    verdict, reason = judge(readings, evidence, stays, confidence)
    # That c_n is not seen to be small says nothing against fast transfer.
    by_size = evidence.hp.degenerate and stays > evidence.probability_fast
    kappa = evidence.kappa
    return TransferDiagnosis(
        widths=tuple(int(n) for n in table.widths),
        optimal_hp=_optimal_hp(readings, confidence),
        optimal_loss=_optimal_loss(readings, confidence),
        edges=readings.edges,
        alpha=Estimate(evidence.loss.exponent, evidence.loss.exponent_interval),
        beta=Estimate(evidence.hp.exponent, evidence.hp.exponent_interval),
        c_rate=Estimate(
            2 * evidence.root.exponent,
            (2 * evidence.root.exponent_interval[0], 2 * evidence.root.exponent_interval[1]),
        ),
        curvature=tuple(float(c) for c in np.where(readings.usable, readings.curvature, np.nan)),
        curvature_exponent=evidence.curvature,
        advantage=evidence.advantage,
        kappa=kappa,
        transfer_penalty=_penalty(readings, confidence),
        loss_floor=Estimate(evidence.loss.limit, evidence.loss.limit_interval),
        loss_prefactor=Estimate(evidence.loss.prefactor, evidence.loss.prefactor_interval),
        resampled=evidence.resampled,
        gaps=gaps,
        verdict=verdict,
        reason=reason,
        probability_fast=stays if by_size else evidence.probability_fast,
        verdict_kappa=(
            "fast"
            if kappa.interval[1] < 0
            else "not fast"
            if kappa.interval[0] > 0
            else "cannot tell"
        ),
        forecast=(
            None if target_width is None else forecast_at(readings, target_width, confidence)
        ),
        seeds=table.seeds,
        confidence=float(confidence),
        optimum=readings.rule,
        scale=table.scale,
        search_range=_search_range(table),
        warnings=(
            *warnings_of(readings, evidence),
            *_warnings_of_request(gaps, target_width),
        ),
    )


def _search_range(table: LossTable) -> float:
    ends = to_scale(np.array([[grid[0], grid[-1]] for grid in table.grids]), table.scale)
    return float(ends[:, 1].max() - ends[:, 0].min())


def _warnings_of_request(gaps: Gaps, target_width: int | None) -> list[str]:
    found = []
    for name, infinity, values in (
        ("loss gap", gaps.infinity, gaps.loss_gap),
        ("hyperparameter gap", gaps.hp_infinity, gaps.hp_gap),
    ):
        if infinity == "limit" and np.isnan(values).all():
            found.append(f"no {name} against the limit: the table does not determine one")
    if target_width is not None and target_width in gaps.widths:
        found.append(
            f"target width {target_width} is in the table: the forecast there is what all widths "
            "say together, not what was measured"
        )
    return found


def _gather(readings: Readings, confidence: float) -> Evidence:
    loss, hp = readings.fit_loss(confidence), readings.fit_optimum(confidence)
    advantage, chance = rate_advantage(loss, hp, confidence)
    curvature = _curvature_exponent(readings, confidence)
    root = readings.fit_root(confidence)
    usable = np.flatnonzero(readings.usable)
    places = np.arange(readings.usable.size)
    left_out = [places != k for k in usable] if usable.size >= 5 else []
    losses = [readings.fit_loss(confidence, which) for which in left_out]
    optima = [readings.fit_optimum(confidence, which) for which in left_out]
    # A root without its rate needs no refits.
    roots = [] if root.degenerate else [readings.fit_root(confidence, w) for w in left_out]
    turning = [
        int(readings.table.widths[k])
        for k, a, b in zip(usable, losses, optima, strict=False)
        if (2 * b.exponent - a.exponent) * advantage.value < 0
    ]
    return Evidence(
        loss=loss,
        hp=hp,
        root=root,
        curvature=curvature,
        advantage=advantage,
        kappa=_difference(curvature, advantage),
        probability_fast=chance,
        turning_widths=tuple(turning),
        resampled=_resampled(readings, (loss, hp, root), (losses, optima, roots)),
    )


def _resampled(
    readings: Readings,
    fits: tuple[PowerLaw, PowerLaw, PowerLaw],
    left_out: tuple[list[PowerLaw], list[PowerLaw], list[PowerLaw]],
) -> dict[str, ResampledIntervals]:
    """Of α, β and the rate of c_n, twice that of its root."""
    drawn = readings.drawn_coordinate
    roots = None if drawn is None else readings.s(drawn)
    found = {}
    for name, fit, draws, without, resolution, lowest in (
        ("alpha", fits[0], readings.drawn_loss, left_out[0], readings.loss_resolution,
         0.0 if readings.table.nonnegative else -math.inf),
        ("beta", fits[1], drawn, left_out[1], readings.resolution, -math.inf),
        ("c_rate", fits[2], roots, left_out[2], readings.root_resolution, -math.inf),
    ):  # fmt: skip
        both = (
            _bootstrap(readings, fit, draws, resolution, lowest),
            jackknife_interval(fit, without),
        )
        times = 2 if name == "c_rate" else 1
        found[name] = ResampledIntervals(*((times * low, times * high) for low, high in both))
    return found


def _bootstrap(
    readings: Readings, fit: PowerLaw, drawn: FloatArray | None, resolution: float, lowest: float
) -> Interval:
    which = readings.usable
    variances, _ = readings.variances(drawn, which)
    if fit.degenerate or drawn is None or variances is None:
        return UNKNOWN
    moved = drawn[:, which]
    moved = moved[np.isfinite(moved).all(axis=1)]
    least = np.finfo(np.float64).eps * np.abs(moved).max()
    refits = refit_exponents(
        readings.table.widths[which],
        moved,
        variances + resolution**2 + least**2,
        fit.exponents,
        lowest,
    )
    # Seeds are resampled for all widths at once: each is one observation, however many widths.
    return bootstrap_interval(fit, refits, readings.dof_per_width)


def rate_advantage(
    loss: PowerLaw, optimum: PowerLaw, confidence: float = 0.9
) -> tuple[Estimate, float]:
    """`ρ = 2β − α` and the probability that it is positive, by the profile of the two fits.

    Args:
      loss: fit of `phi*_n`, exponent α.
      optimum: fit of `x*(n)`, exponent β.
      confidence: level of the interval, which is clipped to [−4, 8].

    Returns:
      NaNs where α is not determined; where only β is not, the probability alone.
    """
    if loss.degenerate or optimum.deviance.size == 0:
        return Estimate(math.nan), math.nan
    dof = min(loss.dof, optimum.dof)
    alpha = loss.exponents
    beta = float(optimum.exponents[np.argmin(optimum.deviance)])
    best = 2 * beta - float(alpha[np.argmin(loss.deviance)])
    rho = refined(_RHO, best) if _RHO[0] < best < _RHO[-1] else _RHO
    other = np.interp((rho[:, None] + alpha) / 2, optimum.exponents, optimum.deviance)
    profile = (loss.deviance + other).min(axis=1)
    distance = math.sqrt(float(np.interp(0.0, rho, profile)))
    chance = float(stats.t.cdf(math.copysign(distance, best), dof))
    if optimum.degenerate:
        return Estimate(math.nan), chance
    threshold = float(stats.t.ppf((1 + confidence) / 2, dof)) ** 2
    return Estimate(best, crossings(rho, profile, threshold, best)), chance


def _curvature_exponent(readings: Readings, confidence: float) -> Estimate:
    known = readings.usable & (readings.curvature > 0)
    drawn = readings.drawn_curvature
    variances = None
    if drawn is not None and known.sum() >= 3:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(drawn > 0, np.log(drawn), np.nan)
        # A curvature that half the draws do not show is not known at all.
        known &= np.isfinite(logs).mean(axis=0) > 0.5
        variances, _ = readings.variances(logs, known)
    if known.sum() < 3:
        return Estimate(math.nan)
    dof = readings.noise_dof(known)
    value, interval = fit_slope(
        readings.table.widths[known],
        readings.curvature[known],
        variances=variances,
        dof=dof,
        confidence=confidence,
    )
    return Estimate(value, interval)


def _difference(first: Estimate, second: Estimate) -> Estimate:
    """`first − second` of independent estimates (MOVER, Zou and Donner 2008)."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.interval[0], second.interval[1] - second.value)
    high = value + math.hypot(first.interval[1] - first.value, second.value - second.interval[0])
    return Estimate(value, (low, high))


def _t(readings: Readings, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, readings.dof_per_width))


def _optimal_hp(readings: Readings, confidence: float) -> tuple[Estimate, ...]:
    scale = readings.table.scale
    drawn = readings.drawn_coordinate
    centre = from_scale(readings.coordinate, scale)
    if drawn is None:
        return tuple(Estimate(float(value)) for value in centre)
    half = _t(readings, confidence) * drawn.std(axis=0)
    low, high = from_scale(readings.low - half, scale), from_scale(readings.high + half, scale)
    return _estimates(centre, low, high)


def _optimal_loss(readings: Readings, confidence: float) -> tuple[Estimate, ...]:
    drawn = readings.drawn_loss
    if drawn is None:
        return tuple(Estimate(float(value)) for value in readings.loss)
    half = _t(readings, confidence) * np.where(np.isfinite(drawn), drawn, np.nan).std(axis=0)
    return _estimates(readings.loss, readings.loss - half, readings.loss + half)


def _estimates(values: FloatArray, low: FloatArray, high: FloatArray) -> tuple[Estimate, ...]:
    return tuple(
        Estimate(float(v), UNKNOWN if math.isnan(a) or math.isnan(b) else (float(a), float(b)))
        for v, a, b in zip(values, low, high, strict=True)
    )


def _root_moves(readings: Readings) -> tuple[FloatArray, FloatArray]:
    """`s(x*(n)) − s(x*(N))` and its standard deviation, per width; NaN deviation without seeds."""
    value = readings.s(readings.coordinate)
    if readings.drawn_coordinate is None:
        return value, np.full(value.size, math.nan)
    drawn = readings.s(readings.drawn_coordinate)
    drawn = np.where(np.isfinite(drawn), drawn, np.nan)
    return value, (drawn - drawn[:, -1:]).std(axis=0)


def _penalty(readings: Readings, confidence: float) -> Estimate:
    """`c` of the smallest width at the largest, its interval squared from that of the root.

    Unknown where one of the two optima is not bracketed: both may be further out.
    """
    if readings.table.widths.size < 2 or not readings.usable[[0, -1]].all():
        return Estimate(math.nan)
    moves, deviation = _root_moves(readings)
    value, half = float(moves[0]), math.nan
    if readings.drawn_coordinate is not None:
        half = _t(readings, confidence) * float(deviation[0])
    return Estimate(value**2, _squared(value, half))


def _squared(value: float, half: float) -> Interval:
    if math.isnan(half) or math.isinf(value):
        return UNKNOWN
    return max(abs(value) - half, 0.0) ** 2, (abs(value) + half) ** 2


def _probability_negligible(readings: Readings, evidence: Evidence, confidence: float) -> float:
    """Probability that c_n < 5 % of a_n at every width but the largest; NaN where unknown."""
    usable = readings.usable
    if (
        evidence.loss.degenerate
        or readings.drawn_coordinate is None
        or not usable.all()
        or usable.size < 4
    ):
        return math.nan
    moves, deviation = _root_moves(readings)
    gaps = evidence.loss.prefactor * readings.table.widths[:-1] ** -evidence.loss.exponent
    room = np.sqrt(NEGLIGIBLE * gaps) - np.abs(moves[:-1])
    spread = np.hypot(deviation[:-1], readings.root_resolution)
    return float(stats.t.cdf(room / np.maximum(spread, 1e-300), readings.dof_per_width).min())
