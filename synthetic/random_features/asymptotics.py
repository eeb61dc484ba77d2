"""Asymptotic risk of random-features ridge regression; infinite width in closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from synthetic.random_features.activations import ActivationLike, Moments
from synthetic.random_features.fixed_point import risk_at_fixed_point
from synthetic.random_features.problem import (
    Real,
    broadcast_shape,
    checked,
    in_float64,
    make_problem,
    student_moments,
    teacher_moments,
)

__all__ = [
    "InfiniteWidth",
    "asymptotic_risk",
    "infinite_width",
    "infinite_width_of",
    "no_finite_optimum",
]

# Rounding of the quadrature.
_NO_LINEAR_PART = 1e-14


def asymptotic_risk(
    ridge: Real,
    *,
    psi1: Real,
    psi2: Real,
    noise_std: Real,
    student: ActivationLike = "tanh",
    teacher: ActivationLike = "relu",
) -> Any:
    """Test risk R(λ) = E (y − f(x))² of random-features ridge regression as d → ∞.

    Data: x ~ N(0, I_d), y = σ*(⟨x, β*⟩) + ε, ‖β*‖ = 1, Var ε = σ_ε², N samples. Model:
    f(x) = ⟨a, σ(W x)⟩/√n with W_ij ~ N(0, 1/d), and a minimises Σ (y − f)² + λ ‖a‖² over the
    samples. N/d → ψ1, n/d → ψ2. σ and σ* are centred and given unit variance under N(0, 1). R
    includes the label noise σ_ε²: the excess risk that GWB's Figure 2 plots is R − σ_ε².

    Not in closed form for finite ψ2 (one scalar equation, :mod:`.fixed_point`), in closed form for
    ψ2 = ∞ (:class:`InfiniteWidth`). Relative error below 1e-9 for λ from 1e-6 to 1e4, ψ1 from 0.1
    to 100, ψ2 from 0.05 to 1e6 and infinite; other positive values are accepted.

    Args:
      ridge: λ > 0, in natural units.
      psi1: ψ1 = N/d > 0.
      psi2: ψ2 = n/d > 0, or `math.inf`.
      noise_std: σ_ε ≥ 0. These four broadcast against one another.
      student: σ, odd up to a constant: a name, a function of arrays, or an `Activation`.
      teacher: σ*, likewise, of any parity.

    Returns:
      R, shape of the arguments broadcast: NumPy float64 whatever JAX's global precision. Where JAX
      traces an argument (`jax.grad`, `jit`, `vmap`) the result is traced, computed in float64 and
      rounded to the argument's type: call under `jax.enable_x64(True)` for all digits. Derivatives
      are those of the implicit function, of any order.

    Raises:
      ValueError: λ ≤ 0, ψ ≤ 0, σ_ε < 0, NaN; a student that is not odd; shapes that do not
        broadcast.

    Source: GWB (arXiv 2512.22768), Theorem 3, after Mei and Montanari (arXiv 1908.05355).
    """
    sigma, sigma_star = student_moments(student), teacher_moments(teacher)
    arguments = {
        "ridge": checked("ridge", ridge),
        "psi1": checked("psi1", psi1),
        "psi2": checked("psi2", psi2, infinite=True),
        "noise_std": checked("noise_std", noise_std, zero=True),
    }
    broadcast_shape(**arguments)

    def risk(ridge: Any, psi1: Any, psi2: Any, noise_std: Any) -> Any:
        problem = make_problem(
            psi1=psi1, psi2=psi2, noise_std=noise_std, student=sigma, teacher=sigma_star
        )
        return _risk(ridge, problem)

    return in_float64(risk, *arguments.values())


@jax.jit
def _risk(ridge: jax.Array, problem: Any) -> jax.Array:
    return risk_at_fixed_point(ridge, problem)


@dataclasses.dataclass(frozen=True)
class InfiniteWidth:
    """The limit ψ2 → ∞ in closed form, at its best ridge.

    With t = 1 + μ1² ψ1 m1 and S(t) = ψ1 t² − (t − 1)²,

        λ(t) = μ1² ψ1/(t − 1) − μ1²/t − μ2²,    R_∞ = ψ1 (A t² + B)/S(t),

    where A = μ2*² + σ_ε² and B = μ1*². R_∞ is least where A t² − (A + B (ψ1 − 1)) t − B = 0, and
    there λ = μ1² A/B − μ2², which does not depend on ψ1.

    Attributes:
      psi1: ψ1.
      linear2: μ1² of the student.
      nonlinear2: μ2² of the student.
      A: as above.
      B: as above.
      t: the best t, above 1.
      ridge: λ*(∞) = μ1² A/B − μ2². Where it is negative it is no ridge: there the student fits the
        linear part of the teacher best with less shrinkage than its own μ2² already gives.
      risk: R_∞ at `ridge`, label noise included.
    """

    psi1: float
    linear2: float
    nonlinear2: float
    A: float
    B: float
    t: float
    ridge: float
    risk: float

    def S(self, t: Any) -> Any:  # noqa: N802
        """The limit's ψ1 t² − (t − 1)²."""
        return self.psi1 * t**2 - (t - 1) ** 2

    def excess(self, t: Any) -> Any:
        """R_∞(t) − R_∞(t*) without cancellation: ψ1 (A t* + B/t*)(t − t*)²/(S(t) S(t*))."""
        factor = self.psi1 * (self.A * self.t + self.B / self.t) / self.S(self.t)
        return factor * (t - self.t) ** 2 / self.S(t)


def infinite_width(
    *,
    psi1: float,
    noise_std: float,
    student: ActivationLike = "tanh",
    teacher: ActivationLike = "relu",
) -> InfiniteWidth:
    """The limit ψ2 → ∞ at its best ridge, in closed form; arguments as in `asymptotic_risk`.

    Raises:
      ValueError: as `asymptotic_risk`; also where no finite ridge is best, because the student or
        the teacher has no linear part, or there is nothing but a linear part to fit (A = 0).
    """
    return infinite_width_of(
        _number("psi1", checked("psi1", psi1)),
        _number("noise_std", checked("noise_std", noise_std, zero=True)),
        student_moments(student),
        teacher_moments(teacher),
    )


def infinite_width_of(
    psi1: float, noise_std: float, student: Moments, teacher: Moments
) -> InfiniteWidth:
    """The same from moments that are known."""
    a, b = student.linear2, student.nonlinear2
    A, B = teacher.nonlinear2 + noise_std**2, teacher.linear2
    if reason := no_finite_optimum(student, teacher):
        raise ValueError(f"{reason}; pass other activations.")
    if A == 0:
        raise ValueError(
            "noise_std is 0 and the teacher is linear: the best ridge is negative and the risk 0; "
            "pass a noise_std above 0, or a non-linear teacher."
        )
    middle = A + B * (psi1 - 1)
    root = math.hypot(middle, 2 * math.sqrt(A * B))
    # Of the two forms of the root the one that adds numbers of one sign.
    t = (middle + root) / (2 * A) if middle > 0 else 2 * B / (root - middle)
    risk = psi1 * (A * t**2 + B) / (psi1 * t**2 - (t - 1) ** 2)
    return InfiniteWidth(psi1, a, b, A, B, t, a * A / B - b, risk)


def no_finite_optimum(student: Moments, teacher: Moments) -> str:
    """Why every finite ridge is worse than an infinite one; empty where that is not so."""
    for role, values in (("student", student), ("teacher", teacher)):
        if values.linear2 < _NO_LINEAR_PART:
            return (
                f"the {role} has no linear part (μ1² = {values.linear2:.1e}), so with N and n "
                "proportional to d nothing can be learned and the best ridge is infinite"
            )
    return ""


def _number(name: str, value: Any) -> float:
    if np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; expected one number.")
    return float(value)
