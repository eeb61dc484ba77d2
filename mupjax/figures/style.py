"""Labels, colours, markers and file formats of all figures, in one place.

Widths are an ordered quantity, so they get an ordered colour map (viridis: perceptually uniform,
readable with colour-blindness, monotone in lightness and so in greyscale) cut before its lightest
part, which vanishes on white paper; markers differ too. Wider is darker.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from theory.curves import Scale

__all__ = [
    "INK",
    "MUTED",
    "PARAMETRIZATION_LABELS",
    "RC",
    "hp_title",
    "label_hp",
    "label_parametrization",
    "save",
    "verbatim",
    "width_colors",
    "width_markers",
]

INK = "#1a1a1a"
MUTED = "#5f5f5f"
GRID = "#e4e4e4"

# Keys are compared in lower case, without spaces, "-" and "_".
PARAMETRIZATION_LABELS = {
    "sp": "Standard (SP)",
    "mup": "Maximal update (μP)",
    "ntp": "Neural tangent (NTP)",
    "meanfield": "Mean-field",
    "adaptivetransfer": "Adaptive Transfer",
}

# Of viridis: 0 is its darkest end, and beyond 0.77 its contrast with white falls below 2:1.
_DARKEST, _LIGHTEST = 0.05, 0.75
# "x" and "*" are taken: they mark diverged cells and optima.
_MARKERS = ("o", "s", "^", "D", "v", "P", "h", "<", "p", ">")

# Any: matplotlib's type of the keys is not public.
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Type 42 keeps the text of a PDF searchable, and journals refuse type 3.
    "pdf.fonttype": 42,
    # A fixed salt: saving the same figure twice gives the same SVG, so results can be versioned.
    "svg.hashsalt": "mupjax",
}


def width_colors(count: int) -> list[tuple[float, float, float, float]]:
    """`count` colours from the narrowest (lightest) to the widest (darkest) network."""
    if count == 1:
        positions = [_DARKEST]
    else:
        step = (_LIGHTEST - _DARKEST) / max(count - 1, 1)
        positions = [_LIGHTEST - step * i for i in range(count)]
    colormap = mpl.colormaps["viridis"]
    return [colormap(position) for position in positions]


def width_markers(count: int) -> list[str]:
    """`count` markers, distinct for up to ten widths; further ones start over."""
    return [_MARKERS[i % len(_MARKERS)] for i in range(count)]


def label_parametrization(name: str) -> str:
    """A title for a parametrization; a name without one is its own title."""
    key = "".join(letter for letter in name.lower() if letter not in " -_")
    return PARAMETRIZATION_LABELS.get(key, name)


def verbatim(text: str) -> str:
    """Text from outside, such as a column's name, to be drawn as it is: no mathematics in it."""
    return text.replace("$", r"\$")


def hp_title(name: str) -> str:
    """A hyperparameter's name as a title: ``learning_rate`` is Learning rate, ``b1`` itself."""
    return verbatim(name.replace("_", " ").capitalize() if len(name) > 2 else name)


def label_hp(ax: Axes, title: str, scale: Scale) -> None:
    """The horizontal axis of a hyperparameter whose values are drawn at their place on `scale`."""
    if scale == "linear":
        ax.set_xlabel(title)
        return
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if scale == "log2":
        ax.set_xlabel(title)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:g}}}$"))
    else:
        ax.set_xlabel(f"{title}, by log₂ 1/(1−{title})")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1 - 2**-x:.4g}"))


def save(
    fig: Figure,
    path_without_suffix: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("png", "svg", "pdf"),
) -> list[Path]:
    """Write a figure in several formats; PNG has 200 dots per inch.

    The files hold no date: the same figure gives the same bytes.

    Args:
      fig: the figure.
      path_without_suffix: where to; the suffix is appended, so a dot in the name does no harm.
        Missing folders are made.
      formats: suffixes that matplotlib knows.

    Returns:
      The paths written, in the order of `formats`.
    """
    base = Path(path_without_suffix)
    base.parent.mkdir(parents=True, exist_ok=True)
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    written = []
    with mpl.rc_context(RC), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes, which say so themselves.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        for suffix in formats:
            path = base.parent / f"{base.name}.{suffix}"
            fig.savefig(path, dpi=200, metadata=dates.get(suffix))
            written.append(path)
    return written
