"""Gradient descent on a quadratic with a power-law spectrum, of which width n reaches n modes.

    φ_n(w) = ½ Σ_{i ≤ n} λ_i (w_i − w*_i)² + ½ Σ_{i > n} λ_i w*_i²,
    λ_i = i^{-a},   λ_i w*_i² = i^{-b},

with spectrum exponent `a > 0` and source exponent `b > 1`. After T steps from `w = 0` at rate η,

    φ_n(η) = ½ Σ_{i ≤ n} (1 − ηλ_i)^{2T} i^{-b} + ½ Σ_{i > n} i^{-b}.

Infinite sums are closed too: beyond the M-th mode, where `2Tηλ_i ≤ ½`, the power is expanded in η
and each term is a Hurwitz zeta function. Every mode is convex in η, so φ_n has one minimum `η*(n)`;
the first mode pulls it to `1/λ_1 = 1` and all others up, so it lies above 1 (at it, for n = 1).

**Gaps** (Ghosh, Wu and Bietti, arXiv 2512.22768, section 2; learning rates in log2):

    a_n = φ_n(η*(n)) − φ_∞(η*(∞)),    c_n = φ_∞(η*(n)) − φ_∞(η*(∞)),
    b_n = log2 η*(∞) − log2 η*(n).

Cutting the modes beyond n adds `D_n(η) = ½ Σ_{i>n} (1 − (1 − ηλ_i)^{2T}) i^{-b}` to φ_∞. Once these
modes are too slow to be learnt anyway, `n^a ≫ ηT`, it is `ηT Σ_{i>n} λ_i i^{-b}` to first order:

    D_n(η) ≈ η T s,    s = n^{-(a+b-1)} / (a+b−1),

so that with `φ″ = φ_∞″(η*)`, `η* = η*(∞)`, expanding around the minimum gives

    a_n ≈ η* T s,    b_n ≈ T s / (φ″ η* ln 2),    c_n ≈ (T s)² / (2 φ″):

`α = β = a+b−1` and `c_n ~ n^{-2α}`. Transfer is fast (`β > α/2`) whatever the exponents. While
`n^a ≪ ηT`, on the other hand, the cut costs all of the missing modes' loss and
`a_n ≈ n^{1-b} / 2(b−1)`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import root_scalar
from scipy.special import zeta

from mupjax.adapters import Model
from mupjax.setting import Predict, Setting

__all__ = ["ROLES", "PowerLawQuadratic", "QuadraticGaps", "QuadraticOptimum", "coordinates"]

FloatArray = NDArray[np.float64]

ROLES: Mapping[str, Literal["vector"]] = {"coordinates": "vector"}
"""What `mupjax.sweep(coordinates, ..., roles=ROLES)` must be told: a coordinate is a unit of its
own, so that under SP nothing scales with the width."""

# Terms of the expansion in η: with 2Tηλ ≤ ½ the k-th is below 2^-k / k!.
_TERMS = 16
_MOST_MODES = 20_000_000
# Optima closer than this are not subtracted: their distance would have fewer than 12 digits.
_CLOSE = 1e-4


@dataclasses.dataclass(frozen=True)
class QuadraticOptimum:
    """The learning rate with the smallest loss.

    Attributes:
      learning_rate: η*(n).
      loss: `φ_n(η*)`.
      curvature: `φ_n″(η*)`, loss per squared learning rate.
    """

    learning_rate: float
    loss: float
    curvature: float


@dataclasses.dataclass(frozen=True)
class QuadraticGaps:
    """Gaps by width, shape (W,) each, to nearly full relative accuracy however small.

    Attributes:
      widths: n.
      loss: a_n.
      hyperparameter: b_n, in octaves.
      suboptimality: c_n, the loss that `η*(n)` costs at infinite width.
    """

    widths: FloatArray
    loss: FloatArray
    hyperparameter: FloatArray
    suboptimality: FloatArray


@dataclasses.dataclass(frozen=True)
class PowerLawQuadratic:
    """The problem of this module's docstring.

    Attributes:
      spectrum_exponent: a > 0, of `λ_i = i^{-a}`.
      source_exponent: b > 1, of `λ_i w*_i² = i^{-b}` (at 1 the loss at `w = 0` is infinite).
    """

    spectrum_exponent: float
    source_exponent: float

    def __post_init__(self) -> None:
        for name, bound in (("spectrum_exponent", 0.0), ("source_exponent", 1.0)):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and bound < float(value) < math.inf):
                raise ValueError(f"{name} must be a number above {bound:g}, got {value!r}")

    @property
    def gap_exponents(self) -> tuple[float, float, float]:
        """Powers of 1/n with which a_n, b_n and c_n vanish, as `n^a ≫ T`."""
        alpha = self.spectrum_exponent + self.source_exponent - 1
        return alpha, alpha, 2 * alpha

    def loss(self, learning_rate: ArrayLike, *, steps: int, width: float = math.inf) -> FloatArray:
        """`φ_n(η)` after T steps.

        Args:
          learning_rate: η ≥ 0, any shape.
          steps: T ≥ 0.
          width: n, whole or infinite.

        Returns:
          Losses in the shape of `learning_rate`; `inf` where the number overflows.

        Raises:
          ValueError: an argument out of range, or so many steps that the sum over modes would be
            too long.
        """
        rates = np.asarray(learning_rate, np.float64)
        if not (np.isfinite(rates) & (rates >= 0)).all():
            raise ValueError(f"learning_rate must be finite and at least 0, got {learning_rate!r}")
        T, n = _count("steps", steps, 0), _width(width)
        out = [0.5 * self._sum(0, 2 * T, eta, 0, n) + 0.5 * self._zeta(0, n) for eta in rates.flat]
        return np.reshape(out, rates.shape)

    def optimum(self, *, steps: int, width: float = math.inf) -> QuadraticOptimum:
        """The minimum of `φ_n`, by bracketing the root of its derivative.

        Args:
          steps: T ≥ 1.
          width: n, whole or infinite.

        Raises:
          ValueError: as `loss`.
        """
        T, n = _count("steps", steps, 1), _width(width)
        eta = 1.0
        if n > 1:
            # −φ_n′/T = Σ λ (1 − ηλ)^{2T−1} i^{-b} is positive at 1, and not positive where the
            # first mode's (η − 1)^{2T−1} reaches the sum of the others at η = 0.
            others = max(1.0, self._zeta(1, 1))
            high = 1 + others ** (1 / (2 * T - 1))
            eta = _root(lambda eta: self._sum(1, 2 * T - 1, eta, 0, n), 1.0, high)
        curvature = T * (2 * T - 1) * self._sum(2, 2 * T - 2, eta, 0, n)
        return QuadraticOptimum(eta, float(self.loss(eta, steps=T, width=n)), curvature)

    def gaps(self, widths: Sequence[int], *, steps: int) -> QuadraticGaps:
        """a_n, b_n and c_n, without the cancellation of subtracting optima that nearly agree.

        Let `η = η*(∞)` and `P(η) = Σ λ_i (1 − ηλ_i)^{2T−1} i^{-b}`, which is 0 there. Then
        `η*(n) = η + δ` solves `P(η + δ) − P(η) = Σ_{i>n} λ_i (1 − (η+δ)λ_i)^{2T−1} i^{-b}`; c_n is
        a sum of non-negative terms once `δ P(η) = 0` is subtracted; `a_n = c_n + D_n(η*(n))`.

        Args:
          widths: n, whole numbers.
          steps: T ≥ 1.

        Raises:
          ValueError: as `loss`.
        """
        T = _count("steps", steps, 1)
        counts = [_count("widths", n, 1) for n in widths]
        best = self.optimum(steps=T).learning_rate
        rows = []
        for n in counts:

            def slope(delta: float, n: int = n) -> float:
                cut = self._sum(1, 2 * T - 1, best + delta, n, math.inf)
                return self._difference(1, 2 * T - 1, best, delta, order=1) - cut

            # δ < 0: what is cut off pulled the optimum up.
            delta = self.optimum(steps=T, width=n).learning_rate - best
            if abs(delta) < _CLOSE:
                delta = _root(slope, -2 * _CLOSE, 0.0)
            c = 0.5 * self._difference(0, 2 * T, best, delta, order=2)
            rows.append((c + self._cut(T, best + delta, n), -math.log1p(delta / best), c))
        a, b, c = np.reshape(rows, (-1, 3)).T
        return QuadraticGaps(np.asarray(counts, np.float64), a, b / math.log(2), c)

    def leading_order(self, widths: Sequence[int], *, steps: int) -> QuadraticGaps:
        """The power laws of this module's docstring, to which `gaps` tends as `n^a ≫ T`.

        Args:
          widths: n, whole numbers.
          steps: T ≥ 1.

        Raises:
          ValueError: as `loss`.
        """
        T = _count("steps", steps, 1)
        n = np.asarray([_count("widths", width, 1) for width in widths], np.float64)
        best, (alpha, _, _) = self.optimum(steps=T), self.gap_exponents
        force = T * n**-alpha / alpha
        octaves = force / (best.curvature * best.learning_rate * math.log(2))
        return QuadraticGaps(n, best.learning_rate * force, octaves, force**2 / 2 / best.curvature)

    def setting(self, modes: int) -> Setting:
        """The problem for the sweep engine; a model predicts `w_i` from the mode's index.

        Full batch, no randomness; to be used with the models of `coordinates` and `ROLES`. Modes
        beyond `modes`, which no width may reach, are in the loss as a constant.

        Args:
          modes: how many modes a batch holds, at least the largest width.

        Raises:
          ValueError: a count below 1.
        """
        M = _count("modes", modes, 1)
        i = np.arange(1, M + 1, dtype=np.float64)
        batch = {
            "mode": np.arange(M, dtype=np.int32),
            "eigenvalue": i**-self.spectrum_exponent,
            "target": i ** ((self.spectrum_exponent - self.source_exponent) / 2),
        }
        beyond = 0.5 * self._zeta(0, M)

        def sample(data: Any, key: jax.Array, step: jax.Array) -> Any:
            del key, step
            return data

        def loss(predict: Predict, batch: Any) -> jax.Array:
            error = predict(batch["mode"]) - batch["target"]
            return 0.5 * jnp.sum(batch["eigenvalue"] * jnp.square(error)) + beyond

        facts = dataclasses.asdict(self) | {"modes": M}
        return Setting("power-law quadratic", sample, loss, batch, batch, configuration=facts)

    def _zeta(self, power: int, n: float) -> float:
        """`Σ_{i>n} λ_i^power i^{-b}`."""
        if math.isinf(n):
            return 0.0
        return float(zeta(self.source_exponent + power * self.spectrum_exponent, n + 1))

    def _head(self, exponent: int, eta: float, last: float = math.inf) -> int:
        """M: modes beyond it are expanded in η; at most `last`."""
        with np.errstate(over="ignore"):
            modes = np.float64(4 * max(exponent, 1) * eta) ** (1 / self.spectrum_exponent)
        modes = min(float(modes), last)
        if modes > _MOST_MODES:
            raise ValueError(
                f"learning_rate {eta:g} at {(exponent + 1) // 2} steps needs {modes:.3g} modes "
                f"one by one, more than {_MOST_MODES:.0e}: take fewer steps or a steeper spectrum"
            )
        return math.ceil(modes)

    def _modes(self, first: float, last: float) -> tuple[FloatArray, FloatArray]:
        """λ_i and i^{-b} for first < i ≤ last."""
        i = np.arange(first + 1, last + 1, dtype=np.float64)
        return i**-self.spectrum_exponent, i**-self.source_exponent

    def _sum(self, power: int, exponent: int, eta: float, first: float, last: float) -> float:
        """`Σ_{first < i ≤ last} λ_i^power (1 − ηλ_i)^exponent i^{-b}`."""
        M = self._head(exponent, eta, last)
        eigenvalue, source = self._modes(first, min(last, max(first, M)))
        with np.errstate(over="ignore"):
            head = float(np.sum(eigenvalue**power * (1 - eta * eigenvalue) ** exponent * source))
        if last <= M:
            return head
        start = max(first, M)
        tail = sum(
            binomial * (-eta) ** k * (self._zeta(power + k, start) - self._zeta(power + k, last))
            for k, binomial in enumerate(_binomials(exponent))
        )
        return head + tail

    def _cut(self, T: int, eta: float, n: int) -> float:
        """`D_n(η)`."""
        M = max(n, self._head(2 * T, eta))
        eigenvalue, source = self._modes(n, M)
        x = eta * eigenvalue
        with np.errstate(divide="ignore"):
            logs = np.where(x < 0.5, np.log1p(-np.minimum(x, 0.5)), np.log(np.abs(1 - x)))
        head = float(np.sum(-np.expm1(2 * T * logs) * source))
        terms = enumerate(_binomials(2 * T))
        tail = -sum(c * (-eta) ** k * self._zeta(k, M) for k, c in terms if k > 0)
        return 0.5 * (head + tail)

    def _difference(
        self, power: int, exponent: int, eta: float, delta: float, *, order: Literal[1, 2]
    ) -> float:
        """The sum over all modes of `λ^power i^{-b}` times the increment of `(1 − ηλ)^exponent`.

        From η to η + δ; at order 2 its linear part in δ is left out.
        """
        M = self._head(exponent, max(eta, eta + delta))
        eigenvalue, source = self._modes(0, M)
        head = float(
            np.sum(
                eigenvalue**power
                * source
                * _increment(1 - eta * eigenvalue, -delta * eigenvalue, exponent, order)
            )
        )
        tail = sum(
            c
            * (-1) ** k
            * float(_increment(np.asarray(eta), np.asarray(delta), k, order))
            * self._zeta(power + k, M)
            for k, c in enumerate(_binomials(exponent))
            if k >= order
        )
        return head + tail


def coordinates(width: int) -> Model:
    """The model of n coordinates, zero at the start: mode indices (M,) to `w_i`, 0 beyond n."""
    n = _count("width", width, 1)

    def init(key: jax.Array) -> Any:
        del key
        return {"coordinates": jnp.zeros((n,))}

    def apply(params: Any, mode: jax.Array, width: Any = None) -> jax.Array:
        # Zero-padding to a larger width adds coordinates that stay 0: nothing to do about them.
        del width
        w = params["coordinates"]
        return jnp.where(mode < w.shape[0], w[jnp.minimum(mode, w.shape[0] - 1)], 0)

    return Model(init, apply, options=frozenset({"width"}))


def _increment(x: FloatArray, h: FloatArray, exponent: int, order: int) -> FloatArray:
    """`(x+h)^m − x^m`, at order 2 less `m h x^{m−1}`, to full relative accuracy for small h."""
    m = exponent
    direct = (x + h) ** m - x**m - (m * h * x ** (m - 1) if order == 2 else 0)
    small = np.abs(m * h) < 0.1 * np.abs(x)
    ratio = np.where(small, h, 0) / np.where(small, x, 1)
    series, term = np.zeros_like(ratio), np.ones_like(ratio)
    for j in range(1, min(m, _TERMS) + 1):
        term = term * (m - j + 1) / j * ratio
        if j >= order:
            series = series + term
    return np.where(small, x**m * series, direct)


def _binomials(m: int) -> list[float]:
    """`C(m, k)` for the k that the expansions use."""
    values = [1.0]
    for k in range(min(m, _TERMS)):
        values.append(values[-1] * (m - k) / (k + 1))
    return values


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    # A tiny δ must be resolved relatively: no absolute tolerance, but SciPy refuses 0.
    return root_scalar(function, bracket=(low, high), xtol=1e-300, rtol=1e-15, maxiter=1000).root


def _count(name: str, value: Any, minimum: int) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < minimum:
        raise ValueError(f"{name} must be whole and at least {minimum}, got {value!r}")
    return int(value)


def _width(value: float) -> float:
    if isinstance(value, float) and value == math.inf:
        return value
    return _count("width", value, 1)
