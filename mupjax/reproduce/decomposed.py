"""Numbers of a sweep with the decomposition: curves, optima, power laws, the top-κ part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mupjax.mechanism import Mechanism, explain_dataset
from theory.curves import Scale, interpolate_loss, to_scale
from theory.drift import TransferSummary, transfer_summary
from theory.profiles import ProfileDifference, profile_difference
from theory.rates import PowerLaw, fit_power_law

__all__ = [
    "DecomposedSweep",
    "best_value",
    "drift_by_seed",
    "interval_over_seeds",
    "kept_cells",
    "measure_sweep",
    "positive",
]

FloatArray = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class DecomposedSweep:
    """What is judged and drawn; W widths, H values of the hyperparameter, S seeds.

    Attributes:
      hp: name of the hyperparameter; it is a dimension of the arrays below.
      scale: on which it is compared.
      curves: losses (width, hp, seed) by name: ``raw``, ``ema`` (averaged weights) and
        ``linearized``, perhaps others. With ``diverged``.
      summaries: of each of them, of `positive` values of the hyperparameter.
      scaling: power laws in the width of the averaged weights' loss, ``optimal`` at ν*(n) and
        ``transferred`` at ν*(n_min), and their losses.
      scaling_losses: shape (W,), by the same names.
      faithfulness: (width, hp, seed).
      profile_differences: by width, how far its top-k profile at the largest width's optimum is
        from the largest width's. Empty where there is no mechanism.
      mechanism: of `mupjax.mechanism`; None where the sweep allows none.
      mechanism_error: why there is none.
    """

    hp: str
    scale: Scale
    curves: xr.Dataset
    summaries: Mapping[str, TransferSummary]
    scaling: Mapping[str, PowerLaw]
    scaling_losses: Mapping[str, FloatArray]
    faithfulness: xr.DataArray
    profile_differences: Mapping[int, ProfileDifference]
    mechanism: Mechanism | None
    mechanism_error: str


def positive(values: ArrayLike, scale: Scale) -> FloatArray:
    """2 to the power of a coordinate, which `theory.drift` takes: a learning rate itself, and for a
    momentum β its window 1/(1 − β).
    """
    return 2.0 ** to_scale(np.asarray(values, dtype=np.float64), scale)


def kept_cells(grid: xr.Dataset, hp: str = "learning_rate") -> xr.Dataset:
    """The sweep's one parametrization, with its fixed hyperparameters dropped."""
    fixed = [d for d in grid["loss"].dims if d not in ("width", hp, "seed")]
    return grid.isel(dict.fromkeys(fixed, 0), drop=True)


def best_value(grid: xr.Dataset, hp: str = "learning_rate") -> float:
    """The value of the grid with the lowest mean loss at the largest width.

    Raises:
      ValueError: every value diverged there.
    """
    cells = kept_cells(grid, hp).isel(width=-1)
    healthy = (cells["status"] == 0).all("seed")
    mean = cells["decomposition_final_loss"].mean("seed").where(healthy, np.inf)
    if not bool(np.isfinite(mean).any()):
        raise ValueError(f"every {hp} diverged at the largest width: change the grid.")
    return float(mean[hp][int(mean.argmin(hp))])


def measure_sweep(
    grid: xr.Dataset,
    parametrization: str,
    *,
    hp: str = "learning_rate",
    scale: Scale = "log2",
    further: Mapping[str, xr.DataArray] | None = None,
) -> DecomposedSweep:
    """All of it, from a sweep over one hyperparameter.

    Args:
      grid: with the decomposition observer.
      parametrization: its name.
      hp: the hyperparameter.
      scale: on which it is compared.
      further: other losses (width, hp, seed) to summarise, by name.
    """
    cells = kept_cells(grid, hp)
    curves = xr.Dataset(
        {
            "raw": cells["loss"],
            "ema": cells["decomposition_final_loss"],
            "linearized": cells["decomposition_initial_loss"] + cells["decomposition_total"],
            **(further or {}),
            "diverged": cells["status"] != 0,
        }
    ).transpose("width", hp, "seed")
    widths, values = curves["width"].values, positive(curves[hp].values, scale)
    dead = curves["diverged"].values
    summaries = {
        str(name): transfer_summary(widths, values, curves[name].values.astype(np.float64), dead)
        for name in curves.data_vars
        if name != "diverged"
    }
    losses = _scaling_losses(curves, values, summaries["ema"])
    mechanism, error = None, ""
    try:
        mechanism = explain_dataset(grid, hp, scale=scale)[parametrization]
    except ValueError as refused:
        error = str(refused)
    return DecomposedSweep(
        hp=hp,
        scale=scale,
        curves=curves,
        summaries=summaries,
        scaling={name: _law(widths, each, summaries["ema"]) for name, each in losses.items()},
        scaling_losses=losses,
        faithfulness=cells["decomposition_faithfulness"].transpose("width", hp, "seed"),
        profile_differences={} if mechanism is None else _profile_differences(mechanism),
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


def drift_by_seed(found: DecomposedSweep, name: str) -> FloatArray:
    """Octaves per doubling that the optimum of one of the curves moves, for every seed alone."""
    curves = found.curves
    values = positive(curves[found.hp].values, found.scale)
    dead = curves["diverged"].values
    losses = curves[name].values.astype(np.float64)
    return np.array(
        [
            transfer_summary(
                curves["width"].values, values, losses[..., s : s + 1], dead[..., s : s + 1]
            ).drift_per_doubling
            for s in range(losses.shape[-1])
        ]
    )


def _profile_differences(mechanism: Mechanism) -> dict[int, ProfileDifference]:
    """Of the changes of loss, at the value of the grid that is best at the largest width."""
    data, widths = mechanism.data, mechanism.report.widths
    change = {n: profile - data.initial_loss[n][..., None] for n, profile in data.profiles.items()}
    alive = np.all([np.isfinite(p).all(axis=(0, 2)) for p in change.values()], axis=0)
    whole = data.profiles[widths[-1]][..., -1].mean(axis=0)
    best = int(np.where(alive, whole, np.inf).argmin())
    return {
        n: profile_difference(change[n][:, best], change[widths[-1]][:, best]) for n in widths[:-1]
    }


def _scaling_losses(
    curves: xr.Dataset, values: FloatArray, summary: TransferSummary
) -> dict[str, FloatArray]:
    mean = curves["ema"].where(~curves["diverged"]).mean("seed", skipna=False).values
    first = np.full(len(summary.widths), summary.optimal_lr[0])
    transferred = np.full(len(summary.widths), np.nan)
    if np.isfinite(first).all():
        transferred = interpolate_loss(values, mean, first)
    return {"optimal": np.asarray(summary.optimal_loss), "transferred": transferred}


def _law(widths: FloatArray, losses: FloatArray, summary: TransferSummary) -> PowerLaw:
    """A fit with the noise of the optimal losses; of those widths that have a loss."""
    known = np.isfinite(losses)
    low, high = np.asarray(summary.optimal_loss_interval).T
    half = ((high - low) / 2)[known]
    options: dict[str, Any] = {}
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
        **options,
    )
