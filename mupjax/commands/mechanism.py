"""``mupjax mechanism``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["mechanism"]


def mechanism(
    run: Annotated[Path, tyro.conf.Positional],
    hp: str | None = None,
    fix: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    scale: Literal["log2", "linear", "momentum"] = "log2",
    reach: float = 2.0,
    least_share: float = 0.5,
    most_instability: float = 0.25,
    most_unevenness: float = 1 / 3,
    confidence: float = 0.9,
    json: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Is transfer explained by a top-κ part of the loss that is the same at all widths?

    Needs a sweep that recorded the decomposition of its losses (several seeds for a verdict).

    Args:
      run: a run's folder, or its dataset (.nc or .zarr).
      hp: the hyperparameter in question; without one: the only one with several values.
      fix: NAME=VALUE of a further hyperparameter with several values; may be repeated.
      scale: how values of the hyperparameter are compared: by log2, as they are, or by
        log2(1/(1-value)).
      reach: how far around the optima curves are read, in units of the scale.
      least_share: of the bowl's curvature that the top-κ part must make.
      most_instability: largest difference of the top-κ curves between widths, as a share of their
        height.
      most_unevenness: largest variation of the residual, as a share of the top-κ curve's.
      confidence: level of the intervals and of the verdict.
      json: file to write the results to.
      figures: folder to write figures to.
    """
    from mupjax.commands.output import check_outputs, write_outputs
    from mupjax.mechanism import (
        explain_dataset,
        format_mechanisms,
        json_of_mechanisms,
        load_decomposition,
    )
    from theory.mechanism_report import Conditions

    check_outputs(json, figures, run)
    found = explain_dataset(
        load_decomposition(run),
        hp,
        scale=scale,
        fix=_numbers(fix),
        conditions=Conditions(least_share, most_instability, most_unevenness, reach),
        confidence=confidence,
    )

    def draw(folder: Path) -> list[Path]:
        from mupjax.figures.decomposition import write_figures

        return write_figures(folder, found)

    # Files first: whoever reads the output may stop reading.
    written = write_outputs(json, lambda: json_of_mechanisms(found), figures, draw)
    print(format_mechanisms(found))
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")


def _numbers(fix: tuple[str, ...]) -> dict[str, float]:
    values = {}
    for text in fix:
        name, equals, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise ValueError(f"--fix {text!r} must look like NAME=NUMBER.") from None
    return values
