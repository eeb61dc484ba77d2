"""How many top components set the optimal hyperparameter: the truncation κ̂(n) and its conditions.

Along a grid `ν_1 < … < ν_g`, `φ_n^k(ν_i)` is the part of the loss change at width n that the k
leading components carry. A truncation `κ = (κ_1, …, κ_g)`, each from 1 to n, splits the loss curve
into the top-κ curve `φ_n^κ(ν_i) = φ_n^{κ_i}(ν_i)` and the residual `φ_n^{−κ} = φ_n − φ_n^κ`. Ghosh,
Wu and Bietti (arXiv 2512.22768, section 4 and its Algorithms 1 and 2) look for the one that makes
the top-κ curve the same at n and at the largest width and the residuals flat: it minimises

    J_p(κ; τ₁, τ₂) = (1/g) Σ_i |φ_n^{κ_i}(ν_i) − φ_max^{κ_i}(ν_i)|
                     + τ₁ Lip(φ_n^{−κ}) + τ₂ Lip(φ_max^{−κ}),

`Lip` being the largest slope between neighbours on the grid, one `κ_i` at a time, from `κ = n/2`
until nothing changes. Penalties (τ₁, τ₂) are tried in order of their sum until the top-κ curves are
convex enough and have their minima where the whole curves have theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Attempt",
    "Truncation",
    "candidate_penalties",
    "proxy_objective",
    "select_truncation",
    "split_curves",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Attempt:
    """One pair of penalties tried.

    Attributes:
      penalties: (τ₁, τ₂).
      kappa: the coordinate-wise minimiser of the proxy, g integers from 1 to n.
      objective: the proxy there.
      concave_fraction: fraction of the interior grid points at which the top-κ curve has a negative
        three-point second derivative, at n and at the largest width.
      argmin_distance: from the top-κ curve's grid minimum to the whole curve's, at n and at the
        largest width, on the grid's scale.
      failures: which conditions do not hold, in words; empty if accepted.
    """

    penalties: tuple[float, float]
    kappa: IntArray
    objective: float
    concave_fraction: tuple[float, float]
    argmin_distance: tuple[float, float]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Truncation:
    """What `select_truncation` found.

    Attributes:
      kappa: g integers from 1 to n, or None where no penalties were accepted.
      accepted: whether some were.
      penalties: those accepted, or None.
      attempts: every pair tried, in order; the last one is the accepted one, if any.
      reason: one sentence.
      top_n, residual_n: the top-κ curve and the residual at width n, shape (g,); None on failure.
      top_max, residual_max: the same at the largest width.
    """

    kappa: IntArray | None
    accepted: bool
    penalties: tuple[float, float] | None
    attempts: tuple[Attempt, ...]
    reason: str
    top_n: FloatArray | None
    residual_n: FloatArray | None
    top_max: FloatArray | None
    residual_max: FloatArray | None


def select_truncation(
    hp_grid: ArrayLike,
    phi_n: ArrayLike,
    phi_max: ArrayLike,
    *,
    penalties: Sequence[tuple[float, float]],
    convexity_tolerance: float,
    argmin_tolerance: float,
) -> Truncation:
    """The truncation κ̂(n) by the paper's Algorithms 1 and 2, or the reason why there is none.

    Args:
      hp_grid: shape (g,), g ≥ 3, strictly increasing, on the scale on which the hyperparameter is
        compared: log2 of a learning rate.
      phi_n: shape (g, n); column k − 1 holds `φ_n^k`, the last one the whole curve.
      phi_max: shape (g, n_max), n_max ≥ n, of the largest width.
      penalties: candidates (τ₁, τ₂), not negative, in units of `hp_grid`; tried in order of
        τ₁ + τ₂, ties by τ₁.
      convexity_tolerance: largest fraction ε_cvx of interior grid points at which a top-κ curve may
        be concave.
      argmin_tolerance: largest distance ε_amin between the grid minima of a top-κ curve and of the
        whole curve.

    Raises:
      ValueError: shapes, order or values are not as described; a curve is not finite (leave out
        hyperparameters at which training diverged).
    """
    grid, ours, largest = check_curves(hp_grid, phi_n, phi_max)
    candidates = _check_penalties(penalties)
    for name, tolerance in (
        ("convexity_tolerance", convexity_tolerance),
        ("argmin_tolerance", argmin_tolerance),
    ):
        if not (np.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {tolerance!r}.")
    attempts: list[Attempt] = []
    for pair in candidates:
        kappa, objective = _descend(grid, ours, largest, pair)
        attempt = _judge(
            grid, ours, largest, pair, kappa, objective, convexity_tolerance, argmin_tolerance
        )
        attempts.append(attempt)
        if not attempt.failures:
            top_n, top_max = _at(ours, kappa), _at(largest, kappa)
            return Truncation(
                kappa=kappa,
                accepted=True,
                penalties=pair,
                attempts=tuple(attempts),
                reason=f"accepted at penalties ({pair[0]:g}, {pair[1]:g})",
                top_n=top_n,
                residual_n=ours[:, -1] - top_n,
                top_max=top_max,
                residual_max=largest[:, -1] - top_max,
            )
    last = attempts[-1]
    reason = (
        f"none of {len(attempts)} pairs of penalties was accepted; at the last, "
        f"({last.penalties[0]:g}, {last.penalties[1]:g}): {'; '.join(last.failures)}"
    )
    return Truncation(None, False, None, tuple(attempts), reason, None, None, None, None)


def candidate_penalties(hp_grid: ArrayLike, *, count: int = 5) -> list[tuple[float, float]]:
    """Pairs (τ₁, τ₂) to try, scaled to the grid.

    Both terms of the proxy are losses once τ is measured in units of the grid: with τ its span, a
    slope weighs as much as the rise over the whole grid. So τ₁ and τ₂ run through `count` values
    from 1/64 of the span to twice the span, all pairs of them. None is 0: without a penalty nothing
    asks for a flat residual, and the widths may agree best at a κ that carries next to nothing.

    Args:
      hp_grid: shape (g,), g ≥ 2, strictly increasing, on the scale of `select_truncation`.
      count: how many values each, at least 1.

    Raises:
      ValueError: the grid does not increase, or the count is below 1.
    """
    grid = np.asarray(hp_grid, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 2 or not (np.diff(grid) > 0).all():
        raise ValueError(f"hp_grid must be at least 2 increasing numbers, got {hp_grid!r}.")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}.")
    span = float(grid[-1] - grid[0])
    values = np.geomspace(span / 64, 2 * span, count).tolist()
    return [(first, second) for first in values for second in values]


def split_curves(phi: ArrayLike, kappa: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The top-κ curve `φ^κ` and the residual `φ^{−κ} = φ − φ^κ`.

    Args:
      phi: shape (g, n), column k − 1 holding `φ^k`, the last one the whole.
      kappa: integers from 1 to n, shape (..., g), one for each hyperparameter; a single integer is
        one for all.

    Returns:
      two arrays (..., g), or (g,) for a single integer.

    Raises:
      ValueError: shapes or entries are not as described.
    """
    table = np.asarray(phi, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"phi has shape {table.shape}, expected (hyperparameter, component).")
    g, n = table.shape
    given = np.asarray(kappa)
    chosen = check_kappa(np.full(g, given) if given.ndim == 0 else given, g, n)
    top = table[np.arange(g), chosen - 1]
    return top, table[:, -1] - top


def proxy_objective(
    hp_grid: ArrayLike,
    phi_n: ArrayLike,
    phi_max: ArrayLike,
    kappa: ArrayLike,
    penalties: tuple[float, float],
) -> float:
    """`J_p(κ; τ₁, τ₂)` of the module docstring.

    Args:
      hp_grid: shape (g,).
      phi_n: shape (g, n).
      phi_max: shape (g, n_max).
      kappa: shape (g,), integers from 1 to n.
      penalties: (τ₁, τ₂).

    Raises:
      ValueError: as `select_truncation`; or an entry of kappa out of its range.
    """
    grid, ours, largest = check_curves(hp_grid, phi_n, phi_max)
    chosen = check_kappa(kappa, grid.size, ours.shape[1])
    if chosen.ndim != 1:
        raise ValueError(f"kappa has shape {chosen.shape}, expected ({grid.size},).")
    (pair,) = _check_penalties([penalties])
    return _objective(grid, ours, largest, chosen, pair)


def _objective(
    grid: FloatArray,
    ours: FloatArray,
    largest: FloatArray,
    kappa: IntArray,
    penalties: tuple[float, float],
) -> float:
    top_n, top_max = _at(ours, kappa), _at(largest, kappa)
    return float(
        np.mean(np.abs(top_n - top_max))
        + penalties[0] * _largest_slope(grid, ours[:, -1] - top_n)
        + penalties[1] * _largest_slope(grid, largest[:, -1] - top_max)
    )


def _descend(
    grid: FloatArray, ours: FloatArray, largest: FloatArray, penalties: tuple[float, float]
) -> tuple[IntArray, float]:
    """Coordinate descent: each κ_i in turn to the minimiser over 1 … n, all others held."""
    g, n = ours.shape
    distance = np.abs(ours - largest[:, :n]) / g
    residuals = [ours[:, -1:] - ours, largest[:, -1:] - largest[:, :n]]
    kappa = np.full(g, max(1, n // 2), dtype=np.int64)
    objective = _objective(grid, ours, largest, kappa, penalties)
    changed = True
    while changed:
        changed = False
        for i in range(g):
            # Only the i-th distance and the slopes to both neighbours depend on κ_i.
            values = distance[i].copy()
            for weight, residual in zip(penalties, residuals, strict=True):
                current = _at(residual, kappa)
                slopes = np.abs(np.diff(current)) / np.diff(grid)
                others = np.delete(slopes, [j for j in (i - 1, i) if 0 <= j < g - 1])
                steepest = np.full(n, others.max(initial=0.0))
                for j in (i - 1, i + 1):
                    if 0 <= j < g:
                        slope = np.abs(residual[i] - current[j]) / abs(grid[i] - grid[j])
                        steepest = np.maximum(steepest, slope)
                values += weight * steepest
            # A move must gain more than rounding, or ties could be walked in circles.
            best, here = int(np.argmin(values)), int(kappa[i]) - 1
            if values[best] < values[here] - 1e-12 * (abs(values[here]) + abs(objective)):
                kappa[i] = best + 1
                objective = _objective(grid, ours, largest, kappa, penalties)
                changed = True
    return kappa, objective


def _judge(
    grid: FloatArray,
    ours: FloatArray,
    largest: FloatArray,
    penalties: tuple[float, float],
    kappa: IntArray,
    objective: float,
    convexity_tolerance: float,
    argmin_tolerance: float,
) -> Attempt:
    concave, moved, failures = [], [], []
    for phi, where in ((ours, "at width n"), (largest, "at the largest width")):
        top = _at(phi, kappa)
        slopes = np.diff(top) / np.diff(grid)
        # A straight piece is not concave by rounding.
        rounding = 1e-12 * np.abs(slopes).max()
        concave.append(float(np.mean(np.diff(slopes) < -rounding)))
        moved.append(float(abs(grid[np.argmin(top)] - grid[np.argmin(phi[:, -1])])))
        if concave[-1] > convexity_tolerance:
            failures.append(
                f"the top-κ curve {where} is concave at {concave[-1]:.0%} of the interior points "
                f"(allowed {convexity_tolerance:.0%})"
            )
        if moved[-1] > argmin_tolerance:
            failures.append(
                f"the top-κ curve {where} has its minimum {moved[-1]:.3g} from the whole curve's "
                f"(allowed {argmin_tolerance:.3g})"
            )
    return Attempt(
        penalties=penalties,
        kappa=kappa,
        objective=objective,
        concave_fraction=(concave[0], concave[1]),
        argmin_distance=(moved[0], moved[1]),
        failures=tuple(failures),
    )


def _at(phi: FloatArray, kappa: IntArray) -> FloatArray:
    return phi[np.arange(kappa.size), kappa - 1]


def _largest_slope(grid: FloatArray, curve: FloatArray) -> float:
    return float(np.max(np.abs(np.diff(curve)) / np.diff(grid)))


def check_kappa(kappa: ArrayLike, g: int, n: int) -> IntArray:
    """Truncations (..., g) of integers from 1 to n, or a ValueError that says what is wrong."""
    chosen = np.asarray(kappa)
    if (
        chosen.ndim == 0
        or chosen.shape[-1] != g
        or not np.issubdtype(chosen.dtype, np.integer)
        or (chosen < 1).any()
        or (chosen > n).any()
    ):
        raise ValueError(f"kappa must hold {g} integers from 1 to {n}, got {kappa!r}.")
    return chosen.astype(np.int64)


def check_curves(
    hp_grid: ArrayLike, phi_n: ArrayLike, phi_max: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The arguments of `select_truncation` as arrays, or a ValueError that says what is wrong."""
    grid = np.asarray(hp_grid, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 3 or not np.isfinite(grid).all() or (np.diff(grid) <= 0).any():
        raise ValueError(
            f"hp_grid must be at least 3 finite, strictly increasing numbers, got {hp_grid!r}: "
            "sort it (and the rows of phi_n and phi_max with it)."
        )
    arrays = []
    for name, given in (("phi_n", phi_n), ("phi_max", phi_max)):
        array = np.asarray(given, dtype=np.float64)
        if array.ndim != 2 or array.shape[0] != grid.size or array.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {array.shape}, expected ({grid.size}, width): a row for each "
                "hyperparameter, column k − 1 for the k leading components."
            )
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise ValueError(
                f"{name} is not finite at hp_grid[{row}] = {grid[row]:g}: leave out "
                "hyperparameters at which training diverged at either width."
            )
        arrays.append(array)
    ours, largest = arrays
    if largest.shape[1] < ours.shape[1]:
        raise ValueError(
            f"phi_max has {largest.shape[1]} components, fewer than the {ours.shape[1]} of phi_n: "
            "phi_max must be of the larger width."
        )
    return grid, ours, largest


def _check_penalties(penalties: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    pairs = np.asarray(penalties, dtype=np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.shape[0] == 0:
        raise ValueError(f"penalties must be pairs (τ₁, τ₂), at least one, got {penalties!r}.")
    if not np.isfinite(pairs).all() or (pairs < 0).any():
        raise ValueError(f"penalties must be finite and not negative, got {penalties!r}.")
    ordered = sorted(map(tuple, pairs.tolist()), key=lambda pair: (pair[0] + pair[1], pair[0]))
    return [(float(a), float(b)) for a, b in ordered]
