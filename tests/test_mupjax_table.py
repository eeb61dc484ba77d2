"""Tables of sweeps: every format gives the same arrays; what is bad is named by row or column."""

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


def stepped(ends=30, last=None):
    """Every run logged at steps 10, 20, 30; but one (width 64, lr 0.008, seed 1) ends otherwise."""
    data = frame().query("param == 'sp'").reset_index(drop=True)
    data["loss"] = np.linspace(1, 2, len(data))
    steps = pd.concat([data.assign(step=k, loss=data["loss"] + 3 / k) for k in (10, 20, 30)])
    run = (steps["width"] == 64) & (steps["lr"] == 0.008) & (steps["seed"] == 1)
    if last is not None:
        steps.loc[run & (steps["step"] == ends), "loss"] = last
    return data, steps[~run | (steps["step"] <= ends)]


def test_the_last_step_counts(tmp_path):
    data, steps = stepped()
    table = read(write(steps.sample(frac=1, random_state=0), tmp_path / "t.csv"))["sp"]
    np.testing.assert_allclose(table.losses.ravel(), data["loss"] + 0.1)
    assert table.notes == ()


@pytest.mark.parametrize("last", [9.0, math.nan])
def test_a_run_that_ends_early_and_high_diverged(tmp_path, last):
    _, steps = stepped(ends=20, last=last)
    table = read(write(steps, tmp_path / "t.csv"))["sp"]
    assert table.losses[1, 3, 1] == np.inf
    assert table.observed.all()
    assert "1 run(s) end early" in table.notes[0]
    assert "diverged" in table.notes[0]


def test_a_run_that_was_stopped_is_missing(tmp_path):
    _, steps = stepped(ends=20)
    table = read(write(steps, tmp_path / "t.csv"))["sp"]
    assert not table.observed[1, 3, 1]
    assert table.observed.sum() == 23
    assert "left out as stopped" in table.notes[0]


def test_runs_of_which_a_few_log_one_step_more_end_where_most_do(tmp_path):
    data, steps = stepped(ends=30)
    longer = steps.query("step == 30 and lr == 0.002 and seed == 0")
    path = write(pd.concat([steps, longer.assign(step=31, loss=7.0)]), tmp_path / "t.csv")
    table = read(path)["sp"]
    np.testing.assert_allclose(table.losses, expected(data, "sp") + 0.1)
    assert len(table.notes) == 1
    assert "3 run(s) go on after step 30" in table.notes[0]


def test_where_most_runs_are_stopped_early_those_that_are_not_count(tmp_path):
    data, steps = stepped(ends=30)
    longer = steps.query("step == 30 and seed == 0")
    table = read(write(pd.concat([steps, longer.assign(step=60)]), tmp_path / "t.csv"))["sp"]
    np.testing.assert_allclose(table.losses[..., 0], expected(data, "sp")[..., 0] + 0.1)
    assert table.losses.shape[-1] == 1
    assert "left out as stopped" in table.notes[0]


def test_last_rows_without_any_loss_are_passed_over(tmp_path):
    data, steps = stepped(ends=30)
    logged = steps.query("step == 30").assign(step=32, loss="")
    table = read(write(pd.concat([steps, logged]), tmp_path / "t.csv"))["sp"]
    np.testing.assert_allclose(table.losses, expected(data, "sp") + 0.1)
    assert "no run has a loss after step 30: the 24 rows after it" in table.notes[0]
    # An explicit nan is no skipped evaluation.
    path = write(pd.concat([steps, logged.assign(loss="nan")]), tmp_path / "n.csv")
    assert np.isinf(read(path)["sp"].losses).all()
    # Where a single run has one, the others diverged.
    logged.loc[logged.index[0], "loss"] = "2.5"
    table = read(write(pd.concat([steps, logged]), tmp_path / "u.csv"))["sp"]
    assert np.isinf(table.losses).sum() == 23


@pytest.mark.parametrize("cell", ["", "nan"])
def test_runs_that_diverge_one_after_another_stay_diverged(tmp_path, cell):
    rows = [
        {
            "width": n,
            "lr": lr,
            "step": s,
            "loss": f"{3 + 0.1 * i + 0.01 * s}" if s <= 50 - 10 * i else cell,
        }
        for n in (32, 64)
        for i, lr in enumerate(2.0 ** np.arange(-8, -3))
        for s in range(0, 101, 10)
    ]
    rows.append({"width": 64, "lr": 2.0**-9, "step": 100, "loss": "2.0"})
    other = [{**row, "loss": "1.0", "param": "mup"} for row in rows]
    data = pd.DataFrame([*({**row, "param": "sp"} for row in rows[:-1]), *other])
    found = read(write(data, tmp_path / "t.csv"))
    assert np.isinf(found["sp"].losses).all()
    assert (found["mup"].losses[found["mup"].observed] == 1).all()


def test_runs_that_diverge_shortly_before_the_end_do_not_say_where_it_is(tmp_path):
    _, steps = stepped(ends=30)
    steps["step"] *= 10
    dead = steps.query("step == 300 and lr > 0.001").assign(step=290, loss=math.nan)
    steps = pd.concat([steps.query("step < 300 or lr <= 0.001"), dead])
    table = read(write(steps, tmp_path / "t.csv"))["sp"]
    truth, _ = stepped(ends=30)
    np.testing.assert_allclose(table.losses[:, 0], expected(truth, "sp")[:, 0] + 0.1)
    assert np.isinf(table.losses[:, 1:]).all()


def test_a_run_with_no_row_where_most_end_is_read_at_its_next_step(tmp_path):
    data, _ = stepped()
    data["step"] = 1000
    data.loc[3, ["step", "loss"]] = [1050, 7.0]
    table = read(write(data, tmp_path / "t.csv"))["sp"]
    np.testing.assert_array_equal(table.losses, expected(data, "sp"))
    assert table.notes == (
        "1 run(s) go on after step 1000, where most runs of their width end, and are read there or "
        "at their next step (the first: width 32, hyperparameter 0.002, at step 1050)",
    )


def test_widths_that_end_at_different_steps_are_said(tmp_path):
    _, steps = stepped(ends=30)
    steps = steps[(steps["width"] < 128) | (steps["step"] <= 20)]
    notes = read(write(steps, tmp_path / "t.csv"))["sp"].notes
    assert any("widths end at different steps (32: 30, 64: 30, 128: 20)" in n for n in notes), notes


@pytest.mark.parametrize("scale", ["log2", "momentum"])
def test_values_that_one_launcher_rounds_are_one(tmp_path, scale):
    """Three digits for one seed: of 1/64, 0.0156."""
    exact = 2.0 ** -np.arange(4, 10)
    data = pd.DataFrame(
        [
            {"width": n, "lr": lr, "seed": s, "loss": 1 / n + (math.log2(lr) + 6) ** 2 + 0.01 * s}
            for n in (32, 64)
            for lr in exact
            for s in (0, 1)
        ]
    )
    if scale == "momentum":
        data["lr"] = 1 - data["lr"]
    rounded = data["lr"].map(lambda v: float(f"{v:.3g}")).where(data["seed"] == 1, data["lr"])
    table = read(write(data.assign(lr=rounded), tmp_path / "t.csv"), scale=scale)["all"]
    truth = read(write(data, tmp_path / "u.csv"), scale=scale)["all"]
    np.testing.assert_array_equal(table.hp_values, truth.hp_values)
    np.testing.assert_array_equal(table.losses, truth.losses)
    assert truth.notes == ()
    assert "differ by rounding alone are taken for one, such as" in table.notes[0]
    # Run by one seed, both were meant.
    near = data[data["lr"] == data["lr"][4]]
    both = pd.concat([data, near.assign(lr=near["lr"] * 1.001)])
    assert read(write(both, tmp_path / "v.csv"), scale=scale)["all"].hp_values.size == 7


def test_values_that_are_close_on_a_fine_grid_are_not_one(tmp_path):
    grid = 2.0 ** (np.arange(30) * 0.04)
    data = pd.DataFrame([{"width": n, "lr": lr, "loss": lr} for n in (32, 64) for lr in grid])
    assert read(write(data, tmp_path / "t.csv"))["all"].hp_values.size == 30


def crossed():
    """A grid over weight decay as well."""
    return pd.concat([frame().assign(wd=wd, loss=frame()["loss"] + wd) for wd in (0.1, 0.0, 0.3)])


def test_a_further_hyperparameter_is_named_with_its_remedies(tmp_path):
    path = write(crossed(), tmp_path / "t.csv")
    refused(path, "line 2, line 50, line 98", "differ in 'wd'", "--fix wd=VALUE", "--profile wd")
    fixed = read(path, fix={"wd": "0.30"})
    np.testing.assert_allclose(fixed["mup"].losses, expected(frame(), "mup") + 0.3)


def test_profiling_takes_the_best_combination(tmp_path):
    data = crossed()
    # The best weight decay of width 64 diverges with one seed: it is out.
    bad = (data["width"] == 64) & (data["wd"] == 0.0) & (data["seed"] == 1)
    data.loc[bad, "loss"] = math.nan
    table = read(write(data, tmp_path / "t.csv"), profile=["wd"])["mup"]
    truth = expected(frame(), "mup")
    truth[1] += 0.1
    np.testing.assert_allclose(table.losses, truth)
    assert "best of 3 combinations" in table.notes[0]


def test_a_column_that_changes_along_a_curve_is_said(tmp_path):
    data = frame()
    data["wd"] = np.where(data["lr"] < 0.003, 0.1, 0.2)
    data["seconds"] = np.arange(len(data)) * 0.37
    notes = read(write(data, tmp_path / "t.csv"))["sp"].notes
    assert len(notes) == 1
    assert "column 'wd' takes 2 values (0.1, 0.2) along the curve of width 32" in notes[0]


def test_a_column_of_text_that_changes_along_a_curve_is_said_too(tmp_path):
    data = frame().assign(state="finished", warmup="none", host="")
    data.loc[data["lr"] > 0.003, "warmup"] = "linear"
    data.loc[(data["width"] == 64) & (data["lr"] == 0.002) & (data["seed"] == 1), "state"] = "crash"
    data["machine"] = [f"node{k % 7}" for k in range(len(data))]
    # Another name of the learning rate is no further hyperparameter.
    data["log_lr"] = np.log(data["lr"])
    data.loc[4, "warmup"] = ""
    notes = read(write(data, tmp_path / "t.csv"))["sp"].notes
    assert len(notes) == 2
    assert "column 'state' takes 2 values (crash, finished) along the curve of width 64" in notes[0]
    assert "--fix state=VALUE" in notes[0]
    assert "column 'warmup' takes 2 values (linear, none) along the curve of width 32" in notes[1]
    profiled = read(
        write(crossed().assign(warmup=data["warmup"]), tmp_path / "p.csv"), profile=["wd"]
    )
    assert any("'warmup' takes 2 values" in note for note in profiled["sp"].notes)
    assert not any("'wd'" in note for note in profiled["sp"].notes)


def test_what_came_of_diverged_runs_is_no_further_hyperparameter(tmp_path):
    data = frame().assign(state="finished")
    data.loc[data["lr"] > 0.003, ["loss", "state"]] = [math.nan, "crashed"]
    assert read(write(data, tmp_path / "t.csv"))["sp"].notes == ()


def test_repeats_are_refused(tmp_path):
    data = frame()
    path = write(data.drop(columns="seed"), tmp_path / "t.csv")
    refused(path, "line 2, line 3", "sp, width 32, lr 0.001", "add a column named seed")
    path = write(pd.concat([data, data[5:6]]), tmp_path / "u.csv")
    refused(path, "line 7, line 50", "seed 1", "drop all but one")
    again = data[5:6].assign(loss=9.0)
    path = write(pd.concat([data, again]), tmp_path / "v.csv")
    refused(path, "line 7, line 50", "seed 1", "correct the seeds")
    path = write(data.assign(seed=""), tmp_path / "w.csv")
    refused(path, "line 2, line 3 say", "'seed' is empty there: fill it")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("config.seed", "if that is the seed, say --seed config.seed"),
        ("_step", "if that is the step, say --step _step"),
        ("epoch", "if that is the step, say --step epoch"),
        ("config.optimizer", "if that is the optimizer, say --optimizer config.optimizer"),
    ],
)
def test_repeats_that_differ_in_a_column_with_a_role_say_which(tmp_path, name, advice):
    path = write(frame().rename(columns={"seed": name}), tmp_path / "t.csv")
    refused(path, f"differ in '{name}'", advice)


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
    thin = data[~((data["width"] == 64) & (data["lr"] > 0.002) & (data["param"] == "mup"))]
    refused(write(thin, tmp_path / "a.csv"), "width 64 of 'mup' has 2 value(s) of 'lr'")
    refused(write(data[data["width"] == 64], tmp_path / "b.csv"), "one width of 'sp', 64")
    refused(write(data.assign(loss=np.nan), tmp_path / "c.csv"), "no finite loss")


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
