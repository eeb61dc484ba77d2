"""Bad hyperparameters, optimizers and schedules give one clear error, before any compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refusals import (
    accepted,
    no_program_is_compiled,  # noqa: F401
    refused,
)

# Hyperparameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ([], ["empty grid"]),
        ([0.0, 0.1], ["positive", "0.0"]),
        ([-0.1, 0.1], ["positive", "-0.1"]),
        (-0.1, ["positive", "-0.1"]),
        ([0.1, float("nan")], ["finite", "nan"]),
        ([0.1, float("inf")], ["finite", "inf"]),
        (np.nan, ["finite", "nan"]),
        ([0.2, 0.1], ["increase", "[0.2, 0.1]"]),
        ([0.1, 0.1], ["duplicates", "[0.1, 0.1]"]),
        (["0.1"], ["number", "'0.1'"]),
        ("0.1", ["number", "'0.1'"]),
        ([True], ["number", "True"]),
        ([[0.1, 0.2]], ["number", "[0.1, 0.2]"]),
        (None, ["number", "None"]),
        (0.1 + 0.1j, ["number", "0.1j"]),
        ({0.1, 0.2}, ["number"]),
        (optax.constant_schedule(0.1), ["number"]),
        ([1e-60, 0.1], ["1e-60"]),  # zero in single precision
        ([0.1, 1e60], ["1e+60"]),  # infinite in single precision
    ],
)
def test_bad_learning_rates(values, fragments):
    refused(ValueError, "'learning_rate'", *fragments, hyperparameters={"learning_rate": values})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b1", 1.0),
        ("b1", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("init_scale", 0.0),
        ("output_multiplier", -1.0),
        ("input_learning_rate_multiplier", 0.0),
    ],
)
def test_other_hyperparameters_out_of_range(name, value):
    refused(
        ValueError, f"'{name}'", str(value), hyperparameters={"learning_rate": 0.1, name: value}
    )


def test_an_unknown_hyperparameter_is_named_with_the_known_ones():
    refused(
        ValueError,
        "unknown hyperparameter 'beta1'",
        "b1, eps, learning_rate",
        "weight_decay",
        hyperparameters={"learning_rate": 0.1, "beta1": 0.9},
    )


def test_a_misspelt_factory_parameter_shows_up_as_an_unknown_hyperparameter():
    refused(
        ValueError,
        "'learning_rate'",
        "lerning_rate",
        optimizer=lambda lerning_rate: optax.sgd(lerning_rate),
    )


def test_a_missing_hyperparameter_is_named():
    refused(ValueError, "needs learning_rate", hyperparameters={"b1": 0.9})
    refused(ValueError, "needs learning_rate", hyperparameters={})


def test_a_schedule_that_asks_for_the_value_of_its_peak():
    unit = optax.warmup_cosine_decay_schedule(0.1, 1.0, 5, 20)

    def asking(learning_rate, b1=0.9):
        peaked = optax.warmup_cosine_decay_schedule(0.1 * learning_rate, learning_rate, 5, 20)
        return optax.adam(peaked, b1=b1)

    rates = {"learning_rate": 0.1, "b1": 0.9}
    refused(ValueError, "'learning_rate' as a number", optimizer=asking, hyperparameters=rates)
    accepted(
        optimizer=lambda learning_rate, b1: optax.adam(lambda t: learning_rate * unit(t), b1=b1),
        hyperparameters=rates,
    )


def test_hyperparameters_that_are_no_mapping():
    refused(TypeError, "hyperparameters", hyperparameters=[0.1, 0.2])


def test_a_hyperparameter_that_would_act_twice():
    def clipped(learning_rate, max_gradient_norm):
        clip = optax.clip_by_global_norm(max_gradient_norm)
        return optax.chain(clip, optax.sgd(learning_rate))

    refused(
        ValueError,
        "'max_gradient_norm' would act twice",
        "rename",
        optimizer=clipped,
        hyperparameters={"learning_rate": 0.1, "max_gradient_norm": [1.0, 2.0]},
    )


def test_a_hyperparameter_with_the_name_of_a_dimension():
    refused(
        ValueError,
        "'seed'",
        optimizer=lambda learning_rate, seed: optax.sgd(learning_rate),
        hyperparameters={"learning_rate": 0.1, "seed": 1.0},
    )


@pytest.mark.parametrize("name", ["loss", "status"])
def test_a_hyperparameter_with_the_name_of_a_result(name):
    def factory(learning_rate, loss=1.0, status=1.0):
        return optax.sgd(learning_rate * loss * status)

    refused(
        ValueError,
        f"'{name}'",
        optimizer=factory,
        hyperparameters={"learning_rate": 0.1, name: [1.0, 2.0]},
    )


@pytest.mark.parametrize("role", ["hidden", "vector"])
def test_a_multiplier_for_a_role_that_does_not_exist(role):
    name = f"{role}_learning_rate_multiplier"
    refused(
        ValueError, f"'{name}'", repr(role), hyperparameters={"learning_rate": 0.1, name: [1, 2]}
    )


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("module", [np, jnp])
def test_arrays_of_either_library_are_taken(module, size):
    values = module.logspace(-2, -1, 3)
    accepted(hyperparameters={"learning_rate": values if size else values[0]})


def test_other_kinds_of_numbers_are_taken():
    for values in ((np.float32(0.1), 1), range(1, 3), np.asarray(0.1), 1):
        accepted(hyperparameters={"learning_rate": values})
    accepted(widths=np.array([4, 8]), steps=np.int64(3), seeds=np.arange(3), base_width=np.int32(4))
    accepted(widths=range(4, 6), seeds=(5, 3), evaluations=np.int64(2), chunk_size=np.int64(2))


# Optimizer and schedule --------------------------------------------------------------------------


def sgd(learning_rate):
    return optax.sgd(learning_rate)


def adamw(learning_rate):
    return optax.adamw(learning_rate)


def test_optimizers_that_cannot_be_run():
    for optimizer in (
        lambda learning_rate: optax.lbfgs(learning_rate),
        lambda learning_rate: optax.lookahead(optax.sgd(learning_rate), 2, 0.5),
    ):
        refused(ValueError, "the optimizer cannot be run as update(", optimizer=optimizer)


def test_an_optimizer_with_a_copy_of_the_parameters_cannot_be_scaled():
    def free(learning_rate):
        return optax.contrib.schedule_free_sgd(learning_rate)

    refused(ValueError, "a copy of them in its state", optimizer=free, optimizer_family="sgd")
    accepted(
        optimizer=free,
        optimizer_family="sgd",
        parametrization="SP",
        init_exponents={"enter/*": 0.0, "readout/*": 0.5},
    )


@pytest.mark.parametrize(
    ("optimizer", "fragments"),
    [
        (optax.sgd(0.1), ["function of its hyperparameters", "GradientTransformation"]),
        ("adam", ["function of its hyperparameters", "str"]),
        (lambda learning_rate: learning_rate, ["GradientTransformation", "float"]),
        (lambda **kwargs: optax.adam(**kwargs), ["**kwargs"]),
        (lambda *args: optax.adam(*args), ["*args"]),
        (lambda learning_rate, /: optax.adam(learning_rate), ["positional-only"]),
    ],
)
def test_what_is_no_optimizer_factory(optimizer, fragments):
    refused(TypeError, "optimizer", *fragments, optimizer=optimizer)


def test_an_optimizer_of_unknown_kind():
    def odd(learning_rate):
        square = optax.stateless(lambda u, _: jax.tree.map(lambda g: g * jnp.abs(g), u))
        return optax.chain(square, optax.scale(-learning_rate))

    refused(ValueError, "optimizer_family", "'sgd', 'adam' or 'spectral'", optimizer=odd)


def test_a_parametrization_without_rows_for_the_optimizer():
    refused(
        ValueError, "Adaptive Transfer", "sgd", optimizer=sgd, parametrization="Adaptive Transfer"
    )


@pytest.mark.parametrize("bad", ["rmsprop", 3])
def test_an_unknown_optimizer_family(bad):
    refused(ValueError, "optimizer_family", repr(bad), optimizer_family=bad)


@pytest.mark.parametrize(
    ("schedule", "error", "fragments"),
    [
        (optax.constant_schedule(0.1), ValueError, ["0.1", "unit peak"]),
        (optax.constant_schedule(2.0), ValueError, ["2", "unit peak"]),
        (optax.linear_schedule(1.0, -1.0, 2), ValueError, ["negative"]),
        (lambda step: jnp.where(step > 1, jnp.nan, 1.0), ValueError, ["non-finite"]),
        (0.5, TypeError, ["0.5"]),
    ],
)
def test_bad_schedules(schedule, error, fragments):
    refused(error, "schedule", *fragments, schedule=schedule)


def test_decaying_twice():
    refused(
        ValueError,
        "'weight_decay'",
        "decay",
        optimizer=adamw,
        hyperparameters={"learning_rate": 0.1, "weight_decay": 0.1},
    )


def test_a_decay_mode_that_the_optimizer_does_not_follow():
    refused(ValueError, "weight_decay_mode", "'l2'", optimizer=adamw, weight_decay_mode="l2")


def test_coupled_decay_needs_a_learning_rate():
    refused(
        ValueError,
        "'coupled'",
        "'learning_rate'",
        optimizer=lambda rate: optax.sgd(rate),
        hyperparameters={"rate": 0.1, "weight_decay": 0.1},
    )
