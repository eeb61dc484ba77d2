"""First-order constants of the optimum in η = ψ1/ψ2, and an erratum to the published ones.

R*(ψ2) = R*(∞) + C_η η + O(η²) and λ*(ψ2) = λ*(∞) + C_λ η + O(η²).

**Derivation.** In the variable s of :mod:`.fixed_point`, risk and ridge are explicit functions
R(s, η) and λ(s, η), and for every η s ↦ λ is one to one; so the optimum over λ is the optimum over
s. By the envelope theorem C_η = ∂R/∂η at the limit's best s, and with s*' = −R_sη/R_ss

    C_λ = ∂λ/∂η − (∂λ/∂s) R_sη/R_ss.

Write t = 1 + μ1² ψ1 s for the limit's optimum, the positive root of
A t² − (A + B (ψ1 − 1)) t − B = 0, and S = ψ1 t² − (t − 1)², P = μ1² + μ2² t, Q = μ1² + μ2² t². The
optimality condition eliminates B, and what remains factors:

    C_η = A P Q (t − 1)² / (μ1⁴ (ψ1 t − t + 1) S),
    C_λ = { S [Q² − 2 μ1² (t − 1) P] + 2 (t − 1)² P Q } / (μ1² ψ1 t³ (t − 1)).

C_η > 0 always: finite width costs. C_λ has no fixed sign; at the setting of GWB's Figure 2 it is
positive (narrow networks want more ridge), for a linear student and little noise it is negative.

**Erratum.** The constants printed in GWB (arXiv 2512.22768) are in error. At the setting of
Figure 2 (tanh student, ReLU teacher, ψ1 = 4, σ_ε = 1/4) they evaluate to C_η = 0.0694 and
C_λ = −0.0318; the fixed-point equations give 0.028618 and 0.204562, and Figure 2 agrees with the
latter (its λ* lies above its limit). One slip would be to drop the η-dependence of the first
equation, u + v = 0 in place of u + v + η u v = 0; with nothing else changed that gives 0.034717
(half the printed C_η) and 0, so it is not the whole of it. The theorem's rates do not change.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from synthetic.random_features.activations import ActivationLike
from synthetic.random_features.asymptotics import InfiniteWidth, infinite_width
from synthetic.random_features.fixed_point import Problem, risk_at
from synthetic.random_features.optimum import require_interior

__all__ = ["FirstOrderConstants", "first_order_constants"]


class FirstOrderConstants(NamedTuple):
    """Slopes in η = ψ1/ψ2 at infinite width.

    Attributes:
      C_eta: of the optimal risk; the loss gap is a = C_η ψ1/ψ2 + O(1/ψ2²).
      C_lambda: of the best ridge; the HP gap is b = |C_λ| ψ1/ψ2 + O(1/ψ2²).
    """

    C_eta: float
    C_lambda: float


def first_order_constants(
    *,
    psi1: float,
    noise_std: float,
    student: ActivationLike = "tanh",
    teacher: ActivationLike = "relu",
    method: Literal["closed form", "implicit"] = "closed form",
) -> FirstOrderConstants:
    """(C_η, C_λ), by the closed form or by implicit differentiation; see the module.

    The two routes share the fixed point only, and agree to rounding. Both differ from the printed
    constants, which are in error.

    Args:
      psi1: ψ1 = N/d > 0.
      noise_std: σ_ε ≥ 0.
      student: σ, odd up to a constant.
      teacher: σ*.
      method: "closed form", or "implicit" for derivatives of R(s, η) and λ(s, η) by JAX.

    Raises:
      ValueError: as `infinite_width`; λ*(∞) ≤ 0; an unknown method.
    """
    if method not in ("closed form", "implicit"):
        raise ValueError(f"method is {method!r}; expected 'closed form' or 'implicit'.")
    limit = infinite_width(psi1=psi1, noise_std=noise_std, student=student, teacher=teacher)
    require_interior(limit.ridge)
    return _closed_form(limit) if method == "closed form" else _implicit(limit)


def _closed_form(limit: InfiniteWidth) -> FirstOrderConstants:
    a, b, t, psi1, A = limit.linear2, limit.nonlinear2, limit.t, limit.psi1, limit.A
    S, P, Q = limit.S(t), a + b * t, a + b * t**2
    C_eta = A * P * Q * (t - 1) ** 2 / (a**2 * (psi1 * t - t + 1) * S)
    bracket = S * (Q**2 - 2 * a * (t - 1) * P) + 2 * (t - 1) ** 2 * P * Q
    return FirstOrderConstants(float(C_eta), float(bracket / (a * psi1 * t**3 * (t - 1))))


def _implicit(limit: InfiniteWidth) -> FirstOrderConstants:
    s = (limit.t - 1) / (limit.linear2 * limit.psi1)
    with jax.enable_x64(True):
        C_eta, C_lambda = _slopes(s, limit.psi1, limit.linear2, limit.nonlinear2, limit.A, limit.B)
    return FirstOrderConstants(float(C_eta), float(C_lambda))


@jax.jit
def _slopes(s: Any, psi1: Any, a: Any, b: Any, A: Any, B: Any) -> tuple[jax.Array, jax.Array]:
    def risk(s: Any, eta: Any) -> jax.Array:
        return risk_at(s, Problem(psi1, eta, a, b, A, B))[0]

    def ridge(s: Any, eta: Any) -> jax.Array:
        return risk_at(s, Problem(psi1, eta, a, b, A, B))[1]

    zero = jnp.zeros_like(s)
    risk_ss = jax.grad(jax.grad(risk))(s, zero)
    risk_sn = jax.grad(jax.grad(risk), argnums=1)(s, zero)
    C_eta = jax.grad(risk, argnums=1)(s, zero)
    C_lambda = jax.grad(ridge, argnums=1)(s, zero)
    return C_eta, C_lambda - jax.grad(ridge)(s, zero) * risk_sn / risk_ss
