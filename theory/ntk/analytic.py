"""Kernels of fully-connected networks at infinite width: NNGP and NTK, in closed form.

The network has `L = depth` hidden layers, weights N(0, 1) and no biases:

    h¹ = W¹ x,    h^{l+1} = W^{l+1} σ(h^l) / √n  (l = 1 … L),    f = h^{L+1},

with no factor on the first layer. As `n → ∞` every unit of `h^l` is a Gaussian process with
covariance `K^l`, and the tangent kernel `Θ^l` of `h^l` is not random (Jacot, Gabriel and Hongler,
arXiv 1806.07572, Theorem 1; Lee et al., arXiv 1711.00165):

    K¹ = Θ¹ = ⟨x, x′⟩,    K^{l+1} = E[σ(u) σ(v)],    Θ^{l+1} = K^{l+1} + Θ^l · E[σ′(u) σ′(v)],

(u, v) Gaussian with covariance `[[p, r], [r, q]]`, where `p = K^l(x,x)`, `q = K^l(x′,x′)` and
`r = K^l(x,x′) = √(pq) cos θ`.

ReLU (Cho and Saul 2009, their arc-cosine kernels of degree 1 and 0), with `S(φ) = sin φ − φ cos φ`:

    E[σσ] = √(pq) S(π−θ) / 2π,    E[σ′σ′] = (π−θ) / 2π,    1 − cos θ_next = (1 − cos θ) − S(θ) / π.

erf (Williams 1997), with `D = 1 + 2p + 2q + 4(pq − r²)`:

    E[σσ] = (2/π) atan2(2r, √D),    E[σ′σ′] = (4/π) / √D.

**Accuracy.** An angle from `arccos` is off by `√eps` where the vectors are nearly parallel. Here it
is `2 atan2(‖a − b‖, ‖a + b‖)` (Kahan) with unit vectors `a`, `b`, off by `eps`; `S` is a series at
small angles; and `pq − r²` of the inputs is `pq ‖a − b‖² ‖a + b‖² / 4`.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["Activation", "InfiniteWidthKernels", "infinite_width_kernels"]

Activation = Literal["relu", "erf"]
"""The activations whose Gaussian expectations are known in closed form here."""


_LARGEST_INPUT = 1e70


class InfiniteWidthKernels(NamedTuple):
    """Kernels between two sets of inputs.

    Attributes:
      nngp: covariance of the network's output at initialisation, shape (N1, N2).
      ntk: tangent kernel of the output, all weights trained, shape (N1, N2).
    """

    nngp: Any
    ntk: Any


def infinite_width_kernels(
    x1: ArrayLike, x2: ArrayLike | None = None, *, depth: int, activation: Activation = "relu"
) -> InfiniteWidthKernels:
    """NNGP and NTK of the network in this module's docstring, per output unit.

    Args:
      x1: inputs, shape (N1, d).
      x2: inputs, shape (N2, d); `x1` if left out.
      depth: number L of hidden layers, at least 1.
      activation: `"relu"` or `"erf"`.

    Returns:
      Both kernels. If `x1` or `x2` is a JAX array, so are they, in its precision, and they can be
      traced and differentiated; otherwise they are NumPy arrays in float64, whatever JAX's own
      setting. Gradients are finite everywhere. The ReLU NTK has a kink where two inputs are
      parallel, as `|θ|` at 0: the gradient there is the mean of the two sides.

    Raises:
      ValueError: shapes that are not as described, a depth below 1, an unknown activation, or (of
        NumPy inputs) entries that are not finite or beyond 1e70.
    """
    if activation not in _LAYERS:
        raise ValueError(
            f"activation={activation!r} is not known; use one of {', '.join(map(repr, _LAYERS))}"
        )
    whole = isinstance(depth, numbers.Integral) and not isinstance(depth, bool)
    if not whole or depth < 1:
        raise ValueError(f"depth={depth!r} hidden layers; expected a whole number, at least 1")
    x2 = x1 if x2 is None else x2
    if isinstance(x1, jax.Array) or isinstance(x2, jax.Array):
        a, b = jnp.asarray(x1), jnp.asarray(x2)
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        _check_inputs(a.shape, b.shape)
        return _kernels(a.astype(dtype), b.astype(dtype), int(depth), activation)
    a, b = np.asarray(x1, np.float64), np.asarray(x2, np.float64)
    _check_inputs(a.shape, b.shape)
    for name, array in (("x1", a), ("x2", b)):
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array).all(axis=1)))
            raise ValueError(f"{name}[{row}] = {array[row]} is not finite; remove or repair it")
        largest = np.abs(array).max(axis=1, initial=0)
        if (largest > _LARGEST_INPUT).any():
            row = int(largest.argmax())
            raise ValueError(
                f"{name}[{row}] has an entry of size {largest[row]:.3g}; fourth powers of inputs "
                f"overflow beyond {_LARGEST_INPUT:g}: divide the inputs by their scale"
            )
    with jax.enable_x64(True):
        nngp, ntk = _kernels(a, b, int(depth), activation)
        return InfiniteWidthKernels(np.asarray(nngp), np.asarray(ntk))


def _check_inputs(shape1: tuple[int, ...], shape2: tuple[int, ...]) -> None:
    if len(shape1) != 2 or len(shape2) != 2 or shape1[1] != shape2[1]:
        raise ValueError(
            f"x1 and x2 have shapes {shape1} and {shape2}; expected (N1, d) and (N2, d): one input "
            "per row (reshape a single input to (1, d), flatten images)"
        )


class _Pair(NamedTuple):
    """The covariance of (u, v) for every pair of inputs; leaves of shape (N2,), or ()."""

    p: Any
    q: Any
    r: Any
    determinant: Any
    angle: Any
    supplement: Any


@functools.partial(jax.jit, static_argnums=(2, 3))
def _kernels(x1: Any, x2: Any, depth: int, activation: str) -> InfiniteWidthKernels:
    layer = _LAYERS[activation]

    def row(x: jax.Array) -> InfiniteWidthKernels:
        pair = _input_pair(x, x2)
        nngp, ntk = pair.r, pair.r
        for _ in range(depth):
            pair, slope = layer(pair)
            nngp, ntk = pair.r, pair.r + ntk * slope
        return InfiniteWidthKernels(nngp, ntk)

    # One row at a time: the differences of all pairs would be an array (N1, N2, d).
    return jax.lax.map(row, x1)


def _input_pair(x: jax.Array, others: jax.Array) -> _Pair:
    p, q = jnp.sum(x * x), jnp.sum(others * others, axis=1)
    norm, norms = _sqrt(p), _sqrt(q)
    # Unit vectors, so that neither tiny nor huge inputs lose their angle to under- or overflow.
    unit = x / jnp.where(norm > 0, norm, 1)
    units = others / jnp.where(norms > 0, norms, 1)[:, None]
    minus = jnp.sum((unit[None] - units) ** 2, axis=1)
    plus = jnp.sum((unit[None] + units) ** 2, axis=1)
    short, long = _sqrt(minus), _sqrt(plus)
    angle, supplement = 2 * _atan2(short, long), 2 * _atan2(long, short)
    p = jnp.broadcast_to(p, q.shape)
    return _Pair(
        p, q, jnp.sum(others * x[None], axis=1), p * q * minus * plus / 4, angle, supplement
    )


def _relu_layer(pair: _Pair) -> tuple[_Pair, Any]:
    """The covariance of the next layer, and E[σ′(u) σ′(v)]."""
    scale = _sqrt(pair.p) * _sqrt(pair.q)
    r = scale * _sine_minus_arc(pair.supplement) / (2 * math.pi)
    slope = pair.supplement / (2 * math.pi)
    # 1 − cos of the next angle, which is at most a right one.
    versine = 2 * jnp.sin(pair.angle / 2) ** 2 - _sine_minus_arc(pair.angle) / math.pi
    angle = 2 * jnp.arcsin(jnp.minimum(_sqrt(jnp.maximum(versine, 0) / 2), math.sqrt(0.5)))
    p, q = pair.p / 2, pair.q / 2
    return _Pair(p, q, r, jnp.zeros_like(r), angle, math.pi - angle), slope


def _erf_layer(pair: _Pair) -> tuple[_Pair, Any]:
    """The covariance of the next layer, and E[σ′(u) σ′(v)]; no angle is needed."""

    def expectation(r: Any, root: Any) -> Any:
        return 2 / math.pi * jnp.arctan2(2 * r, root)

    root = jnp.sqrt(1 + 2 * pair.p + 2 * pair.q + 4 * pair.determinant)
    r = expectation(pair.r, root)
    p = expectation(pair.p, jnp.sqrt(1 + 4 * pair.p))
    q = expectation(pair.q, jnp.sqrt(1 + 4 * pair.q))
    # p, q and r are below 1 from here on, so this difference costs no accuracy beside the 1 in D.
    determinant = jnp.maximum(p * q - r * r, 0)
    return _Pair(p, q, r, determinant, pair.angle, pair.supplement), 4 / math.pi / root


_LAYERS: dict[str, Any] = {"relu": _relu_layer, "erf": _erf_layer}


def _sqrt(x: Any) -> Any:
    """Square root whose derivative at 0 is 0 instead of infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _atan2(y: Any, x: Any) -> Any:
    """atan2 whose derivative at the origin (an input that is zero) is 0 instead of NaN."""
    origin = (x == 0) & (y == 0)
    return jnp.arctan2(y, jnp.where(origin, 1, x))


def _sine_minus_arc(angle: Any) -> Any:
    """`S(φ) = sin φ − φ cos φ`, about `φ³/3` at small angles, to full relative accuracy."""
    small = angle < 1
    t = jnp.where(small, angle, 0)
    # Σ_k (−1)^{k+1} 2k φ^{2k+1} / (2k+1)!; nine terms leave 1e-18 of the first at φ = 1.
    series = jnp.zeros_like(t)
    for k in range(9, 0, -1):
        series = (-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) + t * t * series
    return jnp.where(small, t**3 * series, jnp.sin(angle) - angle * jnp.cos(angle))
