"""What in a table of losses should make a reader doubt it, each in a sentence with its numbers.

Nothing here changes a verdict: a rate can be fitted to a table in which half the networks are dead,
and mean nothing. Thresholds are conventions, named below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import poisson

__all__ = ["duplicates", "suspicions"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Cells that end at one value, above the median, before they are called dead.
_FEWEST_DEAD = 3
# Relative distance below which values are one: losses in single precision, averaged over batches.
_ONE_VALUE = 2e-5
# How many such distances around a value tell how many losses are there by chance.
_AROUND = 100
# So rarely may chance bring that many together anywhere in the table.
_UNLIKELY = 0.01
# A loss rises with width if it does so by more than this many standard errors of the difference.
_RISE_IN_ERRORS = 2.0
# Rounding matters if its unit exceeds this fraction of the dip around an optimum.
_COARSE = 0.1
# Fraction of diverged runs of a width from which little is left to fit.
_MOSTLY = 0.5
_FINEST_DIGITS = 7


def suspicions(
    widths: ArrayLike,
    hp_values: ArrayLike,
    losses: ArrayLike,
    *,
    observed: ArrayLike | None = None,
    hp_name: str = "hyperparameter",
) -> tuple[str, ...]:
    """Warnings about one table; empty where nothing is odd.

    Looked for: a best loss that rises with width, dead but finite runs (many at exactly one value
    that is not small), an optimum at the edge of its grid or curves upside down, one seed, losses
    rounded so coarsely that the dip around the optimum is lost, seeds or widths that are copies,
    widths where most runs diverged.

    Args:
      widths: shape (W,), increasing.
      hp_values: grid, shape (H,) or (W, H).
      losses: shape (W, H, S); NaN or infinite where a run diverged.
      observed: bool, the same shape: False where there is no run. None: all.
      hp_name: of the hyperparameter, for the sentences.

    Raises:
      ValueError: the shapes do not agree.
    """
    n = np.asarray(widths)
    values = np.asarray(losses, dtype=np.float64)
    seen = np.ones(values.shape, bool) if observed is None else np.asarray(observed, dtype=bool)
    grid = np.asarray(hp_values, dtype=np.float64)
    if values.ndim != 3 or values.shape[0] != n.size or seen.shape != values.shape:
        raise ValueError(
            f"losses has shape {values.shape} and observed {seen.shape}, expected "
            f"(width, hyperparameter, seed) = ({n.size}, H, S) of both"
        )
    if grid.shape not in (values.shape[1:2], values.shape[:2]):
        raise ValueError(
            f"hp_values has shape {grid.shape}, expected ({values.shape[1]},) or "
            f"{values.shape[:2]}: one grid for all widths, or one for each"
        )
    grid = np.broadcast_to(grid, values.shape[:2])
    alive = seen & np.isfinite(values)
    # As everywhere: a cell in which a seed diverged is not usable.
    usable = alive.any(axis=-1) & ~(seen & ~alive).any(axis=-1)
    total = np.where(alive, values, 0.0).sum(axis=-1)
    mean = np.where(usable, total / np.maximum(alive.sum(axis=-1), 1), np.inf)
    return tuple(
        sentence
        for sentence in (
            _rising(n, values, alive, mean),
            _dead(values, alive),
            _upside_down(n, seen, mean) or _edges(n, grid, seen, mean, hp_name),
            _one_seed(seen),
            _rounded(n, values[alive], seen, mean),
            _copied_seeds(values, alive),
            _copied_widths(n, values, seen),
            _diverged(n, seen, alive),
        )
        if sentence
    )


def duplicates(tables: Mapping[str, FloatArray]) -> dict[str, list[str]]:
    """Warnings, by name, about parametrizations whose losses are the same in every cell.

    Agreeing at one width is as it should be: parametrizations coincide at their base width.

    Args:
      tables: losses by name, each of any shape.
    """
    found: dict[str, list[str]] = {name: [] for name in tables}
    names = list(tables)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = tables[first], tables[second]
            if a.shape == b.shape and np.array_equal(a, b, equal_nan=True):
                sentence = (
                    f"{first!r} and {second!r} hold the same losses in all {a.size} cells: one may "
                    "be a copy of the other"
                )
                found[first].append(sentence)
                found[second].append(sentence)
    return found


def _rising(n: NDArray[np.int_], values: FloatArray, alive: BoolArray, mean: FloatArray) -> str:
    best = mean.min(axis=1)
    at = mean.argmin(axis=1)
    known = np.flatnonzero(np.isfinite(best))
    steps = []
    for narrow, wide in itertools.pairwise(known):
        error = math.hypot(
            *(_standard_error(values[k, at[k]][alive[k, at[k]]]) for k in (int(narrow), int(wide)))
        )
        if best[wide] - best[narrow] > _RISE_IN_ERRORS * error:
            steps.append((int(narrow), int(wide)))
    if not steps:
        return ""
    narrow, wide = max(steps, key=lambda step: best[step[1]] - best[step[0]])
    times = "" if len(steps) == 1 else f" (and {len(steps) - 1} more such step(s))"
    return (
        f"the best loss rises with width, from {best[narrow]:.5g} at {n[narrow]} to "
        f"{best[wide]:.5g} at {n[wide]}{times}: overfitting, or wide networks trained too little; "
        "rates assume that wider is better"
    )


def _standard_error(sample: FloatArray) -> float:
    return float(sample.std(ddof=1)) / math.sqrt(sample.size) if sample.size > 1 else 0.0


def _dead(values: FloatArray, alive: BoolArray) -> str:
    """Many cells at one value, no better than the median: networks that stopped learning."""
    finite = values[alive]
    if finite.size < 2 * _FEWEST_DEAD:
        return ""
    # Seeds of one cell may agree for being well trained: cells are counted.
    cells = np.flatnonzero(alive) // values.shape[-1]
    order = np.argsort(finite, kind="stable")
    ordered = finite[order]
    starts = _group_starts(ordered)
    groups = np.split(cells[order], starts[1:])
    counts = np.array([np.unique(group).size for group in groups])
    upper = ordered[starts] >= np.median(ordered)
    if counts.size == 1 or not upper.any():
        return ""
    # Coarsely printed losses repeat by chance: one value must stand out from the better ones.
    usual = 1.0 if upper.all() else float(np.median(counts[~upper]))
    most = int(np.argmax(np.where(upper, counts, 0)))
    value = float(np.median(ordered[starts[most] :][: groups[most].size]))
    # In a large table losses come close by chance: how often, their density around tells.
    width = max(_ONE_VALUE * abs(value), _unit(finite))
    around = int((np.abs(ordered - value) <= _AROUND * width).sum()) - groups[most].size
    by_chance = counts.size * poisson.sf(counts[most] - 1, around / (2 * _AROUND))
    if counts[most] < max(_FEWEST_DEAD, 3 * usual) or by_chance > _UNLIKELY:
        return ""
    classes = round(math.exp(value)) if 0 < value < 14 else 0
    chance = ""
    if classes >= 2 and abs(value - math.log(classes)) <= max(_ONE_VALUE * value, _unit(finite)):
        chance = f" = ln {classes}, the loss of a guess among {classes} classes"
    return (
        f"{groups[most].size} of {finite.size} finite runs end at exactly {value:.6g}{chance}: "
        "dead networks, which count as trained; mark them as diverged (nan) if they are"
    )


def _group_starts(ordered: FloatArray) -> NDArray[np.int_]:
    """First indices of groups of sorted values that are one with the first of their group."""
    starts, at = [], 0
    while at < ordered.size:
        starts.append(at)
        reach = ordered[at] + _ONE_VALUE * abs(ordered[at])
        at = int(np.searchsorted(ordered, reach, "right"))
    return np.array(starts)


def _edges(
    n: NDArray[np.int_], grid: FloatArray, seen: BoolArray, mean: FloatArray, hp_name: str
) -> str:
    at_edge = []
    for k in range(n.size):
        present = np.flatnonzero(seen[k].any(axis=-1))
        if present.size == 0 or not np.isfinite(mean[k]).any():
            continue
        best = int(mean[k].argmin())
        # A plateau from edge to edge has no side.
        alone = (mean[k] == mean[k, best]).sum() == 1
        if alone and best in (present[0], present[-1]):
            side = "smallest" if best == present[0] else "largest"
            at_edge.append(f"{n[k]} ({side}, {grid[k, best]:.4g})")
    if not at_edge:
        return ""
    return (
        f"the lowest loss is at the edge of the grid of {hp_name} at width {', '.join(at_edge)}: "
        "the optimum lies there or further out; extend the grid"
    )


def _upside_down(n: NDArray[np.int_], seen: BoolArray, mean: FloatArray) -> str:
    """Curves that are all highest inside of their grid: not losses, but accuracies."""
    for k in range(n.size):
        curve = mean[k][seen[k].any(axis=-1)]
        if curve.size < 3 or not np.isfinite(curve).all():
            return ""
        inside = curve[1:-1].max()
        if inside <= curve[0] or inside <= curve[-1] or curve[1:-1].min() < curve[[0, -1]].min():
            return ""
    return (
        "at every width the curve has its maximum inside of the grid and its minimum at an end: if "
        "larger is better (an accuracy), take 1 minus it as the loss"
    )


def _one_seed(seen: BoolArray) -> str:
    counts = seen.sum(axis=-1)
    if counts.max() != 1:
        return ""
    return (
        "one seed: nothing shows how much of a difference between two runs is chance; run each "
        "with at least 3"
    )


def _unit(finite: FloatArray) -> float:
    """The power of ten of which all losses are multiples; 0 where there is none above 1e-7."""
    # Above 2^53 every double is whole.
    finite = finite[np.abs(finite) < 2.0**53]
    for digits in range(_FINEST_DIGITS if finite.size else 0):
        scaled = finite * 10.0**digits
        whole = np.round(scaled)
        # Each against its own size: a huge loss must not round the others, nor 0 a small one.
        near = np.abs(scaled - whole) <= np.clip(1e-12 * np.abs(scaled), 1e-6, 1e-2)
        if (near & ((whole != 0) | (finite == 0))).all():
            return 10.0**-digits
    return 0.0


def _rounded(n: NDArray[np.int_], finite: FloatArray, seen: BoolArray, mean: FloatArray) -> str:
    unit = _unit(finite) if finite.size else 0.0
    if unit == 0.0:
        return ""
    lost = []
    for k in range(n.size):
        curve = mean[k][seen[k].any(axis=-1)]
        i = int(curve.argmin())
        beside = [curve[j] for j in (i - 1, i + 1) if 0 <= j < curve.size]
        beside = [loss for loss in beside if np.isfinite(loss)]
        # A mean over S seeds is rounded sqrt(S) times less coarsely.
        rounding = unit / math.sqrt(max(int(seen[k].sum(axis=-1).max()), 1))
        if np.isfinite(curve[i]) and beside and rounding > _COARSE * (min(beside) - curve[i]):
            lost.append(str(n[k]))
    best = mean.min(axis=1)
    close = [
        f"{n[k]} and {n[k + 1]}"
        for k in range(n.size - 1)
        if np.isfinite(best[k : k + 2]).all() and abs(best[k + 1] - best[k]) <= unit
    ]
    doubts = []
    if lost:
        doubts.append(
            "more than a tenth of the dip around the optimum at width "
            f"{', '.join(lost)}, so where it lies is partly rounding"
        )
    if close:
        doubts.append(f"all that the best losses of widths {', '.join(close)} differ by")
    if not doubts:
        return ""
    return f"losses are rounded to {unit:g}, which is {'; and '.join(doubts)}: log more digits"


def _copied_seeds(values: FloatArray, alive: BoolArray) -> str:
    several = alive.sum(axis=-1) > 1
    if not several.any():
        return ""
    low = np.where(alive, values, np.inf).min(axis=-1)
    high = np.where(alive, values, -np.inf).max(axis=-1)
    same = int((several & (low == high)).sum())
    if 2 * same <= int(several.sum()):
        return ""
    unit = _unit(values[alive])
    apart = np.diff(np.unique(values[alive]))
    if apart.size and unit > 0.5 * float(np.median(apart)):
        return (
            f"all seeds have the same loss in {same} of {int(several.sum())} cells, as losses are "
            f"rounded to {unit:g}: intervals are too narrow; log more digits"
        )
    return (
        f"all seeds have the same loss in {same} of {int(several.sum())} cells: they are copies of "
        "one run, and intervals from them mean nothing"
    )


def _copied_widths(n: NDArray[np.int_], values: FloatArray, seen: BoolArray) -> str:
    for k in range(1, n.size):
        both = seen[k - 1] & seen[k]
        finite = both & np.isfinite(values[k])
        if finite.sum() >= 3 and np.array_equal(
            values[k - 1][both], values[k][both], equal_nan=True
        ):
            return (
                f"widths {n[k - 1]} and {n[k]} hold the same losses in all {int(both.sum())} "
                "common cells: one may be a copy of the other"
            )
    return ""


def _diverged(n: NDArray[np.int_], seen: BoolArray, alive: BoolArray) -> str:
    runs = seen.sum(axis=(1, 2))
    fraction = 1 - alive.sum(axis=(1, 2)) / np.maximum(runs, 1)
    bad = [f"{n[k]} ({100 * fraction[k]:.0f} %)" for k in range(n.size) if fraction[k] > _MOSTLY]
    if not bad:
        return ""
    return f"more than half of the runs diverged at width {', '.join(bad)}"
