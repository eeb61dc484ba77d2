"""Tables of sweeps: every format gives the same arrays; what is bad is named by row or column."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from mupjax.table import Columns, read_records
from table_files import LRS, WIDTHS, expected, frame, read, refused, write


@pytest.mark.parametrize(
    "name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl", "t.json", "t.nc", "t.zarr"]
)
def test_every_format_gives_the_same_arrays(tmp_path, name):
    data = frame()
    tables = read(write(data, tmp_path / name))
    assert list(tables) == ["sp", "mup"]
    for label, table in tables.items():
        assert table.widths == (32, 64, 128)
        np.testing.assert_array_equal(table.hp_values, LRS)
        np.testing.assert_array_equal(table.losses, expected(data, label))
        assert table.observed.all()
        assert table.notes == ()


def test_rows_come_in_any_order(tmp_path):
    data = frame()
    mixed = read(write(data.sample(frac=1, random_state=1), tmp_path / "t.csv"))
    for label in ("sp", "mup"):
        np.testing.assert_array_equal(mixed[label].losses, expected(data, label))


def test_gridded_datasets_keep_their_dimensions_as_columns(tmp_path):
    losses = np.arange(24.0).reshape(3, 4, 2)
    losses[0, 0, 0] = np.nan
    grid = xr.Dataset(
        {"val": (("width", "lr", "seed"), losses), "extra": ("other", np.zeros(7))},
        coords={"width": WIDTHS, "lr": LRS},
    )
    for name in ("g.nc", "g.zarr"):
        path = tmp_path / name
        if name == "g.nc":
            grid.to_netcdf(path, engine="h5netcdf")
        else:
            grid.to_zarr(path, zarr_format=2, consolidated=False)
        table = read(path, Columns("lr", loss="val"))["all"]
        np.testing.assert_array_equal(table.losses, np.where(np.isnan(losses), np.inf, losses))
    bare = tmp_path / "bare.nc"
    grid.drop_vars("width").to_netcdf(bare, engine="h5netcdf")
    refused(bare, "dimension 'width' has no coordinate", columns=Columns("lr", loss="val"))


def test_own_sweeps_are_read_with_their_status(tmp_path):
    losses = np.random.default_rng(0).uniform(1, 2, (2, 3, 4, 2))
    status = np.zeros(losses.shape, np.int8)
    status[1, 2, 3, 0] = 1
    dims = ("parametrization", "width", "learning_rate", "seed")
    dataset = xr.Dataset(
        {"loss": (dims, losses), "status": (dims, status), "curve": (("step",), np.zeros(5))},
        coords={"parametrization": ["SP", "muP"], "width": WIDTHS, "learning_rate": LRS},
        attrs={"format": "mupjax sweep", "configuration": "{}"},
    )
    dataset.to_netcdf(tmp_path / "sweep.nc", engine="h5netcdf")
    tables = read(tmp_path / "sweep.nc", Columns("learning_rate"))
    np.testing.assert_array_equal(tables["SP"].losses, losses[0])
    assert tables["muP"].losses[2, 3, 0] == np.inf
    single = dataset.isel(parametrization=0, drop=True)
    single.attrs["configuration"] = json.dumps({"parametrizations": [{"name": "mine"}]})
    single.to_netcdf(tmp_path / "single.nc", engine="h5netcdf")
    assert list(read(tmp_path / "single.nc", Columns("learning_rate"))) == ["mine"]


def test_missing_cells_are_not_divergences(tmp_path):
    data = frame()
    gone = (data["width"] == 64) & (data["lr"] == 0.008) & (data["param"] == "sp")
    table = read(write(data[~gone], tmp_path / "t.csv"))["sp"]
    assert not table.observed[1, 3].any()
    assert np.isnan(table.losses[1, 3]).all()
    assert table.observed.sum() == 22


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "inf", "-inf", "None", "null", "N/A"])
def test_what_diverged_may_be_written_in_many_ways(tmp_path, cell):
    path = write(frame(), tmp_path / "t.csv")
    lines = path.read_text().splitlines()
    lines[5] = f"sp,32,0.004,0,{cell}"
    path.write_text("\n".join(lines))
    assert read(path)["sp"].losses[0, 2, 0] == np.inf


def test_columns_with_pandas_own_types(tmp_path):
    """Categories, nullable integers and floats, a named index."""
    data = frame()
    data["loss"] = data["loss"].replace(np.inf, np.nan).astype("Float64")
    data = data.astype({"param": "category", "width": "Int64", "seed": "Int64"})
    tables = read(write(data.set_index(["param", "width"]), tmp_path / "t.parquet"))
    for name, table in tables.items():
        np.testing.assert_array_equal(table.losses, expected(frame(), name))


def test_columns_can_be_mapped(tmp_path):
    data = frame().rename(
        columns={"param": "scheme", "width": "d_model", "lr": "eta", "seed": "run", "loss": "nll"}
    )
    columns = Columns("eta", loss="nll", width="d_model", param="scheme", seed="run")
    tables = read(write(data, tmp_path / "t.csv"), columns)
    np.testing.assert_array_equal(tables["mup"].losses, expected(frame(), "mup"))
    assert (tables["mup"].hp_name, tables["mup"].loss_name) == ("eta", "nll")


def test_without_param_and_seed_there_is_one_family(tmp_path):
    data = frame().query("param == 'sp' and seed == 0").drop(columns=["param", "seed"])
    tables = read(write(data, tmp_path / "t.csv"))
    assert list(tables) == ["all"]
    assert tables["all"].losses.shape == (3, 4, 1)


def test_several_optimizers_are_families_one_is_none(tmp_path):
    one = frame().assign(optimizer="adam")
    assert list(read(write(one, tmp_path / "one.csv"))) == ["sp", "mup"]
    two = pd.concat([one, frame().assign(optimizer="sgd")])
    names = list(read(write(two, tmp_path / "two.csv")))
    assert names == ["sp, adam", "mup, adam", "sp, sgd", "mup, sgd"]


def test_spellings_of_one_value_are_one(tmp_path):
    data = frame()
    data.loc[data["width"] == 64, "lr"] = data["lr"].astype(np.float32).astype(float)
    table = read(write(data, tmp_path / "t.csv"))["sp"]
    assert table.hp_values.size == 4
    assert table.observed.all()


def test_seeds_that_no_two_cells_share_are_taken_in_order(tmp_path):
    data = frame()
    data["seed"] = np.arange(len(data)) + 1000
    table = read(write(data, tmp_path / "t.csv"))["mup"]
    np.testing.assert_array_equal(table.losses, expected(frame(), "mup"))
    assert "other labels in other cells" in table.notes[0]


def edited(tmp_path, line, column, cell):
    path = write(frame(), tmp_path / "t.csv")
    rows = [text.split(",") for text in path.read_text().splitlines()]
    rows[line - 1][rows[0].index(column)] = cell
    path.write_text("\n".join(map(",".join, rows)))
    return path


@pytest.mark.parametrize(
    ("column", "cell", "parts"),
    [
        ("loss", "oops", ("line 9", "'loss'", "'oops'", "not a number")),
        ("width", "64.5", ("line 9", "'width'", "64.5", "whole")),
        ("width", "-64", ("line 9", "'width'", "-64")),
        ("width", "1e19", ("line 9", "'width'", "1e19")),
        ("width", "", ("line 9", "'width'", "finite numbers")),
        ("width", "6_4", ("line 9", "'width'", "'6_4'")),
        ("width", "3.4M" + 99 * "x", ("line 9", "'3.4Mxxx", "xxx...; widths", "written as 1024")),
        ("lr", "fast", ("line 9", "'lr'", "'fast'")),
        ("lr", "nan", ("line 9", "'lr'", "finite")),
        ("lr", "0", ("line 9", "'lr'", "--scale linear")),
        ("lr", "-0.1", ("line 9", "above 0")),
        ("param", "", ("line 9", "'param'", "empty")),
    ],
)
def test_bad_cells_are_named(tmp_path, column, cell, parts):
    refused(edited(tmp_path, 9, column, cell), *parts)


def test_scales_say_what_they_take(tmp_path):
    assert read(edited(tmp_path, 9, "lr", "-0.1"), scale="linear")["sp"].hp_values[0] == -0.1
    refused(edited(tmp_path, 9, "lr", "1.0"), "[0, 1)", scale="momentum")
    assert read(edited(tmp_path, 9, "lr", "0.0"), scale="momentum")["sp"].hp_values[0] == 0


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (Columns("learning_rate"), ("no column 'learning_rate' (--hp)", "'lr'", "'seed'")),
        (Columns("LR"), ("Did you mean 'lr'?",)),
        (Columns("lr", loss="los"), ("--loss", "Did you mean 'loss'?")),
        (Columns("lr", width="n"), ("--width",)),
        (Columns("lr", seed="rng"), ("--seed",)),
        (Columns("lr", step="epoch"), ("--step",)),
        (Columns("loss"), ("'loss' is given two roles",)),
    ],
)
def test_missing_columns_list_what_there_is(tmp_path, columns, parts):
    refused(write(frame(), tmp_path / "t.csv"), *parts, columns=columns)


def test_thin_tables_are_refused(tmp_path):
    data = frame()
    thin = data[~((data["width"] > 32) & (data["lr"] > 0.002) & (data["param"] == "mup"))]
    refused(write(thin, tmp_path / "a.csv"), "width 64 of 'mup' has 2 value(s) of 'lr'")
    refused(write(data[data["width"] == 64], tmp_path / "b.csv"), "one width of 'sp', 64")
    refused(write(data.assign(loss=np.nan), tmp_path / "c.csv"), "no finite loss")


def test_a_confirmation_run_is_left_out_and_said(tmp_path):
    data = frame()
    run = {"param": "mup", "width": 512, "lr": 0.004, "seed": 0, "loss": 0.9}
    more = pd.concat([data, pd.DataFrame([run])], ignore_index=True)
    tables = read(write(more, tmp_path / "t.csv"))
    assert tables["mup"].widths == (32, 64, 128)
    np.testing.assert_array_equal(tables["mup"].losses, expected(data, "mup"))
    (note,) = tables["mup"].notes
    assert "left out" in note
    assert "width 512 (1, best loss 0.9 at 0.004)" in note
    assert tables["sp"].notes == ()


def test_fix_names_what_there_is(tmp_path):
    path = write(frame(), tmp_path / "t.csv")
    assert list(read(path, fix={"param": "mup"})) == ["mup"]
    refused(path, "no row has param=ntp", "sp, mup", fix={"param": "ntp"})
    refused(path, "--fix", "Did you mean 'param'?", fix={"params": "mup"})


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("t.csv", "", ("no header",)),
        ("t.csv", "width,lr,loss\n", ("no rows",)),
        ("t.csv", "width,lr,loss\n1,2,3\n1,2\n", ("line 3", "2 cells")),
        ("t.csv", "width,lr,lr\n1,2,3\n", ("two columns named 'lr'",)),
        ("t.csv", 'width,lr,loss\n1,"2,3\n', ("line",)),
        ("t.jsonl", '{"width": 1}\n[1, 2]\n', ("line 2", "expected an object")),
        ("t.jsonl", '{"width": 1}\n{"width"\n', ("line 2",)),
        ("t.json", "[{]", ("line 1",)),
        ("t.json", "[" * 100_000, ("nests too deeply",)),
        ("t.jsonl", '{"width": ' * 100_000, ("line 1", "nests too deeply")),
        ("t.parquet", "no parquet", ("no Parquet file",)),
        ("t.nc", "no netcdf", ("no dataset",)),
        ("t.xlsx", "", ("'.xlsx'", ".csv", ".parquet")),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, parts):
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, name, *parts)


def test_files_that_are_no_text_or_not_there(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "t.csv", "UTF-8")
    with pytest.raises(FileNotFoundError, match="no table at"):
        read_records(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    refused(tmp_path / "folder.csv", "is a folder")


def test_spreadsheets_csv(tmp_path):
    """A byte order mark, semicolons, spaces, quotes and blank lines."""
    text = "\ufeffwidth; lr ;loss\n" + "".join(
        f'{n};"{lr}"; {n * lr}\n\n' for n in (8, 16) for lr in (1, 2, 4)
    )
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    table = read(tmp_path / "t.csv")["all"]
    np.testing.assert_array_equal(table.losses[..., 0], [[8, 16, 32], [16, 32, 64]])
