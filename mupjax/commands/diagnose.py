"""``mupjax diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["diagnose"]


def diagnose(
    table: Annotated[Path, tyro.conf.Positional],
    hp: str,
    loss: str = "loss",
    width: str = "width",
    param: str | None = None,
    seed: str | None = None,
    step: str | None = None,
    optimizer: str | None = None,
    fix: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    profile: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    scale: Literal["log2", "linear", "momentum"] = "log2",
    optimum: Literal["quartic", "parabola", "midpoint"] = "quartic",
    midpoint_tolerance: float = 0.01,
    infinity: Literal["auto", "largest", "limit"] = "auto",
    confidence: float = 0.9,
    target_width: int | None = None,
    json: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Judge from a table of losses whether a hyperparameter transfers across width, and how fast.

    The table has a row for each run, made by any framework: CSV, TSV, Parquet, JSON lines, Zarr,
    netCDF, or a dataset of `mupjax sweep`. Runs that diverged have nan, inf or nothing as loss.

    Args:
      table: the file.
      hp: column of the hyperparameter in question, such as a learning rate.
      loss: column of the final loss.
      width: column of the width.
      param: column of the parametrization; without one: param or parametrization, if there.
      seed: column of the seed; without one: seed, if there.
      step: column of the step: the last one of every run counts; without one: step, if there.
      optimizer: column of the optimizer; without one: optimizer, if there.
      fix: COLUMN=VALUE keeps the rows with that value; may be repeated.
      profile: column of a further hyperparameter, of which the best value is taken at each width
        and value of the first; may be repeated.
      scale: how values of the hyperparameter are compared: by log2, as they are, or by
        log2(1/(1-value)).
      optimum: minimum of a local quartic (where every width has a bowl of five points, or else as
        parabola), minimum of a local parabola, or midpoint of the interval within a tolerance.
      midpoint_tolerance: of the midpoint, as a fraction of the curve's range.
      infinity: what gaps are measured against: the largest width; an extrapolated limit, without
        gaps where the table determines none; or that limit where there is one and else the largest
        width.
      confidence: level of the intervals.
      target_width: forecast optimum, loss and penalties at this width.
      json: file to write the results to.
      figures: folder to write figures to.
    """
    from mupjax.commands.output import check_outputs, write_outputs
    from mupjax.diagnose import diagnose_tables, format_diagnoses, json_of
    from mupjax.table import Columns, arrange_sweeps, read_records

    check_outputs(json, figures, table)
    tables = arrange_sweeps(
        read_records(table),
        Columns(hp, loss, width, param, seed, step, optimizer),
        scale=scale,
        fix=_pairs(fix),
        profile=profile,
    )
    diagnoses = diagnose_tables(
        tables,
        scale=scale,
        optimum=optimum,
        midpoint_tolerance=midpoint_tolerance,
        infinity=infinity,
        confidence=confidence,
        target_width=target_width,
    )

    def draw(folder: Path) -> list[Path]:
        from mupjax.figures.diagnosis import write_figures

        return write_figures(folder, diagnoses, scale=scale)

    # Files first: whoever reads the output may stop reading.
    written = write_outputs(json, lambda: json_of(diagnoses), figures, draw)
    print(format_diagnoses(diagnoses))
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")


def _pairs(fix: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in fix:
        column, equals, value = text.partition("=")
        if not (column and equals):
            raise ValueError(f"--fix {text!r} must look like COLUMN=VALUE.")
        if column in pairs:
            raise ValueError(f"--fix gives column {column!r} two values; a row has only one.")
        pairs[column] = value
    return pairs
