"""The picture of learning-rate transfer: loss against learning rate, a curve for each width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from mupjax.figures import style
from theory.drift import TransferSummary, format_with_interval

__all__ = ["DIMENSIONS", "learning_rate_figure"]

DIMENSIONS = ("parametrization", "width", "learning_rate", "seed")
"""The axes of `loss` and `status` in a dataset that can be drawn."""

# Above this ratio of the largest to the smallest loss shown, the minima of a linear axis are flat.
_LOG_AXIS_FROM_RATIO = 4.0
_TICKS_PER_AXIS = 7


@dataclass(frozen=True)
class _Panel:
    """One parametrization, in arrays over (width, learning rate)."""

    name: str
    mean: NDArray[np.float64]  # NaN where any seed diverged
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    summary: TransferSummary


def learning_rate_figure(dataset: xr.Dataset, summaries: Mapping[str, TransferSummary]) -> Figure:
    """Final loss against learning rate: a panel for each parametrization, a curve for each width.

    Curves are means over seeds, bands the range over seeds. Stars are the optima of `summaries`,
    open where the grid does not bracket them. A cell in which a seed diverged is no part of the
    curve: a cross above the plot marks it, in a row for each width, the narrowest on top. The
    vertical axis is shared, and cut at Tukey's fence (third quartile plus 1.5 interquartile ranges,
    of the logarithms where losses are positive), so that losses about to diverge do not flatten
    the rest; a curve that goes further leaves through the top. It is logarithmic when what it shows
    spans a factor of 4.

    Args:
      dataset: dims `parametrization`, `width`, `learning_rate`, `seed` with their coordinates;
        variables `loss` (final loss) and `status` (0 ok, else diverged) on these dims. The
        `long_name` and `units` of `loss` and `learning_rate` become axis labels.
      summaries: `theory.drift.transfer_summary` of each parametrization in the dataset, by name.

    Returns:
      A figure that no window or global state knows of; `mupjax.figures.save` writes it.

    Raises:
      ValueError: a variable, dimension or summary is missing, or the widths differ.
    """
    panels = _panels(dataset, summaries)
    rates = np.asarray(dataset["learning_rate"].values, dtype=np.float64)
    widths = [int(width) for width in dataset["width"].values]
    colors = style.width_colors(len(widths))
    markers = style.width_markers(len(widths))
    with mpl.rc_context(style.RC):
        # A long verdict must end before the next panel's begins: .06 inches a letter.
        letters = max(len(_verdict_line(panel.summary)) for panel in panels)
        width = max(3.3, 0.06 * letters + 0.5)
        fig = Figure(figsize=(width * len(panels) + 1.45, 3.5), layout="constrained")
        axes = fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        _scale_axes(axes[0], panels, rates)
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel, rates, colors, markers)
            ax.set_xlabel(_axis_label(dataset["learning_rate"], "Learning rate"))
        axes[0].set_ylabel(_axis_label(dataset["loss"], "Final validation loss"))
        _legend(fig, panels, widths, colors, markers, seeds=dataset.sizes["seed"])
    return fig


def _panels(dataset: xr.Dataset, summaries: Mapping[str, TransferSummary]) -> list[_Panel]:
    for variable in ("loss", "status"):
        if variable not in dataset:
            raise ValueError(
                f"dataset has no variable {variable!r}, only {sorted(map(str, dataset.data_vars))}"
            )
        if set(dataset[variable].dims) != set(DIMENSIONS):
            raise ValueError(
                f"dataset[{variable!r}] has dims {dataset[variable].dims}, expected {DIMENSIONS}"
            )
    if missing := [name for name in DIMENSIONS[:3] if name not in dataset.coords]:
        raise ValueError(f"dataset has no coordinate {missing[0]!r}, which the axes need")
    widths = tuple(int(width) for width in dataset["width"].values)
    panels = []
    for name in map(str, dataset["parametrization"].values):
        if name not in summaries:
            raise ValueError(
                f"summaries has no entry for parametrization {name!r}, only {sorted(summaries)}; "
                "make one with theory.transfer_summary"
            )
        summary = summaries[name]
        if summary.widths != widths:
            raise ValueError(
                f"summaries[{name!r}] has widths {summary.widths}, the dataset {widths}; they must "
                "come from the same sweep"
            )
        cells = dataset.sel(parametrization=name)
        loss = cells["loss"].transpose(*DIMENSIONS[1:]).values.astype(np.float64)
        bad = cells["status"].transpose(*DIMENSIONS[1:]).values != 0
        any_bad = bad.any(axis=-1)
        # A cell with one diverged seed has no mean: averaging the survivors would flatter it.
        loss = np.where(any_bad[..., None], np.nan, loss)
        panels.append(_Panel(name, loss.mean(-1), loss.min(-1), loss.max(-1), any_bad, summary))
    return panels


def _scale_axes(ax: Axes, panels: list[_Panel], rates: NDArray[np.float64]) -> None:
    """Limits, scales and ticks of the axes that all panels share."""
    ax.set_xscale("log", base=2)
    octaves = np.log2(rates)
    margin = 0.05 * (octaves[-1] - octaves[0])
    ax.set_xlim(2.0 ** (octaves[0] - margin), 2.0 ** (octaves[-1] + margin))
    whole = np.arange(math.ceil(octaves[0] - margin), math.floor(octaves[-1] + margin) + 1)
    step = max(1, math.ceil(whole.size / _TICKS_PER_AXIS))
    ax.xaxis.set_minor_locator(NullLocator())
    if whole.size > 1:
        ax.xaxis.set_major_locator(FixedLocator([2.0**power for power in whole[::step]]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{round(math.log2(x))}}}$"))
    else:
        # A grid that spans hardly an octave: its own ends say more than powers of two.
        ax.xaxis.set_major_locator(FixedLocator([rates[0], rates[-1]]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))

    shown = np.concatenate([panel.mean[np.isfinite(panel.mean)] for panel in panels])
    if shown.size == 0:
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_locator(NullLocator())
        return
    # Optima and the ends of their seeds' range always stay in the picture.
    kept = [loss for panel in panels for loss in panel.summary.optimal_loss if math.isfinite(loss)]
    bottom = min(
        min(float(np.nanmin(panel.low)) for panel in panels if np.isfinite(panel.low).any()), *kept
    )
    positive = bottom > 0
    values = np.log(shown) if positive else shown
    quartiles = np.quantile(values, [0.25, 0.75])
    fence = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
    fence = float(np.exp(fence) if positive else fence)
    top = max(min(float(shown.max()), fence), *kept)
    log_axis = positive and top / bottom > _LOG_AXIS_FROM_RATIO
    low, high = (math.log(bottom), math.log(top)) if log_axis else (bottom, top)
    # No spread at all still needs an axis.
    span = (high - low) or max(abs(high), 1.0) * 0.1
    rows = _cross_rows(panels)
    headroom = rows[-1] + 0.05 if rows else 0.06
    low -= 0.06 * span
    limit = low + (high - low) / (1 - headroom)
    if log_axis:
        ax.set_yscale("log")
        ax.set_ylim(math.exp(low), math.exp(limit))
        ticks = _log_ticks(math.exp(low), math.exp(high))
    else:
        ax.set_ylim(low, limit)
        ticks = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(low, high)
    # None beside the crosses: their height means nothing.
    end = low + (limit - low) * (1 - rows[-1] - 0.03 if rows else 1)
    end = math.exp(end) if log_axis else end
    ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= end]))
    ax.yaxis.set_minor_locator(NullLocator())
    if log_axis:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten: a loss of 0.2 reads better than 2×10⁻¹."""
    mantissas = (1, 2, 5) if high / low < 1e3 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**decade for decade in decades for m in mantissas]
    return [tick for tick in ticks if low <= tick <= high]


def _cross_rows(panels: list[_Panel]) -> list[float]:
    """Distance of each width's row of crosses from the top, as a fraction of the height."""
    if not any(panel.diverged.any() for panel in panels):
        return []
    count = panels[0].mean.shape[0]
    pitch = min(0.04, 0.24 / count)
    return [0.02 + pitch * k for k in range(count)]


def _draw(
    ax: Axes,
    panel: _Panel,
    rates: NDArray[np.float64],
    colors: list[tuple[float, float, float, float]],
    markers: list[str],
) -> None:
    summary = panel.summary
    for k, (color, marker) in enumerate(zip(colors, markers, strict=True)):
        ax.fill_between(rates, panel.low[k], panel.high[k], color=color, alpha=0.18, linewidth=0)
        ax.plot(rates, panel.mean[k], color=color, marker=marker, label=f"{summary.widths[k]}")
    # The way the optimum goes is what the figure is about.
    ax.plot(
        summary.optimal_lr,
        summary.optimal_loss,
        color=style.INK,
        linewidth=0.9,
        linestyle=":",
        zorder=4,
    )
    for k, color in enumerate(colors):
        rate, loss = summary.optimal_lr[k], summary.optimal_loss[k]
        if math.isfinite(rate) and math.isfinite(loss):
            star = ax.plot(rate, loss, zorder=5, **_star(color, summary.at_edge[k]))[0]
            star.set_gid(f"optimum {panel.name} {summary.widths[k]}")
    if rows := _cross_rows([panel]):
        over = ax.get_xaxis_transform()
        for k, (color, row) in enumerate(zip(colors, rows, strict=True)):
            at = rates[panel.diverged[k]]
            ax.plot(at, np.full(at.size, 1 - row), transform=over, **_cross(color))
    title = style.verbatim(style.label_parametrization(panel.name))
    ax.set_title(title, loc="left", pad=17, fontweight="bold")
    ax.annotate(
        _verdict_line(summary),
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=style.INK,
    )


def _star(color: Any, at_edge: bool) -> dict[str, Any]:
    return {
        "marker": "*",
        "markersize": 12,
        "markerfacecolor": "white" if at_edge else color,
        "markeredgecolor": color if at_edge else style.INK,
        "markeredgewidth": 1.3 if at_edge else 0.7,
        "linestyle": "none",
    }


def _cross(color: Any) -> dict[str, Any]:
    return {
        "marker": "x",
        "markersize": 4.5,
        "markeredgewidth": 1.2,
        "color": color,
        "linestyle": "none",
    }


def _verdict_line(summary: TransferSummary) -> str:
    if math.isnan(summary.drift_per_doubling):
        return f"{summary.verdict}: drift unknown"
    drift = format_with_interval(summary.drift_per_doubling, summary.drift_per_doubling_interval)
    # Typographic signs, as on the axes.
    drift = drift.replace("-", "−").replace("inf", "∞")
    return f"{summary.verdict}: {drift} octaves/doubling"


def _legend(
    fig: Figure,
    panels: list[_Panel],
    widths: list[int],
    colors: list[tuple[float, float, float, float]],
    markers: list[str],
    *,
    seeds: int,
) -> None:
    handles: list[Any] = [
        Line2D([], [], color=color, marker=marker)
        for color, marker in zip(colors, markers, strict=True)
    ]
    labels = [f"{width}" for width in widths]
    middle = colors[len(colors) // 2]
    if seeds > 1:
        handles.append(Patch(color=middle, alpha=0.25, linewidth=0))
        labels.append(f"range over\n{seeds} seeds")
    edges = [edge for panel in panels for edge in panel.summary.at_edge]
    known = [not math.isnan(rate) for panel in panels for rate in panel.summary.optimal_lr]
    if any(k and not edge for k, edge in zip(known, edges, strict=True)):
        handles.append(Line2D([], [], **_star(middle, False)))
        labels.append("optimum")
    if any(k and edge for k, edge in zip(known, edges, strict=True)):
        handles.append(Line2D([], [], **_star(middle, True)))
        labels.append("at an edge:\nonly a bound")
    if any(panel.diverged.any() for panel in panels):
        handles.append(Line2D([], [], **_cross(middle)))
        labels.append("diverged")
    fig.legend(
        handles,
        labels,
        title="Width",
        loc="outside right upper",
        frameon=False,
        alignment="left",
    )


def _axis_label(variable: xr.DataArray, otherwise: str) -> str:
    label = str(variable.attrs.get("long_name", otherwise))
    label = label[:1].upper() + label[1:]
    units = str(variable.attrs.get("units", ""))
    # "1" is the convention for a quantity without a unit.
    return f"{label} ({units})" if units not in ("", "1", "dimensionless") else label
