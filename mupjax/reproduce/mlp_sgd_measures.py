"""Numbers of ``mupjax reproduce mlp-sgd``: those of its sweep, and easy and hard examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mupjax.reproduce.decomposed import DecomposedSweep, kept_cells, measure_sweep
from mupjax.reproduce.mlp_sgd_training import PARAMETRIZATION
from theory.sample_groups import Overlap, extreme, overlap

__all__ = ["EASY", "ENDS", "HARD", "Measures", "measure"]

FloatArray = NDArray[np.float64]

EASY, HARD, ENDS = 0.25, 0.05, 0.05


@dataclasses.dataclass(frozen=True)
class Measures(DecomposedSweep):
    """A decomposed sweep, whose curves have ``easy`` and ``hard`` too: averaged weights' losses on
    these examples alone.

    Attributes:
      index: mean component index (width, seed, sample), at `index_rate`.
      index_rate: the learning rate of the sample-wise decomposition.
      easy, hard: the examples in the two restricted curves.
      class_share: how much of the index's variance over examples lies between classes, mean over
        (width, seed).
      overlaps: of the rankings of all (width, seed), in this order, by end.
    """

    index: xr.DataArray
    index_rate: float
    easy: NDArray[np.int64]
    hard: NDArray[np.int64]
    class_share: float
    overlaps: Mapping[str, Overlap]


def measure(grid: xr.Dataset, samplewise: xr.Dataset, labels: NDArray[np.int64]) -> Measures:
    """All of it, from the two sweeps and the class of every validation example.

    Examples are easy or hard by their mean component index at the largest width, averaged over
    seeds.
    """
    single = samplewise.isel(learning_rate=0)
    index = kept_cells(single)["samplewise_mci"].transpose("width", "seed", "sample")
    ranking = index.isel(width=-1).mean("seed").values
    groups = {"easy": extreme(ranking, EASY, "lowest"), "hard": extreme(ranking, HARD, "highest")}
    final = kept_cells(grid)["samples_final_loss"]
    restricted = {name: final.isel(sample=list(g)).mean("sample") for name, g in groups.items()}
    rows = index.values.reshape(-1, index.sizes["sample"])
    return Measures(
        **vars(measure_sweep(grid, PARAMETRIZATION, further=restricted)),
        index=index,
        index_rate=float(single["learning_rate"]),
        easy=groups["easy"],
        hard=groups["hard"],
        class_share=float(np.mean([_between_classes(row, labels) for row in rows])),
        overlaps={end: overlap(rows, ENDS, end) for end in ("lowest", "highest")},
    )


def _between_classes(index: FloatArray, labels: NDArray[np.int64]) -> float:
    """Share of the variance that lies between the means of classes."""
    known = np.isfinite(index)
    index, labels = index[known], labels[known]
    between = sum(
        (labels == c).mean() * (index[labels == c].mean() - index.mean()) ** 2
        for c in np.unique(labels)
    )
    return float(between / index.var()) if index.size and index.var() > 0 else float("nan")
