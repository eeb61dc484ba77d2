"""Loss trajectories recorded with microsoft/mup 1.0.0, the reference implementation of muP.

`fixtures/make_mup_fixture.py` says what was recorded: an MLP 12-64-64-5 with biases, base width 16.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mupjax import Model, Setting, muP, resolve_sweep, sweep
from tolerances import float_tolerance

FIXTURE = Path(__file__).parent / "fixtures" / "mup_mlp.npz"
WIDTH, BASE, STEPS = 64, 16, 40
RUNS = ("sgd", "sgd_momentum", "sgd_l2", "adam", "adam_l2", "adamw", "adamw_decoupled")
# The file is in double precision, the sweep in single: 40 steps, each with sums over 64 units.
TOLERANCE = float_tolerance(np.float32, operations=STEPS * WIDTH)


def decoupled(parametrization):
    """Weight decay left alone where mup multiplies it: in hidden layers under Adam.

    (In these coordinates the others are unscaled in Table 8, and follow from it elsewhere.)
    """
    table = dict(parametrization.table("adam"))
    table["hidden"] = dataclasses.replace(table["hidden"], weight_decay=0.0)
    name = f"{parametrization.name}, decoupled decay"
    return dataclasses.replace(parametrization, name=name, rows={"adam": table})


# Two routes in one program, for there is nothing to fold in Table 3: it has no multipliers
# (test_folded_it_is_table_3).
ROUTES = {"Table 8 by multipliers": muP.form(8), "Table 3 folded": muP}


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURE) as arrays:
        return {name: arrays[name] for name in arrays.files}


def nested(recorded, width):
    """The recorded weights, or at another width as many of them."""
    sizes = {"0/kernel": (12, width), "1/kernel": (width, width), "2/kernel": (width, 5)}
    sizes |= {"0/bias": (width,), "1/bias": (width,), "2/bias": (5,)}
    params = {str(layer): {} for layer in range(3)}
    for name, size in sizes.items():
        layer, kind = name.split("/")
        full = recorded[f"init/{name}"]
        params[layer][kind] = jnp.asarray(full[tuple(slice(n) for n in size)], jnp.float32)
    return params


def apply(params, x):
    for layer in range(3):
        here = params[str(layer)]
        x = x @ here["kernel"] + here["bias"][None]
        x = jax.nn.relu(x) if layer < 2 else x
    return x


def factory_of(recorded):
    def factory(width):
        return Model(init=lambda key: nested(recorded, width), apply=apply)

    return factory


def setting_of(recorded):
    data = (
        jnp.asarray(recorded["data/x"], jnp.float32),
        jnp.asarray(recorded["data/y"], jnp.int32),
    )

    def loss(predict, batch):
        logits = predict(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return Setting(
        "recorded batches",
        sample=lambda data, key, step: jax.tree.map(lambda a: a[step], data),
        loss=loss,
        validation=jax.tree.map(lambda a: a[0], data),
        data=data,
    )


# The weights were drawn for Table 8, in which only the hidden kernel's scale depends on the width.
INIT_EXPONENTS = {"0/kernel": 0, "1/kernel": 0.5, "2/kernel": 0, "*bias": 0}
COMMON = {"base_width": BASE, "widths": [WIDTH], "init_exponents": INIT_EXPONENTS}


def sgd(learning_rate, momentum):
    return optax.sgd(learning_rate, momentum)


def adam(learning_rate):
    return optax.adam(learning_rate)


# Each program trains several of the recorded runs; where in its grid they are.
PROGRAMS = {
    "sgd": (
        sgd,
        {"learning_rate": [0.03, 0.2], "momentum": [0.0, 0.9], "weight_decay": [0.0, 0.01]},
        "l2",
    ),
    "adam": (adam, {"learning_rate": 0.02, "weight_decay": [0.0, 0.01]}, "l2"),
    "adamw": (adam, {"learning_rate": 0.02, "weight_decay": [0.0, 0.1]}, "coupled"),
}
WHERE = {
    "sgd": ("sgd", {"learning_rate": 0.2, "momentum": 0.0, "weight_decay": 0.0}),
    "sgd_momentum": ("sgd", {"learning_rate": 0.03, "momentum": 0.9, "weight_decay": 0.0}),
    "sgd_l2": ("sgd", {"learning_rate": 0.03, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": ("adam", {"weight_decay": 0.0}),
    "adam_l2": ("adam", {"weight_decay": 0.01}),
    "adamw": ("adamw", {"weight_decay": 0.1}),
    "adamw_decoupled": ("adamw", {"weight_decay": 0.1}),
}


@pytest.fixture(scope="module")
def trained(recorded):
    """Each program with both forms of muP, with decoupled decay where it matters, and with SP."""
    datasets = {}
    for name, (optimizer, hyperparameters, mode) in PROGRAMS.items():
        several = [*ROUTES.values(), "SP"]
        if name == "adamw":
            several += map(decoupled, ROUTES.values())
        datasets[name] = sweep(
            factory_of(recorded),
            setting_of(recorded),
            optimizer,
            several,
            hyperparameters=hyperparameters,
            steps=STEPS,
            evaluations=1,
            application="multipliers",
            weight_decay_mode=mode,
            **COMMON,
        )
    return datasets


def losses(trained, run, parametrization):
    """Loss before every update, and on batch 0 after the last."""
    program, point = WHERE[run]
    trial = trained[program].sel(
        point | {"parametrization": parametrization, "width": WIDTH, "seed": 0}
    )
    return np.append(trial["train_loss"].values, trial["loss"].values)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("route", ROUTES)
def test_the_trajectory_is_that_of_the_reference_implementation(trained, recorded, route, run):
    form = decoupled(ROUTES[route]) if run == "adamw_decoupled" else ROUTES[route]
    got, expected = losses(trained, run, form.name), recorded[f"loss/{run}"]
    assert got.shape == expected.shape == (STEPS + 1,)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_the_standard_parametrization_takes_another_course(trained, recorded, run):
    got, expected = losses(trained, run, "SP"), recorded[f"loss/{run}"]
    assert np.max(np.abs(got / expected - 1)) > 1e-3
    assert np.max(np.abs(got / expected - 1)[10:]) > 1e-3


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("form", [muP, muP.form(8), muP.form(9)], ids=lambda p: p.name)
def test_folded_it_is_table_3(recorded, program, form):
    optimizer, hyperparameters, mode = PROGRAMS[program]
    table_3, folded = (
        resolve_sweep(
            factory_of(recorded),
            setting_of(recorded),
            optimizer,
            parametrization,
            hyperparameters=hyperparameters,
            application=application,
            weight_decay_mode=mode,
            **COMMON,
        ).factors(WIDTH)
        for parametrization, application in ((muP, "multipliers"), (form, "folded"))
    )
    assert set(folded.multiplier.values()) == {1.0}
    assert folded == table_3


def test_the_recorded_runs_differ_from_one_another(recorded):
    # Otherwise agreement with one would say nothing of, for example, its weight decay.
    for i, one in enumerate(RUNS):
        for other in RUNS[:i]:
            apart = recorded[f"loss/{one}"] / recorded[f"loss/{other}"] - 1
            assert np.max(np.abs(apart)) > 20 * TOLERANCE, (one, other)


@pytest.mark.parametrize("run", RUNS)
def test_resolved_factors_are_those_of_the_reference_parameter_groups(recorded, run):
    settings = json.loads(str(recorded["meta"]))["runs"][run]
    optimizer, hyperparameters, mode = PROGRAMS[WHERE[run][0]]
    parametrization = muP.form(8)
    if run == "adamw_decoupled":
        parametrization = decoupled(parametrization)
    factors = resolve_sweep(
        factory_of(recorded),
        setting_of(recorded),
        optimizer,
        parametrization,
        hyperparameters=hyperparameters,
        application="multipliers",
        weight_decay_mode=mode,
        **COMMON,
    ).factors(WIDTH)
    groups = json.loads(str(recorded[f"param_groups/{run}"]))
    assert set(groups) == set(factors.learning_rate)
    for path, group in groups.items():
        assert factors.learning_rate[path] * settings["lr"] == pytest.approx(group["lr"]), path
        decay = settings.get("weight_decay", 0.0)
        assert factors.weight_decay[path] * decay == pytest.approx(group["weight_decay"]), path
        assert factors.init[path] == 1.0, path
        assert factors.multiplier[path] == (0.25 if path == "2/kernel" else 1.0), path


def test_the_multiplier_is_that_of_the_reference_readout(recorded):
    params = nested(recorded, WIDTH)
    params["2"]["kernel"] = params["2"]["kernel"] * (BASE / WIDTH)
    setting = setting_of(recorded)
    loss = setting.loss(lambda x: apply(params, x), setting.validation)
    assert float(loss) == pytest.approx(recorded["loss/sgd"][0], rel=TOLERANCE)
