"""From a sweep's dataset to its verdict: does the learning rate stay put as the network widens?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from mupjax.figures import learning_rate_figure, style
from mupjax.report import write_report
from mupjax.results import with_parametrizations
from theory.drift import TransferSummary, transfer_summary

__all__ = ["format_summaries", "learning_rate_view", "summarize", "write_analysis"]


def learning_rate_view(dataset: xr.Dataset) -> xr.Dataset:
    """``loss`` and ``status`` over (parametrization, width, learning_rate, seed) alone.

    A single parametrization gains its dimension. Further hyperparameters are profiled out: every
    (width, learning rate) takes the combination of the others with the lowest mean loss over seeds,
    a combination in which a seed diverged counting as infinite.

    Raises:
      ValueError: the dataset has no grid over ``learning_rate``.
    """
    if "learning_rate" not in dataset.dims:
        raise ValueError(
            "the verdict is about the learning rate, but this sweep has no grid over "
            f"'learning_rate' (its dimensions are {', '.join(map(str, dataset['loss'].dims))})."
        )
    view = with_parametrizations(dataset[["loss", "status"]])
    kept = ("parametrization", "width", "learning_rate", "seed")
    if others := [d for d in view["loss"].dims if d not in kept]:
        flat = view.stack(combination=others)
        healthy = (flat["status"] == 0).all("seed")
        mean = flat["loss"].mean("seed").where(healthy, np.inf)
        view = flat.isel(combination=mean.argmin("combination")).drop_vars(
            ["combination", *others], errors="ignore"
        )
    view = view.transpose(*kept)
    view.attrs = dict(dataset.attrs)
    return view


def summarize(dataset: xr.Dataset, *, confidence: float = 0.9) -> dict[str, TransferSummary]:
    """The verdict of every parametrization of a sweep, by name.

    Args:
      dataset: of :func:`mupjax.sweep`, with a grid over ``learning_rate``.
      confidence: level of the intervals.

    Raises:
      ValueError: no such grid, or fewer than three learning rates.
    """
    view = learning_rate_view(dataset)
    return {
        str(name): transfer_summary(
            view["width"].values,
            view["learning_rate"].values,
            view["loss"].sel(parametrization=name).values,
            view["status"].sel(parametrization=name).values != 0,
            confidence=confidence,
        )
        for name in view["parametrization"].values
    }


def format_summaries(summaries: Mapping[str, TransferSummary]) -> str:
    """All tables, one after another, for a terminal."""
    return "\n\n".join(f"{name}\n{summary.table()}" for name, summary in summaries.items())


def write_analysis(
    folder: Path, dataset: xr.Dataset, summaries: Mapping[str, TransferSummary], *, title: str
) -> list[Path]:
    """Write ``summary.json``, the figure (PNG and SVG) and the report ``index.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    view = learning_rate_view(dataset)
    summary = folder / "summary.json"
    record = {name: s.to_json() for name, s in summaries.items()}
    summary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    figure = learning_rate_figure(view, summaries)
    drawn = style.save(figure, folder / "learning_rate", formats=("png", "svg"))
    page = write_report(
        folder / "index.html", title=title, dataset=view, summaries=summaries, figure=figure
    )
    return [summary, *drawn, page]
