"""The chain from convexity to fast transfer, as statements that can be run on families of losses.

For `phi_n → phi_∞` with minima `nu*(n)`, `nu*(∞)`, let `a_n`, `b_n`, `c_n` be the gaps of
`theory.gaps` and `ε_n = sup |phi_n − phi_∞|`, the sup over the hyperparameters that are searched.
After Ghosh, Wu and Bietti (GWB, arXiv 2512.22768, section 2):

1. `a_n ≤ ε_n` and `c_n ≤ 2 ε_n`: `phi_∞(nu*(n)) ≤ phi_n(nu*(n)) + ε_n ≤ phi_n(nu*(∞)) + ε_n ≤
   phi*_∞ + 2 ε_n`. Nothing is asked but a minimum.
2. With `μ ≤ phi_∞'' ≤ M` where the minima lie, `μ/2 b_n² ≤ c_n ≤ M/2 b_n²`: `c_n = Θ(b_n²)`.
3. Hence `b_n ≤ 2 sqrt(ε_n/μ)`: the optimum converges (weak transfer) once the losses do, uniformly.
   It is `O(sqrt(a_n))` **where `ε_n = O(a_n)`**: where no hyperparameter's loss converges more
   slowly than the best one. Without that it is false: a curve that moves sideways without sinking
   has `a_n = 0 < b_n`, see `sideways`.
4. Transfer is fast, `c_n = o(a_n)`, iff `b_n = o(sqrt(a_n))`, by 2.

The families below have known exponents and show that each step can be tight and that each
assumption is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ChainReport",
    "LossFamily",
    "check_chain",
    "flat_bottom",
    "moving_dip",
    "self_similar",
    "shifted_parabola",
    "sideways",
]

FloatArray = NDArray[np.float64]
Transfer = Literal["fast", "weak", "none"]

# Points of the grids on which minima and suprema are sought.
_GRID = 4001


@dataclass(frozen=True)
class LossFamily:
    """Losses `phi_n(nu)` with their limit and the exponents that `a_n`, `b_n`, `c_n` have.

    Attributes:
      name: short.
      loss: `(n, nu) -> phi_n(nu)`, `nu` of any shape.
      limit: `nu -> phi_∞(nu)`.
      domain: ends of the hyperparameters searched.
      alpha, beta, c_rate: exponents, `inf` for a gap that is zero, 0 for one that stays.
      transfer: what the definitions call it.
      curvature: `phi_∞''` at its minimum; 0 where there is no strong convexity.
    """

    name: str
    loss: Callable[[float, FloatArray], FloatArray]
    limit: Callable[[FloatArray], FloatArray]
    domain: tuple[float, float]
    alpha: float
    beta: float
    c_rate: float
    transfer: Transfer
    curvature: float


@dataclass(frozen=True)
class ChainReport:
    """What holds on a family, measured at widths (W,).

    Attributes:
      widths, loss_gap, hp_gap, suboptimality: n, a_n, b_n, c_n.
      uniform_gap: `ε_n`.
      alpha, beta, c_rate: slopes of the gaps over the second half of the widths.
      bounded_by_uniform_gap: step 1 holds at every width.
      quadratic: step 2: the ratio `c_n/b_n²` over the widths, smallest and largest.
      hp_gap_over_root: `b_n / sqrt(a_n)` per width: bounded if step 3's conclusion holds.
      ratio: `c_n / a_n` per width: it vanishes iff transfer is fast.
    """

    widths: FloatArray
    loss_gap: FloatArray
    hp_gap: FloatArray
    suboptimality: FloatArray
    uniform_gap: FloatArray
    alpha: float
    beta: float
    c_rate: float
    bounded_by_uniform_gap: bool
    quadratic: tuple[float, float]
    hp_gap_over_root: FloatArray
    ratio: FloatArray


def check_chain(family: LossFamily, widths: ArrayLike) -> ChainReport:
    """Measure the gaps of a family by minimising its losses, and test the chain on them.

    Args:
      family: closed forms; only its `loss`, `limit` and `domain` are used.
      widths: shape (W,), increasing, at least 4.

    Raises:
      ValueError: there are fewer than 4 widths, or they do not increase.
    """
    n = np.asarray(widths, dtype=np.float64)
    if n.ndim != 1 or n.size < 4 or not (np.diff(n) > 0).all() or n[0] < 1:
        raise ValueError(f"widths={n.tolist()} must be at least 4 increasing numbers from 1 on")
    low, high = family.domain
    best_limit = _minimise(family.limit, low, high)
    floor = float(family.limit(np.array([best_limit]))[0])
    a, b, c, uniform = (np.empty(n.size) for _ in range(4))
    for k, width in enumerate(n):

        def loss(nu: FloatArray, width: float = float(width)) -> FloatArray:
            return family.loss(width, nu)

        def closeness(nu: FloatArray, width: float = float(width)) -> FloatArray:
            return -np.abs(family.loss(width, nu) - family.limit(nu))

        best = _minimise(loss, low, high)
        at = np.array([best])
        a[k] = abs(float(loss(at)[0]) - floor)
        b[k] = abs(best - best_limit)
        c[k] = float(family.limit(at)[0]) - floor
        farthest = _minimise(closeness, low, high)
        uniform[k] = -float(closeness(np.array([farthest]))[0])
    rounding = 1e-12 * max(1.0, abs(floor))
    a[a <= rounding] = 0.0
    known = b > 1e-6
    ratios = c[known] / b[known] ** 2 if known.any() else np.array([math.nan])
    with np.errstate(divide="ignore", invalid="ignore"):
        over_root, ratio = b / np.sqrt(a), c / a
    return ChainReport(
        widths=n,
        loss_gap=a,
        hp_gap=b,
        suboptimality=c,
        uniform_gap=uniform,
        alpha=_exponent(n, a, rounding),
        beta=_exponent(n, b, 1e-7),
        c_rate=_exponent(n, c, rounding),
        bounded_by_uniform_gap=bool(
            (a <= uniform + rounding).all() and (c <= 2 * uniform + rounding).all()
        ),
        quadratic=(float(ratios.min()), float(ratios.max())),
        hp_gap_over_root=over_root,
        ratio=ratio,
    )


def shifted_parabola(alpha: float, beta: float, curvature: float = 1.0) -> LossFamily:
    """`μ/2 (nu − n^{-β})² + n^{-α}`: any α and β, so `c_n = μ/2 n^{-2β}`.

    A smooth perturbation of size `n^{-α}`, `phi_∞ + n^{-α} g(nu)`, is the case α = β: it moves the
    optimum by `O(n^{-α})`, which is why random features transfer fast (GWB, section 3). For β < α
    the losses converge uniformly as `n^{-β}` only, so nothing bounds `b_n` by `sqrt(a_n)`.
    """
    return LossFamily(
        name=f"shifted parabola, alpha {alpha:g}, beta {beta:g}",
        loss=lambda n, nu: curvature / 2 * (nu - n**-beta) ** 2 + n**-alpha,
        limit=lambda nu: curvature / 2 * nu**2,
        domain=(-2.0, 2.0),
        alpha=alpha,
        beta=beta,
        c_rate=2 * beta,
        transfer="fast" if beta > alpha / 2 else "weak",
        curvature=curvature,
    )


def self_similar(alpha: float, position: float = 0.5, curvature: float = 1.0) -> LossFamily:
    """`μ/2 nu² + n^{-α} (3 k − k·2s/(1+s²))`, `s = nu n^{α/2}`: weak transfer, no more.

    The perturbation has height `n^{-α}` and width `n^{-α/2}`, as narrow as step 3 allows: in s the
    loss is the same at all n, up to `n^{-α}`. With `k = μ p (1+p²)² / (2 (1−p²))` its minimum is at
    s = p, so `b_n = p n^{-α/2}` and `c_n = μ/2 p² n^{-α}`: a constant fraction of `a_n`.

    Args:
      alpha: α.
      position: p, in (0, 0.6].
      curvature: μ.
    """
    if not 0 < position <= 0.6:
        raise ValueError(f"position={position!r} must lie in (0, 0.6]: beyond, minima compete")
    p = position
    k = curvature * p * (1 + p**2) ** 2 / (2 * (1 - p**2))

    def loss(n: float, nu: FloatArray) -> FloatArray:
        s = nu * n ** (alpha / 2)
        return curvature / 2 * nu**2 + n**-alpha * k * (3 - 2 * s / (1 + s**2))

    return LossFamily(
        name=f"self-similar, alpha {alpha:g}",
        loss=loss,
        limit=lambda nu: curvature / 2 * nu**2,
        domain=(-2.0, 2.0),
        alpha=alpha,
        beta=alpha / 2,
        c_rate=alpha,
        transfer="weak",
        curvature=curvature,
    )


def sideways(beta: float, curvature: float = 1.0) -> LossFamily:
    """`μ/2 (nu − n^{-β})²`: the curve moves and does not sink, so `a_n = 0` and `b_n` is not.

    Weak transfer in which `b_n = O(sqrt(a_n))` fails: `ε_n ~ n^{-β}` is not `O(a_n)`.
    """
    return LossFamily(
        name=f"sideways, beta {beta:g}",
        loss=lambda n, nu: curvature / 2 * (nu - n**-beta) ** 2,
        limit=lambda nu: curvature / 2 * nu**2,
        domain=(-2.0, 2.0),
        alpha=math.inf,
        beta=beta,
        c_rate=2 * beta,
        transfer="weak",
        curvature=curvature,
    )


def flat_bottom(alpha: float) -> LossFamily:
    """`nu⁴/4 − n^{-α} (nu − 2)`: no strong convexity, `b_n = n^{-α/3}` and `c_n = n^{-4α/3}/4`.

    `b_n` falls more slowly than `sqrt(a_n)`, and still `c_n = o(a_n)`: without step 2, comparing β
    with α/2 misjudges transfer, and `c_n/a_n` itself has to be looked at.
    """
    return LossFamily(
        name=f"flat bottom, alpha {alpha:g}",
        loss=lambda n, nu: nu**4 / 4 - n**-alpha * (nu - 2),
        limit=lambda nu: nu**4 / 4,
        domain=(-1.5, 1.5),
        alpha=alpha,
        beta=alpha / 3,
        c_rate=4 * alpha / 3,
        transfer="fast",
        curvature=0.0,
    )


def moving_dip(gamma: float = 0.5, curvature: float = 1.0) -> LossFamily:
    """`μ/2 nu² − D max(0, 1 − n^{2γ} (nu − 1)²)`, `D = μ`: no transfer at all.

    The losses converge at every `nu ≠ 1`, but not uniformly: a dip around 1 narrows and keeps its
    depth, and the optimum, `2D n^{2γ}/(μ + 2D n^{2γ})`, goes to 1 while that of the limit is 0.
    """
    depth = curvature

    def loss(n: float, nu: FloatArray) -> FloatArray:
        dip = np.maximum(0, 1 - n ** (2 * gamma) * (nu - 1) ** 2)
        return curvature / 2 * nu**2 - depth * dip

    return LossFamily(
        name=f"moving dip, gamma {gamma:g}",
        loss=loss,
        limit=lambda nu: curvature / 2 * nu**2,
        domain=(-2.0, 2.0),
        alpha=0.0,
        beta=0.0,
        c_rate=0.0,
        transfer="none",
        curvature=curvature,
    )


def _minimise(function: Callable[[FloatArray], FloatArray], low: float, high: float) -> float:
    """The global minimum on an interval: a grid, then ever finer grids around its best point."""
    best = low
    while high - low > 1e-12 * _GRID:
        grid = np.linspace(low, high, _GRID)
        best = float(grid[np.argmin(function(grid))])
        step = (high - low) / (_GRID - 1)
        low, high = max(low, best - 2 * step), min(high, best + 2 * step)
    return best


def _exponent(n: FloatArray, gaps: FloatArray, rounding: float) -> float:
    """Slope over the larger widths; `inf` where the gap is rounding alone."""
    if (gaps <= rounding).all():
        return math.inf
    half = np.arange(n.size) >= n.size // 2
    usable = half & (gaps > rounding)
    if usable.sum() < 2:
        return math.nan
    return -float(np.polyfit(np.log(n[usable]), np.log(gaps[usable]), 1)[0])
