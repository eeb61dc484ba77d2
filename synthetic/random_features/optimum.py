"""The best ridge at every width, and the three gaps whose rates GWB's Theorem 3 gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike, NDArray

from synthetic.random_features.activations import ActivationLike
from synthetic.random_features.asymptotics import infinite_width_of, no_finite_optimum
from synthetic.random_features.fixed_point import (
    Problem,
    gap_at,
    risk_at_fixed_point,
    solve_fixed_point,
    t_of,
)
from synthetic.random_features.problem import (
    broadcast_shape,
    checked,
    in_float64,
    make_problem,
    student_moments,
    teacher_moments,
)

__all__ = ["OptimalRidge", "TransferGaps", "optimal_ridge", "transfer_gaps"]

# In every one of 4000 random problems the risk falls and then rises in λ, and the minimum, where it
# is not at 0, lies between 1e-3 and 1e4.1 times max(1, μ1² A/B); the search spans more.
_LOWEST, _HIGHEST, _PER_DECADE = -12, 7, 8
# A bracket of one grid step, halved until it is below the spacing of doubles.
_HALVINGS = 56


@dataclasses.dataclass(frozen=True)
class OptimalRidge:
    """The ridge of least asymptotic risk; all arrays of the shape of the arguments broadcast.

    Attributes:
      ridge: λ* ≥ 0; 0 or infinite where `at_boundary`.
      risk: R(λ*), label noise included; at a boundary the limit there.
      at_boundary: no positive finite ridge is best.
      reason: why, in a sentence; empty where no element is at a boundary.
    """

    ridge: Any
    risk: Any
    at_boundary: Any
    reason: str


def optimal_ridge(
    *,
    psi1: ArrayLike,
    psi2: ArrayLike,
    noise_std: ArrayLike,
    student: ActivationLike = "tanh",
    teacher: ActivationLike = "relu",
) -> OptimalRidge:
    """λ*(ψ2) = argmin R(λ) over λ ≥ 0; the model is that of `asymptotic_risk`.

    The sign of the exact derivative d R/d log λ is searched over 19 decades for where falling turns
    to rising, and bisected there to rounding.
    At ψ2 = ∞ it equals the closed form λ*(∞) = μ1² A/B − μ2² where that is positive.

    Args:
      psi1: ψ1 = N/d > 0.
      psi2: ψ2 = n/d > 0, or `math.inf`.
      noise_std: σ_ε ≥ 0. The three broadcast; they are concrete numbers (no gradient through the
        search: differentiate `asymptotic_risk`, or see `first_order_constants`).
      student: σ, odd up to a constant.
      teacher: σ*.

    Raises:
      ValueError: as `asymptotic_risk`.
      TypeError: a traced argument.
    """
    arguments = {
        "psi1": _concrete("psi1", psi1),
        "psi2": _concrete("psi2", psi2, infinite=True),
        "noise_std": _concrete("noise_std", noise_std, zero=True),
    }
    shape = broadcast_shape(**arguments)
    sigma, sigma_star = student_moments(student), teacher_moments(teacher)
    if reason := no_finite_optimum(sigma, sigma_star):
        null = sigma_star.linear2 + sigma_star.nonlinear2 + arguments["noise_std"] ** 2
        full = np.broadcast_to(null, shape).astype(np.float64)
        return OptimalRidge(
            np.full(shape, np.inf)[()], full[()], np.ones(shape, dtype=bool)[()], reason + "."
        )

    def search(psi1: Any, psi2: Any, noise_std: Any) -> Any:
        problem = make_problem(
            psi1=psi1, psi2=psi2, noise_std=noise_std, student=sigma, teacher=sigma_star
        )
        return _search(problem)

    ridge, risk, at_zero = in_float64(search, *arguments.values())
    reason = ""
    if np.any(at_zero):
        reason = (
            f"the risk increases with the ridge from 0 on at {int(np.sum(at_zero))} of "
            f"{np.size(at_zero)} problems: the best ridge would be negative, which the theory does "
            "not cover (the student's own μ2² regularises more than the noise asks for)."
        )
    return OptimalRidge(ridge, risk, at_zero, reason)


@jax.jit
def _search(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Natural logarithms of λ, in units of the limit's μ1² A/B.
    unit = jnp.log(jnp.maximum(1.0, problem.linear2 * problem.A / problem.B))
    decade = np.log(10.0)
    steps = jnp.arange(_LOWEST * _PER_DECADE, _HIGHEST * _PER_DECADE + 1) * decade / _PER_DECADE

    def risk(log_ridge: jax.Array) -> jax.Array:
        return risk_at_fixed_point(jnp.exp(log_ridge), problem)

    def risk_and_rise(log_ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = jax.jvp(risk, (log_ridge,), (jnp.ones_like(log_ridge),))
        return value, slope > 0

    values, rising = jax.lax.map(lambda step: risk_and_rise(unit + step), steps)
    # A minimum lies where falling turns to rising. The signs are exact where the values are flat to
    # rounding, which they are for tiny ridges.
    turns = ~rising[:-1] & rising[1:]
    best = jnp.argmin(jnp.where(turns, values[:-1], jnp.inf), axis=0)
    at_zero = rising[0] & (~turns.any(axis=0) | (values[0] <= values.min(axis=0)))
    low = unit + jnp.where(at_zero, steps[0], steps[best])

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        up = risk_and_rise(middle)[1]
        return jnp.where(up, low, middle), jnp.where(up, middle, high)

    high = low + decade / _PER_DECADE
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    log_ridge = jnp.where(at_zero, low, 0.5 * (low + high))
    return jnp.where(at_zero, 0.0, jnp.exp(log_ridge)), risk(log_ridge), at_zero


@dataclasses.dataclass(frozen=True)
class TransferGaps:
    """Loss gap, HP gap and transfer suboptimality against ψ2 (GWB, Section 2), all ≥ 0.

    Attributes:
      psi2: ψ2, shape (W,).
      ridge: λ*(ψ2).
      risk: R(λ*(ψ2)) at ψ2.
      loss_gap: a = R*(ψ2) − R*(∞) = Θ(1/ψ2).
      ridge_gap: b = |λ*(ψ2) − λ*(∞)| = O(1/ψ2); GWB's Figure 2 plots b/ψ1.
      suboptimality: c = R_∞(λ*(ψ2)) − R*(∞) = O(1/ψ2²).
      limit_ridge: λ*(∞).
      limit_risk: R*(∞).
    """

    psi2: NDArray[np.float64]
    ridge: NDArray[np.float64]
    risk: NDArray[np.float64]
    loss_gap: NDArray[np.float64]
    ridge_gap: NDArray[np.float64]
    suboptimality: NDArray[np.float64]
    limit_ridge: float
    limit_risk: float


def transfer_gaps(
    psi2: ArrayLike,
    *,
    psi1: float,
    noise_std: float,
    student: ActivationLike = "tanh",
    teacher: ActivationLike = "relu",
) -> TransferGaps:
    """The three gaps at every ψ2, free of cancellation: relative error below 1e-6 at ψ2 = 1e6.

    R_η(s) − R_0(s) is η times a ratio without differences of close numbers, and R_0(s) − R_0(s*) is
    a square (`InfiniteWidth.excess`): neither risk is subtracted from the other.

    Args:
      psi2: ψ2 > 0, shape (W,); finite.
      psi1: ψ1 = N/d > 0.
      noise_std: σ_ε ≥ 0.
      student: σ, odd up to a constant.
      teacher: σ*.

    Raises:
      ValueError: as `optimal_ridge`; also where λ*(∞) or a λ*(ψ2) is not positive: the theorem
        assumes an interior optimum.
    """
    widths = np.atleast_1d(_concrete("psi2", psi2))
    if widths.ndim != 1:
        raise ValueError(f"psi2 has shape {widths.shape}; expected one axis.")
    best = optimal_ridge(
        psi1=psi1, psi2=widths, noise_std=noise_std, student=student, teacher=teacher
    )
    sigma, sigma_star = student_moments(student), teacher_moments(teacher)
    limit = infinite_width_of(float(psi1), float(noise_std), sigma, sigma_star)
    require_interior(limit.ridge)

    def gaps(psi2: Any, ridge: Any) -> Any:
        at = make_problem(
            psi1=jnp.full_like(psi2, psi1),
            psi2=psi2,
            noise_std=noise_std,
            student=sigma,
            teacher=sigma_star,
        )
        return _gap_parts(ridge, at)

    width_part, t_here, t_transferred = in_float64(gaps, widths, best.ridge)
    return TransferGaps(
        psi2=widths,
        ridge=best.ridge,
        risk=best.risk,
        loss_gap=width_part + limit.excess(t_here),
        ridge_gap=np.abs(best.ridge - limit.ridge),
        suboptimality=limit.excess(t_transferred),
        limit_ridge=limit.ridge,
        limit_risk=limit.risk,
    )


@jax.jit
def _gap_parts(ridge: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R_η(s) − R_0(s) and t at the problem's optimum, and t of its ridge at infinite width."""
    s = solve_fixed_point(ridge, problem)
    limit = problem._replace(eta=jnp.zeros_like(problem.eta))
    return gap_at(s, problem), t_of(s, problem), t_of(solve_fixed_point(ridge, limit), limit)


def require_interior(ridge: float) -> None:
    """Refuse a problem whose limit has no positive best ridge.

    Raises:
      ValueError: λ*(∞) ≤ 0.
    """
    if ridge <= 0:
        raise ValueError(
            f"λ*(∞) = μ1² A/B − μ2² is {ridge:.6g}: the best ridge at infinite width is not "
            "positive, and the theorem assumes an interior optimum. Raise noise_std, or take a "
            "student closer to linear."
        )


def _concrete(name: str, value: ArrayLike, *, infinite: bool = False, zero: bool = False) -> Any:
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} is traced by JAX; the search for the optimum takes concrete numbers. "
            "Differentiate asymptotic_risk instead."
        )
    return checked(name, value, infinite=infinite, zero=zero)
