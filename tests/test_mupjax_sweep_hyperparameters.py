"""Several hyperparameters at once, and schedules, each as in a plain loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mupjax
from mupjax import results
from mupjax.adapters import as_model
from small_sweeps import (
    NET_INIT,
    OUTPUTS,
    D,
    adam,
    assert_close,
    net,
    regression,
    sweep_line,
    timing,
    unoptimised_programs,  # noqa: F401
)
from tolerances import float_tolerance
from trial_loop import points_of, train_by_hand

# Several hyperparameters ------------------------------------------------------------------------


def test_an_axis_of_one_value_stays_a_dimension_and_a_number_does_not():
    kept = sweep_line(hyperparameters={"learning_rate": [0.5]})
    assert kept.loss.dims == ("width", "learning_rate", "seed")
    assert results.configuration_of(kept)["hyperparameters"] == {"learning_rate": [0.5]}


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="'learning_rate' has an empty grid"):
        sweep_line(hyperparameters={"learning_rate": []})


MANY_AXES = {
    "init_scale": [0.5, 1.0],
    "learning_rate": [0.003, 0.02],
    "output_multiplier": [1.0, 3.0],
    "weight_decay": [0.0, 0.5],
    "hidden_learning_rate_multiplier": [1.0, 4.0],
}
MANY_SWEEP: dict[str, Any] = {
    "widths": [6],
    "hyperparameters": {**MANY_AXES, "b1": 0.8},
    "steps": 3,
    "base_width": 4,
    "evaluations": 1,
    "application": "multipliers",
    "init_exponents": NET_INIT,
}


@pytest.fixture(scope="module")
def many_axes():
    """Five axes and a fixed hyperparameter, with forward multipliers (NTP) left in place."""
    return mupjax.sweep(net, regression(), adam, "NTP", **MANY_SWEEP)


def test_axes_come_in_the_order_given_between_width_and_seed(many_axes):
    assert many_axes.loss.dims == ("width", *MANY_AXES, "seed")
    assert many_axes.eval_loss.dims == ("width", *MANY_AXES, "seed", "eval_step")
    assert many_axes.train_loss.dims == ("width", *MANY_AXES, "seed", "step")
    for name, values in MANY_AXES.items():
        assert many_axes[name].values.tolist() == values
    assert "b1" not in many_axes.coords
    assert results.configuration_of(many_axes)["hyperparameters"] == {**MANY_AXES, "b1": 0.8}
    assert timing(many_axes)["compilations"] == 1


def test_every_hyperparameter_acts_as_in_a_plain_loop(many_axes):
    resolved = mupjax.resolve_sweep(net, regression(), adam, "NTP", **MANY_SWEEP)
    factors = resolved.factors(6)
    assert any(m != 1 for m in factors.multiplier.values())
    points = [point | {"b1": 0.8} for point in points_of(MANY_AXES)]
    train, evaluation = train_by_hand(6, factors, resolved.roles, points, [0], 3, [0, 3])
    assert_close(many_axes.train_loss.values.reshape(train.shape), train, 3)
    assert_close(many_axes.eval_loss.values.reshape(evaluation.shape), evaluation, 3)


def test_initial_scale_and_output_multiplier_set_the_initial_loss(many_axes):
    setting, model = regression(), as_model(net, 6, regression())
    params = model.init(jax.random.fold_in(jax.random.key(0), 0))
    resolved = mupjax.resolve_sweep(net, regression(), adam, "NTP", **MANY_SWEEP)
    f = resolved.factors(6)
    start = many_axes.eval_loss.isel(width=0, seed=0, eval_step=0)
    for scale in MANY_AXES["init_scale"]:
        for multiplier in MANY_AXES["output_multiplier"]:
            x, y = setting.validation
            W = {
                name: params[name]["kernel"] * f.init[path] * f.multiplier[path] * scale
                for name in params
                for path in [f"{name}/kernel"]
            }
            h = jnp.tanh(jnp.tanh(x @ W["enter"] + params["enter"]["bias"][None]) @ W["mix"])
            out = multiplier * (h @ W["readout"] + params["readout"]["bias"][None])
            found = start.sel(init_scale=scale, output_multiplier=multiplier)
            assert_close(found, float(jnp.mean((out - y) ** 2)), 1)


def test_output_multiplier_leaves_the_rest_of_a_flat_model_alone():
    """All parameters of a model of pure functions may stand beside the readout."""

    def flat(width):
        def init(key):
            into, out = jax.random.split(key)
            return {
                "w": jax.random.normal(into, (D, width)),
                "a": jax.random.normal(out, (width, OUTPUTS)) / width**0.5,
                "gain": jnp.ones((1,)),
            }

        def apply(params, x):
            return params["gain"][None, :] * jnp.tanh(x @ params["w"]) @ params["a"]

        return mupjax.Model(init, apply)

    found = mupjax.sweep(
        flat,
        regression(),
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=[6],
        base_width=6,
        hyperparameters={"learning_rate": 0.1, "output_multiplier": [1.0, 3.0]},
        steps=1,
        roles={"w": "input", "a": "output", "gain": "fixed"},
        init_exponents={"w": 0.0, "a": 0.5},
    )
    setting, model = regression(), flat(6)
    params = model.init(jax.random.fold_in(jax.random.key(0), 0))
    for factor in (1.0, 3.0):
        expected = setting.loss(lambda x, c=factor: c * model.apply(params, x), setting.validation)
        start = found.eval_loss.sel(output_multiplier=factor).isel(eval_step=0)
        assert_close(start.values.ravel(), [float(expected)], 1)


def test_output_multiplier_leaves_routers_alone():
    """A router's kernel is of role output too, but does not make the model's outputs."""

    class Routed(nnx.Module):
        def __init__(self, width, *, rngs):
            self.first = nnx.Linear(D, width, rngs=rngs)
            self.router = nnx.Linear(width, 2, rngs=rngs)
            self.last = nnx.Linear(width, OUTPUTS, rngs=rngs)

        def __call__(self, x, times=1.0):
            h = jnp.tanh(self.first(x))
            odds = jax.nn.softmax(self.router(h))
            return times * self.last(odds[:, :1] * jnp.sin(h) + odds[:, 1:] * jnp.cos(h))

    setting, multipliers = regression(), [0.5, 1.0, 3.0]
    rates = {"learning_rate": 0.1, "output_multiplier": multipliers}
    found = mupjax.sweep(
        Routed,
        setting,
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=[6],
        base_width=3,
        hyperparameters=rates,
        steps=1,
        init_exponents={"first/kernel": 0.0, "[rl]*/kernel": 0.5, "*bias": 0.0},
    )
    model = as_model(Routed, 6, setting)
    params = model.init(jax.random.fold_in(jax.random.key(0), 0))
    for times in multipliers:
        expected = setting.loss(lambda x, c=times: model.apply(params, x, c), setting.validation)
        start = found.eval_loss.sel(output_multiplier=times).isel(eval_step=0)
        assert_close(start.values.ravel(), [float(expected)], 1)


def test_a_multiplier_for_a_role_that_the_model_lacks_is_refused():
    rates = {"learning_rate": 0.1, "hidden_learning_rate_multiplier": [1.0, 2.0]}
    with pytest.raises(ValueError, match=r"'hidden_learning_rate_multiplier' would do nothing"):
        sweep_line(hyperparameters=rates)


# Schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 29, 1000])
@pytest.mark.parametrize("fractions", [(0.04, 0.2), (0, 0), (0.5, 0.5), (1, 0), (0, 1), (0.3, 0.4)])
def test_warmup_stable_decay_rises_to_one_and_falls(steps, fractions):
    schedule = mupjax.wsd_schedule(steps, *fractions)
    values = np.asarray(jax.vmap(schedule)(np.arange(steps)), np.float64)
    values = np.broadcast_to(values, (steps,))
    assert values.max() == pytest.approx(1.0, rel=float_tolerance(np.float32))
    assert values.min() > 0
    slopes = np.sign(np.round(np.diff(values), 7))
    assert (np.diff(slopes) <= 0).all()  # up, then level, then down
    rise, fall = (round(steps * f) for f in fractions)
    if rise + fall < steps:
        assert (slopes > 0).sum() == rise
        assert (slopes < 0).sum() == fall
        assert values[-1] == pytest.approx(1 / (fall + 1), rel=1e-4)
        assert values[0] == pytest.approx(1 / (rise + 1), rel=1e-4)


@pytest.mark.parametrize("bad", [(0, 0.1, 0.1), (10, -0.1, 0.2), (10, 0.1, -0.2), (10, 0.6, 0.6)])
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="warmup \\+ cooldown <= 1, got steps="):
        mupjax.wsd_schedule(*bad)


def test_the_schedule_scales_every_update():
    T, rates = 10, np.array([0.3, 1.5])
    schedule = mupjax.wsd_schedule(T, warmup=0.3, cooldown=0.4)
    found = sweep_line(
        hyperparameters={"learning_rate": rates}, steps=T, schedule=schedule, evaluations=T
    )
    v = np.full(2, 2.0)  # sqrt(4)
    expected = [v**2 / 2]
    for t in range(T):
        v = v - rates * float(jnp.asarray(schedule(t))) * v
        expected.append(v**2 / 2)
    assert_close(found.eval_loss.values[0, :, 0], np.transpose(expected), T)
