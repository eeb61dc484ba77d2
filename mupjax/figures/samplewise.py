"""Figures of easy and hard examples, and of the losses of ``mupjax reproduce mlp-sgd``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from mupjax.figures import style
from theory.drift import TransferSummary
from theory.rates import PowerLaw
from theory.sample_groups import Overlap

__all__ = ["index_figure", "loss_figure", "restricted_figure"]

FloatArray = NDArray[np.float64]
# Losses beyond this multiple of the lowest leave no room for the minimum; and from such a ratio of
# the best to the middle one on, only a logarithm shows both.
_TALLEST, _LOGARITHM = 2.5, 10.0


def loss_figure(
    curves: xr.Dataset,
    summaries: Mapping[str, TransferSummary],
    scaling: Mapping[str, PowerLaw],
    scaling_losses: Mapping[str, FloatArray],
) -> Figure:
    """Loss against learning rate: of the raw weights, the averaged ones, and linearized; and the
    averaged weights' loss against width, at ν*(n), with 90 % intervals, and at the smallest width's
    optimum.

    Args:
      curves: ``raw``, ``ema``, ``linearized`` and ``diverged`` over (width, learning_rate, seed).
      summaries: `theory.drift.transfer_summary` of each, for the stars.
      scaling: power laws ``optimal`` and ``transferred``.
      scaling_losses: the losses they are fits of, shape (widths,).
    """
    titles = {"raw": "Weights as trained", "ema": "Averaged weights", "linearized": "Linearized"}
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(12.4, 3.5), layout="constrained")
        *panels, right = figure.subplots(1, 4)
        for ax, (name, title) in zip(panels, titles.items(), strict=True):
            _sweep(ax, curves[name].where(~curves["diverged"]), summaries[name])
            ax.set_title(title, loc="left")
        low = min(ax.get_ylim()[0] for ax in panels)
        high = max(ax.get_ylim()[1] for ax in panels)
        for ax in panels:
            ax.set_ylim(low, high)
        panels[0].set_ylabel("Validation loss (nats)")
        widths = curves["width"].values.astype(float)
        fine = np.geomspace(widths[0], widths[-1], 100)
        looks = (("optimal", "at ν*(n)", "o", "-"), ("transferred", "", "^", "--"))
        for name, label, marker, line in looks:
            law, color = scaling[name], style.INK if name == "optimal" else style.MUTED
            label = label or f"at ν*({widths[0]:g})"
            if not law.degenerate:
                label += f", ∝ $n^{{{-law.exponent:.2f}}}$ + {law.limit:.3g}"
                right.plot(fine, law(fine), color=color, linestyle=line, linewidth=1)
            right.plot(
                widths,
                scaling_losses[name],
                marker=marker,
                markersize=5,
                linestyle="none",
                color=color,
                fillstyle="full" if name == "optimal" else "none",
                label=label,
            )
        low, high = np.asarray(summaries["ema"].optimal_loss_interval).T
        if np.isfinite([low, high]).all():
            right.vlines(widths, low, high, color=style.INK, linewidth=0.8, alpha=0.6)
        _width_axis(right, widths)
        right.set_title("Averaged weights, by width", loc="left")
        right.legend(frameon=False)
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            title="Width n",
            loc="outside right upper",
            frameon=False,
        )
    return figure


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
            _sweep(ax, curves[name].where(~curves["diverged"]), summaries[name])
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


def _sweep(ax: Axes, losses: xr.DataArray, summary: TransferSummary) -> None:
    """Mean over seeds and a band of one standard error, one curve a width; optima starred."""
    losses = losses.transpose("width", "learning_rate", "seed")
    rates, table = losses["learning_rate"].values, losses.values.astype(np.float64)
    mean = table.mean(axis=-1)
    count = table.shape[-1]
    error = table.std(axis=-1, ddof=1) / math.sqrt(count) if count > 1 else np.zeros_like(mean)
    widths = losses["width"].values
    looks = zip(style.width_colors(len(widths)), style.width_markers(len(widths)), strict=True)
    for k, (color, marker) in enumerate(looks):
        ax.plot(rates, mean[k], color=color, marker=marker, label=f"{widths[k]}")
        ax.fill_between(
            rates, mean[k] - error[k], mean[k] + error[k], color=color, alpha=0.18, linewidth=0
        )
        ax.plot(
            summary.optimal_lr[k],
            summary.optimal_loss[k],
            marker="*",
            markersize=11,
            markerfacecolor="white" if summary.at_edge[k] else color,
            markeredgecolor=style.INK,
            markeredgewidth=0.7,
            zorder=5,
        )
    ax.set_xscale("log", base=2)
    octaves = np.arange(math.ceil(math.log2(rates[0])), math.floor(math.log2(rates[-1])) + 1)
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in octaves]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{round(math.log2(x))}}}$"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Learning rate")
    finite = mean[np.isfinite(mean)]
    if finite.size and np.median(finite) > _LOGARITHM * finite.min() > 0:
        ax.set_yscale("log")
        # Bands of one standard error may reach below 0.
        ax.set_ylim(0.2 * finite.min(), 2 * finite.max())
    elif finite.size:
        low, high = finite.min(), min(finite.max(), _TALLEST * mean[np.isfinite(mean)].min())
        room = 0.12 * max(high - low, 1e-12)
        ax.set_ylim(low - room / 2, high + room)


def _width_axis(ax: Axes, widths: FloatArray) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(widths.tolist()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Width n")
