"""The picture of a coordinate check: size of every layer's coordinates against width."""

from __future__ import annotations

import json

import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from mupjax.coord_check import checked_size, slopes
from mupjax.figures import style

__all__ = ["coordinate_figure"]


def coordinate_figure(dataset: xr.Dataset) -> Figure:
    """Mean |h| and mean |h - h_0| of every layer against width or depth, a row a parametrization.

    Left: activations at the start; middle: after the last update; right: their change. Both axes
    are logarithmic, points are means over seeds, and the legend gives the fitted powers.

    Args:
      dataset: of :func:`mupjax.coord_check.coord_check` or `mupjax.depth_check.depth_check`.

    Raises:
      ValueError: a dataset without coordinates.
    """
    fitted = {(s.parametrization, s.layer, s.quantity, s.update): s.slope for s in slopes(dataset)}
    if "parametrization" not in dataset.dims:
        name = json.loads(dataset.attrs["configuration"])["parametrizations"][0]["name"]
        dataset = dataset.expand_dims(parametrization=[name])
    names = [str(p) for p in dataset["parametrization"].values]
    # The whole model's output repeats its last layer.
    layers = [str(x) for x in dataset["layer"].values if x != "output"] or ["output"]
    last = int(dataset["update"].values[-1])
    columns = [("activation", 0), ("activation", last), ("change", last)]
    titles = [
        "Activations, at the start",
        f"Activations, after {last} updates",
        f"Change, after {last} updates",
    ]
    along = checked_size(dataset)
    size = dataset[along].values.astype(float)
    colors, markers = style.width_colors(len(layers)), style.width_markers(len(layers))
    with mpl.rc_context(style.RC):
        fig = Figure(figsize=(9.6, 2.5 * len(names) + 0.4), layout="constrained")
        axes = fig.subplots(len(names), 3, sharex=True, sharey="col", squeeze=False)
        for r, (row, name) in enumerate(zip(axes, names, strict=True)):
            for ax, (quantity, t), title in zip(row, columns, titles, strict=True):
                values = dataset[f"coordinate_{quantity}"].sel(parametrization=name, update=t)
                values = values.mean("seed")
                for i, layer in enumerate(layers):
                    slope = fitted[name, layer, quantity, t]
                    ax.plot(
                        size,
                        values.sel(layer=layer).transpose(along).values,
                        marker=markers[i],
                        color=colors[i],
                        label=f"{layer}  {slope:+.2f}",
                    )
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                ax.set_xticks(size, [f"{int(n)}" for n in size])
                ax.minorticks_off()
                ax.legend(title="layer, power", fontsize="x-small", title_fontsize="x-small")
                if r == 0:
                    ax.set_title(title)
                if r == len(names) - 1:
                    ax.set_xlabel(along.capitalize())
            label = style.verbatim(style.label_parametrization(name))
            row[0].set_ylabel(f"{label}\nmean |coordinate|")
    return fig
