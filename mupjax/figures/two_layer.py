"""Two-layer networks: loss curves, optimal loss and learning rate, beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mupjax.figures import style
from theory.drift import TransferSummary

__all__ = ["NO_FIT", "ball_indicator_figure"]

PowerLawNumbers = tuple[float, float, float]
"""Limit L, prefactor B, exponent e of ``L + B n^-e``; NaN where there is no fit."""

NO_FIT: PowerLawNumbers = (math.nan, math.nan, math.nan)

# Okabe and Ito's vermilion: told from viridis by those who are colour-blind.
_PUBLISHED = "#d55e00"


def ball_indicator_figure(
    dataset: xr.Dataset,
    summary: TransferSummary,
    *,
    loss_fit: PowerLawNumbers,
    rate_fit: PowerLawNumbers,
    published: Mapping[int, tuple[float, float]],
    published_loss_fit: PowerLawNumbers,
    published_rate_fit: PowerLawNumbers,
) -> Figure:
    """Loss against learning rate; optimal loss and optimal learning rate against width.

    Args:
      dataset: `loss` and `status` over (width, learning_rate, seed).
      summary: `theory.drift.transfer_summary` of it: stars and intervals.
      loss_fit: of the optimal losses.
      rate_fit: of log2 of the optima.
      published: optimum and loss by width; nothing is drawn where it is empty.
      published_loss_fit, published_rate_fit: drawn with them.

    Returns:
      a figure that no window or global state knows of.
    """
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(10.2, 3.5), layout="constrained")
        curves, losses, rates = fig.subplots(1, 3, width_ratios=[1.25, 1, 1])
        _curves(curves, dataset, summary, published)
        widths = np.asarray(summary.widths)
        fine = np.geomspace(widths[0], widths[-1], 200)
        _against_width(
            losses,
            widths,
            np.asarray(summary.optimal_loss),
            np.asarray(summary.optimal_loss_interval),
        )
        _fit_line(losses, fine, loss_fit, style.INK, "fit, this run")
        _against_width(
            rates,
            widths,
            np.log2(summary.optimal_lr),
            _log2(np.asarray(summary.optimal_lr_interval)),
        )
        _fit_line(rates, fine, rate_fit, style.INK, "fit, this run")
        if published:
            known = np.array([n for n in published if widths[0] <= n <= widths[-1]])
            at = np.array([published[int(n)] for n in known])
            for ax, y, fit in (
                (losses, at[:, 1], published_loss_fit),
                (rates, np.log2(at[:, 0]), published_rate_fit),
            ):
                ax.plot(known, y, linestyle="none", **_PUBLISHED_STAR, label="published")
                _fit_line(ax, fine, fit, _PUBLISHED, "published fit")
        losses.set_ylabel("Loss at the optimum (nats)")
        rates.set_ylabel("log2 of the best learning rate")
        losses.set_title("Optimal loss", loc="left", fontweight="bold")
        rates.set_title("Optimal learning rate", loc="left", fontweight="bold")
        losses.legend(frameon=False, loc="lower left")
    return fig


_PUBLISHED_STAR = {
    "marker": "*",
    "markersize": 11,
    "markerfacecolor": "white",
    "markeredgecolor": _PUBLISHED,
    "markeredgewidth": 1.2,
    "zorder": 6,
}


def _curves(
    ax: Axes,
    dataset: xr.Dataset,
    summary: TransferSummary,
    published: Mapping[int, tuple[float, float]],
) -> None:
    rates = dataset["learning_rate"].values
    bad = (dataset["status"] != 0).any("seed")
    mean = dataset["loss"].mean("seed").where(~bad).transpose("width", "learning_rate").values
    colors = style.width_colors(len(summary.widths))
    markers = style.width_markers(len(summary.widths))
    for k, (color, marker) in enumerate(zip(colors, markers, strict=True)):
        ax.plot(rates, mean[k], color=color, marker=marker, label=f"{summary.widths[k]}")
        ax.plot(
            summary.optimal_lr[k],
            summary.optimal_loss[k],
            marker="*",
            markersize=12,
            markerfacecolor="white" if summary.at_edge[k] else color,
            markeredgecolor=style.INK,
            markeredgewidth=0.7,
            zorder=5,
        )
    inside = [published[n] for n in summary.widths if n in published]
    if inside:
        at = np.array(inside)
        ax.plot(at[:, 0], at[:, 1], linestyle="none", **_PUBLISHED_STAR, label="published")
    ax.set_xscale("log", base=2)
    octaves = np.arange(math.ceil(math.log2(rates[0])), math.floor(math.log2(rates[-1])) + 1)
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in octaves]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{round(math.log2(x))}}}$"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Learning rate")
    ax.set_ylabel("Final validation loss (nats)")
    ax.set_title("Loss by width", loc="left", fontweight="bold")
    # Below the curves, where room is made for it.
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.35 * (high - low), high)
    ax.legend(title="width", frameon=False, ncols=3, loc="lower center")


def _against_width(ax: Axes, widths: np.ndarray, values: np.ndarray, intervals: np.ndarray) -> None:
    errors = np.abs(intervals.T - values)
    ax.errorbar(
        widths,
        values,
        yerr=np.where(np.isfinite(errors), errors, 0.0),
        color=style.INK,
        marker="o",
        linestyle="none",
        capsize=2.5,
        label="this run, 90 % interval",
    )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(widths[:: max(1, len(widths) // 5)].tolist()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Width n")


def _fit_line(ax: Axes, fine: np.ndarray, fit: PowerLawNumbers, color: str, label: str) -> None:
    limit, prefactor, exponent = fit
    if math.isfinite(exponent):
        ax.plot(fine, limit + prefactor * fine**-exponent, color=color, linewidth=1, label=label)


def _log2(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(values)
