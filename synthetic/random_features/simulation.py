"""Random-features ridge regression of finite size, its test risk without a test set."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray
from scipy import interpolate, stats

from synthetic.random_features.activations import (
    Activation,
    ActivationLike,
    as_activation,
    expect,
    hermite_coefficients,
    moments,
    normalized_hermite,
)
from synthetic.random_features.problem import checked, student_moments

__all__ = ["SimulatedRisk", "simulate_risk"]

# Odd Hermite orders 1, 3, .. 23 of the test risk. What is left out is the weight beyond (1e-6 of
# tanh, 9 % of sign) times the 25th power of a correlation between features, about 1/√d each.
_ORDERS = 12
# Nodes in log‖w‖ of the interpolated coefficients: they are analytic in a strip of half width π/4.
_NODES = 48
# Feature matrices held at a time, in numbers: about what a processor's cache holds.
_BLOCK = 2**20
# For a minimum between grid points: quadratic convergence, and a bend that is none.
_NEWTON_STEPS, _FLAT = 12, 1e-12


@dataclasses.dataclass(frozen=True)
class SimulatedRisk:
    """Test risks of S independent networks and data sets at L ridges.

    Attributes:
      dimension: d.
      samples: N.
      features: n.
      noise_std: σ_ε.
      ridge: λ, shape (L,).
      risk: shape (S, L), label noise included; exact over the test distribution.
    """

    dimension: int
    samples: int
    features: int
    noise_std: float
    ridge: NDArray[np.float64]
    risk: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean over seeds, shape (L,)."""
        return self.risk.mean(axis=0)

    @property
    def standard_error(self) -> NDArray[np.float64]:
        """Of the mean, shape (L,)."""
        return self.risk.std(axis=0, ddof=1) / math.sqrt(len(self.risk))

    def best_ridge(self) -> tuple[float, float]:
        """The ridge at which the mean risk is least, and its standard error.

        The minimum of the cubic spline in log λ through the grid's points; its error from leaving
        out one seed at a time (jackknife).

        Raises:
          ValueError: the grid has fewer than 3 points, or the minimum lies at its edge.
        """
        total, count = self.risk.sum(axis=0), len(self.risk)
        best = _argmin(self.ridge, (total / count)[None])[0]
        each = _argmin(self.ridge, (total - self.risk) / (count - 1))
        error = math.sqrt((count - 1) / count * float(np.sum((each - each.mean()) ** 2)))
        return float(np.exp(best)), float(np.exp(best) * error)


def simulate_risk(
    ridge: ArrayLike,
    *,
    dimension: int,
    samples: int,
    features: int,
    noise_std: float,
    student: ActivationLike = "tanh",
    teacher: ActivationLike = "relu",
    seeds: int = 16,
    key: int = 0,
) -> SimulatedRisk:
    """Ridge regression on n random features of N samples, for every ridge and seed at once.

    The model is that of `asymptotic_risk` with N/d = ψ1 and n/d = ψ2. One eigendecomposition of
    the smaller Gram matrix serves all ridges; seeds are vmapped in blocks; everything is float64
    whatever JAX's global precision.

    The test risk is an expectation over x in closed form, not an average over test points:
    with c_k(r) = E[σ(r z) He_k(z)]/√k! (interpolated in log r), ρ_ij the cosine of w_i and w_j and
    c*_k the teacher's coefficients, Mehler's formula gives

        E σ(⟨w_i, x⟩) σ(⟨w_j, x⟩) = Σ_k c_k(‖w_i‖) c_k(‖w_j‖) ρ_ij^k,
        E σ(⟨w_i, x⟩) σ*(⟨β, x⟩) = Σ_k c_k(‖w_i‖) c*_k ρ_iβ^k,

    summed over the odd k below 25; the diagonal (ρ = 1) is summed exactly, as E σ(r z)².

    Args:
      ridge: λ > 0, shape (L,) or a number.
      dimension: d, at least 4.
      samples: N.
      features: n.
      noise_std: σ_ε ≥ 0.
      student: σ, odd up to a constant, a JAX function if not a name.
      teacher: σ*, a JAX function if not a name.
      seeds: S, at least 2: each draws W, the samples and the noise afresh. β is the first axis,
        which costs no generality: W and x are isotropic.
      key: of the random numbers.

    Raises:
      ValueError: a number out of range; a student that is not odd.
      TypeError: an activation that JAX cannot trace.
    """
    for name, value, least in (
        ("dimension", dimension, 4),
        ("samples", samples, 1),
        ("features", features, 1),
        ("seeds", seeds, 2),
    ):
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}.")
    ridges = np.atleast_1d(checked("ridge", ridge))
    if ridges.ndim != 1:
        raise ValueError(f"ridge has shape {ridges.shape}; expected one axis.")
    noise = float(checked("noise_std", noise_std, zero=True))
    sigma, sigma_star = as_activation(student, "student"), as_activation(teacher, "teacher")
    student_moments(sigma)
    low, high, series = _coefficients_by_norm(sigma, int(dimension))
    targets = hermite_coefficients(sigma_star, 2 * _ORDERS, normalize=True)[1::2]
    seeds = int(seeds)
    block = max(1, min(seeds, _BLOCK // (samples * features + min(samples, features) ** 2)))
    blocks = math.ceil(seeds / block)
    with jax.enable_x64(True):
        # Blocks of one size, so that one program does; what is left over is cut off.
        keys = jax.random.split(jax.random.key(key), blocks * block).reshape(blocks, block)
        try:
            risk = _networks(
                keys,
                jnp.asarray(ridges),
                jnp.asarray(noise),
                jnp.asarray([low, high]),
                jnp.asarray(series),
                jnp.asarray(targets),
                sizes=(int(dimension), int(samples), int(features)),
                activations=(sigma, sigma_star),
            )
        except jax.errors.TracerArrayConversionError as error:
            raise TypeError(
                f"student {sigma.name!r} or teacher {sigma_star.name!r} is not a JAX function; "
                "write it with jax.numpy."
            ) from error
        values = np.asarray(risk).reshape(blocks * block, -1)[:seeds]
    return SimulatedRisk(int(dimension), int(samples), int(features), noise, ridges, values)


@partial(jax.jit, static_argnames=("sizes", "activations"))
def _networks(
    keys: jax.Array,
    ridges: jax.Array,
    noise: jax.Array,
    norms: jax.Array,
    series: jax.Array,
    targets: jax.Array,
    *,
    sizes: tuple[int, int, int],
    activations: tuple[Activation, Activation],
) -> jax.Array:
    """Risks, keys of shape (blocks, block) -> (blocks, block, L)."""

    def one(key: jax.Array) -> jax.Array:
        return _one_network(key, ridges, noise, norms, series, targets, sizes, activations)

    return jax.lax.map(jax.vmap(one), keys)


def _one_network(
    key: jax.Array,
    ridges: jax.Array,
    noise: jax.Array,
    norms: jax.Array,
    series: jax.Array,
    targets: jax.Array,
    sizes: tuple[int, int, int],
    activations: tuple[Activation, Activation],
) -> jax.Array:
    """Risks of one network at all ridges, shape (L,)."""
    d, N, n = sizes
    sigma, sigma_star = map(_normalized, activations)
    # One call for all random numbers: compiling a generator takes a second.
    draws = jax.random.normal(key, (n * d + N * d + N,), dtype=jnp.float64)
    W, X = draws[: n * d].reshape(n, d) / math.sqrt(d), draws[n * d : -N].reshape(N, d)
    y = sigma_star(X[:, 0]) + noise * draws[-N:]
    Z = sigma(X @ W.T) / math.sqrt(n)

    # One LAPACK call in the program: two independent ones can deadlock XLA:CPU.
    if n <= N:
        spectrum, basis = jnp.linalg.eigh(Z.T @ Z)
        lift, load = basis, basis.T @ (Z.T @ y)
    else:
        spectrum, basis = jnp.linalg.eigh(Z @ Z.T)
        lift, load = Z.T @ basis, basis.T @ y
    shrunk = load[:, None] / (jnp.maximum(spectrum, 0.0)[:, None] + ridges[None, :])
    a = (lift @ shrunk) / math.sqrt(n)  # (n, L), the 1/√n of the model included

    norm = jnp.sqrt(jnp.sum(W**2, axis=1))
    low, high = norms
    place = jnp.clip((2 * jnp.log(norm) - low - high) / (high - low), -1.0, 1.0)
    polynomials = jnp.cos(jnp.arange(_NODES)[None, :] * jnp.arccos(place)[:, None])
    table = polynomials @ series  # (n, orders + 1)
    c, second_moment = table[:, :_ORDERS], table[:, _ORDERS]
    unit = W / norm[:, None]
    cosine = unit @ unit.T
    square, towards = cosine**2, unit[:, 0]

    # Horner in ρ²: the highest order first.
    def add_order(
        sums: tuple[jax.Array, jax.Array], order: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        kernel, cross = sums
        c_k, target = order
        kernel = kernel * square + c_k[:, None] * c_k[None, :]
        return (kernel, cross * towards**2 + c_k * target), None

    start = (jnp.zeros_like(cosine), jnp.zeros_like(towards))
    (kernel, cross), _ = jax.lax.scan(add_order, start, (c.T, targets), reverse=True)
    kernel = jnp.where(jnp.eye(n, dtype=bool), second_moment[:, None], kernel * cosine)
    cross = cross * towards
    return 1 + noise**2 - 2 * cross @ a + jnp.sum(a * (kernel @ a), axis=0)


def _normalized(activation: Activation) -> Any:
    values = moments(activation)
    return lambda z: (activation.function(z) - values.mean) / math.sqrt(values.variance)


def _coefficients_by_norm(
    sigma: Activation, dimension: int
) -> tuple[float, float, NDArray[np.float64]]:
    """Chebyshev series in log r of c_1(r), c_3(r), .. and of E σ(r z)²: (low, high, series).

    `series` has shape (nodes, orders + 1); low and high bound log‖w‖ but for a chance of 1e-13 per
    feature.
    """
    values = moments(sigma)
    tail = 1e-13
    low, high = (
        0.5 * math.log(float(bound) / dimension)
        for bound in (stats.chi2.ppf(tail, dimension), stats.chi2.isf(tail, dimension))
    )
    radii = np.exp(0.5 * (high + low) + 0.5 * (high - low) * chebyshev.chebpts1(_NODES))

    def integrand(z: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = (sigma(radii * z) - values.mean) / math.sqrt(values.variance)
        odd = normalized_hermite(z, 2 * _ORDERS)[1::2]
        return np.concatenate([scaled[:, None] * odd[None, :], scaled[:, None] ** 2], axis=1)

    kinks = tuple(kink / radius for kink in sigma.kinks if kink for radius in radii)
    table = expect(integrand, kinks=kinks, name=f"student {sigma.name!r}")
    angles = math.pi * (np.arange(_NODES) + 0.5)[::-1] / _NODES
    basis = np.cos(np.arange(_NODES)[:, None] * angles[None, :])
    series = 2 / _NODES * basis @ table
    series[0] /= 2
    return low, high, series


def _argmin(ridge: NDArray[np.float64], curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """log λ of the least value of the cubic spline through each curve, shape (C, L) -> (C,)."""
    order = np.argsort(ridge)
    x, y = np.log(ridge[order]), curves[:, order]
    if len(x) < 3:
        raise ValueError(f"ridge has {len(x)} values; a minimum needs at least 3.")
    best = y.argmin(axis=1)
    if ((best == 0) | (best == len(x) - 1)).any():
        raise ValueError(
            f"the least risk lies at the edge of the ridges {ridge.min():g} to {ridge.max():g}; "
            "widen the grid."
        )
    rows = np.arange(len(y))
    spline = interpolate.CubicSpline(x, y, axis=1)
    # Newton from the grid's minimum, kept between its neighbours.
    place = x[best]
    for _ in range(_NEWTON_STEPS):
        piece = np.clip(np.searchsorted(x, place, side="right") - 1, 0, len(x) - 2)
        cubic, square, linear, _ = spline.c[:, piece, rows]
        u = place - x[piece]
        slope, bend = (3 * cubic * u + 2 * square) * u + linear, 6 * cubic * u + 2 * square
        place = np.clip(place - slope / np.maximum(bend, _FLAT), x[best - 1], x[best + 1])
    return place
