"""Figures of ``mupjax reproduce ntk-mechanism``."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mupjax.figures import style

__all__ = ["bases_figure", "gaps_figure", "mechanism_figure"]

# Okabe and Ito's palette, distinct with colour-blindness; markers and dashes differ too.
_PROBLEMS: dict[str, tuple[str, str, Any]] = {
    "power law": ("#0072B2", "o", "-"),
    "digits": ("#009E73", "s", "--"),
    "isotropic": ("#CC79A7", "^", "-."),
    "noise": ("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    "hidden mode": ("#D55E00", "D", ":"),
}
_OPTIMIZERS = ("#0072B2", "#009E73", "#D55E00")


def mechanism_figure(dataset: xr.Dataset, problem: str = "power law") -> Figure:
    """Loss change against learning rate: whole curves, top-κ part, residual; a row per family.

    Args:
      dataset: of ``mupjax reproduce ntk-mechanism``. Stars are minima; the black line is infinite
        width.
      problem: which one.
    """
    families = dataset["family"].values
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(11.0, 3.1 * len(families) + 0.3), layout="constrained")
        grid = fig.subplots(len(families), 3, squeeze=False)
        for axes, family in zip(grid, families, strict=True):
            own = dataset.sel(family=family, problem=problem)
            kappa = int(own["kappa"])
            whole = own["limit_top"].isel(parts=-1)
            pairs = (
                (own["total"], whole, "whole loss"),
                (own["top_kappa"], own["limit_top_kappa"], f"top κ = {kappa} modes"),
                (own["total"] - own["top_kappa"], whole - own["limit_top_kappa"], "residual"),
            )
            # One scale for a row, so that heights can be compared.
            rise = max(_rise(limit) for _, limit, _ in pairs)
            for ax, (curves, limit, title) in zip(axes, pairs, strict=True):
                _curves(ax, curves, limit, rise, stars=title != "residual")
                ax.set_title(f"{family}: {title}")
                ax.set_ylabel("Change of the loss")
            axes[0].legend(frameon=False, loc="lower left", fontsize=7.5)
        for ax in grid[-1]:
            ax.set_xlabel("log$_2$ learning rate / best at n = ∞")
    return fig


def _rise(limit: xr.DataArray) -> float:
    below = limit.sel(octaves=slice(None, -0.25))
    return float(below.max() - below.min())


def _curves(
    ax: Axes, curves: xr.DataArray, limit: xr.DataArray, rise: float, *, stars: bool
) -> None:
    octaves, widths = curves["octaves"].values, curves["width"].values
    shown = np.arange(0, len(widths), 2 if len(widths) > 5 else 1)
    colors = style.width_colors(len(shown))
    lines: list[tuple[NDArray[np.float64], Any, str]] = [
        (curves.isel(width=i).values, colors[j], f"n = {widths[i]}") for j, i in enumerate(shown)
    ]
    lines.append((limit.values, style.INK, "n = ∞"))
    for values, color, label in lines:
        dashes = "--" if label == "n = ∞" else "-"
        ax.plot(octaves, values, color=color, linestyle=dashes, label=label)
        if stars:
            best = int(values.argmin())
            ax.plot(
                octaves[best],
                values[best],
                marker="*",
                markersize=10,
                color=color,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=4,
            )
    low = float(limit.sel(octaves=slice(None, 0.0)).min())
    # The wall above the optimum is cut: it rises by orders of magnitude.
    ax.set_ylim(low - 0.25 * rise, low + 1.35 * rise)


def gaps_figure(dataset: xr.Dataset) -> Figure:
    """a_n, b_n and c_n against width, one line per problem; a row per family.

    Args:
      dataset: of ``mupjax reproduce ntk-mechanism``. Bands are 90 % bootstrap intervals over
        initial weights; open markers are t_n in octaves, left out where it allows any distance.
    """
    families, widths = dataset["family"].values, dataset["width"].values.astype(float)
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(11.0, 3.1 * len(families) + 0.6), layout="constrained")
        grid = fig.subplots(len(families), 3, squeeze=False)
        for axes, family in zip(grid, families, strict=True):
            own = dataset.sel(family=family)
            panels = (
                ("loss_gap", "Loss gap $a_n$", -1.0),
                ("hp_gap", "HP gap $b_n \\leq t_n$ (octaves)", -1.0),
                ("suboptimality", "Suboptimality $c_n$", -2.0),
            )
            for column, (ax, (key, title, power)) in enumerate(zip(axes, panels, strict=True)):
                for problem, (color, marker, dashes) in _PROBLEMS.items():
                    part = own.sel(problem=problem)
                    middle = part[key].values
                    draws = part["gap_draws"].isel(gap=column).transpose("draw", "width").values
                    low, high = np.quantile(np.maximum(draws, 1e-12), [0.05, 0.95], axis=0)
                    ax.fill_between(widths, low, high, color=color, alpha=0.15, linewidth=0)
                    ax.plot(widths, middle, color=color, marker=marker, linestyle=dashes)
                    if key == "hp_gap":
                        ax.plot(
                            widths,
                            _in_octaves(part["bound"].values),
                            color=color,
                            marker=marker,
                            markerfacecolor="white",
                            linestyle=dashes,
                            linewidth=0.7,
                        )
                first = float(own[key].sel(problem="power law")[-1])
                guide = 0.5 * first * (widths / widths[-1]) ** power
                ax.plot(widths, guide, color=style.MUTED, linewidth=1.0)
                ax.annotate(
                    f"slope −{-power:g}",
                    (widths[-1], guide[-1]),
                    textcoords="offset points",
                    xytext=(-2, -13),
                    ha="right",
                    fontsize=8,
                    color=style.MUTED,
                )
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.set_ylim(bottom=guide[-1] / 5)
                ax.set_title(f"{family}: {title}")
        for ax in grid[-1]:
            ax.set_xlabel("Width n")
        handles = [
            Line2D([], [], color=color, marker=marker, linestyle=dashes, label=problem)
            for problem, (color, marker, dashes) in _PROBLEMS.items()
        ]
        handles.append(
            Line2D(
                [],
                [],
                color=style.MUTED,
                marker="o",
                markerfacecolor="white",
                linestyle="none",
                label="bound $t_n$, where it says something",
            )
        )
        fig.legend(handles=handles, frameon=False, ncols=6, loc="outside lower center")
    return fig


def _in_octaves(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """`|η/η* − 1| ≤ t` keeps η within −log2(1 − t) octaves of η*; from t = 1 on, within none."""
    return -np.log2(np.where(distance < 1, 1 - distance, np.nan))


def bases_figure(dataset: xr.Dataset) -> Figure:
    """Share of the loss change that the first k components hold: by alignment, by kernel modes."""
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(5.6, 3.6), layout="constrained")
        ax = fig.subplots()
        for color, name in zip(_OPTIMIZERS, dataset["optimizer"].values, strict=False):
            own = dataset.sel(optimizer=name)
            ax.plot(own["component"], own["alignment_share"], color=color, label=f"{name}")
            ax.plot(own["k"], own["mode_share"], color=color, linestyle="--")
        handles, labels = ax.get_legend_handles_labels()
        handles.append(Line2D([], [], color=style.MUTED))
        handles.append(Line2D([], [], color=style.MUTED, linestyle="--"))
        labels += ["alignment", "kernel modes"]
        ax.axhline(1.0, color=style.MUTED, linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("Components k")
        ax.set_ylabel("$φ^k$ / $φ$")
        ax.set_title("Two-layer net in training: one change, two bases")
        ax.legend(handles, labels, frameon=False)
    return fig
