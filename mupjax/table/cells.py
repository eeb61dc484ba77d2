"""Cells of a table as checked values: which column is what, and what its cells say."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mupjax.table.records import Records
from theory.curves import to_scale

__all__ = [
    "Columns",
    "Roles",
    "Scale",
    "family_labels",
    "hp_values",
    "keep_rows",
    "listed",
    "losses_of",
    "merge_rounded",
    "number",
    "numbers",
    "resolve_columns",
    "text",
    "text_labels",
    "widths_of",
]

Scale = Literal["log2", "linear", "momentum"]
Roles = Mapping[str, str | None]
"""The column of hp, loss, width, param, seed, step, optimizer; None where there is none."""

# How loggers write a loss that is not there; compared in lower case.
_DIVERGED = ("", "nan", "inf", "-inf", "+inf", "infinity", "-infinity", "none", "null", "na", "n/a")
# Two spellings of one value (0.003 in single precision, six digits in a file) differ by less.
_SAME_VALUE = 1e-6
_LONGEST_SHOWN = 60
# In octaves: two digits, as few as anybody rounds a learning rate to, are off by less.
_ROUNDED = 0.05


@dataclass(frozen=True)
class Columns:
    """Which column holds what. `None` means the usual name, if the table has it.

    Attributes:
      hp: the hyperparameter in question.
      loss, width: final loss and width.
      param: parametrization (usually `param` or `parametrization`), one curve family each.
      seed, step, optimizer: usually of these names.
    """

    hp: str
    loss: str = "loss"
    width: str = "width"
    param: str | None = None
    seed: str | None = None
    step: str | None = None
    optimizer: str | None = None


def resolve_columns(
    records: Records, columns: Columns, fix: Mapping[str, str], profile: Sequence[str]
) -> Roles:
    """The column of every role, or an error that lists what there is."""
    asked = {"--hp": columns.hp, "--loss": columns.loss, "--width": columns.width}
    usual = {
        "param": ("param", "parametrization"),
        "seed": ("seed",),
        "step": ("step",),
        "optimizer": ("optimizer",),
    }
    roles: dict[str, str | None] = {}
    for role, names in usual.items():
        given = getattr(columns, role)
        if given is not None:
            asked[f"--{role}"] = given
        taken = (*asked.values(), *profile)
        roles[role] = given or next(
            (n for n in names if n in records.columns and n not in taken), None
        )
    for option, name in (
        *asked.items(),
        *(("--fix", name) for name in fix),
        *(("--profile", name) for name in profile),
    ):
        if name not in records.columns:
            near = difflib.get_close_matches(name, records.columns, n=1, cutoff=0.5)
            near = near or [c for c in records.columns if c.lower() == name.lower()]
            # As loggers nest them: config.lr, summary/loss.
            ends = (f".{name.lower()}", f"/{name.lower()}")
            near = [c for c in records.columns if c.lower().endswith(ends)] or near
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{records.source!r} has no column {name!r} ({option}); its columns are "
                f"{', '.join(map(repr, records.columns))}.{hint} Name another with {option}."
            )
    used = [*asked.values(), *profile]
    doubled = sorted({name for name in used if used.count(name) > 1})
    if doubled:
        raise ValueError(f"column {doubled[0]!r} is given two roles; each needs its own.")
    return roles | {"hp": columns.hp, "loss": columns.loss, "width": columns.width}


def keep_rows(records: Records, fix: Mapping[str, str]) -> Records:
    """The rows that have the given value in every given column."""
    kept = np.ones(len(records.places), dtype=bool)
    for name, wanted in fix.items():
        cells = records.columns[name]
        match = np.array([_equals(cell, wanted) for cell in cells])
        if not match.any():
            raise ValueError(
                f"no row has {name}={wanted} (--fix); column {name!r} holds {listed(cells)}."
            )
        kept &= match
    if not kept.any():
        raise ValueError(f"no row has all of {dict(fix)} (--fix).")
    return Records(
        records.source,
        {name: cells[kept] for name, cells in records.columns.items()},
        tuple(place for place, keep in zip(records.places, kept, strict=True) if keep),
    )


def family_labels(records: Records, roles: Roles) -> NDArray[np.object_]:
    """Parametrization and, where there are several, optimizer of each row; `all` without them."""
    parts = []
    for role in ("param", "optimizer"):
        if column := roles[role]:
            cells = np.array([text(cell) for cell in records.columns[column]], dtype=object)
            for i in np.flatnonzero(cells == ""):
                raise ValueError(f"{_where(records, int(i), column)} is empty.")
            # One optimizer in the whole table says nothing that tells curves apart.
            if role == "param" or len(set(cells)) > 1:
                parts.append(cells)
    if not parts:
        return np.full(len(records.places), "all", dtype=object)
    return np.array([", ".join(labels) for labels in zip(*parts, strict=True)], dtype=object)


def widths_of(records: Records, column: str) -> NDArray[np.int64]:
    """Widths, shape (rows,); a ValueError names a row that has none."""
    values = numbers(records, column, "widths")
    # Beyond 2^53 floats skip whole numbers.
    for i in np.flatnonzero((values < 1) | (values > 2.0**53) | (values != np.round(values))):
        raise ValueError(
            f"{_where(records, int(i), column)} is {_shown(records, int(i), column)}; widths are "
            "positive whole numbers (up to 2^53)."
        )
    return values.astype(np.int64)


def hp_values(records: Records, column: str, scale: Scale) -> NDArray[np.float64]:
    """The hyperparameter, shape (rows,), spellings merged; a ValueError names a row without."""
    values = numbers(records, column, "hyperparameters")
    bad, remedy = np.zeros(values.shape, dtype=bool), ""
    if scale == "log2":
        bad, remedy = values <= 0, "the log2 scale needs values above 0 (--scale linear takes all)"
    elif scale == "momentum":
        bad, remedy = (values < 0) | (values >= 1), "the momentum scale needs values in [0, 1)"
    for i in np.flatnonzero(bad):
        raise ValueError(
            f"{_where(records, int(i), column)} is {_shown(records, int(i), column)}; {remedy}."
        )
    return _merge_spellings(values)


def losses_of(records: Records, column: str) -> NDArray[np.float64]:
    """Losses, shape (rows,), infinite where a run diverged; a ValueError names other cells."""
    values = np.empty(len(records.places))
    for i, cell in enumerate(records.columns[column]):
        value = math.inf if text(cell).lower() in _DIVERGED else number(cell)
        if value is None:
            raise ValueError(
                f"{_where(records, i, column)} is {_cut(cell)}, not a number; a run that diverged "
                "has nan, inf or nothing there."
            )
        values[i] = value if math.isfinite(value) else math.inf
    if not np.isfinite(values).any():
        raise ValueError(f"column {column!r} of {records.source!r} holds no finite loss.")
    return values


def numbers(records: Records, column: str, what: str) -> NDArray[np.float64]:
    """Finite numbers, shape (rows,); a ValueError names the first cell that is none."""
    values = np.empty(len(records.places))
    for i, cell in enumerate(records.columns[column]):
        value = number(cell)
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"{_where(records, i, column)} is {_cut(cell)}; {what} are finite numbers, written "
                "as 1024 or 1e-3 (leave other rows out, or keep some with --fix COLUMN=VALUE)."
            )
        values[i] = value
    return values


def text_labels(records: Records, column: str | None) -> NDArray[np.object_]:
    """Cells as text, shape (rows,); empty without a column."""
    if column is None:
        return np.full(len(records.places), "", dtype=object)
    return np.array([text(cell) for cell in records.columns[column]], dtype=object)


def _merge_spellings(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that are one but for rounding become the first of them."""
    distinct, inverse = np.unique(values, return_inverse=True)
    apart = np.diff(distinct) > _SAME_VALUE * np.abs(distinct[1:])
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    group = np.concatenate([[0], np.cumsum(apart)])
    return distinct[first][group][inverse]


def merge_rounded(
    values: NDArray[np.float64], scale: Scale
) -> tuple[NDArray[np.float64], tuple[float, float] | None]:
    """Values that one launcher rounds and another does not, as one: 0.000244 and 0.00024414.

    Values are taken for one where they lie within a twentieth of an octave and the grid's own steps
    are at least ten times as large. The most exact spelling, the one with most digits, stands for
    all.

    Args:
      values: as of `hp_values`, shape (rows,).
      scale: on which they are compared; on the linear one nothing is merged.

    Returns:
      the values, and two that were taken for one, if any were.
    """
    distinct, inverse = np.unique(values, return_inverse=True)
    if scale == "linear" or distinct.size < 3:
        return values, None
    octaves = to_scale(distinct, scale)
    steps = np.diff(octaves)
    close = steps < _ROUNDED
    if not close.any() or close.all() or steps[close].max() > steps[~close].min() / 10:
        return values, None
    groups = np.split(np.arange(distinct.size), np.flatnonzero(~close) + 1)
    # Wider, it is a part of the grid that was refined.
    if any(octaves[g[-1]] - octaves[g[0]] >= _ROUNDED for g in groups):
        return values, None
    exact = [max(distinct[g], key=lambda value: len(f"{value:.9g}")) for g in groups]
    kept = np.repeat(exact, [g.size for g in groups])
    at = int(np.flatnonzero(close)[0])
    return kept[inverse], (float(distinct[at]), float(distinct[at + 1]))


def number(cell: Any) -> float | None:
    """The cell as a float, or None."""
    if isinstance(cell, bool | np.bool_) or cell is None:
        return None
    # Python takes 6_4 for 64.
    if isinstance(cell, str) and "_" in cell:
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def text(cell: Any) -> str:
    """The cell as text: a whole number as an integer."""
    if cell is None:
        return ""
    # 1 and 1.0 are one label: a column with a gap is read as floats.
    if isinstance(cell, float | np.floating) and float(cell).is_integer():
        return str(int(cell))
    return str(cell).strip()


def _equals(cell: Any, wanted: str) -> bool:
    value, target = number(cell), number(wanted)
    if value is not None and target is not None:
        return math.isclose(value, target, rel_tol=_SAME_VALUE)
    return text(cell) == wanted


def listed(cells: NDArray[np.object_]) -> str:
    """The first few distinct cells, for a message."""
    distinct = list(dict.fromkeys(text(cell) for cell in cells))
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")


def _cut(cell: Any) -> str:
    shown = repr(cell)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."


def _where(records: Records, row: int, column: str) -> str:
    return f"{records.source!r}, {records.places[row]}: {column!r}"


def _shown(records: Records, row: int, column: str) -> str:
    return text(records.columns[column][row])
