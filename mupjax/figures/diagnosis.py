"""The picture of a diagnosis: loss curves with their optima, and how the three gaps fall."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from mupjax.diagnose import Diagnosis
from mupjax.figures import style
from mupjax.table import Scale

__all__ = ["diagnosis_figure", "write_figures"]

FloatArray = NDArray[np.float64]

# Above this ratio of the largest to the smallest loss shown, the minima of a linear axis are flat.
_LOG_AXIS_FROM_RATIO = 4.0
# Bytes of a file's name without its suffix: most systems allow 255 with it.
_LONGEST_STEM = 200
# Letters of a parametrization that fit above a figure.
_LONGEST_TITLE = 60
_CROSS: dict[str, Any] = {"marker": "x", "markersize": 4.5, "linestyle": "none"}


def write_figures(folder: Path, diagnoses: Mapping[str, Diagnosis], *, scale: Scale) -> list[Path]:
    """One figure a parametrization, as PNG and SVG, named after it (shortened where too long)."""
    stems: dict[str, str] = {}
    for name in diagnoses:
        stem = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "parametrization"
        # A cut through a letter of several bytes leaves bytes that mean nothing.
        stem = stem.encode()[:_LONGEST_STEM].decode(errors="ignore")
        while stem in stems.values():
            stem += "_"
        stems[name] = stem
    written = []
    for name, diagnosis in diagnoses.items():
        figure = diagnosis_figure(name, diagnosis, scale=scale)
        written += style.save(figure, folder / stems[name], formats=("png", "svg"))
    return written


def diagnosis_figure(name: str, diagnosis: Diagnosis, *, scale: Scale = "log2") -> Figure:
    """Loss against the hyperparameter, a curve a width, beside a_n, b_n and c_n against width.

    Curves are means over seeds, bands the range over seeds, stars the optima, open where the grid
    does not bracket them; crosses above mark values at which a run diverged. Beside them both axes
    are logarithmic; lines have the fitted exponents, and, where the largest width stands for
    infinity, the shape that gaps to it have: `n^{-α} − N^{-α}`.

    Args:
      name: of the parametrization.
      diagnosis: of `mupjax.diagnose.diagnose_tables`.
      scale: how the hyperparameter is compared.
    """
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(11.0, 3.6), layout="constrained")
        curves, *gaps = figure.subplots(1, 4, width_ratios=(1.7, 1, 1, 1))
        _draw_curves(curves, diagnosis, scale)
        _draw_gaps(gaps, diagnosis, scale)
        result = diagnosis.result
        chance = result.probability_fast
        said = "" if math.isnan(chance) else f", P(fast) = {chance:.2f}"
        short = name if len(name) <= _LONGEST_TITLE else f"{name[: _LONGEST_TITLE - 1]}…"
        title = "" if name == "all" else f"{style.verbatim(style.label_parametrization(short))}: "
        figure.suptitle(
            f"{title}{result.verdict}{said}", x=0.01, ha="left", fontsize=10.5, fontweight="bold"
        )
        handles, labels = _legend(curves, diagnosis)
        figure.legend(
            handles,
            labels,
            title="Width",
            loc="outside right upper",
            frameon=False,
            alignment="left",
        )
    return figure


def _draw_curves(ax: Axes, diagnosis: Diagnosis, scale: Scale) -> None:
    table, result = diagnosis.table, diagnosis.result
    colors = style.width_colors(len(table.widths))
    markers = style.width_markers(len(table.widths))
    died = np.asarray((table.observed & ~np.isfinite(table.losses)).any(axis=-1))
    x = _position(table.hp_values, scale)
    shown = []
    for k, width in enumerate(table.widths):
        there = table.observed[k].any(axis=-1)
        # A cell with one diverged seed has no mean, and the curve a gap.
        usable = ~died[k][there]
        losses = np.where(table.observed[k], table.losses[k], np.nan)[there][usable]
        mean, low, high = (np.full(usable.size, np.nan) for _ in range(3))
        mean[usable] = np.nanmean(losses, axis=1)
        low[usable], high[usable] = np.nanmin(losses, axis=1), np.nanmax(losses, axis=1)
        shown.append(mean[usable])
        ax.fill_between(x[there], low, high, color=colors[k], alpha=0.18, linewidth=0)
        ax.plot(x[there], mean, color=colors[k], marker=markers[k], label=str(width))
        crosses = x[died[k]]
        height = 0.985 - k * min(0.035, 0.2 / len(table.widths))
        ax.plot(
            crosses,
            np.full(crosses.size, height),
            color=colors[k],
            transform=ax.get_xaxis_transform(),
            **_CROSS,
        )
        hp, loss = result.optimal_hp[k].value, result.optimal_loss[k].value
        if math.isfinite(hp) and math.isfinite(loss):
            star = _star(colors[k], bool(result.edges[k]))
            ax.plot(_position(np.array([hp]), scale), [loss], zorder=5, **star)
    optima = [estimate.value for estimate in result.optimal_loss]
    _limit_losses(ax, np.concatenate(shown), optima, bool(died.any()))
    style.label_hp(ax, style.verbatim(table.hp_name), scale)
    ax.set_ylabel(style.verbatim(f"Final {table.loss_name}"))


def _star(color: Any, at_edge: bool) -> dict[str, Any]:
    return {
        "marker": "*",
        "markersize": 12,
        "markerfacecolor": "white" if at_edge else color,
        "markeredgecolor": color if at_edge else style.INK,
        "markeredgewidth": 1.2 if at_edge else 0.7,
        "linestyle": "none",
    }


def _legend(curves: Axes, diagnosis: Diagnosis) -> tuple[list[Any], list[Any]]:
    """The widths, then whatever else is in the picture."""
    table, edges = diagnosis.table, diagnosis.result.edges
    handles, labels = curves.get_legend_handles_labels()
    middle = style.width_colors(3)[1]
    if diagnosis.result.seeds > 1:
        handles.append(Patch(color=middle, alpha=0.25, linewidth=0))
        labels.append(f"range over\n{diagnosis.result.seeds} seeds")
    if not all(edges):
        handles.append(Line2D([], [], **_star(middle, False)))
        labels.append("optimum")
    if any(edges):
        handles.append(Line2D([], [], **_star(middle, True)))
        labels.append("not bracketed:\nonly a bound")
    if (table.observed & ~np.isfinite(table.losses)).any():
        handles.append(Line2D([], [], color=middle, **_CROSS))
        labels.append("diverged")
    return handles, labels


def _limit_losses(ax: Axes, means: FloatArray, optima: list[float], crosses: bool) -> None:
    """Up to Tukey's fence: losses about to diverge would flatten the rest."""
    if means.size == 0:
        ax.set_yticks([])
        return
    kept = [loss for loss in optima if math.isfinite(loss)]
    low = min([*kept, float(means.min())])
    positive = low > 0
    quartiles = np.quantile(np.log(means) if positive else means, [0.25, 0.75])
    fence = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
    fence = math.exp(min(fence, 700.0)) if positive else float(fence)
    high = max([*kept, min(float(means.max()), fence)])
    if positive and high / low > _LOG_AXIS_FROM_RATIO:
        span = math.log(high / low)
        ax.set_yscale("log")
        top = high * math.exp((0.35 if crosses else 0.08) * span)
        ax.set_ylim(low * math.exp(-0.06 * span), top)
        _label_log_axis(ax)
        return
    span = (high - low) or max(abs(high), 1.0) * 0.1
    # Room above for the crosses.
    ax.set_ylim(low - 0.06 * span, high + (0.35 if crosses else 0.08) * span)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))


def _position(values: FloatArray, scale: Scale) -> FloatArray:
    if scale == "log2":
        return np.log2(values)
    return -np.log2(1 - values) if scale == "momentum" else values


def _draw_gaps(axes: list[Axes], diagnosis: Diagnosis, scale: Scale) -> None:
    result, gaps = diagnosis.result, diagnosis.result.gaps
    widths = np.asarray(result.widths, dtype=np.float64)
    colors = style.width_colors(widths.size)
    markers = style.width_markers(widths.size)
    unit = {"log2": "octaves", "momentum": "octaves", "linear": diagnosis.table.hp_name}[scale]
    panels = (
        ("Loss gap $a_n$", gaps.loss_gap, "α", result.alpha, 1, gaps.infinity),
        (f"HP gap $b_n$ ({unit})", gaps.hp_gap, "β", result.beta, 1, gaps.hp_infinity),
        (
            "Suboptimality $c_n$",
            gaps.suboptimality,
            "rate",
            result.c_rate,
            2,
            gaps.hp_infinity,
        ),
    )
    for ax, (title, values, symbol, rate, power, infinity) in zip(axes, panels, strict=True):
        prefactor = result.loss_prefactor.value if symbol == "α" else math.nan
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_xlabel("Width")
        ax.set_xscale("log", base=2)
        usable = np.isfinite(values) & (values > 0)
        for n, value, color, marker in zip(
            widths[usable],
            values[usable],
            np.array(colors)[usable],
            np.array(markers)[usable],
            strict=True,
        ):
            ax.plot(n, value, marker=marker, color=tuple(color), linestyle="none", markersize=5.5)
        ax.set_xlim(widths[0] / 1.3, widths[-1] * 1.3)
        step = math.ceil(widths.size / 4)
        ax.set_xticks(widths[::step], [f"{int(n)}" for n in widths[::step]])
        ax.xaxis.set_minor_locator(NullLocator())
        if not usable.any():
            ax.set_yticks([])
            why = (
                f"the optimum of width\n{result.widths[-1]} is not bracketed"
                if result.edges[-1] and title != panels[0][0]
                else "the limit is not known"
                if infinity == "limit"
                else "no finite gap"
            )
            ax.annotate(why, (0.5, 0.5), xycoords="axes fraction", ha="center")
            continue
        ax.set_yscale("log")
        _fit_line(ax, widths, values, usable, rate.value, power, infinity, prefactor)
        bottom, top = ax.get_ylim()
        # Room for the rate above the points.
        ax.set_ylim(bottom, top * (top / bottom) ** 0.2)
        _label_log_axis(ax)
        against = "the limit" if infinity == "limit" else f"width {result.widths[-1]}"
        ax.annotate(
            f"{_rate_text(symbol, rate.value, rate.interval)}\nagainst {against}",
            (0.98, 0.98),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8.5,
        )


def _fit_line(
    ax: Axes,
    widths: FloatArray,
    values: FloatArray,
    usable: NDArray[np.bool_],
    rate: float,
    power: int,
    infinity: str,
    prefactor: float,
) -> None:
    """`C n^{-rate}`, or `C (n^{-r} − N^{-r})^power` with `r = rate/power`.

    C is the prefactor where it was fitted (not NaN), else that which fits the points shown.
    """
    if not math.isfinite(rate) or rate <= 0:
        return
    base = rate / power
    limit = widths[-1] ** -base if infinity == "largest" else 0.0

    def shape(n: FloatArray) -> FloatArray:
        return (n**-base - limit) ** power

    fitted = usable & (shape(widths) > 0)
    if not fitted.any():
        return
    if math.isnan(prefactor):
        prefactor = math.exp(np.mean(np.log(values[fitted] / shape(widths)[fitted])))
    bottom, top = ax.get_ylim()
    n = np.geomspace(widths[0], widths[-1], 200)
    line = prefactor * shape(n)
    # The line of a gap to the largest width plunges there: the points set the axis.
    ax.plot(n[line > 0], line[line > 0], color=style.MUTED, linewidth=1.1, zorder=1)
    ax.set_ylim(bottom, max(top, prefactor * float(shape(widths[:1])[0])))


def _label_log_axis(ax: Axes) -> None:
    """Plain numbers, as few of them as read well, however little the axis spans."""
    low, high = ax.get_ylim()
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        ticks = np.multiply.outer(decades, mantissas).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if ticks.size >= 3:
            break
    else:
        ticks = np.asarray(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high))
    ax.yaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(ticks.size / 8)].tolist()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _rate_text(symbol: str, value: float, interval: tuple[float, float]) -> str:
    if math.isnan(value):
        return f"{symbol} unknown"
    low, high = interval
    ends = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{symbol} = {value:.2f}{ends}".replace("-", "−")
