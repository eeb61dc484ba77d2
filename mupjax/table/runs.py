"""Rows as runs: repeats refused, last steps taken, further hyperparameters profiled out."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mupjax.table.cells import (
    Columns,
    Roles,
    Scale,
    family_labels,
    hp_values,
    listed,
    losses_of,
    number,
    numbers,
    text,
    text_labels,
    widths_of,
)
from mupjax.table.records import Records

__all__ = ["Run", "confounded", "grouped", "last_steps", "profile_out", "read_runs"]

K = TypeVar("K", bound=Hashable)

_ROWS_NAMED = 3


@dataclass(frozen=True)
class Run:
    """A row that was read; `further` labels the combination of hyperparameters to profile out."""

    family: str
    width: int
    hp: float
    further: str
    seed: str
    step: float
    loss: float
    row: int

    @property
    def cell(self) -> tuple[int, float]:
        """Width and hyperparameter."""
        return self.width, self.hp

    @property
    def identity(self) -> tuple[Hashable, ...]:
        """What tells it from other runs."""
        return self.family, self.width, self.hp, self.further, self.seed


def grouped(runs: Iterable[Run], key: Callable[[Run], K]) -> dict[K, list[Run]]:
    """Runs by key, both in the order in which they come."""
    groups: dict[K, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def read_runs(
    records: Records, columns: Columns, roles: Roles, scale: Scale, profile: Sequence[str]
) -> list[Run]:
    """Every row, checked.

    Raises:
      ValueError: a cell makes no sense, or rows repeat a run (at a step, where there are steps).
    """
    count = len(records.places)
    step = roles["step"]
    further = [text_labels(records, name) for name in profile]
    runs = [
        Run(
            str(family),
            int(width),
            float(hp),
            ", ".join(keys),
            str(seed),
            float(at),
            float(loss),
            row,
        )
        for row, (family, width, hp, keys, seed, at, loss) in enumerate(
            zip(
                family_labels(records, roles),
                widths_of(records, columns.width),
                hp_values(records, columns.hp, scale),
                zip(*further, strict=True) if further else [()] * count,
                text_labels(records, roles["seed"]),
                numbers(records, step, "steps") if step else np.zeros(count),
                losses_of(records, columns.loss),
                strict=True,
            )
        )
    ]
    _refuse_repeats(records, roles, runs)
    return runs


def last_steps(runs: Sequence[Run]) -> tuple[list[Run], dict[str, list[str]]]:
    """The last step of every run, and notes by family.

    A run that ends before the longest of its family and width counts as diverged if its last loss
    is not finite or above its first; else it is left out as stopped: its loss compares to nothing.
    """
    series = [
        sorted(rows, key=lambda r: r.step) for rows in grouped(runs, lambda r: r.identity).values()
    ]
    end: dict[tuple[str, int], float] = defaultdict(lambda: -math.inf)
    for rows in series:
        last = rows[-1]
        end[last.family, last.width] = max(end[last.family, last.width], last.step)
    kept: list[Run] = []
    stopped: dict[str, list[Run]] = defaultdict(list)
    risen: dict[str, list[Run]] = defaultdict(list)
    for rows in series:
        first, last = rows[0], rows[-1]
        if last.step == end[last.family, last.width]:
            kept.append(last)
        elif not math.isfinite(last.loss) or last.loss > first.loss:
            kept.append(dataclasses.replace(last, loss=math.inf))
            risen[last.family].append(last)
        else:
            stopped[last.family].append(last)
    notes: dict[str, list[str]] = defaultdict(list)
    for family, rows in risen.items():
        notes[family].append(
            f"{len(rows)} run(s) end early with no loss or one above their first, and count as "
            f"diverged (the first: {_shown(rows[0])})"
        )
    for family, rows in stopped.items():
        notes[family].append(
            f"{len(rows)} run(s) end early with a finite loss and are left out as stopped (the "
            f"first: {_shown(rows[0])}); if they diverged, give them a last loss of nan"
        )
    return sorted(kept, key=lambda r: r.row), notes


def profile_out(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Of each (width, hp), the combination of further hyperparameters with the lowest mean loss."""
    combinations = len({run.further for run in runs})
    if combinations < 2:
        return list(runs), []
    kept = []
    for rows in grouped(runs, lambda r: r.cell).values():
        choices = grouped(rows, lambda r: r.further).values()
        kept += min(choices, key=lambda c: sum(r.loss for r in c) / len(c))
    return kept, [
        f"at each width and hyperparameter the best of {combinations} combinations of further "
        "hyperparameters is taken, which favours the lucky ones"
    ]


def confounded(records: Records, roles: Roles, runs: Sequence[Run]) -> dict[str, list[str]]:
    """Notes on further numeric columns that change along a curve."""
    notes: dict[str, list[str]] = defaultdict(list)
    for name, cells in records.columns.items():
        if name in roles.values():
            continue
        values = [number(cells[run.row]) for run in runs]
        distinct = set(values)
        # A hyperparameter takes few values many times; a measured quantity, a new one in each row.
        if None in distinct or len(distinct) > min(len(runs) // 4, 20):
            continue
        for family, rows in grouped(runs, lambda r: r.family).items():
            for width, curve in grouped(rows, lambda r: r.width).items():
                count = len({number(cells[run.row]) for run in curve})
                if count > 1:
                    notes[family].append(
                        f"column {name!r} takes {count} values along the curve of width {width}: "
                        "if it is a hyperparameter, the curve mixes two effects "
                        f"(--fix {name}=VALUE keeps one)"
                    )
                    break
    return notes


def _refuse_repeats(records: Records, roles: Roles, runs: Sequence[Run]) -> None:
    same = grouped(runs, lambda r: (*r.identity, r.step)).values()
    repeats = [rows for rows in same if len(rows) > 1]
    if not repeats:
        return
    first = repeats[0]
    named = ", ".join(records.places[run.row] for run in first[:_ROWS_NAMED])
    if len(first) > _ROWS_NAMED:
        named += f" and {len(first) - _ROWS_NAMED} more"
    what = f"width {first[0].width}, {roles['hp']} {first[0].hp:g}"
    what += f", seed {first[0].seed}" if roles["seed"] else ""
    what += f", step {first[0].step:g}" if roles["step"] else ""
    if first[0].family != "all":
        what = f"{first[0].family}, {what}"
    others = _differing(records, roles, repeats)
    if others:
        other = others[0]
        values = listed(records.columns[other][[run.row for run in first]])
        remedy = (
            f"they differ in {', '.join(map(repr, others))} ({other}: {values}); keep one value "
            f"with --fix {other}=VALUE, or take the best at each width with --profile {other}"
        )
    elif roles["seed"]:
        remedy = "drop the repeats, or give them different seeds"
    else:
        remedy = "if they are seeds, add a column named seed (or name one with --seed)"
    also = f" ({len(repeats) - 1} more runs are repeated as well)" if len(repeats) > 1 else ""
    raise ValueError(f"{records.source!r}: {named} say the same run ({what}){also}: {remedy}.")


def _differing(records: Records, roles: Roles, repeats: Sequence[Sequence[Run]]) -> list[str]:
    """Columns without a role that tell repeats apart and whose values come again."""
    found = []
    rows = [run.row for group in repeats for run in group]
    for name, cells in records.columns.items():
        if name in roles.values():
            continue
        apart = all(len({text(cells[run.row]) for run in group}) > 1 for group in repeats)
        few = len({text(cells[row]) for row in rows}) <= max(len(rows) // 2, 2)
        if apart and few:
            found.append(name)
    return found


def _shown(run: Run) -> str:
    return f"width {run.width}, hyperparameter {run.hp:g}, at step {run.step:g}"
