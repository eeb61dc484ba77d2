"""From a file to named columns. Every row remembers where in the file it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import xarray as xr
from numpy.typing import NDArray

from mupjax import results

__all__ = ["Records", "read_records"]

_DELIMITERS = (",", "\t", ";")


@dataclass(frozen=True)
class Records:
    """A table as it was read.

    Attributes:
      source: the file, for messages.
      columns: by name, each an object array of one cell a row: text from CSV, else numbers, text or
        None.
      places: of each row, as said to the reader: `line 17`.
    """

    source: str
    columns: Mapping[str, NDArray[np.object_]]
    places: tuple[str, ...]


def read_records(path: Path) -> Records:
    """Read a table in the format that the file's ending names.

    `.csv`, `.tsv`: a header, then rows; the delimiter is the first of comma, tab and semicolon that
    the header holds. `.parquet`. `.jsonl`, `.ndjson`: an object a line; `.json`: the same, or an
    array of objects. `.nc`, `.zarr`: xarray datasets, either with one dimension (tidy), or a grid
    whose dimensions become columns, where NaN is a loss that diverged and not a missing cell; a
    dataset of `mupjax.sweep` keeps its losses, diverged ones being infinite.

    Raises:
      FileNotFoundError: there is nothing at the path.
      ValueError: the ending is unknown, the file is not of that format, or it has no rows; the
        message names the line.
    """
    readers: dict[str, Callable[[Path], Records]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_json,
        ".ndjson": _read_json,
        ".json": _read_json,
        ".nc": _read_dataset,
        ".zarr": _read_dataset,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{str(path)!r} ends in {path.suffix!r}, which names no format of a table; known are "
            f"{', '.join(readers)}."
        )
    if not path.exists():
        raise FileNotFoundError(f"there is no table at {str(path)!r}.")
    if path.is_dir() and path.suffix.lower() != ".zarr":
        raise ValueError(f"{str(path)!r} is a folder, not a table.")
    try:
        records = reader(path)
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    if not records.places:
        raise ValueError(f"{str(path)!r} has no rows.")
    return records


def _read_csv(path: Path) -> Records:
    # utf-8-sig: spreadsheets begin a file with a byte order mark.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: {error}.") from None
    first = text.partition("\n")[0]
    if not first.strip():
        raise ValueError(f"{str(path)!r} has no header in its first line.")
    delimiter = next((mark for mark in _DELIMITERS if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    places: list[str] = []
    try:
        header = [name.strip() for name in next(reader)]
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{str(path)!r}, line {reader.line_num}: {len(row)} cells, but the header "
                    f"names {len(header)} columns."
                )
            rows.append([cell.strip() for cell in row])
            places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.line_num}: {error}.") from None
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise ValueError(f"{str(path)!r} has two columns named {doubled[0]!r}; rename one.")
    cells = np.array(rows, dtype=object).reshape(len(rows), len(header))
    return Records(str(path), dict(zip(header, cells.T, strict=True)), tuple(places))


def _read_json(path: Path) -> Records:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: {error}.") from None
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            entries = [(f"entry {i}", entry) for i, entry in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r}, line {error.lineno}: {error.msg}.") from None
        except RecursionError:
            raise ValueError(f"{str(path)!r} nests too deeply to be a table.") from None
    else:
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entries.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path)!r}, line {number}: {error.msg}.") from None
            except RecursionError:
                raise ValueError(
                    f"{str(path)!r}, line {number} nests too deeply to be a row."
                ) from None
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(
                f"{str(path)!r}, {place}: expected an object such as "
                f'{{"width": 64, "lr": 0.01, "loss": 2.3}}, got {json.dumps(entry)[:40]}.'
            )
    names = dict.fromkeys(str(name) for _, entry in entries for name in entry)
    return Records(
        str(path),
        {name: _objects(entry.get(name) for _, entry in entries) for name in names},
        tuple(place for place, _ in entries),
    )


def _read_parquet(path: Path) -> Records:
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no Parquet file: {error}.") from None
    return _from_frame(path, frame, "row")


def _read_dataset(path: Path) -> Records:
    try:
        if path.suffix.lower() == ".zarr":
            opened = xr.open_zarr(path, consolidated=False)
        else:
            opened = xr.open_dataset(path, engine="h5netcdf")
        with opened:
            dataset = opened.load()
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no dataset that xarray reads: {error}.") from None
    if dataset.attrs.get("format") == results.FORMAT:
        dataset = _own_losses(path, dataset)
    widest = max((v.dims for v in dataset.data_vars.values()), key=len, default=())
    if not widest:
        raise ValueError(f"{str(path)!r} holds no variable with a dimension.")
    # What lies along further dimensions (curves over steps of another grid) is no column of this.
    columns = dataset[[n for n, v in dataset.data_vars.items() if set(v.dims) <= set(widest)]]
    if len(widest) > 1:
        # Seeds alone need no labels; an index in place of a width would be taken for one.
        bare = [d for d in columns.dims if d not in columns.coords and d != "seed"]
        if bare:
            raise ValueError(
                f"{str(path)!r}: dimension {str(bare[0])!r} has no coordinate, so its values are "
                "not known; assign one."
            )
    frame = columns.to_dataframe()
    return _from_frame(path, frame, "entry")


def _own_losses(path: Path, dataset: xr.Dataset) -> xr.Dataset:
    if "loss" not in dataset or "status" not in dataset:
        raise ValueError(f"{str(path)!r} holds no final losses: it is not the result of a sweep.")
    loss = dataset["loss"].where(dataset["status"] == 0, np.inf)
    if "parametrization" not in loss.dims:
        configuration = results.configuration_of(dataset)
        loss = loss.expand_dims(parametrization=[configuration["parametrizations"][0]["name"]])
    return loss.to_dataset(name="loss")


def _from_frame(path: Path, frame: pd.DataFrame, kind: str) -> Records:
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    return Records(
        str(path),
        # NaN, NaT and pandas.NA all become None.
        {
            str(name): _objects(frame[name].astype(object).where(frame[name].notna(), None))
            for name in frame.columns
        },
        tuple(f"{kind} {i}" for i in range(1, len(frame) + 1)),
    )


def _objects(cells: Iterable[Any]) -> NDArray[np.object_]:
    listed = list(cells)
    column = np.empty(len(listed), dtype=object)
    column[:] = listed
    return column
