"""Rows as runs: repeats refused, last steps taken, further hyperparameters profiled out."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mupjax.table.cells import (
    Columns,
    Roles,
    Scale,
    family_labels,
    hp_values,
    listed,
    losses_of,
    merge_rounded,
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
# Of the longest run's steps: who ends there, ends where it does.
_NEARLY = 0.9


@dataclass(frozen=True)
class Run:
    """A row that was read.

    `further` labels the combination of hyperparameters to profile out; `blank`: the cell of the
    loss is empty.
    """

    family: str
    width: int
    hp: float
    further: str
    seed: str
    step: float
    loss: float
    row: int
    blank: bool = False

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
) -> tuple[list[Run], list[str]]:
    """Every row, checked, and notes on what was done to them.

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
            text(records.columns[columns.loss][row]) == "",
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
    values, alike = merge_rounded(np.array([run.hp for run in runs]), scale)
    merged = [dataclasses.replace(run, hp=float(v)) for run, v in zip(runs, values, strict=True)]
    # Both values in one run's place were meant to be two.
    if alike is None or len({(*run.identity, run.step) for run in merged}) < len(runs):
        return runs, []
    return merged, [
        f"values of {columns.hp!r} that differ by rounding alone are taken for one, such as "
        f"{alike[0]:.9g} and {alike[1]:.9g}"
    ]


def last_steps(runs: Sequence[Run]) -> tuple[list[Run], dict[str, list[str]]]:
    """The last step of every run, and notes by family.

    Rows after the last step at which any run of a family has a loss are passed over (training was
    logged there, and nothing evaluated), and so are those shortly after the step at which most runs
    of a width end. A run that ends before that counts as diverged if its last loss is not finite or
    above its first; else it is left out as stopped: its loss compares to nothing.
    """
    notes: dict[str, list[str]] = defaultdict(list)
    kept: list[Run] = []
    for family, rows in grouped(runs, lambda r: r.family).items():
        series, ends, cut = _ends(_evaluated(rows, notes[family]))
        notes[family] += cut
        risen: list[Run] = []
        stopped: list[Run] = []
        for run in series:
            first, last = run[0], run[-1]
            if last.step == ends[last.width]:
                kept.append(last)
            elif not math.isfinite(last.loss) or last.loss > first.loss:
                kept.append(dataclasses.replace(last, loss=math.inf))
                risen.append(last)
            else:
                stopped.append(last)
        if risen:
            notes[family].append(
                f"{len(risen)} run(s) end early with no loss or one above their first, and count "
                f"as diverged (the first: {_shown(risen[0])})"
            )
        if stopped:
            notes[family].append(
                f"{len(stopped)} run(s) end early with a finite loss and are left out as stopped "
                f"(the first: {_shown(stopped[0])}); if they diverged, give them a last loss of nan"
            )
        if len(set(ends.values())) > 1:
            said = ", ".join(f"{width}: {step:g}" for width, step in sorted(ends.items()))
            notes[family].append(
                f"widths end at different steps ({said}): where that is not meant, the losses of "
                "shorter trainings are higher, and rates are of that too"
            )
    return sorted(kept, key=lambda r: r.row), notes


def _evaluated(runs: Sequence[Run], notes: list[str]) -> Sequence[Run]:
    """Without what comes after the last evaluation, where the cells of the loss are empty.

    An evaluation is a step at which most runs of a width have a loss: where runs come to have none
    one after another, they diverged.
    """
    last: dict[int, float] = {}
    for width, rows in grouped(runs, lambda r: r.width).items():
        finite = Counter(run.step for run in rows if math.isfinite(run.loss))
        if not finite:
            return runs
        last[width] = max(finite)
        count = len({run.identity for run in rows})
        beyond = [run for run in rows if run.step > last[width]]
        if not beyond or not all(run.blank for run in beyond) or 2 * finite[last[width]] <= count:
            return runs
    said = ", ".join(sorted({f"{step:g}" for step in last.values()}))
    kept = [run for run in runs if run.step <= last[run.width]]
    notes.append(
        f"no run has a loss after step {said}: the {len(runs) - len(kept)} rows after it are "
        "passed over"
    )
    return kept


def _ends(runs: Sequence[Run]) -> tuple[list[list[Run]], dict[int, float], list[str]]:
    """Rows by run, in the order of steps; the step at which a width's runs end; and a note."""
    series = [
        sorted(rows, key=lambda r: r.step) for rows in grouped(runs, lambda r: r.identity).values()
    ]
    ends: dict[int, float] = {}
    longer = []
    for width, ending in grouped([rows[-1] for rows in series], lambda r: r.width).items():
        ends[width] = max(run.step for run in ending)
        # Those that diverged may all have been stopped there.
        finite = [run for run in ending if math.isfinite(run.loss)]
        counts = Counter(run.step for run in finite)
        usual, most = max(counts.items(), key=lambda item: (item[1], item[0]), default=(0.0, 0))
        # A few runs that log a little more; where most are stopped early, it is the few that count.
        if _NEARLY * ends[width] <= usual < ends[width] and 2 * most > len(finite):
            ends[width] = usual
            longer += [run for run in ending if run.step > usual]
    if not longer:
        return series, ends, []
    first = longer[0]
    note = (
        f"{len(longer)} run(s) go on after step {ends[first.width]:g}, where most runs of their "
        f"width end, and are read there or at their next step (the first: {_shown(first)})"
    )
    return [_until(rows, ends[rows[0].width]) for rows in series], ends, [note]


def _until(rows: list[Run], end: float) -> list[Run]:
    """Of a run, in the order of steps, what counts if it ends there; its next row if none is."""
    before = [run for run in rows if run.step <= end]
    if len(before) == len(rows) or (before and before[-1].step == end):
        return before
    return [*before, dataclasses.replace(rows[len(before)], step=end)]


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


def confounded(
    records: Records, roles: Roles, runs: Sequence[Run], profile: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Notes on further columns, of numbers or text, that change along a curve.

    Empty cells say nothing, and diverged runs may differ in what came of them.
    """
    notes: dict[str, list[str]] = defaultdict(list)
    finite = [run for run in runs if math.isfinite(run.loss)]
    for name, cells in records.columns.items():
        if name in roles.values() or name in profile:
            continue
        values = {run.row: _label(cells[run.row]) for run in finite}
        distinct = set(values.values()) - {""}
        # A hyperparameter takes few values many times; a measured quantity, a new one in each row,
        # and of names (hosts, dates) there are several.
        named = any(number(value) is None for value in distinct)
        if not 1 < len(distinct) <= min(len(finite) // 4, 5 if named else 20):
            continue
        for family, rows in grouped(finite, lambda r: r.family).items():
            for width, curve in grouped(rows, lambda r: r.width).items():
                pairs = {(run.hp, values[run.row]) for run in curve if values[run.row]}
                found = {value for _, value in pairs}
                # One value for each of the hyperparameter, and no two alike: another name for it.
                if len(found) < 2 or len(pairs) == len(found) == len({hp for hp, _ in pairs}):
                    continue
                some = sorted(found)[:_ROWS_NAMED]
                said = ", ".join(some) + (", ..." if len(found) > len(some) else "")
                notes[family].append(
                    f"column {name!r} takes {len(found)} values ({said}) along the curve of width "
                    f"{width}: if it is a hyperparameter or tells how a run ended, the curve mixes "
                    f"two effects (--fix {name}=VALUE keeps one)"
                )
                break
    return notes


def _label(cell: Any) -> str:
    """Of a cell, whichever way a number is spelt; empty where it says nothing."""
    value = number(cell)
    if value is None:
        return text(cell)
    return "" if math.isnan(value) else f"{value:.12g}"


# What else a column of repeats may be, by what its name holds.
_MAY_BE = {"seed": "seed", "step": "step", "epoch": "step", "iter": "step", "optim": "optimizer"}


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
    what += f", seed {first[0].seed}" if first[0].seed else ""
    what += f", step {first[0].step:g}" if roles["step"] else ""
    if first[0].family != "all":
        what = f"{first[0].family}, {what}"
    others = _differing(records, roles, repeats)
    if others:
        other = others[0]
        values = listed(records.columns[other][[run.row for run in first]])
        role = next(
            (r for part, r in _MAY_BE.items() if part in other.lower() and not roles[r]), None
        )
        named_so = f"if that is the {role}, say --{role} {other}; else " if role else ""
        remedy = (
            f"they differ in {', '.join(map(repr, others))} ({other}: {values}); {named_so}keep "
            f"one value with --fix {other}=VALUE, or take the best at each width with --profile "
            f"{other}"
        )
    elif all(
        len({text(cells[run.row]) for run in first}) == 1 for cells in records.columns.values()
    ):
        remedy = "they are the same in every column: drop all but one"
    elif roles["seed"]:
        remedy = (
            "drop all but one, or correct the seeds where they are runs of different ones"
            if first[0].seed
            else f"column {roles['seed']!r} is empty there: fill it"
        )
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
