"""From named columns to losses over width × hyperparameter × seed.

A *run* is a row, or, where there is a `step` column, all rows that agree in everything else that
identifies it. What is missing is not diverged: `observed` tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mupjax.table.cells import Columns, Scale, keep_rows, number, resolve_columns
from mupjax.table.records import Records
from mupjax.table.runs import Run, confounded, grouped, last_steps, profile_out, read_runs

__all__ = ["SweepTable", "arrange_sweeps"]


@dataclass(frozen=True)
class SweepTable:
    """The losses of one parametrization, as `theory` takes them.

    Attributes:
      name: of the parametrization; `all` where the table names none.
      hp_name, loss_name: the columns.
      widths: (W,), increasing.
      hp_values: (H,), increasing: all values seen at any width.
      losses: (W, H, S); infinite where a run diverged, NaN where there is none.
      observed: (W, H, S): there is a run.
      notes: what was done to the rows on the way, and what a reader should know about it.
    """

    name: str
    hp_name: str
    loss_name: str
    widths: tuple[int, ...]
    hp_values: NDArray[np.float64]
    losses: NDArray[np.float64]
    observed: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


def arrange_sweeps(
    records: Records,
    columns: Columns,
    *,
    scale: Scale = "log2",
    fix: Mapping[str, str] | None = None,
    profile: Sequence[str] = (),
) -> dict[str, SweepTable]:
    """The table's parametrizations by name, in the order in which they appear.

    Where there is a `step` column, the last step of every run counts. A run that ends before the
    longest of its parametrization and width counts as diverged if its last loss is not finite or
    above its first, and otherwise as missing, with a note: it was stopped, so its loss compares to
    nothing. Several optimizers make a family of curves each. A width with fewer than three values
    of the hyperparameter, such as a confirmation run, is left out, with a note.

    Args:
      records: as read.
      columns: which column holds what.
      scale: how the hyperparameter will be compared: which of its values make sense.
      fix: keeps the rows that have this value in this column.
      profile: columns of further hyperparameters; at each (width, hp) the combination of them with
        the lowest mean loss is taken, one in which a seed diverged counting as infinite.

    Raises:
      ValueError: a column is missing, a cell is no number or out of range, rows repeat a run, or
        fewer than two widths have three values of the hyperparameter. The message names rows,
        column and remedy.
    """
    roles = resolve_columns(records, columns, fix or {}, profile)
    records = keep_rows(records, fix or {})
    runs, merged = read_runs(records, columns, roles, scale, profile)
    names = list(dict.fromkeys(run.family for run in runs))
    runs, notes = last_steps(runs)
    mixed = confounded(records, roles, runs, profile)
    families = grouped(runs, lambda run: run.family)
    return {
        name: _arrange(
            name, columns, families[name], [*merged, *notes.get(name, []), *mixed.get(name, [])]
        )
        for name in names
    }


def _arrange(name: str, columns: Columns, runs: Sequence[Run], notes: Sequence[str]) -> SweepTable:
    said = "" if name == "all" else f" of {name!r}"
    runs, profiled = profile_out(runs)
    runs, thin = _with_curves(runs, columns.hp, said)
    widths = sorted({run.width for run in runs})
    if len(widths) < 2:
        raise ValueError(
            f"there is one width{said}, {widths[0]}: transfer is from one width to another, so add "
            "widths (four or more for a verdict)."
        )
    index, size, reordered = _seed_indices(runs)
    hps = sorted({run.hp for run in runs})
    row_of, column_of = ({v: i for i, v in enumerate(axis)} for axis in (widths, hps))
    losses = np.full((len(widths), len(hps), size), np.nan)
    observed = np.zeros(losses.shape, dtype=bool)
    for run, s in zip(runs, index, strict=True):
        at = row_of[run.width], column_of[run.hp], s
        losses[at], observed[at] = run.loss, True
    return SweepTable(
        name=name,
        hp_name=columns.hp,
        loss_name=columns.loss,
        widths=tuple(widths),
        hp_values=np.array(hps),
        losses=losses,
        observed=observed,
        notes=(*notes, *profiled, *thin, *reordered),
    )


def _with_curves(runs: Sequence[Run], hp: str, said: str) -> tuple[list[Run], list[str]]:
    """Runs of the widths that have a curve: one of fewer than three values is a check at best."""
    curves = dict(sorted(grouped(runs, lambda run: run.width).items()))
    counts = {width: len({run.hp for run in rows}) for width, rows in curves.items()}
    thin = {width: count for width, count in counts.items() if count < 3}
    if not thin:
        return list(runs), []
    what = "an optimum needs a value on each side of it, so 3 at least"
    if len(curves) - len(thin) < 2:
        width, count = next(iter(thin.items()))
        raise ValueError(
            f"width {width}{said} has {count} value(s) of {hp!r}; {what}: add some, or leave this "
            "width out."
        )
    best = {width: min(curves[width], key=lambda run: run.loss) for width in thin}
    listed = ", ".join(
        f"width {width} ({count}, best loss {best[width].loss:.6g} at {best[width].hp:.4g})"
        for width, count in thin.items()
    )
    return [run for run in runs if run.width not in thin], [
        f"left out for too few values of {hp!r}: {listed}; {what}"
    ]


def _seed_indices(runs: Sequence[Run]) -> tuple[list[int], int, list[str]]:
    """Each run's place on the axis of seeds, how long that is, and what has to be said about it."""
    labels = sorted({run.seed for run in runs}, key=_seed_order)
    most = max(len(rows) for rows in grouped(runs, lambda run: run.cell).values())
    if len(labels) <= most:
        place = {label: i for i, label in enumerate(labels)}
        return [place[run.seed] for run in runs], most, []
    # Seeds that the cells do not share carry no common noise: their order in the cell will do.
    seen: dict[tuple[int, float], int] = {}
    index = []
    for run in runs:
        index.append(seen.get(run.cell, 0))
        seen[run.cell] = index[-1] + 1
    return (
        index,
        most,
        [
            f"seeds have other labels in other cells ({len(labels)} labels, at most {most} in a "
            "cell): taken in the order of the rows"
        ],
    )


def _seed_order(label: str) -> tuple[float, str]:
    value = number(label)
    return (math.inf if value is None else value, label)
