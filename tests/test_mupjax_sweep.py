"""The sweep: equal to a plain loop over trials; its random numbers, its curves and its files."""

import shutil
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import mupjax
from foreign_files import contents, folder_with_a_file, foreign_dataset, text_file
from mupjax import results
from mupjax.adapters import as_model
from mupjax.roles import map_leaves
from mupjax.train import STATUS
from small_sweeps import (
    NET_INIT,
    B,
    adam,
    assert_close,
    line,
    net,
    parabola,
    regression,
    sgd,
    sweep_line,
    timing,
    unoptimised_programs,  # noqa: F401
)
from tolerances import float_tolerance
from trial_loop import points_of, train_by_hand

# A plain loop -----------------------------------------------------------------------------------


def batch_checksum():
    """Records a number per step that tells batches apart."""

    def checksum(batch):
        weights = jnp.arange(1.0, B + 1)
        return sum(jnp.sum(jnp.sum(leaf, axis=1) * weights) for leaf in jax.tree.leaves(batch))

    def init(params, model, setting):
        return jnp.zeros((STEPS,))

    def update(state, seen):
        return state.at[seen.step].set(checksum(seen.batch))

    return mupjax.Observer(
        "batch", init, update, lambda state: {"checksum": state}, {"checksum": ("step",)}
    )


STEPS, WIDTHS, SEEDS = 7, [4, 12], [3, 0]
AXES = {"learning_rate": [0.003, 0.02], "b1": [0.5, 0.9]}
ADAM_SWEEP: dict[str, Any] = {
    "widths": WIDTHS,
    "hyperparameters": AXES,
    "steps": STEPS,
    "seeds": SEEDS,
    "base_width": 8,
    "evaluations": 3,
    "init_exponents": NET_INIT,
}


@pytest.fixture(scope="module")
def adam_grid():
    """Adam on `net`: two parametrizations, two widths, two axes, two seeds."""
    return mupjax.sweep(
        net,
        regression(),
        adam,
        ["SP", "muP"],
        observers=[batch_checksum()],
        strategy="bucketed",
        **ADAM_SWEEP,
    )


def test_one_sweep_equals_a_loop_over_trials_and_steps(adam_grid):
    for name in ("SP", "muP"):
        resolved = mupjax.resolve_sweep(net, regression(), adam, name, **ADAM_SWEEP)
        for width in WIDTHS:
            found = adam_grid.sel(parametrization=name, width=width)
            train, evaluation = train_by_hand(
                width,
                resolved.factors(width),
                resolved.roles,
                points_of(AXES),
                SEEDS,
                STEPS,
                found.eval_step.values,
            )
            assert_close(found.train_loss.values.reshape(train.shape), train, STEPS)
            assert_close(found.eval_loss.values.reshape(evaluation.shape), evaluation, STEPS)


def test_the_loop_tells_the_parametrizations_and_hyperparameters_apart(adam_grid):
    # Otherwise the test above would prove little.
    curves = adam_grid.train_loss
    for axis in ("parametrization", "learning_rate", "b1", "seed", "width"):
        gap = abs(curves.isel({axis: 0}, drop=True) - curves.isel({axis: 1}, drop=True))
        assert float(gap.max("step").min()) > 1e-3, axis


def test_resolve_sweep_takes_every_argument_of_sweep(adam_grid, tmp_path):
    plain = mupjax.resolve_sweep(net, regression(), adam, "muP", **ADAM_SWEEP)
    full = mupjax.resolve_sweep(
        net,
        regression(),
        adam,
        "muP",
        **ADAM_SWEEP,
        strategy="bucketed",
        chunk_size=3,
        out=tmp_path / "run.nc",
        existing="error",
        progress=False,
    )
    assert full.factors(12) == plain.factors(12)


# Compilations -----------------------------------------------------------------------------------


def test_two_parametrizations_and_two_axes_share_one_program_per_width(adam_grid):
    assert timing(adam_grid)["compilations"] == len(WIDTHS)
    assert [p["widths"] for p in timing(adam_grid)["programs"]] == [[w] for w in WIDTHS]


# Common random numbers --------------------------------------------------------------------------


def test_trials_of_a_seed_see_the_same_batches_whatever_else_differs(adam_grid):
    seen = adam_grid.batch_checksum.transpose(..., "seed", "step").values
    seen = seen.reshape(-1, len(SEEDS), STEPS)
    np.testing.assert_array_equal(seen, np.broadcast_to(seen[:1], seen.shape))
    assert len(np.unique(seen[0])) == seen[0].size  # every seed and step has a batch of its own


def test_without_common_random_numbers_every_trial_draws_its_own_batches():
    arguments: dict[str, Any] = ADAM_SWEEP | {"hyperparameters": {"learning_rate": [0.01, 0.02]}}
    found = mupjax.sweep(
        net,
        regression(),
        sgd,
        ["SP", "muP"],
        observers=[batch_checksum()],
        common_random_numbers=False,
        strategy="bucketed",
        **arguments,
    )
    seen = found.batch_checksum.values
    assert len(np.unique(seen)) == seen.size
    # What a seed fixes beside the batches stays shared.
    start = found.eval_loss.isel(eval_step=0)
    np.testing.assert_array_equal(start.isel(learning_rate=0), start.isel(learning_rate=1))


# The evaluation curve ---------------------------------------------------------------------------


def test_the_curve_begins_at_the_initial_loss_and_ends_at_the_final_one(adam_grid):
    assert adam_grid.eval_step.values.tolist() == [0, 2, 5, 7]
    np.testing.assert_array_equal(adam_grid.eval_loss.isel(eval_step=-1), adam_grid.loss)
    resolved = mupjax.resolve_sweep(net, regression(), adam, "muP", **ADAM_SWEEP)
    setting = regression()
    for width in WIDTHS:
        model, factors = as_model(net, width, setting), resolved.factors(width)
        for seed in SEEDS:
            params = model.init(jax.random.fold_in(jax.random.key(seed), 0))
            params = map_leaves(lambda path, leaf, f=factors: leaf * f.init[path], params)
            loss = setting.loss(lambda x, m=model, p=params: m.apply(p, x), setting.validation)
            first = adam_grid.eval_loss.sel(parametrization="muP", width=width, seed=seed)
            assert_close(first.isel(eval_step=0), float(loss), 1)


def test_more_evaluations_than_steps_evaluate_after_every_step():
    found = sweep_line(evaluations=10)
    assert found.loss.dims == ("width", "seed")
    assert found.eval_step.values.tolist() == [0, 1, 2, 3]
    expected = 2.0 * 0.25 ** np.arange(4)
    assert_close(found.eval_loss.values, expected[None, None], 3)
    assert_close(found.train_loss.values, expected[None, None, :3], 3)


def test_a_single_step_and_a_loss_that_is_infinite_only_after_it():
    found = sweep_line(
        steps=1, evaluations=10, hyperparameters={"learning_rate": [0.5, 1e30]}, seeds=[7]
    )
    assert found.sizes["learning_rate"] == 2
    assert found.seed.values.tolist() == [7]
    assert found.eval_step.values.tolist() == [0, 1]
    assert_close(found.train_loss.values.ravel(), 2.0, 1)
    assert found.status.values.ravel().tolist() == [STATUS["ok"], STATUS["non_finite"]]
    assert found.diverged_step.values.ravel().tolist() == [-1, 1]
    assert_close(found.loss.values.ravel(), [0.5, np.nan], 1)


# What surrounds a sweep -------------------------------------------------------------------------


def test_a_progress_bar_reaches_the_end(capsys):
    sweep_line(progress=True)
    assert "100%" in capsys.readouterr().err
    sweep_line(progress=False)
    assert capsys.readouterr().err == ""


def test_the_callers_jax_settings_hold_while_programs_are_traced():
    # jax's context managers are local to a thread, and programs compile on several.
    seen = []

    def spy(width):
        straight = line(width)

        def apply(params, x):
            seen.append(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
            return straight.apply(params, x)

        return mupjax.Model(straight.init, apply)

    with jax.default_matmul_precision("highest"):
        mupjax.sweep(
            spy,
            parabola(),
            sgd,
            "SP",
            widths=[4],
            hyperparameters={"learning_rate": 0.5},
            steps=1,
            base_width=4,
            init_exponents={"*": 0.5},
        )
    assert set(seen) == {"highest"}


def test_a_sweep_in_double_precision():
    jax.config.update("jax_enable_x64", True)
    try:
        found = sweep_line(hyperparameters={"learning_rate": [0.3, 5.0]}, steps=6)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert found.eval_loss.dtype == np.float64
    ok = found.isel(learning_rate=0)
    expected = 2 * 0.7 ** (2 * np.arange(7.0))
    np.testing.assert_allclose(
        ok.eval_loss.values.ravel(), expected, rtol=float_tolerance(np.float64, operations=400)
    )
    np.testing.assert_array_equal(ok.loss, ok.eval_loss.isel(eval_step=-1))
    assert found.diverged_step.values.ravel().tolist() == [-1, 2]


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_a_result_survives_writing_and_reading(tmp_path, adam_grid, suffix):
    path = mupjax.save(adam_grid, tmp_path / "new" / f"run{suffix}")
    read = mupjax.load(path)
    xr.testing.assert_identical(read, adam_grid)
    assert read.attrs == adam_grid.attrs
    assert read.parametrization.values.tolist() == ["SP", "muP"]
    assert read.loss.dims == ("parametrization", "width", "learning_rate", "b1", "seed")
    for name in adam_grid.variables:
        assert read[name].dtype.kind == adam_grid[name].dtype.kind, name
    assert results.configuration_of(read) == results.configuration_of(adam_grid)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    mupjax.save(adam_grid.isel(seed=[0]), path)  # over itself
    assert mupjax.load(path).sizes["seed"] == 1


def test_the_configuration_says_what_was_run(adam_grid):
    configuration = results.configuration_of(adam_grid)
    assert configuration["setting"]["name"] == "regression"
    assert configuration["widths"] == WIDTHS
    assert configuration["hyperparameters"] == AXES
    assert configuration["seeds"] == SEEDS
    assert configuration["base_width"] == 8
    assert configuration["evaluation_steps"] == [0, 2, 5, 7]
    names = [p["name"] for p in configuration["parametrizations"]]
    assert names == ["SP", "muP"]
    assert mupjax.Parametrization.from_dict(configuration["parametrizations"][1]) == mupjax.muP
    assert adam_grid.attrs["parametrization_fingerprint"].split(", ") == [
        mupjax.SP.fingerprint(),
        mupjax.muP.fingerprint(),
    ]
    with pytest.raises(ValueError, match=r"not written by mupjax\.sweep"):
        results.configuration_of(xr.Dataset())


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_writing_that_fails_leaves_the_old_file_and_no_draft(
    tmp_path, adam_grid, monkeypatch, suffix
):
    path = mupjax.save(adam_grid, tmp_path / f"run{suffix}")
    before = contents(tmp_path)

    def half(self, draft, **kwargs):
        if Path(draft).suffix == ".zarr":
            folder_with_a_file(Path(draft))
        else:
            text_file(Path(draft))
        raise OSError("no space left on device")

    method = "to_zarr" if suffix == ".zarr" else "to_netcdf"
    monkeypatch.setattr(xr.Dataset, method, half)
    with pytest.raises(OSError, match="no space left"):
        mupjax.save(adam_grid, path)
    assert contents(tmp_path) == before


def test_a_sweep_without_out_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_line()
    assert list(tmp_path.iterdir()) == []


def test_reading_nothing_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no result at"):
        mupjax.load(tmp_path / "none.nc")
    foreign_dataset(tmp_path / "other.nc")
    with h5py.File(tmp_path / "plain.nc", "w") as file:
        file["x"] = np.ones(3)
    for name in ("other.nc", "plain.nc"):
        with pytest.raises(ValueError, match=r"not written by mupjax\.sweep"):
            mupjax.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.zarr or \.nc"):
        mupjax.load(tmp_path / "run.csv")
    shutil.rmtree(tmp_path)


def test_a_parameter_without_axes_is_trained():
    """The line times a number of its own: as the line whose gain is a vector of one entry."""

    def scaled(shape):
        def factory(width):
            straight = line(width)

            def apply(params, x):
                return straight.apply(params, x) * params["gain"].reshape(())

            def init(key):
                return {**straight.init(key), "gain": jnp.full(shape, 1.5)}

            return mupjax.Model(init, apply)

        return factory

    def run(shape):
        return mupjax.sweep(
            scaled(shape),
            parabola(),
            adam,
            "SP",
            widths=[4, 8],
            hyperparameters={"learning_rate": [0.01, 0.1]},
            steps=3,
            base_width=4,
            init_exponents={"readout/*": 0.5},
        )

    assert_close(run(()).loss, run((1,)).loss, steps=3)
