"""Figures of a sweep's final losses: against the hyperparameter, and by width."""

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
from theory.curves import Scale, to_scale
from theory.drift import TransferSummary
from theory.rates import PowerLaw

__all__ = ["draw_sweep", "loss_figure"]

FloatArray = NDArray[np.float64]
# Losses beyond this multiple of the lowest leave no room for the minimum; and from such a ratio of
# the best to the middle one on, only a logarithm shows both.
_TALLEST, _LOGARITHM = 2.5, 10.0


def loss_figure(
    curves: xr.Dataset,
    summaries: Mapping[str, TransferSummary],
    scaling: Mapping[str, PowerLaw],
    scaling_losses: Mapping[str, FloatArray],
    *,
    hp: str = "learning_rate",
    scale: Scale = "log2",
) -> Figure:
    """Loss against the hyperparameter: of the raw weights, of the averaged ones, linearized.

    Beside them the averaged weights' loss against width, at ν*(n), with 90 % intervals, and at the
    smallest width's optimum.

    Args:
      curves: ``raw``, ``ema``, ``linearized`` and ``diverged`` over (width, hp, seed).
      summaries: `theory.drift.transfer_summary` of each, for the stars.
      scaling: power laws ``optimal`` and ``transferred``.
      scaling_losses: the losses they are fits of, shape (widths,).
      hp: the hyperparameter.
      scale: on which it is drawn.
    """
    titles = {"raw": "Weights as trained", "ema": "Averaged weights", "linearized": "Linearized"}
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(12.4, 3.5), layout="constrained")
        *panels, right = figure.subplots(1, 4)
        for ax, (name, title) in zip(panels, titles.items(), strict=True):
            draw_sweep(ax, curves[name].where(~curves["diverged"]), summaries[name], hp, scale)
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


def draw_sweep(
    ax: Axes,
    losses: xr.DataArray,
    summary: TransferSummary,
    hp: str = "learning_rate",
    scale: Scale = "log2",
) -> None:
    """Mean over seeds and a band of one standard error, one curve a width; optima starred."""
    losses = losses.transpose("width", hp, "seed")
    x = to_scale(losses[hp].values.astype(np.float64), scale)
    table = losses.values.astype(np.float64)
    mean = table.mean(axis=-1)
    count = table.shape[-1]
    error = table.std(axis=-1, ddof=1) / math.sqrt(count) if count > 1 else np.zeros_like(mean)
    widths = losses["width"].values
    looks = zip(style.width_colors(len(widths)), style.width_markers(len(widths)), strict=True)
    for k, (color, marker) in enumerate(looks):
        ax.plot(x, mean[k], color=color, marker=marker, label=f"{widths[k]}")
        ax.fill_between(
            x, mean[k] - error[k], mean[k] + error[k], color=color, alpha=0.18, linewidth=0
        )
        ax.plot(
            math.log2(summary.optimal_lr[k]),
            summary.optimal_loss[k],
            marker="*",
            markersize=11,
            markerfacecolor="white" if summary.at_edge[k] else color,
            markeredgecolor=style.INK,
            markeredgewidth=0.7,
            zorder=5,
        )
    style.label_hp(ax, style.hp_title(hp), scale)
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
