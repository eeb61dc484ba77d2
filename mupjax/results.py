"""Results of sweeps as labelled datasets: built, saved (Zarr or netCDF), loaded, identified."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

__all__ = ["configuration_of", "load", "save"]

FORMAT = "mupjax sweep"
"""Value of the attribute ``format`` that marks a dataset as ours."""

Existing = Literal["error", "replace", "resume"]


def versions() -> dict[str, str]:
    """Versions of this package and of what numbers depend on."""
    names = ("mupjax", "jax", "jaxlib", "flax", "optax", "numpy", "xarray")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def fingerprint(record: Any) -> str:
    """Hash of a JSON-ready record (16 hexadecimal digits)."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def with_parametrizations(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with a dimension ``parametrization``, which a sweep of a single one lacks."""
    if "parametrization" in dataset.dims:
        return dataset
    if "parametrization" in dataset.coords:
        return dataset.expand_dims("parametrization")
    listed = json.loads(dataset.attrs["configuration"])["parametrizations"]
    return dataset.expand_dims(parametrization=[one["name"] for one in listed])


def configuration_of(dataset: xr.Dataset) -> dict[str, Any]:
    """The configuration a dataset was made with.

    Raises:
      ValueError: the dataset is no result of :func:`mupjax.sweep`.
    """
    if dataset.attrs.get("format") != FORMAT:
        raise ValueError(
            "this dataset was not written by mupjax.sweep (its attribute 'format' is "
            f"{dataset.attrs.get('format')!r}, not {FORMAT!r})."
        )
    return json.loads(dataset.attrs["configuration"])


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if its ending names a format.

    Raises:
      ValueError: the ending is neither ``.zarr`` nor ``.nc``.
    """
    path = Path(path)
    if path.suffix not in (".zarr", ".nc"):
        raise ValueError(
            f"the output path {str(path)!r} must end in .zarr or .nc, which names its format."
        )
    return path


def check_output(path: str | os.PathLike[str], existing: Existing) -> Path:
    """Make sure that an output path may be written, before anything is computed.

    Raises:
      TypeError, ValueError: it is no path, its ending is unknown, or ``existing`` is.
      FileExistsError: there is something else, or an earlier sweep (whole or interrupted) and
        ``existing="error"``.
      PermissionError: nothing can be written there.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"out must be a path ending in .zarr or .nc, got {path!r}.")
    path = check_path(path)
    if existing not in ("error", "replace", "resume"):
        raise ValueError(f"existing must be 'error', 'replace' or 'resume', got {existing!r}.")
    _check_writable(path)
    if path.exists():
        try:
            load(path)
        except Exception as error:
            raise FileExistsError(
                f"{str(path)!r} exists and is no result of a sweep: choose another output path."
            ) from error
    parts = parts_folder(path)
    if parts.exists() and not (parts.is_dir() and all(map(_is_part, parts.iterdir()))):
        raise FileExistsError(
            f"{str(parts)!r}, where finished widths would be kept, holds something else: choose "
            "another output path."
        )
    if existing == "error" and (path.exists() or parts.exists()):
        state = "an earlier sweep" if path.exists() else "an interrupted sweep"
        raise FileExistsError(
            f"{str(path)!r} holds {state}: choose another path, or say existing='replace' to "
            "overwrite it or existing='resume' to complete it."
        )
    return path


def _check_writable(path: Path) -> None:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise FileExistsError(f"{str(parent)!r} is a file, so {str(path)!r} cannot be written.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"{str(path)!r} cannot be written: {parent} takes no files ({error.strerror}). Choose "
            "another output path."
        ) from error


def _is_part(path: Path) -> bool:
    return re.fullmatch(r"\.?width-\d{7}(\.draft-\d+)?\.nc", path.name) is not None


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a dataset, whole or not at all: to a neighbouring name first, then moved into place.

    Args:
      dataset: what to write.
      path: ends in ``.zarr`` (a folder) or ``.nc`` (one netCDF-4 file); replaced if it exists.
    """
    path = check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft-{os.getpid()}{path.suffix}")
    remove(draft)
    try:
        if path.suffix == ".zarr":
            # Version 3 of the format has no settled way to store text yet.
            dataset.to_zarr(draft, mode="w", consolidated=False, zarr_format=2)
        else:
            dataset.to_netcdf(draft, engine="h5netcdf")
        if path.is_dir():
            remove(path)
        draft.replace(path)
    finally:
        remove(draft)
    return path


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a dataset written by :func:`save` wholly into memory.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it is no result of a sweep.
    """
    path = check_path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no result at {str(path)!r}.")
    if path.suffix == ".zarr":
        opened = xr.open_zarr(path, consolidated=False)
    else:
        # Foreign HDF5 may have no named dimensions: that is found out below, without a warning.
        opened = xr.open_dataset(path, engine="h5netcdf", phony_dims="access")
    with opened:
        dataset = opened.load()
    configuration_of(dataset)
    return dataset


def free_path(path: Path) -> Path:
    """The path with the least number after its stem under which there is nothing yet."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))
    return next(other for other in numbered if not other.exists())


def parts_folder(path: Path) -> Path:
    """Where the finished widths of a running sweep are kept."""
    return path.with_name(path.name + ".parts")


def part_path(path: Path, width: int) -> Path:
    """File of one finished width."""
    return parts_folder(path) / f"width-{width:07d}.nc"


def load_part(path: Path, width: int, configuration: Mapping[str, Any]) -> xr.Dataset | None:
    """One finished width of an interrupted sweep, or ``None`` if it has to be run.

    Raises:
      ValueError: it was run with another parametrization or another configuration, or is damaged.
    """
    source = part_path(path, width)
    if not source.exists():
        return None
    try:
        part = load(source)
    except Exception as error:
        raise ValueError(
            f"{str(source)!r}, where width {width} of an interrupted sweep was kept, cannot be "
            f"read ({error}): delete it, and that width is run again."
        ) from error
    check_same(
        path, f"width {width}", configuration, configuration_of(part), ("widths", "parameters")
    )
    return part


def finished_widths(path: Path, configuration: Mapping[str, Any]) -> dict[int, xr.Dataset]:
    """Of a finished sweep, every width by itself.

    Raises:
      ValueError: it was run with another parametrization or configuration, or has further widths
        than are asked for, which would be lost.
    """
    whole = load(path)
    theirs = configuration_of(whole)
    widths = theirs["widths"]
    added = set(widths) <= set(configuration["widths"])
    but = ("widths", "parameters") if added else ()
    check_same(path, "the finished sweep", configuration, theirs, but)
    return {width: whole.sel(width=[width]) for width in widths}


def check_same(
    path: Path,
    what: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    except_for: Sequence[str] = (),
) -> None:
    """Refuse to take up what was run otherwise.

    Raises:
      ValueError: the configurations differ; the text says in what.
    """
    ours, theirs = _comparable(ours, except_for), _comparable(theirs, except_for)
    # Only sweeps with an output path compute their first losses.
    known = (ours.keys() | theirs.keys()) - ({"first_losses"} - (ours.keys() & theirs.keys()))
    differing = sorted(k for k in known if ours.get(k) != theirs.get(k))
    if "parametrizations" in differing:
        raise ValueError(
            f"cannot resume {str(path)!r}: {what} was trained with another parametrization "
            f"({_names(theirs)}, not {_names(ours)}). Use the same one, or say existing='replace'."
        )
    if differing:
        raise ValueError(
            f"cannot resume {str(path)!r}: {what} was run with another configuration (differing: "
            f"{', '.join(differing)}). Use the same one, or say existing='replace'."
        )


def _names(configuration: Mapping[str, Any]) -> str:
    listed = configuration["parametrizations"]
    return ", ".join(f"{p['name']} [{fingerprint(p)}]" for p in listed)


def _comparable(configuration: Mapping[str, Any], except_for: Sequence[str]) -> dict[str, Any]:
    record = json.loads(json.dumps(configuration))
    return {k: v for k, v in record.items() if k not in except_for}


def assemble(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, tuple[Sequence[Any] | np.ndarray, Mapping[str, str]]],
    attrs: Mapping[str, Mapping[str, Any]],
    global_attrs: Mapping[str, Any],
) -> xr.Dataset:
    """A dataset from arrays, the names of their axes, coordinates and attributes."""
    used = {d for names in dims.values() for d in names}
    return xr.Dataset(
        {name: (tuple(dims[name]), array, attrs.get(name, {})) for name, array in values.items()},
        coords={
            name: (name, np.asarray(c), dict(a)) for name, (c, a) in coords.items() if name in used
        },
        attrs=dict(global_attrs),
    )
