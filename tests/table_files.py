"""A small table of runs, its files in every format, and what is read of them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from mupjax.table import Columns, arrange_sweeps, read_records

WIDTHS, LRS, SEEDS = [32, 64, 128], [0.001, 0.002, 0.004, 0.008], [0, 1]


def frame():
    rng = np.random.default_rng(0)
    rows = [
        {"param": p, "width": n, "lr": lr, "seed": s, "loss": round(float(rng.uniform(1, 3)), 6)}
        for p in ("sp", "mup")
        for n in WIDTHS
        for lr in LRS
        for s in SEEDS
    ]
    rows[3]["loss"] = math.nan
    rows[7]["loss"] = math.inf
    return pd.DataFrame(rows)


def expected(data, name):
    losses = data[data["param"] == name]["loss"].to_numpy().reshape(3, 4, 2)
    return np.where(np.isfinite(losses), losses, np.inf)


def write(data, path):
    if path.suffix == ".csv":
        data.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        data.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in data.to_dict("records")]
        path.write_text("\n".join(lines) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(data.to_dict("records")))
    else:
        tidy = xr.Dataset.from_dataframe(data.astype({"param": str}))
        tidy["param"] = ("index", data["param"].to_numpy(dtype="U3"))
        if path.suffix == ".nc":
            tidy.to_netcdf(path, engine="h5netcdf")
        else:
            tidy.to_zarr(path, zarr_format=2, consolidated=False)
    return path


def read(path, columns=None, **options):
    return arrange_sweeps(read_records(path), columns or Columns("lr"), **options)


def refused(path, *parts, columns=None, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the parts are the match)
        read(path, columns, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
