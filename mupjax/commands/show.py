"""``mupjax show``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["show"]


def show(run: Annotated[Path, tyro.conf.Positional], configuration: bool = False) -> None:
    """Print what a run found.

    Args:
      run: a run's folder, or its dataset (.nc or .zarr).
      configuration: print how it was run as well.
    """
    from mupjax import results
    from mupjax.coord_check import slope_table
    from mupjax.verdict import format_summaries, summarize

    if run.suffix not in (".nc", ".zarr"):
        named = [run / name for name in ("sweep.nc", "sweep.zarr", "coordinates.nc")]
        found = [path for path in named if path.exists()]
        if not found:
            raise FileNotFoundError(
                f"{str(run)!r} holds no result of a sweep (a table of runs is for mupjax diagnose)."
            )
        run = found[0]
    dataset = results.load(run)
    print(
        f"{run}: {dict(dataset.sizes)}, run {dataset.attrs['created']} on {dataset.attrs['device']}"
    )
    if configuration:
        print(json.dumps(results.configuration_of(dataset), indent=2))
    if "coordinate_change" in dataset:
        print(slope_table(dataset))
    elif dataset.sizes.get("learning_rate", 0) >= 3:
        print(format_summaries(summarize(dataset)))
    else:
        print(dataset)
