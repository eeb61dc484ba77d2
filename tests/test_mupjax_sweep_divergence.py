"""Diverged trials: every way has its status and step, and harms no other trial."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import mupjax
from mupjax.train import STATUS
from small_sweeps import (
    assert_close,
    line,
    parabola,
    sgd,
    sweep_line,
    unoptimised_programs,  # noqa: F401
)


@pytest.fixture(scope="module")
def diverging():
    """|1 - rate| is 0.5, 1.1, 4 and 1e30: the loss falls, rises slowly, quickly, at once."""
    return sweep_line(
        hyperparameters={"learning_rate": [0.5, 2.1, 5.0, 1e30]}, steps=6, evaluations=3
    ).isel(width=0, seed=0)


def test_every_way_to_diverge_has_its_status_and_step(diverging):
    names = ["ok", "ended_above_start", "above_threshold", "non_finite"]
    assert diverging.status.values.tolist() == [STATUS[name] for name in names]
    # 16**t first exceeds 100 at t = 2; the infinite loss is seen at step 1; a high end at the end.
    assert diverging.diverged_step.values.tolist() == [-1, 6, 2, 1]
    assert diverging.status.attrs["flag_meanings"].split() == list(STATUS)


def test_a_loss_that_rises_by_rounding_alone_has_not_diverged():
    # |1 - rate|**6 = 1 + 1.4e-6 and 1 + 6e-4: the first is what rounding does at tiny rates.
    barely, truly = 2 + 2.0**-22, 2.0001
    found = sweep_line(hyperparameters={"learning_rate": [barely, truly]}, steps=3, evaluations=1)
    start, end = found.eval_loss.isel(width=0, seed=0).values.T
    assert (end > start).all()
    expected = [STATUS["ok"], STATUS["ended_above_start"]]
    assert found.status.values.ravel().tolist() == expected


def test_a_trial_that_diverged_on_the_way_has_no_final_loss(diverging):
    expected = [2 * 0.25**6, 2 * 1.1**12, np.nan, np.nan]
    assert_close(diverging.loss, expected, 6)
    assert_close(diverging.train_loss.values[2, :3], [2, 32, 512], 6)


def test_a_diverged_trial_leaves_its_neighbours_as_they_were(diverging):
    alone = sweep_line(hyperparameters={"learning_rate": [0.5]}, steps=6, evaluations=3)
    alone = alone.isel(width=0, seed=0, learning_rate=0)
    beside = diverging.isel(learning_rate=0)
    for name in ("loss", "train_loss", "eval_loss", "status", "diverged_step"):
        np.testing.assert_array_equal(beside[name], alone[name], err_msg=name)


@pytest.mark.parametrize(("limit", "step"), [(3.0, 1), (1.0, 0)])
def test_a_loss_that_is_nan_and_never_infinite(limit, step):
    """The loss is nan where |v| > limit; v starts at 2 and then is -8."""
    base = parabola()

    def loss(predict, batch):
        out = predict(batch)
        return 0.5 * jnp.mean(jnp.where(jnp.abs(out) > limit, jnp.nan, out) ** 2)

    found = mupjax.sweep(
        line,
        dataclasses.replace(base, loss=loss),
        sgd,
        "SP",
        widths=[4],
        hyperparameters={"learning_rate": 5.0},
        steps=3,
        base_width=4,
        init_exponents={"*": 0.5},
    )
    assert found.status.values.tolist() == [[STATUS["non_finite"]]]
    assert found.diverged_step.values.tolist() == [[step]]
    assert np.isnan(found.loss).all()


def test_the_threshold_is_the_users():
    found = sweep_line(
        hyperparameters={"learning_rate": [2.1, 5.0]}, steps=3, divergence_threshold=1e6
    )
    assert found.status.values.ravel().tolist() == [STATUS["ended_above_start"]] * 2
    assert np.isfinite(found.loss).all()
