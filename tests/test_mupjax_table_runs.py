"""Which rows of a table are one run, where it ends, and what else changes along a curve."""

import math

import numpy as np
import pandas as pd
import pytest

from table_files import expected, frame, read, refused, write


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


@pytest.mark.parametrize(
    "octaves", [np.arange(30) * 0.04, np.sort([*range(-3, 4), 0.04, 0.08, 0.12])]
)
def test_values_that_are_close_on_a_fine_or_refined_grid_are_not_one(tmp_path, octaves):
    grid = 2.0**octaves
    data = pd.DataFrame([{"width": n, "lr": lr, "loss": lr} for n in (32, 64) for lr in grid])
    assert read(write(data, tmp_path / "t.csv"))["all"].hp_values.size == grid.size


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
