"""The fixed point of random-features ridge regression, reduced to one monotone equation.

GWB (arXiv 2512.22768, Theorem 3) follow Mei and Montanari (arXiv 1908.05355): m1, m2 > 0 solve

    (1/ψ1)(m1 − m2) v + μ1² m1 m2 u = 0,         u = λ m1 − 1,  v = μ2² m1 + μ1² m2,
    μ1² m1 m2 (1 + η u) = (m1 − m2)/ψ1,          η = ψ1/ψ2.

Eliminating m1 − m2 leaves u + v + η u v = 0, that is (1 + η u)(1 + η v) = 1. With

    p = 1 + η u,   s = p m1,   t = 1 + μ1² ψ1 s,   g(s) = μ2² s + μ1² s/t,   e = −u = 1 − λ m1,

the second equation reads m2 = m1/t, the eliminated one g = −u, and so (writing e for 1 − g)

    λ s = e p,    e = 1 − g(s),    p = 1 − η g(s).                                            (*)

**Exactly one positive solution.** p ≤ 0 is impossible: p = 0 makes m1 = m2 and then u = 0, p = 1;
p < 0 needs g > 1/η > 0, while g = p v < 0. So s > 0, and 1 − λ m1 = g > 0 gives e = λ m1 > 0. On
the interval where e and p are positive the right side of (*) falls from 1 to 0 (g grows from 0),
and the left side grows from 0: they meet once.

**Solving it.** One of e, p may be tiny and the other is then not. With κ = min(η, 1/η) and
ζ = max(1, η), the smaller of the two, w, obeys w (1 − κ + κ w) = λ s, which gives it without
cancellation, and what is left to solve is

    h(s) = ζ g(s) + w(λ s) − 1 = 0,    h increasing and concave,

for which Newton's method from any point left of the root climbs to it without overshooting. Since
g(s) ≤ s, the root of λ s = (1 − s)(1 − η s) is such a point.

**Risk.** Differentiating (*) by λ in R = −(A m1' + B m2')/m1², everything that cancels has been
cancelled, and with g' = μ2² + μ1²/t²

    R = [A (p + η s g') + B (p/t² + η s g'/t)] / [e p + s g' (p + η e)],

a quotient of sums of positive terms. It is a rational function of s, as is λ = e p/s.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "Problem",
    "gap_at",
    "risk_at",
    "risk_at_fixed_point",
    "smallest_scale",
    "solve_fixed_point",
    "t_of",
]

# Where g saturates, the slowest case, Newton doubles s at every step, and s starts less than 2^60
# below the root; else a handful of steps suffices.
_MOST_STEPS = 200

_Climb = tuple[jax.Array, jax.Array, jax.Array]


class Problem(NamedTuple):
    """The numbers the asymptotics depend on, besides λ; arrays of one shape, float64.

    Attributes:
      psi1: ψ1 = N/d, samples per input dimension.
      eta: η = ψ1/ψ2 = N/n, samples per feature; 0 at infinite width.
      linear2: μ1² of the student.
      nonlinear2: μ2² = 1 − μ1² of the student.
      A: μ2*² + σ_ε², what no linear function of x explains.
      B: μ1*² of the teacher, what one does.
    """

    psi1: jax.Array
    eta: jax.Array
    linear2: jax.Array
    nonlinear2: jax.Array
    A: jax.Array
    B: jax.Array


def t_of(s: jax.Array, problem: Problem) -> jax.Array:
    """t = 1 + μ1² ψ1 s."""
    return 1 + problem.linear2 * problem.psi1 * s


def g_of(s: jax.Array, problem: Problem) -> jax.Array:
    """g(s) = μ2² s + μ1² s/t."""
    return s * (problem.nonlinear2 + problem.linear2 / t_of(s, problem))


def _slope(s: jax.Array, problem: Problem) -> jax.Array:
    """g'(s) = μ2² + μ1²/t²."""
    return problem.nonlinear2 + problem.linear2 / t_of(s, problem) ** 2


def _kappa_zeta(eta: jax.Array) -> tuple[jax.Array, jax.Array]:
    # `where`, not `minimum`, whose derivative at η = 1 is the mean of its two sides: either branch
    # is right on both sides of 1, their mean is not.
    wide = eta <= 1
    inverse = 1 / jnp.where(wide, 1.0, eta)
    return jnp.where(wide, eta, inverse), jnp.where(wide, 1.0, eta)


def _smaller_factor(y: jax.Array, kappa: jax.Array) -> jax.Array:
    """The positive root w of w (1 − κ + κ w) = y."""
    return 2 * y / (1 - kappa + jnp.sqrt((1 - kappa) ** 2 + 4 * kappa * y))


def _h(s: jax.Array, ridge: jax.Array, problem: Problem) -> jax.Array:
    kappa, zeta = _kappa_zeta(problem.eta)
    return zeta * g_of(s, problem) + _smaller_factor(ridge * s, kappa) - 1


def _h_slope(s: jax.Array, ridge: jax.Array, problem: Problem) -> jax.Array:
    kappa, zeta = _kappa_zeta(problem.eta)
    w = _smaller_factor(ridge * s, kappa)
    return zeta * _slope(s, problem) + ridge / (1 - kappa + 2 * kappa * w)


def smallest_scale(ridge: jax.Array, eta: jax.Array) -> jax.Array:
    """The root of λ s = (1 − s)(1 − η s): a lower bound of s, from which Newton climbs."""
    # The root of the discriminant, as two factors: ridge² would overflow.
    root = jnp.sqrt(eta)
    distance = jnp.sqrt(ridge + (1 - root) ** 2) * jnp.sqrt(ridge + (1 + root) ** 2)
    return 2 / (1 + eta + ridge + distance)


@jax.custom_jvp
def solve_fixed_point(ridge: jax.Array, problem: Problem) -> jax.Array:
    """The solution s > 0 of λ s = (1 − g(s))(1 − η g(s)), for λ > 0; see the module.

    Derivatives, of any order and in both modes, are those of the implicit function.
    """

    def climb(state: _Climb) -> _Climb:
        s, _, steps = state
        new = s - _h(s, ridge, problem) / _h_slope(s, ridge, problem)
        # In exact arithmetic every step goes up; the first that does not is rounding.
        climbing = new > s * (1 + 2 * jnp.finfo(s.dtype).eps)
        return jnp.where(new > s, new, s), climbing, steps + 1

    def unfinished(state: _Climb) -> jax.Array:
        _, climbing, steps = state
        return climbing.any() & (steps < _MOST_STEPS)

    start = smallest_scale(ridge, problem.eta)
    return jax.lax.while_loop(
        unfinished, climb, (start, jnp.ones_like(start, dtype=bool), jnp.int32(0))
    )[0]


@solve_fixed_point.defjvp
def _solve_fixed_point_jvp(
    primals: tuple[jax.Array, Problem], tangents: tuple[jax.Array, Problem]
) -> tuple[jax.Array, jax.Array]:
    ridge, problem = primals
    s = solve_fixed_point(ridge, problem)
    _, change = jax.jvp(lambda ridge, problem: _h(s, ridge, problem), primals, tangents)
    return s, -change / _h_slope(s, ridge, problem)


def _risk(s: jax.Array, e: jax.Array, p: jax.Array, problem: Problem) -> jax.Array:
    t, eta = t_of(s, problem), problem.eta
    moved = s * _slope(s, problem)
    numerator = problem.A * (p + eta * moved) + problem.B * (p / t + eta * moved) / t
    return numerator / (e * p + moved * (p + eta * e))


def risk_at_fixed_point(ridge: jax.Array, problem: Problem) -> jax.Array:
    """R(λ), label noise included."""
    s = solve_fixed_point(ridge, problem)
    kappa, _ = _kappa_zeta(problem.eta)
    w = _smaller_factor(ridge * s, kappa)
    other = 1 - kappa + kappa * w
    wide = problem.eta <= 1
    return _risk(s, jnp.where(wide, w, other), jnp.where(wide, other, w), problem)


def risk_at(s: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """R and λ as explicit functions of s: (R, λ).

    For one η, s ↦ λ is one to one, so the best λ may be looked for over s.
    """
    g = g_of(s, problem)
    e, p = 1 - g, 1 - problem.eta * g
    return _risk(s, e, p, problem), e * p / s


def gap_at(s: jax.Array, problem: Problem) -> jax.Array:
    """R_η(s) − R_0(s), not as a difference of close numbers.

    Numerator and denominator of R are linear in η, N0 + η N1 and D = D0 + η D1, so it is
    η (N1 D0 − N0 D1)/(D D0).
    """
    t, g, moved = t_of(s, problem), g_of(s, problem), s * _slope(s, problem)
    A, B, eta = problem.A, problem.B, problem.eta
    # s g' − g = −μ1² s (t − 1)/t²
    flat = -problem.linear2 * s * (t - 1) / t**2
    N0, N1 = A + B / t**2, A * flat + B * (moved - g / t) / t
    D0 = 1 + flat
    D1 = moved * (1 - 2 * g) - g * (1 - g)
    return eta * (N1 * D0 - N0 * D1) / ((D0 + eta * D1) * D0)
