"""Figures of random-features ridge regression, laid out like Figure 2 of GWB."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from numpy.typing import NDArray

from mupjax.figures import style

__all__ = ["convergence_figure", "figure_2"]


def figure_2(dataset: xr.Dataset) -> Figure:
    """Excess risk against ridge with starred optima; loss gap, HP gap, suboptimality against ψ2.

    Args:
      dataset: of ``mupjax reproduce rf-ridge``. Dots are simulated networks, with bars of two
        standard errors; dashed lines have the theorem's slopes.
    """
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(12.6, 3.4), layout="constrained")
        axes = fig.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
        _curves(axes[0], dataset)
        psi2, psi1 = dataset["psi2"].values, dataset.attrs["psi1"]
        for ax, key, divisor, power, title, label in (
            (axes[1], "loss_gap", 1.0, -1, "Loss gap", "$R^*(ψ_2) - R^*(\\infty)$"),
            (
                axes[2],
                "ridge_gap",
                psi1,
                -1,
                "HP gap",
                "$|λ^*(ψ_2) - λ^*(\\infty)|\\,/\\,ψ_1$",
            ),
            (
                axes[3],
                "suboptimality",
                1.0,
                -2,
                "Transfer suboptimality",
                "$R_\\infty(λ^*(ψ_2)) - R^*(\\infty)$",
            ),
        ):
            _gap(ax, psi2, dataset[key].values / divisor, power)
            ax.set_title(title)
            ax.set_ylabel(label)
    return fig


def _curves(ax: Axes, dataset: xr.Dataset) -> None:
    widths = dataset["curve"].values
    colors, markers = style.width_colors(len(widths)), style.width_markers(len(widths))
    simulated = dataset["simulated_psi2"].values
    for i, psi2 in enumerate(widths):
        label = "$ψ_2 = \\infty$" if math.isinf(psi2) else f"$ψ_2 = {psi2:g}$"
        ax.plot(dataset["ridge"], dataset["excess_risk"][i], color=colors[i], label=label, zorder=2)
        ax.plot(
            dataset["best_ridge"][i],
            dataset["best_excess_risk"][i],
            marker="*",
            markersize=11,
            color=colors[i],
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=4,
        )
        for row in np.flatnonzero(simulated == psi2):
            ax.errorbar(
                dataset["simulated_ridge"],
                dataset["simulated_excess_risk"][row],
                2 * dataset["simulated_standard_error"][row],
                fmt=markers[i],
                color=colors[i],
                markerfacecolor="white",
                linewidth=0.9,
                zorder=3,
            )
    shown = dataset["excess_risk"].values
    low, high = shown.min(), np.median(shown.max(axis=1))
    ax.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
    ax.set_xscale("log")
    ax.set_xlabel("Ridge λ")
    ax.set_ylabel("Excess risk $R(λ) - σ_ε^2$")
    ax.set_title(f"Curves: theory; dots: networks, d = {dataset.attrs['dots_dimension']}")
    ax.legend(frameon=False, ncols=2, loc="upper center")


def _gap(ax: Axes, psi2: NDArray[np.float64], values: NDArray[np.float64], power: int) -> None:
    ax.loglog(psi2, values, marker="o", color=style.INK, label="theory", zorder=3)
    # Through the last point, a little above the curve so that both are seen.
    guide = 2.0 * values[-1] * (psi2 / psi2[-1]) ** power
    ax.loglog(psi2, guide, linestyle="--", color=style.MUTED, label=f"slope −{-power}", zorder=2)
    ax.set_xlabel("Width $ψ_2 = n/d$")
    ax.legend(frameon=False)


def convergence_figure(dataset: xr.Dataset) -> Figure:
    """Deviation of the simulated mean risk from its limit, and spread over networks, against d."""
    d = dataset["dimension"].values.astype(float)
    deviation, error = np.abs(dataset["deviation"].values), dataset["deviation_error"].values
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.errorbar(d, deviation, 2 * error, fmt="o", color=style.INK, label="simulated, ± 2 SE")
        right.plot(d, dataset["spread"], marker="o", linestyle="none", color=style.INK)
        for ax, power, anchor in ((left, -1.0, deviation[0]), (right, -0.5, None)):
            first = float(dataset["spread"][0]) if anchor is None else anchor
            ax.plot(
                d,
                first * (d / d[0]) ** power,
                linestyle="--",
                color=style.MUTED,
                label=f"slope −{-power:g}",
            )
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.xaxis.set_major_locator(FixedLocator(list(d)))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
            ax.set_xlabel("Input dimension d")
            ax.legend(frameon=False)
        left.set_ylabel("|mean risk − asymptotic risk|")
        left.set_title("Finite networks approach the theory")
        right.set_ylabel("Standard deviation of the risk")
        right.set_title("Spread over networks and samples")
    return fig
