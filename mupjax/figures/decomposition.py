"""Figures of a decomposed sweep: losses over time, top-κ pairs, residuals, profiles, κ̂."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from mupjax.figures import style
from mupjax.mechanism import Decomposed, Mechanism
from theory.mechanism_report import Explanation

__all__ = ["curves_figure", "path_figure", "profile_figure", "write_figures"]

FloatArray = NDArray[np.float64]

# Beyond Tukey's fence a curve about to diverge would flatten all others.
# Interquartile ranges: of few points with a steep end, 1.5 would cut some that count.
_FENCE = 3.0


def write_figures(folder: Path, mechanisms: Mapping[str, Mechanism]) -> list[Path]:
    """All figures of every parametrization, as PNG and SVG; those over time where recorded."""
    written = []
    for name, mechanism in mechanisms.items():
        stem = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "parametrization"
        figures = {"curves": curves_figure(mechanism), "profile": profile_figure(mechanism)}
        if mechanism.data.times.size:
            figures["path"] = path_figure(mechanism)
        for kind, figure in figures.items():
            written += style.save(figure, folder / f"{stem}_{kind}", formats=("png", "svg"))
    return written


def curves_figure(mechanism: Mechanism) -> Figure:
    """Loss against the hyperparameter: whole, that of top-κ pairs, residuals.

    Left the whole curves φ_n of all widths, with their minima. Middle the pairs of top-κ curves, at
    width n (full) and at the largest width with the same κ (dashed). Right the residuals of both,
    each less its value at the largest width's optimum, so that what counts, their slope, can be
    seen. κ is that of the report: constant, or κ̂(n).
    """
    data, report = mechanism.data, mechanism.report
    widths = list(report.widths)
    largest = widths[-1]
    colors, markers = style.width_colors(len(widths)), style.width_markers(len(widths))
    kept = np.isin(np.round(data.grid, 9), np.round(report.hp_values, 9))
    x, mean = report.hp_values, _means(data, kept)
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(11.0, 3.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for k, n in enumerate(widths):
            whole = mean[n][:, -1]
            left.plot(x, whole, color=colors[k], marker=markers[k], label=str(n))
            best = int(whole.argmin())
            left.plot(x[best], whole[best], marker="*", ms=11, color=colors[k], mec=style.INK)
        anchor = int(mean[largest][:, -1].argmin())
        for k, e in enumerate(report.explanations):
            kappa = _on_grid(e, x)
            tops, rests = [], []
            for n in (e.width, largest):
                top = mean[n][np.arange(x.size), kappa - 1]
                tops.append(top)
                rests.append(mean[n][:, -1] - top)
            for top, rest, line in zip(tops, rests, ("-", "--"), strict=True):
                look: dict[str, Any] = {"color": colors[k], "marker": markers[k], "linestyle": line}
                middle.plot(x, top, **look)
                right.plot(x, rest - rest[anchor], **look)
        for ax, title in (
            (left, "Whole"),
            (middle, "Top-κ part"),
            (right, f"Residual less its value at ν*({largest})"),
        ):
            ax.set_title(title, loc="left")
            style.label_hp(ax, style.hp_title(data.hp_name), data.scale)
            _limit(ax)
        left.set_ylabel("Validation loss (linearized)")
        handles, labels = left.get_legend_handles_labels()
        ink: dict[str, Any] = {"color": style.MUTED, "marker": "none"}
        handles += [Line2D([], [], **ink), Line2D([], [], linestyle="--", **ink)]
        labels += ["at width n", f"at {largest},\nsame κ"]
        figure.legend(handles, labels, title="Width n", loc="outside right upper", frameon=False)
        figure.suptitle(
            f"{style.verbatim(style.label_parametrization(data.name))}: {report.verdict}",
            x=0.01,
            ha="left",
            fontsize=10.5,
            fontweight="bold",
        )
    return figure


def profile_figure(mechanism: Mechanism) -> Figure:
    """Left `φ_n^k` against k at the largest width's optimum, κ̂(n) marked; right κ̂(n) against n.

    Bars are the bootstrap's intervals over seeds; a width without a κ̂ has no mark. The dotted line
    is κ = n: everything.
    """
    data, report = mechanism.data, mechanism.report
    widths = list(report.widths)
    colors, markers = style.width_colors(len(widths)), style.width_markers(len(widths))
    kept = np.isin(np.round(data.grid, 9), np.round(report.hp_values, 9))
    mean = _means(data, kept)
    best = int(mean[widths[-1]][:, -1].argmin())
    hats = {e.width: e for e in report.explanations if e.truncation.kappa is not None}
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for k, n in enumerate(widths):
            profile = mean[n][best]
            left.plot(np.arange(1, profile.size + 1), profile, color=colors[k], label=str(n))
            if n not in hats:
                continue
            hat = hats[n].truncation.kappa
            number = hats[n].kappa_hat
            assert hat is not None
            at = int(hat[best])
            look: dict[str, Any] = {
                "color": colors[k],
                "marker": markers[k],
                "ms": 7.0,
                "mec": style.INK,
            }
            left.plot(at, profile[at - 1], **look)
            low, high = number.interval
            if np.isfinite([low, high]).all():
                right.plot([n, n], [low, high], color=colors[k], linewidth=2.2, alpha=0.6)
            right.plot(n, number.value, linestyle="none", **look)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        left.set_xlabel("Number of components k")
        left.set_ylabel("Loss reached by the top k alone")
        held = data.hp_values[kept][best]
        left.set_title(f"Top-k profile at {style.verbatim(data.hp_name)} {held:.4g}", loc="left")
        handles, labels = left.get_legend_handles_labels()
        if hats:
            handles.append(
                Line2D([], [], color=style.MUTED, marker="o", mec=style.INK, linestyle="none")
            )
            labels.append("κ̂(n)")
        left.legend(handles, labels, title="Width n", frameon=False)
        right.set_title("κ̂(n) at the optimum", loc="left")
        ends = np.array([widths[0] / 1.3, widths[-1] * 1.1])
        right.plot(ends, ends, color=style.MUTED, linestyle=":", linewidth=1.0)
        right.annotate("κ = n", (ends[1], ends[1]), ha="right", va="bottom", fontsize=8.0)
        right.set_xscale("log", base=2)
        right.set_yscale("log", base=2)
        right.set_xticks(widths, [str(n) for n in widths])
        right.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        right.set_xlabel("Width n")
        if not hats:
            right.annotate("no κ̂ accepted", (0.62, 0.2), xycoords="axes fraction", ha="center")
    return figure


def path_figure(mechanism: Mechanism, *, hp_value: float | None = None) -> Figure:
    """Loss over training: whole, top-κ part, residual; one line a width, mean over seeds.

    All three start at the initial loss (residuals at 0). κ is that of the smallest width's
    comparison, the same at all widths, so that lines can be compared.

    Args:
      mechanism: with decompositions recorded on the way.
      hp_value: the hyperparameter; None for the largest width's optimum.

    Raises:
      ValueError: nothing was recorded on the way.
    """
    data, report = mechanism.data, mechanism.report
    if not data.times.size:
        raise ValueError("the sweep recorded no losses on the way: give the observer times.")
    widths = list(report.widths)
    colors = style.width_colors(len(widths))
    if hp_value is None:
        alive = np.all([np.isfinite(data.profiles[n]).all(axis=(0, 2)) for n in widths], axis=0)
        whole = np.where(alive, data.profiles[widths[-1]][..., -1].mean(axis=0), np.inf)
        i = int(whole.argmin())
    else:
        i = int(np.abs(data.hp_values - hp_value).argmin())
    first = report.explanations[0]
    k = int(_on_grid(first, data.grid)[i])
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(10.0, 3.3), layout="constrained")
        axes = figure.subplots(1, 3)
        for color, n in zip(colors, widths, strict=True):
            path = data.paths[n][:, i].mean(axis=0)
            start = data.initial_loss[n][:, i].mean()
            top, rest = path[:, k - 1], path[:, -1] - path[:, k - 1]
            steps = np.maximum(data.times, 1)
            axes[0].plot(steps, data.losses[n][:, i].mean(axis=0), color=color, label=str(n))
            axes[1].plot(steps, start + top, color=color)
            axes[2].plot(steps, rest, color=color)
        titles = ("Loss", f"Initial loss + top-{k} part", f"Residual of the top-{k} part")
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, loc="left")
            ax.set_xscale("log")
            ax.set_xlabel("Updates")
        axes[0].set_ylabel("Validation loss")
        low = min(axes[0].get_ylim()[0], axes[1].get_ylim()[0])
        high = max(axes[0].get_ylim()[1], axes[1].get_ylim()[1])
        for ax in axes[:2]:
            ax.set_ylim(low, high)
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            title="Width n",
            loc="outside right upper",
            frameon=False,
        )
        held = f"{style.verbatim(data.hp_name)} {data.hp_values[i]:.4g}"
        figure.suptitle(
            f"{style.verbatim(style.label_parametrization(data.name))}, {held}",
            x=0.01,
            ha="left",
            fontsize=10.5,
            fontweight="bold",
        )
    return figure


def _means(data: Decomposed, kept: NDArray[np.bool_]) -> dict[int, FloatArray]:
    """Mean profiles over seeds at the hyperparameters used, (g, n)."""
    return {n: profile[:, kept].mean(axis=0) for n, profile in data.profiles.items()}


def _on_grid(explanation: Explanation, x: FloatArray) -> NDArray[np.int64]:
    """κ of the window on the whole grid: κ̂(n) where it is that, else the window's ends go on."""
    low, high = (int(np.abs(x - end).argmin()) for end in explanation.window)
    kappa, hat = explanation.kappa, explanation.truncation.kappa
    if hat is not None and hat.size == x.size and np.array_equal(hat[low : high + 1], kappa):
        return hat
    return np.pad(kappa, (low, x.size - 1 - high), mode="edge")


def _limit(ax: Axes) -> None:
    """Cut what lies beyond Tukey's outer fences, such as losses of runs that nearly diverged."""
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()]
    values = np.concatenate(drawn)
    low, high = np.quantile(values, [0.25, 0.75])
    room = _FENCE * (high - low)
    bottom, top = max(values.min(), low - room), min(values.max(), high + room)
    margin = 0.06 * (top - bottom) or 0.1
    ax.set_ylim(bottom - margin, top + margin)
