"""Figures of easy and hard examples."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from mupjax.figures import style
from mupjax.figures.sweep_losses import draw_sweep
from theory.drift import TransferSummary
from theory.sample_groups import Overlap

__all__ = ["index_figure", "restricted_figure"]

FloatArray = NDArray[np.float64]


def index_figure(index: xr.DataArray, overlaps: Mapping[str, Overlap]) -> Figure:
    """How hard the examples are, and how far networks agree on which ones.

    Left the distribution of the mean component index, one line a width, all seeds. Middle and right
    the shared part of the examples with the lowest and the highest index, for every pair of
    networks, sorted by width, then seed.

    Args:
      index: mean component index (width, seed, sample).
      overlaps: `theory.sample_groups.overlap` of its rows, by end.
    """
    index = index.transpose("width", "seed", "sample")
    widths = index["width"].values
    seeds = index.sizes["seed"]
    colors = style.width_colors(len(widths))
    values = index.values[np.isfinite(index.values)]
    edges = np.geomspace(max(values.min(), 1.0), values.max() * 1.0001, 40)
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(11.4, 3.7), layout="constrained")
        left, *maps = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        for color, n in zip(colors, widths, strict=True):
            each = index.sel(width=n).values.ravel()
            weights = np.full(each.size, 1 / each.size)
            left.hist(
                each,
                bins=edges.tolist(),
                weights=weights,
                histtype="step",
                color=color,
                label=f"{n}",
            )
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        left.set_xlabel("Mean component index of an example")
        left.set_ylabel("Share of the examples")
        left.set_title("Easy (low) and hard (high) examples", loc="left")
        left.legend(title="Width n", frameon=False)
        image = None
        for ax, (end, word) in zip(
            maps, (("lowest", "Easiest"), ("highest", "Hardest")), strict=True
        ):
            agreed = overlaps[end]
            image = ax.imshow(agreed.shares, vmin=0, vmax=1, cmap="cividis")
            ticks = (np.arange(len(widths)) + 0.5) * seeds - 0.5
            ax.set_xticks(ticks, [f"{n}" for n in widths], rotation=45)
            ax.set_yticks(ticks, [f"{n}" for n in widths])
            for k in range(1, len(widths)):
                ax.axhline(k * seeds - 0.5, color="white", linewidth=0.8)
                ax.axvline(k * seeds - 0.5, color="white", linewidth=0.8)
            ax.grid(visible=False)
            pairs = agreed.shares[np.triu_indices(len(agreed.shares), 1)]
            mean = f"{pairs.mean():.2f}" if pairs.size else "-"
            ax.set_title(
                f"{word} {agreed.count}: shared {mean}, chance {agreed.chance:.2f}", loc="left"
            )
            ax.set_xlabel("Width n (blocks: seeds)")
        assert image is not None
        figure.colorbar(image, ax=maps, label="Shared part", shrink=0.85)
    return figure


def restricted_figure(
    curves: xr.Dataset, summaries: Mapping[str, TransferSummary], counts: Mapping[str, int]
) -> Figure:
    """Learning-rate sweeps on all, the easiest and the hardest examples, one curve a width.

    Args:
      curves: ``ema``, ``easy``, ``hard`` and ``diverged`` over (width, learning_rate, seed).
      summaries: of each.
      counts: number of examples in ``easy`` and ``hard``.
    """
    titles = {
        "ema": "All examples",
        "easy": f"Easiest {counts['easy']}",
        "hard": f"Hardest {counts['hard']}",
    }
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(10.6, 3.5), layout="constrained")
        panels = figure.subplots(1, 3)
        for ax, (name, title) in zip(panels, titles.items(), strict=True):
            draw_sweep(ax, curves[name].where(~curves["diverged"]), summaries[name])
            drift = summaries[name].drift_per_doubling
            ax.set_title(title, loc="left")
            if math.isfinite(drift):
                ax.text(
                    0.5,
                    0.99,
                    f"optimum: {drift:+.2f} octaves per doubling",
                    transform=ax.transAxes,
                    va="top",
                    ha="center",
                    fontsize=8.5,
                    color=style.MUTED,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
                )
        panels[0].set_ylabel("Validation loss (nats), averaged weights")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            title="Width n",
            loc="outside right upper",
            frameon=False,
        )
    return figure
