"""Transfer of the learning rate in linearized training, in closed form: loss curves by modes, gaps.

A width's kernel depends on the initial weights, so its loss curve is a mean over initialisations,

    φ_n(η) = E_init (1/2P) Σ_i (1 − ηκ_i/P)^{2T} (u_iᵀ r_0)²,

of which the modes of the k largest eigenvalues (of each initialisation's own kernel) hold the part

    φ_n^k(η) = E_init Σ_{i ≤ k} (1/2P) [(1 − ηκ_i/P)^{2T} − 1] (u_iᵀ r_0)²

of the change. For the squared loss this is what the trapezoid rule sums to along the trajectory,
`Σ_t ½ (g_t + g_{t+1})ᵀ J δw_t` by modes: exactly, at every learning rate. At infinite width the
kernel is not random, and the ensemble has one member.

The gaps of Ghosh, Wu and Bietti (arXiv 2512.22768, section 2) follow without training: with
`η*(n) = argmin φ_n` (one minimum: φ_n is convex in η),

    a_n = |φ_n(η*(n)) − φ_∞(η*(∞))|,   b_n = |log2 η*(n)/η*(∞)|,   c_n = φ_∞(η*(n)) − φ_∞(η*(∞)).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.ntk.linearized import LinearizedOptimum, LinearizedTraining, best_rate

__all__ = ["EnsembleGaps", "LinearizedEnsemble", "linearized_ensemble"]

FloatArray = NDArray[np.float64]

# Of log2 η, for resampled optima: cells are then below 0.01 wherever optima differ by 5 octaves.
_CELLS = 512
# A weight of 0 times an infinite loss would be no number.
_LARGEST_LOG = 600.0


@dataclasses.dataclass(frozen=True)
class EnsembleGaps:
    """Distances of a width from infinite width, with resampled initialisations.

    Attributes:
      loss_gap: a_n, in units of the loss.
      hp_gap: b_n, in octaves.
      suboptimality: c_n, in units of the loss.
      optimum: the width's best learning rate and loss.
      draws: (a, b, c) of bootstrap draws of the initialisations, shape (draws, 3); b to about
        1e-3 octaves.
    """

    loss_gap: float
    hp_gap: float
    suboptimality: float
    optimum: LinearizedOptimum
    draws: FloatArray


@dataclasses.dataclass(frozen=True)
class LinearizedEnsemble:
    """Linearized trainings on the same points, one per initialisation: see `linearized_ensemble`.

    Attributes:
      members: S trainings.
    """

    members: tuple[LinearizedTraining, ...]

    @property
    def points(self) -> int:
        """P."""
        return self.members[0].points

    def loss(self, learning_rate: ArrayLike, steps: int) -> FloatArray:
        """Loss of every member after T steps, shape (S, g) for g learning rates."""
        rates = np.atleast_1d(np.asarray(learning_rate, np.float64))
        return np.stack([member.loss(rates, steps) for member in self.members])

    def member_changes(self, learning_rate: ArrayLike, steps: int) -> FloatArray:
        """Change of each mode's loss over T steps in every member, shape (S, g, M)."""
        rates = np.atleast_1d(np.asarray(learning_rate, np.float64))
        return np.stack(
            [
                member.mode_losses(rates, steps) - member.mode_energies[None] / (2 * member.points)
                for member in self.members
            ]
        )

    def mode_changes(self, learning_rate: ArrayLike, steps: int) -> FloatArray:
        """Mean change of each mode's loss over T steps, shape (g, M); the sum over modes is φ."""
        return self.member_changes(learning_rate, steps).mean(axis=0)

    def top(self, learning_rate: ArrayLike, steps: int) -> FloatArray:
        """`φ^k`, shape (g, M): column k − 1 sums the k modes of largest eigenvalue."""
        return np.cumsum(self.mode_changes(learning_rate, steps), axis=1)

    def optimum(self, steps: int) -> LinearizedOptimum:
        """The learning rate at which the mean loss is smallest, and that loss.

        Raises:
          ValueError: T < 1, or nothing to learn.
        """
        if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps={steps!r}; expected a whole number, at least 1")
        rates = np.stack([member.eigenvalues for member in self.members]) / self.points
        energies = np.stack([member.mode_energies for member in self.members])
        rate = best_rate(rates, energies, int(steps))
        return LinearizedOptimum(rate, float(self.loss(rate, steps).mean()))

    def gaps(
        self, limit: LinearizedTraining, steps: int, *, draws: int = 400, rng_seed: int = 0
    ) -> EnsembleGaps:
        """a_n, b_n and c_n of this width.

        Args:
          limit: the same training with the kernel of infinite width.
          steps: T ≥ 1.
          draws: bootstrap draws of the members (with replacement).
          rng_seed: of the draws.

        Raises:
          ValueError: as `optimum`; a limit on other points.
        """
        if limit.points != self.points:
            raise ValueError(
                f"limit has {limit.points} points, the members {self.points}; expected the same"
            )
        best, here = limit.optimum(steps), self.optimum(steps)

        def distances(log_rate: FloatArray, loss: FloatArray) -> FloatArray:
            at_limit = limit.loss(2.0**log_rate, steps) - best.loss
            away = np.abs(log_rate - math.log2(best.learning_rate))
            return np.stack([np.abs(loss - best.loss), away, at_limit], axis=-1)

        a, b, c = distances(np.array([math.log2(here.learning_rate)]), np.array([here.loss]))[0]
        weights = self.resampling_weights(draws, rng_seed)
        return EnsembleGaps(
            float(a), float(b), float(c), here, distances(*self._resampled(weights, steps))
        )

    def resampling_weights(self, draws: int, rng_seed: int = 0) -> FloatArray:
        """Shares of the members in bootstrap draws, (draws, S), each row summing to 1.

        `gaps` draws these, so that other means can be taken over the same members.
        """
        members = len(self.members)
        rng = np.random.default_rng(rng_seed)
        return rng.multinomial(members, np.full(members, 1 / members), size=draws) / members

    def _resampled(self, weights: FloatArray, steps: int) -> tuple[FloatArray, FloatArray]:
        """log2 η* and loss of the weighted means of the members' losses, each of shape (draws,)."""
        optima = np.log2([member.optimum(steps).learning_rate for member in self.members])
        # The slope of every member rises in η, so that of a mean changes sign between their optima.
        grid = np.linspace(optima.min() - 1e-9, optima.max() + 1e-9, _CELLS + 1)
        slopes = weights @ np.stack([_slope(member, 2.0**grid, steps) for member in self.members])
        cell = np.argmax(slopes > 0, axis=1)
        cell = np.clip(cell, 1, _CELLS)
        rows = np.arange(len(weights))
        low, high = slopes[rows, cell - 1], slopes[rows, cell]
        rise = high - low
        share = np.where(rise > 0, -low / np.where(rise > 0, rise, 1.0), 0.0)
        share = np.clip(share, 0.0, 1.0)
        width = grid[1] - grid[0]
        losses = weights @ np.minimum(self.loss(2.0**grid, steps), math.exp(_LARGEST_LOG))
        at = losses[rows, cell - 1] * (1 - share) + losses[rows, cell] * share
        return grid[cell - 1] + share * width, at


def linearized_ensemble(members: Sequence[LinearizedTraining]) -> LinearizedEnsemble:
    """The mean over initialisations of linearized trainings on the same points.

    Args:
      members: one per initialisation, of `linearized_training`.

    Raises:
      ValueError: none given, or of different sizes.
    """
    given = tuple(members)
    if not given:
        raise ValueError("members is empty; give at least one linearized training")
    shapes = {(member.points, member.eigenvalues.size) for member in given}
    if len(shapes) > 1:
        raise ValueError(
            f"members have (points, modes) {sorted(shapes)}; expected the same points for all"
        )
    return LinearizedEnsemble(given)


def _slope(training: LinearizedTraining, rates: FloatArray, steps: int) -> FloatArray:
    """`dL/dη` of one member, shape of `rates`; a diverging member's is large, never infinite."""
    z = rates[:, None] * training.eigenvalues[None] / training.points
    weight = steps * training.mode_energies * training.eigenvalues / training.points**2
    with np.errstate(divide="ignore"):
        log_size = (2 * steps - 1) * np.log(np.abs(1 - z))
    power = np.sign(1 - z) * np.exp(np.minimum(log_size, _LARGEST_LOG))
    return -np.sum(weight[None] * power, axis=1)
