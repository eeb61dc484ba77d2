"""Gradient descent under squared loss with a frozen kernel, in closed form, mode by mode.

A model that is linear in its parameters, `f = f_0 + J (θ − θ_0)`, is trained on P examples by
gradient descent on `L = (1/2P) ‖f − y‖²` (a sum over examples and outputs) at learning rate η.
The residual `r = f − y` obeys `r_{t+1} = (I − ηK/P) r_t`, and with `K = J Jᵀ = U diag(κ) Uᵀ`

    r_T = U (1 − ηκ/P)^T Uᵀ r_0,      L_T(η) = (1/2P) Σ_i (1 − ηκ_i/P)^{2T} (u_iᵀ r_0)²,
    f_T(x) = f_0(x) − K(x, X) U diag(g) Uᵀ r_0,      g_i = (1 − (1 − ηκ_i/P)^T) / κ_i

(`g_i = ηT/P` where `κ_i = 0`). Exact for every η, stable or not, and every T; also the limit of
wide networks in the NTK scaling (Jacot et al., arXiv 1806.07572, section 5; Lee et al., arXiv
1902.06720, equations 8 to 11, in continuous time).

Losses are computed from their logarithms, so that a diverging run overflows only where the number
itself does, and `LinearizedTraining.log_loss` not at all. Each mode's loss is convex in η for every
`T ≥ 1`, hence so is `L_T`, which therefore has one minimum.
"""

from __future__ import annotations

import dataclasses
import math
import numbers

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import root_scalar
from scipy.special import logsumexp

__all__ = ["LinearizedOptimum", "LinearizedTraining", "linearized_training"]

FloatArray = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class LinearizedOptimum:
    """The learning rate with the smallest loss after a number of steps.

    Attributes:
      learning_rate: η*.
      loss: `L_T(η*)`.
    """

    learning_rate: float
    loss: float


@dataclasses.dataclass(frozen=True)
class LinearizedTraining:
    """A kernel's modes and the initial residual in them: made by `linearized_training`.

    Attributes:
      eigenvalues: κ, shape (M,), decreasing; exactly 0 below rounding.
      modes: U, shape (M, M), orthonormal columns.
      coefficients: `Uᵀ r_0`, shape (M, R): R = 1 for a kernel of all outputs, R = C for one kernel
        that every output shares.
      points: P.
      shape: of the residual, (P,) or (P, C).
    """

    eigenvalues: FloatArray
    modes: FloatArray
    coefficients: FloatArray
    points: int
    shape: tuple[int, ...]

    @property
    def mode_energies(self) -> FloatArray:
        """`Σ_outputs (u_iᵀ r_0)²`, shape (M,)."""
        return np.sum(self.coefficients**2, axis=1)

    @property
    def largest_stable_rate(self) -> float:
        """`2P/κ_max` over modes that the residual excites; above it the loss grows for ever."""
        fastest = self.eigenvalues[self.mode_energies > 0].max(initial=0.0)
        return 2 * self.points / float(fastest) if fastest > 0 else math.inf

    def loss(self, learning_rate: ArrayLike, steps: ArrayLike) -> FloatArray:
        """`L_T(η)`, shape of `learning_rate` and `steps` broadcast; `inf` where it overflows.

        Args:
          learning_rate: η ≥ 0, any shape.
          steps: T ≥ 0, whole or infinite, any shape. At `T = inf` a rate above the stable ones
            gives `inf`; at exactly `ηκ/P = 2` a mode flips its sign for ever at constant loss.

        Raises:
          ValueError: a learning rate or a number of steps that is out of range.
        """
        with np.errstate(over="ignore"):
            return np.exp(self.log_loss(learning_rate, steps))

    def log_loss(self, learning_rate: ArrayLike, steps: ArrayLike) -> FloatArray:
        """`log L_T(η)`, finite where the loss itself over- or underflows; arguments of `loss`."""
        logs = self._log_mode_losses(learning_rate, steps)
        # Where every mode is −inf (solved exactly), or one is +inf, logsumexp does what is meant.
        with np.errstate(divide="ignore"):
            return np.asarray(logsumexp(logs, axis=-1))

    def mode_losses(self, learning_rate: ArrayLike, steps: ArrayLike) -> FloatArray:
        """What each mode has left, `(1/2P)(1 − ηκ_i/P)^{2T}(u_iᵀ r_0)²`; shape (..., M)."""
        with np.errstate(over="ignore"):
            return np.exp(self._log_mode_losses(learning_rate, steps))

    def residual(self, learning_rate: float, steps: float) -> FloatArray:
        """`r_T = f_T − y` on the training points, in the shape of the initial residual.

        NaN where there is no limit (`T = inf` at or above the largest stable rate).
        """
        eta, T = _checked(learning_rate, steps)
        factor = _power(eta * self.eigenvalues / self.points, T)
        return (self.modes @ self._scaled(factor)).reshape(self.shape)

    def change(self, cross_kernel: ArrayLike, learning_rate: float, steps: float) -> FloatArray:
        """`f_T(x) − f_0(x)` at further points x, from their kernel with the training points.

        Args:
          cross_kernel: `K(x, X)`, shape (Q, M): Q = points · C for a kernel of all outputs.
          learning_rate: η, one number.
          steps: T, one number; infinite gives the minimum-norm solution below the largest stable
            rate, and NaN at or above it.

        Returns:
          Shape (Q,) or, where the residual has outputs C, (points, C).

        Raises:
          ValueError: a kernel whose columns are not the training points', or as `loss`.
        """
        eta, T = _checked(learning_rate, steps)
        cross = np.asarray(cross_kernel, np.float64)
        if cross.ndim != 2 or cross.shape[1] != self.eigenvalues.size:
            raise ValueError(
                f"cross_kernel has shape {cross.shape}; expected (Q, {self.eigenvalues.size}), "
                "columns in the order of the training kernel"
            )
        moved = -cross @ (self.modes @ self._scaled(self._integrated(eta, T)))
        return moved.reshape(-1, *self.shape[1:])

    def optimum(self, steps: int) -> LinearizedOptimum:
        """The learning rate that minimises `L_T`, by bisection on its increasing derivative.

        Args:
          steps: T ≥ 1, finite.

        Raises:
          ValueError: steps out of range, or no mode to learn (every κ_i u_iᵀ r_0 is 0).
        """
        whole = isinstance(steps, numbers.Integral) and not isinstance(steps, bool)
        if not whole or steps < 1:
            raise ValueError(f"steps={steps!r}; expected a whole number, at least 1")
        rate = best_rate(self.eigenvalues / self.points, self.mode_energies, steps)
        return LinearizedOptimum(rate, float(self.loss(rate, steps)))

    def _log_mode_losses(self, learning_rate: ArrayLike, steps: ArrayLike) -> FloatArray:
        eta, T = _checked(learning_rate, steps)
        log_factor = _log_power(eta[..., None] * self.eigenvalues / self.points, 2 * T[..., None])
        with np.errstate(divide="ignore"):
            log_energy = np.log(self.mode_energies / (2 * self.points))
        # A mode that the residual does not excite stays at rest, however unstable.
        with np.errstate(invalid="ignore"):
            return np.where(np.isneginf(log_energy), -np.inf, log_factor + log_energy)

    def _scaled(self, factor: FloatArray) -> FloatArray:
        rest = self.coefficients == 0
        with np.errstate(invalid="ignore"):
            return np.where(rest, 0.0, factor[:, None] * self.coefficients)

    def _integrated(self, eta: FloatArray, T: FloatArray) -> FloatArray:
        """g: what the residual of each mode adds up to over T steps, times η/P."""
        kappa = self.eigenvalues
        z = eta * kappa / self.points
        # Where κ = 0, K(x, X) u = 0 as well: the value only has to be finite at T = inf.
        flat = float(eta * T / self.points) if math.isfinite(T) else 0.0
        safe = np.where(kappa > 0, kappa, 1.0)
        small = z < 1
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            near = -np.expm1(_times(np.broadcast_to(T, z.shape), np.log1p(-np.where(small, z, 0))))
            far = 1 - _power(z, T)
        return np.where(kappa > 0, np.where(small, near, far) / safe, flat)


def linearized_training(kernel: ArrayLike, residual: ArrayLike) -> LinearizedTraining:
    """Diagonalise a kernel once; every loss and prediction then costs a sum over modes.

    Args:
      kernel: K between the training points, symmetric positive semidefinite: shape (P·C, P·C) with
        output c of point i at row i·C + c (`empirical_ntk`), or (P, P) if every output has the same
        kernel and outputs do not mix (`infinite_width_kernels`).
      residual: `r_0 = f_0 − y`, shape (P,) or (P, C).

    Returns:
      The modes. Eigenvalues below `M · eps · κ_max` and coefficients below `M · eps · |r_0|` are
      set to 0, as they are rounding.

    Raises:
      ValueError: shapes that do not fit, entries that are not finite, a kernel that is not
        symmetric or has an eigenvalue that is negative beyond rounding.
    """
    K = np.asarray(kernel)
    # Rounding in the kernel is that of the precision in which it was computed.
    precision = np.finfo(K.dtype if K.dtype in (np.float32, np.float16) else np.float64)
    K, r = K.astype(np.float64), np.asarray(residual, np.float64)
    if r.ndim not in (1, 2) or r.size == 0:
        raise ValueError(f"residual has shape {r.shape}; expected (P,) or (P, C)")
    sizes = {r.size, r.shape[0]}
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape[0] not in sizes:
        expected = " or ".join(f"({size}, {size})" for size in sorted(sizes))
        raise ValueError(
            f"kernel has shape {K.shape}; expected {expected} for a residual of shape {r.shape}"
        )
    for name, array in (("kernel", K), ("residual", r)):
        if not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"{name}{list(where)} = {array[where]} is not finite")
    scale, count = float(np.abs(K).max()), K.shape[0]
    rounding = 8 * count * float(precision.eps) * scale
    asymmetry = float(np.abs(K - K.T).max())
    if asymmetry > rounding:
        raise ValueError(
            f"kernel is not symmetric: entries differ by {asymmetry:.3g} from their mirror images; "
            "give the kernel of the training points with themselves"
        )
    eigenvalues, modes = np.linalg.eigh((K + K.T) / 2)
    eigenvalues, modes = eigenvalues[::-1], modes[:, ::-1]
    if eigenvalues[-1] < -count * rounding:
        raise ValueError(
            f"kernel has the negative eigenvalue {eigenvalues[-1]:.3g}: no kernel J Jᵀ has one"
        )
    floor = count * float(precision.eps) * max(float(eigenvalues[0]), 0.0)
    eigenvalues = np.where(eigenvalues > floor, eigenvalues, 0.0)
    columns = r.reshape(count, -1)
    coefficients = modes.T @ columns
    # A mode at rest but for rounding would grow above its stable rate all the same.
    least = count * np.finfo(np.float64).eps * np.linalg.norm(columns, axis=0)
    coefficients = np.where(np.abs(coefficients) > least, coefficients, 0.0)
    return LinearizedTraining(eigenvalues, modes, coefficients, r.shape[0], r.shape)


def best_rate(rates: FloatArray, energies: FloatArray, steps: int) -> float:
    """The η that minimises `Σ_i e_i (1 − η r_i)^{2T}`, by bisection on its increasing derivative.

    Args:
      rates: `r_i = κ_i / P ≥ 0`, any shape.
      energies: `e_i ≥ 0`, the same shape.
      steps: T ≥ 1.

    Raises:
      ValueError: no rate is positive where the energy is.
    """
    learnable = (energies > 0) & (rates > 0)
    if not learnable.any():
        raise ValueError(
            "no mode with a positive eigenvalue has a residual: every learning rate gives the "
            "same loss"
        )
    rates, energies = rates[learnable], energies[learnable]

    def slope(log_rate: float) -> float:
        """−dL/dη without a positive factor: Σ κ_i c_i² (1 − ηκ_i/P)^{2T−1}."""
        z = math.exp(log_rate) * rates
        logs = (2 * steps - 1) * _log_distance(z) + np.log(rates) + np.log(energies)
        # Scaled by the largest term: only the sign matters.
        return float(np.sum(np.sign(1 - z) * np.exp(logs - logs.max())))

    # At 1/max every term pulls up or is 0, at 1/min every term pushes down or is 0.
    low, high = -math.log(rates.max()), -math.log(rates.min())
    root = low
    if high > low and slope(low) > 0 > slope(high):
        root = root_scalar(slope, bracket=(low, high), xtol=1e-15, rtol=1e-15).root
    return math.exp(root)


def _checked(learning_rate: ArrayLike, steps: ArrayLike) -> tuple[FloatArray, FloatArray]:
    eta, T = np.asarray(learning_rate, np.float64), np.asarray(steps, np.float64)
    if not (np.isfinite(eta) & (eta >= 0)).all():
        bad = eta[~(np.isfinite(eta) & (eta >= 0))].flat[0]
        raise ValueError(f"learning_rate holds {bad}; expected finite numbers, at least 0")
    whole = (T >= 0) & (np.isinf(T) | (np.floor(T) == T))
    if not whole.all():
        raise ValueError(
            f"steps holds {T[~whole].flat[0]}; expected whole numbers, at least 0, or infinity"
        )
    return np.broadcast_arrays(eta, T)  # type: ignore[return-value]


def _log_distance(z: FloatArray) -> FloatArray:
    """`log|1 − z|` for z ≥ 0, to full relative accuracy around z = 0."""
    with np.errstate(divide="ignore"):
        return np.where(z < 1, np.log1p(-np.minimum(z, 1)), np.log(np.abs(1 - z)))


def _times(T: FloatArray, logs: FloatArray) -> FloatArray:
    """`T · logs` where 0 · ∞ is 0: no step changes nothing, and nothing stays nothing."""
    with np.errstate(invalid="ignore"):
        return np.where((T == 0) | (logs == 0), 0.0, T * logs)


def _log_power(z: FloatArray, T: FloatArray) -> FloatArray:
    """`log |1 − z|^T`."""
    return _times(np.broadcast_to(T, np.broadcast_shapes(np.shape(T), z.shape)), _log_distance(z))


def _power(z: FloatArray, T: FloatArray) -> FloatArray:
    """`(1 − z)^T`; NaN where there is no limit (T = inf and z ≥ 2)."""
    with np.errstate(over="ignore"):
        size = np.exp(_log_power(z, T))
    if not math.isfinite(T):
        return np.where(z >= 2, np.nan, size)
    return np.where((z > 1) & (T % 2 == 1), -size, size)
