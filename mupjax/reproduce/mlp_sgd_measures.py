"""Numbers of ``mupjax reproduce mlp-sgd``: optima, scaling laws, easy and hard examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from mupjax.mechanism import Mechanism, explain_dataset
from mupjax.reproduce.mlp_sgd_training import PARAMETRIZATION
from theory.curves import interpolate_loss
from theory.drift import TransferSummary, transfer_summary
from theory.rates import PowerLaw, fit_power_law
from theory.sample_groups import Overlap, extreme, overlap

__all__ = [
    "EASY",
    "ENDS",
    "HARD",
    "Measures",
    "best_rate",
    "interval_over_seeds",
    "kept_cells",
    "measure",
]

FloatArray = NDArray[np.float64]

EASY, HARD, ENDS = 0.25, 0.05, 0.05
_CURVES = ("raw", "ema", "linearized", "easy", "hard")


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is judged and drawn; W widths, H learning rates, S seeds, P examples.

    Attributes:
      curves: losses (width, learning_rate, seed) by name: ``raw``, ``ema`` and ``linearized`` of
        all validation examples; ``easy`` and ``hard``: the averaged weights' on these alone. With
        ``diverged``.
      summaries: of each of them.
      scaling: power laws in the width of the averaged weights' loss, ``optimal`` at ν*(n) and
        ``transferred`` at ν*(n_min), and their losses.
      scaling_losses: shape (W,), by the same names.
      faithfulness: (width, learning_rate, seed).
      index: mean component index (width, seed, sample), at `index_rate`.
      index_rate: the learning rate of the sample-wise decomposition.
      easy, hard: the examples in the two restricted curves.
      class_share: how much of the index's variance over examples lies between classes, mean over
        (width, seed).
      overlaps: of the rankings of all (width, seed), in this order, by end.
      mechanism: of `mupjax.mechanism`; None where the sweep allows none.
      mechanism_error: why there is none.
    """

    curves: xr.Dataset
    summaries: Mapping[str, TransferSummary]
    scaling: Mapping[str, PowerLaw]
    scaling_losses: Mapping[str, FloatArray]
    faithfulness: xr.DataArray
    index: xr.DataArray
    index_rate: float
    easy: NDArray[np.int64]
    hard: NDArray[np.int64]
    class_share: float
    overlaps: Mapping[str, Overlap]
    mechanism: Mechanism | None
    mechanism_error: str = ""


def kept_cells(grid: xr.Dataset) -> xr.Dataset:
    """The sweep's one parametrization, with its fixed hyperparameters dropped."""
    fixed = [d for d in grid["loss"].dims if d not in ("width", "learning_rate", "seed")]
    return grid.isel(dict.fromkeys(fixed, 0), drop=True)


def best_rate(grid: xr.Dataset) -> float:
    """The learning rate of the grid with the lowest mean loss at the largest width.

    Raises:
      ValueError: every learning rate diverged there.
    """
    cells = kept_cells(grid).isel(width=-1)
    healthy = (cells["status"] == 0).all("seed")
    mean = cells["decomposition_final_loss"].mean("seed").where(healthy, np.inf)
    if not bool(np.isfinite(mean).any()):
        raise ValueError("every learning rate diverged at the largest width: lower the grid.")
    return float(mean["learning_rate"][int(mean.argmin("learning_rate"))])


def measure(grid: xr.Dataset, samplewise: xr.Dataset, labels: NDArray[np.int64]) -> Measures:
    """All of it, from the two sweeps and the class of every validation example.

    Examples are easy or hard by their mean component index at the largest width, averaged over
    seeds.
    """
    cells = kept_cells(grid)
    single = samplewise.isel(learning_rate=0)
    index = kept_cells(single)["samplewise_mci"].transpose("width", "seed", "sample")
    ranking = index.isel(width=-1).mean("seed").values
    groups = {"easy": extreme(ranking, EASY, "lowest"), "hard": extreme(ranking, HARD, "highest")}
    final = cells["samples_final_loss"]
    curves = xr.Dataset(
        {
            "raw": cells["loss"],
            "ema": cells["decomposition_final_loss"],
            "linearized": cells["decomposition_initial_loss"] + cells["decomposition_total"],
            **{name: final.isel(sample=list(g)).mean("sample") for name, g in groups.items()},
            "diverged": cells["status"] != 0,
        }
    ).transpose("width", "learning_rate", "seed")
    widths, rates = curves["width"].values, curves["learning_rate"].values
    dead = curves["diverged"].values
    summaries = {
        name: transfer_summary(widths, rates, curves[name].values.astype(np.float64), dead)
        for name in _CURVES
    }
    losses = _scaling_losses(curves, summaries["ema"])
    rows = index.values.reshape(-1, index.sizes["sample"])
    mechanism, error = None, ""
    try:
        mechanism = explain_dataset(grid, "learning_rate")[PARAMETRIZATION]
    except ValueError as refused:
        error = str(refused)
    return Measures(
        curves=curves,
        summaries=summaries,
        scaling={name: _law(widths, values, summaries["ema"]) for name, values in losses.items()},
        scaling_losses=losses,
        faithfulness=cells["decomposition_faithfulness"].transpose(
            "width", "learning_rate", "seed"
        ),
        index=index,
        index_rate=float(single["learning_rate"]),
        easy=groups["easy"],
        hard=groups["hard"],
        class_share=float(np.mean([_between_classes(row, labels) for row in rows])),
        overlaps={end: overlap(rows, ENDS, end) for end in ("lowest", "highest")},
        mechanism=mechanism,
        mechanism_error=error,
    )


def interval_over_seeds(values: FloatArray, confidence: float = 0.9) -> tuple[float, float, float]:
    """Mean over the last axis of (S,) values with its Student interval; nan ends for one seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * float(np.std(values, ddof=1))
    return mean, mean - half / count**0.5, mean + half / count**0.5


def _between_classes(index: FloatArray, labels: NDArray[np.int64]) -> float:
    """Share of the variance that lies between the means of classes."""
    known = np.isfinite(index)
    index, labels = index[known], labels[known]
    between = sum(
        (labels == c).mean() * (index[labels == c].mean() - index.mean()) ** 2
        for c in np.unique(labels)
    )
    return float(between / index.var()) if index.size and index.var() > 0 else float("nan")


def _scaling_losses(curves: xr.Dataset, summary: TransferSummary) -> dict[str, FloatArray]:
    mean = curves["ema"].where(~curves["diverged"]).mean("seed", skipna=False).values
    rates = curves["learning_rate"].values
    first = np.full(len(summary.widths), summary.optimal_lr[0])
    transferred = np.full(len(summary.widths), np.nan)
    if np.isfinite(first).all():
        transferred = interpolate_loss(rates, mean, first)
    return {"optimal": np.asarray(summary.optimal_loss), "transferred": transferred}


def _law(widths: FloatArray, losses: FloatArray, summary: TransferSummary) -> PowerLaw:
    """A fit with the noise of the optimal losses; of those widths that have a loss."""
    known = np.isfinite(losses)
    low, high = np.asarray(summary.optimal_loss_interval).T
    half = ((high - low) / 2)[known]
    options: dict[str, object] = {}
    if summary.seeds > 1 and np.isfinite(half).all() and (half > 0).all():
        quantile = float(stats.t.ppf((1 + summary.confidence) / 2, summary.seeds - 1))
        options = {
            "variances": np.full(half.size, float(np.mean((half / quantile) ** 2))),
            "dof": float((summary.seeds - 1) * half.size),
        }
    return fit_power_law(
        widths[known],
        losses[known],
        lowest_limit=0.0,
        falling=True,
        **options,  # type: ignore[arg-type]
    )
