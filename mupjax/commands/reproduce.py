"""``mupjax reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mupjax.commands.devices import one_device_per_core

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    list: bool = False,
    scale: Literal["tiny", "laptop", "paper"] = "laptop",
    out: Path | None = None,
    seeds: int | None = None,
    max_width: int | None = None,
    data: Path | None = None,
    replace: bool = False,
    quiet: bool = False,
) -> None:
    """Check published claims: prints claim, published value, measured value and verdict.

    Writes the dataset, the figure, summary.json and a page. An interrupted run resumes when it is
    called again alike.

    Args:
      name: which target; see --list.
      list: name the targets and the claims each one checks, and run nothing.
      scale: laptop: minutes on two cores; paper: as published; tiny: seconds, to see that it runs.
      out: folder to write to; default runs/ and the target's name.
      seeds: number of seeds, for targets that train networks.
      max_width: the largest width to train, for targets that train networks.
      data: folder with a local copy of the data, for targets that need one.
      replace: start anew where the folder holds an earlier run of the target.
      quiet: no progress bar.
    """
    one_device_per_core()
    from mupjax.reproduce.registry import find_target, format_targets
    from mupjax.reproduce.runner import format_findings
    from mupjax.reproduce.runner import reproduce as run_target

    if list:
        print(format_targets())
        return
    if name is None:
        raise ValueError("name a target to reproduce, or say --list to see them.")
    target = find_target(name)
    options = {
        "seeds": seeds,
        "max_width": max_width,
        "data": None if data is None else str(data),
    }
    if target.estimate is not None and scale == "paper":
        given = {key: value for key, value in options.items() if value is not None}
        print(target.estimate(scale, **given), flush=True)
    run = run_target(
        target,
        out or Path("runs") / target.name,
        scale=scale,
        replace=replace,
        progress=False if quiet else None,
        **options,
    )
    print(format_findings(target, run.outcome))
    print(f"\nwrote {', '.join(map(str, run.files))}")
