"""The losses of a sweep over widths and one hyperparameter, checked once, and their resamples.

A cell (width n, hyperparameter nu) holds the final losses of its seeds. Three states are kept
apart: a finite loss; NaN, infinity or beyond 1e100, which is a run that diverged; and not observed,
a cell or a seed that the table does not hold. The curve `phi_n(nu)` is the mean over the observed
seeds, and infinite where any of them diverged: a hyperparameter that kills one run in three is not
usable.

Seeds that are copies of one another in every cell show no noise, and count as one.

Seeds are resampled jointly (common random numbers): one bootstrap draw gives weights `m_s/S`, `m`
multinomial, to the seeds of all cells at once. A bootstrap of S seeds has a variance too small by
`(S−1)/S`, so each drawn curve's deviation from the mean curve is stretched by `sqrt(S/(S−1))`.
Where one seed of a cell blew up and stayed finite, that would lead far below every loss: no cell is
drawn lower than its lowest loss by more than the seeds differ at the width's best cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.curves import Scale, check_grid

__all__ = ["LossTable", "check_widths", "loss_table", "resampled_deviations"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


# Squares of larger losses, which fits add up, come near the end of the floating-point range.
_LARGEST = 1e100
_SMALLEST = 1e-100


@dataclass(frozen=True)
class LossTable:
    """A checked table; tuples run over widths, whose grids may differ.

    Attributes:
      widths: shape (W,), strictly increasing.
      grids: hyperparameters observed at each width, each of shape (H_n,), strictly increasing.
      losses: each (H_n, S), NaN where not observed or diverged.
      observed: each (H_n, S).
      curves: mean over the observed seeds, each (H_n,), `inf` where one of them diverged.
      scale: how the hyperparameter is compared.
    """

    widths: NDArray[np.int64]
    grids: tuple[FloatArray, ...]
    losses: tuple[FloatArray, ...]
    observed: tuple[BoolArray, ...]
    curves: tuple[FloatArray, ...]
    scale: Scale

    @property
    def seeds(self) -> int:
        """Seeds S of the table; cells may hold fewer."""
        return self.losses[0].shape[-1]

    @property
    def nonnegative(self) -> bool:
        """No mean loss is negative, as of a quantity that cannot be."""
        return all(bool((curve >= 0).all()) for curve in self.curves)

    @property
    def replicates(self) -> NDArray[np.int64]:
        """Seeds per observed cell, the median at each width."""
        return np.array([int(np.median(seen.sum(axis=-1))) for seen in self.observed])

    def draws(self, resamples: int, rng_seed: int) -> tuple[FloatArray, ...]:
        """Curves of `resamples` joint bootstrap draws, each of shape (R, H_n)."""
        rng = np.random.default_rng(rng_seed)
        weights = rng.multinomial(self.seeds, np.full(self.seeds, 1 / self.seeds), size=resamples)
        drawn = []
        for curve, loss, seen in zip(self.curves, self.losses, self.observed, strict=True):
            trained = np.isfinite(curve)[:, None]
            away = resampled_deviations(np.where(trained, loss, 0), weights, seen)
            for cell, donor in _cell_donors(curve, seen).items():
                # The noise of one seed is that of a mean over S of them, times sqrt(S).
                root = math.sqrt(int(seen[donor].sum()))
                away[:, cell] = root * away[rng.permutation(resamples), donor]
            floor = draw_floor(curve, loss, seen)
            single = seen.sum(axis=-1) == 1
            drawn.append(np.where(single, curve + away, np.maximum(curve + away, floor)))
        return tuple(drawn)


def _cell_donors(curve: FloatArray, seen: BoolArray) -> dict[int, int]:
    """For every cell with one seed, the nearest trained cell of its width that has several."""
    counts = np.where(np.isfinite(curve), seen.sum(axis=-1), 0)
    several, single = np.flatnonzero(counts > 1), np.flatnonzero(counts == 1)
    if not several.size:
        return {}
    return {int(k): int(several[np.abs(several - k).argmin()]) for k in single}


def draw_floor(curve: FloatArray, losses: FloatArray, observed: ArrayLike = True) -> FloatArray:
    """Below what a bootstrap draw of one width's curve may not go, shape (H,).

    A cell's lowest seed, less the spread of seeds at the best cell. Stretched deviations stay above
    it where noise is alike everywhere; a single seed that blew up would otherwise draw its cell far
    below every loss.

    Args:
      curve: mean over seeds, shape (H,), `inf` where diverged.
      losses: shape (H, S).
      observed: bool, shape (H, S).
    """
    trained = np.isfinite(curve)[:, None]
    lowest = np.where(observed & trained, losses, np.inf).min(axis=-1)
    best = losses[curve.argmin()]
    return lowest - (np.ptp(best[np.isfinite(best)]) if trained.any() else 0.0)


def resampled_deviations(
    losses: ArrayLike, weights: ArrayLike, observed: ArrayLike | None = None
) -> FloatArray:
    """How far the mean over seeds moves in each bootstrap draw, unbiased in variance.

    Args:
      losses: shape (..., S), finite where observed.
      weights: how often each draw holds each seed, shape (R, S), rows adding up to S.
      observed: bool, shape (..., S); None means all. A draw without any observed seed of a cell
        leaves that cell where it is.

    Returns:
      Deviations, shape (R, ...), stretched by `sqrt(S/(S−1))`, S counting each cell's observed
      seeds; 0 for a cell with one seed.
    """
    raw = np.asarray(losses, dtype=np.float64)
    seen = np.ones(raw.shape, dtype=bool) if observed is None else np.asarray(observed)
    values, drawn = np.where(seen, raw, 0.0), np.asarray(weights, dtype=np.float64)
    count = seen.sum(axis=-1)
    centred = np.where(seen, values - (values.sum(-1) / np.maximum(count, 1))[..., None], 0.0)
    total = np.tensordot(drawn, centred, axes=(1, -1))
    held = np.tensordot(drawn, seen.astype(np.float64), axes=(1, -1))
    stretch = np.sqrt(count / np.maximum(count - 1, 1))
    return np.where(held > 0, total / np.maximum(held, 1), 0.0) * stretch[None]


def loss_table(
    widths: ArrayLike,
    hp_values: ArrayLike,
    losses: ArrayLike,
    *,
    observed: ArrayLike | None = None,
    scale: Scale = "log2",
) -> LossTable:
    """Check arrays and bring them into the form of `LossTable`.

    Args:
      widths: positive integers, strictly increasing, shape (W,).
      hp_values: grid, shape (H,) shared by all widths or (W, H); strictly increasing among the
        observed entries of a width, at least 3 of them, valid on the scale. Entries that are
        observed nowhere may be NaN.
      losses: shape (W, H, S), or (W, H) for one seed; NaN, infinite or beyond ±1e100 means
        diverged.
      observed: bool, the losses' shape; False means that the table holds no such run. None: all.
      scale: how hyperparameters are compared.

    Raises:
      ValueError: an argument is not as described; the message names it and what to do.
    """
    n = check_widths(widths)
    values = np.asarray(losses, dtype=np.float64)
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[0] != n.size or values.shape[2] == 0:
        raise ValueError(
            f"losses has shape {np.shape(losses)}, expected (width, hyperparameter, seed) = "
            f"({n.size}, H, S)"
        )
    seen = np.ones(values.shape, dtype=bool) if observed is None else np.asarray(observed)
    if observed is not None and seen.ndim == 2:
        seen = seen[..., None]
    if seen.shape != values.shape or seen.dtype != np.bool_:
        raise ValueError(
            f"observed has shape {seen.shape} and dtype {seen.dtype}, expected bool of "
            f"shape {values.shape}, that of losses"
        )
    given = np.asarray(hp_values, dtype=np.float64)
    if given.shape not in ((values.shape[1],), values.shape[:2]):
        raise ValueError(
            f"hp_values has shape {given.shape}, expected ({values.shape[1]},) or "
            f"{values.shape[:2]}: one grid for all widths, or one for each"
        )
    grids, kept, marks, curves = [], [], [], []
    for k, grid in enumerate(np.broadcast_to(given, values.shape[:2])):
        present = seen[k].any(axis=-1)
        if present.sum() < 3:
            raise ValueError(
                f"width {n[k]} has losses at {int(present.sum())} hyperparameter values, and an "
                "optimum needs 3: add values there or leave this width out"
            )
        try:
            check_grid(grid[present], scale)
        except ValueError as error:
            raise ValueError(f"at width {n[k]}: {error}") from None
        mark = seen[k][present]
        # NaN compares as False.
        trained = mark & (np.abs(values[k][present]) <= _LARGEST)
        loss = np.where(trained, values[k][present], np.nan)
        dead = (mark & np.isnan(loss)).any(axis=-1)
        mean = np.where(mark, np.nan_to_num(loss), 0.0).sum(axis=-1) / mark.sum(axis=-1)
        grids.append(grid[present])
        kept.append(loss)
        marks.append(mark)
        curves.append(np.where(dead, np.inf, mean))
    largest = max(float(np.max(np.abs(c[np.isfinite(c)]), initial=0.0)) for c in curves)
    if 0 < largest < _SMALLEST:
        raise ValueError(
            f"no loss is larger than {largest:.3g}, which is near the end of the floating-point "
            "range: give losses in other units"
        )
    if _all_copies(kept, marks):
        kept = [np.fmax.reduce(loss, axis=-1, keepdims=True) for loss in kept]
        curves = [
            np.where(np.isfinite(curve), loss[:, 0], np.inf)
            for curve, loss in zip(curves, kept, strict=True)
        ]
        marks = [mark.any(axis=-1, keepdims=True) for mark in marks]
    return LossTable(n, tuple(grids), tuple(kept), tuple(marks), tuple(curves), scale)


def _all_copies(losses: list[FloatArray], observed: list[BoolArray]) -> bool:
    """Whether several seeds were observed and none differs from the others of its cell."""
    several = [seen.sum(axis=-1) > 1 for seen in observed]
    if not any(cells.any() for cells in several):
        return False
    for loss, seen, cells in zip(losses, observed, several, strict=True):
        filled = np.where(np.isnan(loss), np.inf, loss)
        low = np.where(seen, filled, np.inf).min(axis=-1)
        high = np.where(seen, filled, -np.inf).max(axis=-1)
        if (cells & (low != high)).any():
            return False
    return True


def check_widths(widths: ArrayLike) -> NDArray[np.int64]:
    """Widths as integers, shape (W,), or a ValueError that says what is wrong with them."""
    given = np.asarray(widths)
    whole = given.ndim == 1 and given.size > 0 and np.issubdtype(given.dtype, np.number)
    if not whole or not (np.isfinite(given).all() and (given == np.round(given)).all()):
        raise ValueError(f"widths={given.tolist()} must be whole numbers of shape (W,)")
    n = given.astype(np.int64)
    if n[0] < 1 or (np.diff(n) <= 0).any():
        raise ValueError(f"widths={n.tolist()} must be positive and strictly increasing; sort them")
    return n
