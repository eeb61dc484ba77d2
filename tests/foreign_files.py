"""What may lie where a sweep is to be written, and is no result of one."""

import numpy as np
import xarray as xr


def text_file(path):
    path.write_text("notes")


def folder_with_a_file(path):
    path.mkdir()
    (path / "notes.txt").write_text("notes")


def foreign_dataset(path):
    foreign = xr.Dataset({"x": ("t", np.arange(3.0))}, attrs={"title": "not ours"})
    if path.suffix == ".nc":
        foreign.to_netcdf(path, engine="h5netcdf")
    else:
        foreign.to_zarr(path, consolidated=False)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
