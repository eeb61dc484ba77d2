"""The picture of ``mupjax reproduce adaptive-transfer``: where schemes land, and at what cost."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mupjax.figures import style

__all__ = ["adaptive_transfer_figure"]

# Okabe and Ito's palette: distinct with colour-blindness; controls share the hue of their kind.
_LOOKS: dict[str, dict[str, Any]] = {
    "SP": {"color": "#D55E00", "marker": "X"},
    "muP": {"color": "#0072B2", "marker": "s"},
    "Adaptive Transfer": {"color": "#009E73", "marker": "D"},
    "SP, std 1/sqrt(fan-in)": {"color": "#E69F00", "marker": "v", "linestyle": "--"},
    "muP, per layer": {"color": "#56B4E9", "marker": "^", "linestyle": "--"},
}
_LABELS = {
    "SP": "SP: nothing scales",
    "muP": "μP: lr 1/w",
    "Adaptive Transfer": r"Adaptive Transfer: lr $w^{-0.8}$",
    "SP, std 1/sqrt(fan-in)": "control: SP with fan-in std",
    "muP, per layer": "control: μP per layer",
}
# Losses above this multiple of the curves' own range leave the panel through the top.
_HEADROOM = 0.35


def adaptive_transfer_figure(dataset: xr.Dataset) -> Figure:
    """Curves and landing points, transfer error, loss penalty and stability: a row per network.

    Args:
      dataset: as ``mupjax.reproduce.adaptive_transfer_findings.analyse`` returns it.

    Returns:
      A figure that no window or global state knows of; `mupjax.figures.save` writes it.
    """
    networks = [str(name) for name in dataset["network"].values]
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(12.4, 2.9 * len(networks) + 0.75), layout="constrained")
        axes = fig.subplots(
            len(networks), 4, squeeze=False, gridspec_kw={"width_ratios": [1.45, 1, 1, 1]}
        )
        for row, network in zip(axes, networks, strict=True):
            cells = dataset.sel(network=network)
            _draw_curves(row[0], cells, int(dataset.attrs["base_width"]))
            _draw_errors(row[1], cells)
            _draw_penalty(row[2], cells)
            _draw_stability(row[3], cells)
            value, low, high = cells["exponent"].values
            fitted = (
                rf"$\eta^\star \propto w^{{{value:.2f}}}$ [{low:.2f}, {high:.2f}]".replace("-", "−")
                if math.isfinite(value)
                else "optimum not bracketed"
            )
            row[0].set_title(f"{network.capitalize()} networks: {fitted}", loc="left")
        for ax, title in zip(
            axes[0][1:], ("Transfer error", "Loss penalty", "Stability"), strict=True
        ):
            ax.set_title(title, loc="left")
        _legend(fig, dataset)
    return fig


def _draw_curves(ax: Axes, cells: xr.Dataset, base: int) -> None:
    widths = [int(w) for w in cells["width"].values]
    colors, markers = style.width_colors(len(widths) + 1), style.width_markers(len(widths) + 1)
    tuned = float(cells["tuned_rate"])
    base_loss = cells["base_loss"].where(cells["base_status"] == 0).mean("seed", skipna=False)
    lines = [(cells["base_rate"].values, base_loss.values)]
    reference = cells["reference_loss"].where(cells["reference_status"] == 0)
    for width in widths:
        rates = tuned * base / width * 2.0 ** cells["offset"].values
        lines.append((rates, reference.sel(width=width).mean("seed", skipna=False).values))
    kept = [loss[np.abs(np.log2(rates / _lowest(rates, loss))) <= 2.6] for rates, loss in lines]
    inside = np.concatenate([k[np.isfinite(k)] for k in kept])
    low, high = float(inside.min()), float(inside.max())
    top = high + _HEADROOM * (high - low)
    ax.set_ylim(low - 0.06 * (high - low), top)
    for (rates, loss), color, marker, width in zip(
        lines, colors, markers, [base, *widths], strict=True
    ):
        ax.plot(rates, loss, color=color, marker=marker, markersize=3, label=f"{width}", zorder=2)
    at_zero = cells["loss"].sel(near=0.0).where(cells["status"].sel(near=0.0) == 0)
    for scheme, power in (("SP", 0.0), ("muP", 1.0), ("Adaptive Transfer", 0.8)):
        look = _LOOKS[scheme]
        for width in widths:
            loss = float(at_zero.sel(scheme=scheme, width=width).mean("seed", skipna=False))
            beyond = not loss < top
            ax.plot(
                tuned * (width / base) ** -power,
                top if beyond else loss,
                marker=10 if beyond else look["marker"],
                color=look["color"],
                markeredgecolor="white",
                markeredgewidth=0.5,
                markersize=7,
                linestyle="none",
                clip_on=False,
                zorder=4,
            )
    ax.axvline(tuned, color=style.MUTED, linewidth=0.8, linestyle=":", zorder=1)
    _octave_axis(ax)
    ax.set_xlabel("Learning rate of all matrices")
    ax.set_ylabel("Validation loss (nats)")


def _lowest(rates: np.ndarray, loss: np.ndarray) -> float:
    return float(rates[np.nanargmin(loss)]) if np.isfinite(loss).any() else float(rates[0])


def _draw_errors(ax: Axes, cells: xr.Dataset) -> None:
    widths = cells["width"].values.astype(float)
    for scheme in ("SP", "muP", "Adaptive Transfer"):
        look = _LOOKS[scheme]
        assumed = cells["assumed_error"].sel(scheme=scheme).values
        ax.plot(widths, assumed, color=look["color"], linestyle=":", linewidth=1.2, zorder=2)
        _with_bars(ax, widths, cells["transfer_error"].sel(scheme=scheme), scheme)
    ax.set_yscale("log")
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, 1e-2), top)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.set_ylabel(r"$|\eta(w)/\eta^\star(w) - 1|$")
    _width_axis(ax, widths)


def _draw_penalty(ax: Axes, cells: xr.Dataset) -> None:
    _side_by_side(ax, cells["penalty"])
    # Linear around 0, where the good schemes are; logarithmic where the others go.
    ax.set_yscale("symlog", linthresh=0.02, linscale=1.0)
    ax.axhline(0, color=style.MUTED, linewidth=0.8)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", "−")))
    lows = cells["penalty"].sel(bound=["value", "low"]).values
    ax.set_ylim(bottom=1.2 * min(float(lows[np.isfinite(lows)].min(initial=0.0)), -0.005))
    ax.set_ylabel("Loss over the tuned optimum (nats)")


def _draw_stability(ax: Axes, cells: xr.Dataset) -> None:
    _side_by_side(ax, cells["stability"])
    ax.set_ylim(-0.04, 1.04)
    ax.set_ylabel("Fraction of runs that train")


def _side_by_side(ax: Axes, cell: xr.DataArray) -> None:
    """All schemes at every width, a little apart: many lie on one another."""
    widths = cell["width"].values.astype(float)
    schemes = [str(s) for s in cell["scheme"].values]
    for k, scheme in enumerate(schemes):
        shifted = widths * 2.0 ** (0.13 * (k - (len(schemes) - 1) / 2))
        _with_bars(ax, shifted, cell.sel(scheme=scheme), scheme, line=False)
    _width_axis(ax, widths)


def _with_bars(
    ax: Axes, x: np.ndarray, cell: xr.DataArray, scheme: str, *, line: bool = True
) -> None:
    value, low, high = (cell.sel(bound=b).values for b in ("value", "low", "high"))
    shown = np.isfinite(value)
    x, value = x[shown], value[shown]
    look: dict[str, Any] = _look(scheme) | ({} if line else {"linestyle": "none"})
    bars = [np.where(np.isfinite(e), np.abs(e - value), 0) for e in (low[shown], high[shown])]
    ax.errorbar(x, value, yerr=bars, capsize=2, elinewidth=0.9, markersize=4.5, zorder=3, **look)


def _look(scheme: str) -> dict[str, Any]:
    return {"linestyle": "-", **_LOOKS[scheme]}


def _width_axis(ax: Axes, widths: np.ndarray) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(widths[0] / 1.5, widths[-1] * 1.5)
    ax.xaxis.set_major_locator(FixedLocator(list(widths)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("Width")


def _octave_axis(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    low, high = (math.log2(x) for x in ax.get_xlim())
    step = 1 if high - low < 7 else 2
    ticks = [2.0**k for k in range(math.ceil(low), math.floor(high) + 1) if k % step == 0]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())


def _legend(fig: Figure, dataset: xr.Dataset) -> None:
    handles = [
        Line2D([], [], label=_LABELS[s], **_look(s)) for s in map(str, dataset["scheme"].values)
    ]
    handles.append(
        Line2D(
            [], [], color=style.INK, linestyle=":", label=r"assumed: $\eta^\star\propto w^{-0.85}$"
        )
    )
    fig.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False)
    widths = [int(dataset.attrs["base_width"]), *map(int, dataset["width"].values)]
    looks = zip(
        widths, style.width_colors(len(widths)), style.width_markers(len(widths)), strict=True
    )
    curves = [Line2D([], [], color=c, marker=m, label=f"{w}") for w, c, m in looks]
    fig.legend(
        handles=curves, title="Width", loc="outside lower left", ncols=len(curves), frameon=False
    )
