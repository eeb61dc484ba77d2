"""Gaussian moments and Hermite coefficients of activations, closed form or adaptive quadrature."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ActivationLike",
    "Moments",
    "as_activation",
    "expect",
    "hermite_coefficients",
    "moments",
    "normalized_hermite",
]

# exp(-13²/2) is 2e-37: an integrand must outgrow exp(|z|³) to be missed beyond.
_REACH = 13.0
# Adaptive quadrature aims at the first and must report an error below the second.
_AIM, _ACCEPT = 1e-14, 1e-11


@dataclasses.dataclass(frozen=True)
class Activation:
    """A scalar function z ↦ σ(z), applied element by element.

    Attributes:
      name: for messages.
      function: an array in, an array of the same shape out; NumPy or JAX (called with
        float64; the simulation needs JAX).
      kinks: where σ or a derivative of it jumps; quadrature splits there. A kink left out costs
        time, and an error if the quadrature then does not converge.
      coefficients: E[σ(z) He_k(z)]/√k!, z ~ N(0, 1), as a function of k, where there is a closed
        form; σ as given, neither centred nor normalised.
      second_moment: E[σ(z)²], where there is a closed form.
    """

    name: str
    function: Callable[..., Any]
    kinks: tuple[float, ...] = ()
    coefficients: Callable[[int], float] | None = None
    second_moment: float | None = None

    def __call__(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """σ(z) in float64, whatever the global precision is."""
        with jax.enable_x64(True):
            value = np.asarray(self.function(np.asarray(z, dtype=np.float64)), dtype=np.float64)
        if value.shape != np.shape(z):
            raise ValueError(
                f"activation {self.name!r} turns shape {np.shape(z)} into {value.shape}; it must "
                "act element by element."
            )
        return value


ActivationLike: TypeAlias = "str | Callable[..., object] | Activation"
"""An activation by name (a key of `ACTIVATIONS`), as a function of arrays, or in full."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """What the asymptotics need to know of an activation σ, z ~ N(0, 1).

    Attributes:
      mean: E σ(z).
      variance: Var σ(z); what follows is of σ̄ = (σ − mean)/√variance.
      linear: μ1 = E[z σ̄(z)] (= E σ̄'(z)), the first Hermite coefficient.
      linear2: μ1².
      nonlinear2: μ2² = E[(σ̄(z) − μ1 z)²] = 1 − μ1², as accurate where it is small.
      even2: E[((σ̄(z) + σ̄(−z))/2)²], the weight of the even part: 0 for an odd σ, 1 for an even.
    """

    mean: float
    variance: float
    linear: float
    linear2: float
    nonlinear2: float
    even2: float


def _relu_coefficient(k: int) -> float:
    # E[relu He_k] = E[relu'' He_{k-2}] = φ(0) He_{k-2}(0), by parts twice: relu'' is a delta.
    if k == 0:
        return 1 / math.sqrt(2 * math.pi)
    if k == 1:
        return 0.5
    if k % 2:
        return 0.0
    half = k // 2 - 1
    return (-1) ** half * _odd_factorial(half, over=k) / math.sqrt(2 * math.pi)


def _erf_coefficient(k: int) -> float:
    # E[erf He_k] = E[erf' He_{k-1}] = (2/√(3π)) E[He_{k-1}(z/√3)], and
    # E[He_{2m}(τz)] = (2m−1)!! (τ²−1)^m.
    if k % 2 == 0:
        return 0.0
    half = (k - 1) // 2
    return 2 / math.sqrt(3 * math.pi) * (-2 / 3) ** half * _odd_factorial(half, over=k)


def _sign_coefficient(k: int) -> float:
    # E[sign He_k] = 2 E[δ He_{k-1}] = 2 φ(0) He_{k-1}(0).
    if k % 2 == 0:
        return 0.0
    half = (k - 1) // 2
    return 2 / math.sqrt(2 * math.pi) * (-1) ** half * _odd_factorial(half, over=k)


def _sin_coefficient(k: int) -> float:
    # E[sin He_k] = E[sin^{(k)}] = ± e^{-1/2} for odd k.
    if k % 2 == 0:
        return 0.0
    return (-1) ** ((k - 1) // 2) * math.exp(-0.5 - 0.5 * special.gammaln(k + 1))


def _odd_factorial(half: int, *, over: int) -> float:
    """(2·half − 1)!!/√(over!), by logarithms: either alone overflows."""
    log_odd = special.gammaln(2 * half + 1) - half * math.log(2) - special.gammaln(half + 1)
    return math.exp(log_odd - 0.5 * special.gammaln(over + 1))


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("tanh", jnp.tanh),
        Activation(
            "relu",
            jax.nn.relu,
            kinks=(0.0,),
            coefficients=_relu_coefficient,
            second_moment=0.5,
        ),
        Activation(
            "erf",
            jax.scipy.special.erf,
            coefficients=_erf_coefficient,
            second_moment=2 / math.pi * math.asin(2 / 3),
        ),
        Activation(
            "sin",
            jnp.sin,
            coefficients=_sin_coefficient,
            second_moment=-0.5 * math.expm1(-2.0),
        ),
        Activation(
            "sign", jnp.sign, kinks=(0.0,), coefficients=_sign_coefficient, second_moment=1.0
        ),
        Activation("linear", lambda z: z, coefficients=lambda k: float(k == 1), second_moment=1.0),
        Activation("arctan", jnp.arctan),
        Activation("softsign", jax.nn.soft_sign, kinks=(0.0,)),
        Activation("hard_tanh", jax.nn.hard_tanh, kinks=(-1.0, 1.0)),
        Activation("sigmoid", jax.nn.sigmoid),
        Activation("softplus", jax.nn.softplus),
        Activation("gelu", functools.partial(jax.nn.gelu, approximate=False)),
        Activation("silu", jax.nn.silu),
        Activation("abs", jnp.abs, kinks=(0.0,)),
    )
}
"""Activations known by name; every other one is passed as a function or an `Activation`."""


def as_activation(activation: ActivationLike, argument: str = "activation") -> Activation:
    """The activation meant by a name or a function.

    Raises:
      ValueError: no activation has that name.
      TypeError: neither a name nor a function.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{argument} is {activation!r}, which is not a known activation; pass one of "
                f"{sorted(ACTIVATIONS)}, or a function of arrays."
            )
        return ACTIVATIONS[activation]
    if callable(activation):
        return Activation(getattr(activation, "__name__", "activation"), activation)
    raise TypeError(
        f"{argument} is {activation!r} of type {type(activation).__name__}; pass a name such as "
        "'tanh', or a function of arrays."
    )


def expect(
    integrand: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    kinks: tuple[float, ...] = (),
    name: str = "integrand",
) -> NDArray[np.float64]:
    """E[f(z)], z ~ N(0, 1), by adaptive Gauss–Kronrod quadrature split at the kinks.

    Args:
      integrand: from a number z to an array, all of whose entries are integrated.
      kinks: where f or a derivative jumps; 0 is always split at.
      name: for the message.

    Raises:
      ValueError: the quadrature does not reach 1e-11 of the largest entry (a kink that was not
        named, a singularity, or growth beyond the Gaussian's reach).
    """

    def weighted(z: float) -> NDArray[np.float64]:
        return integrand(np.asarray(z)) * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    points = sorted({0.0, *(kink for kink in kinks if abs(kink) < _REACH)})
    with np.errstate(over="ignore", invalid="ignore"):
        value, error = integrate.quad_vec(
            weighted, -_REACH, _REACH, epsabs=_AIM, epsrel=_AIM, norm="max", points=points
        )[:2]
        tail = np.max(np.abs([weighted(-_REACH), weighted(_REACH)]))
    scale = max(1.0, float(np.max(np.abs(value))))
    if not (np.isfinite(value).all() and error <= _ACCEPT * scale and tail <= _ACCEPT * scale):
        raise ValueError(
            f"{name}: the Gaussian integral did not converge (error {error:.1e}, at the ends of "
            f"±{_REACH:g} the integrand is {tail:.1e}); pass an Activation that names its kinks, "
            "with finite Gaussian moments."
        )
    return np.asarray(value)


def normalized_hermite(z: NDArray[np.float64], orders: int) -> NDArray[np.float64]:
    """He_k(z)/√k! for k = 0 .. orders − 1 along a new first axis: orthonormal under N(0, 1)."""
    z = np.asarray(z, dtype=np.float64)
    rows = [np.ones_like(z), z]
    for k in range(1, orders - 1):
        rows.append((z * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return np.stack(rows[:orders])


def hermite_coefficients(
    activation: ActivationLike, orders: int, *, normalize: bool = False
) -> NDArray[np.float64]:
    """c_k = E[σ(z) He_k(z)]/√k!, z ~ N(0, 1), k = 0 .. orders − 1, so that Σ c_k² = E σ².

    He_k are the probabilists' polynomials. Closed form for the activations that have one (relu,
    erf, sin, sign, linear), else quadrature to about 1e-13.

    Args:
      activation: a name, a function, or an `Activation`.
      orders: how many.
      normalize: of (σ − Eσ)/√Var σ instead: then c_0 = 0 and Σ c_k² = 1.

    Returns:
      Shape (orders,).
    """
    if orders < 1:
        raise ValueError(f"orders is {orders}; expected at least 1.")
    sigma = as_activation(activation)
    if sigma.coefficients is not None:
        values = np.array([sigma.coefficients(k) for k in range(orders)])
    else:
        values = expect(
            lambda z: sigma(z) * normalized_hermite(z, orders),
            kinks=sigma.kinks,
            name=f"activation {sigma.name!r}",
        )
    if not normalize:
        return values
    values = values / math.sqrt(moments(sigma).variance)
    values[0] = 0.0
    return values


@functools.lru_cache(maxsize=256)
def moments(activation: Activation) -> Moments:
    """The Gaussian moments of an activation.

    Raises:
      ValueError: the function is constant under the Gaussian, or its integrals do not converge.
    """

    def raw(z: NDArray[np.float64]) -> NDArray[np.float64]:
        up, down = activation(z), activation(-z)
        return np.stack([up, z * up, up * up, ((up + down) / 2) ** 2])

    kinks = tuple({*activation.kinks, *(-kink for kink in activation.kinks)})
    where = f"activation {activation.name!r}"
    mean, linear, second, even = map(float, expect(raw, kinks=kinks, name=where))
    if activation.coefficients is not None and activation.second_moment is not None:
        mean, linear = activation.coefficients(0), activation.coefficients(1)
        second = activation.second_moment
    variance = second - mean**2
    if not variance > 1e-12 * max(second, 1e-300):
        raise ValueError(f"{where} is constant (variance {variance:.1e}): it carries no signal.")
    # The residual is integrated, and not taken as a difference, so that a student that is nearly
    # linear keeps the digits of its small non-linear part.
    residual = float(
        expect(
            lambda z: np.square(activation(z) - mean - linear * z),
            kinks=kinks,
            name=where,
        )
    )
    linear2, nonlinear2 = linear**2 / variance, residual / variance
    total = linear2 + nonlinear2
    return Moments(
        mean=mean,
        variance=variance,
        linear=linear / math.sqrt(variance),
        linear2=linear2 / total,
        nonlinear2=nonlinear2 / total,
        even2=max(0.0, (even - mean**2) / variance),
    )
