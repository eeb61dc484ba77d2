"""What users of muP packages trip over where tables are equivalent, or are not, and on resuming."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mupjax import NTP, SP, mean_field, muP, results, sweep
from sine_regression import (
    BASE,
    COMMON,
    EPS,
    FEATURES,
    FIXED_MLP,
    OUTPUTS,
    SETTING,
    TOLERANCE,
    WIDTH,
    adam,
    curve,
    sgd,
)

# --- Which of the equivalent tables: all of them, by multipliers or folded ----------------------


def renamed(parametrization, name):
    return dataclasses.replace(parametrization, name=name)


def eps_unscaled(parametrization):
    adam_rows = {
        role: dataclasses.replace(row, adam_eps=0.0)
        for role, row in parametrization.table("adam").items()
    }
    name = f"{parametrization.name}, eps unscaled"
    return dataclasses.replace(parametrization, name=name, rows={"adam": adam_rows})


FORMS = {
    "muP": [muP, muP.form(8), muP.form(9), mean_field],
    "NTP": [NTP, renamed(NTP.form(3), "NTP (Table 3)"), NTP.form(8), NTP.form(9)],
    "SP": [SP, SP.form(8), SP.form(9)],
}
EQUIVALENT = [(forms[0].name, other.name) for forms in FORMS.values() for other in forms[1:]]
OPTIMIZERS: dict[str, Any] = {"sgd": (sgd, "l2", 0.05), "adam": (adam, "coupled", 0.05)}


def trained_by(application, family, listed):
    optimizer, mode, rate = OPTIMIZERS[family]
    return sweep(
        FIXED_MLP,
        SETTING,
        optimizer,
        listed,
        hyperparameters={"learning_rate": rate, "weight_decay": [0.0, 0.1]},
        weight_decay_mode=mode,
        application=application,
        optimizer_family=family,
        **COMMON,
    )


@pytest.fixture(scope="module")
def by_multipliers():
    every = [p for forms in FORMS.values() for p in forms]
    unscaled = [eps_unscaled(muP), eps_unscaled(muP.form(8))]
    return {
        "sgd": trained_by("multipliers", "sgd", every),
        "adam": trained_by("multipliers", "adam", every + unscaled),
    }


FOLDED = [muP.form(8), mean_field, NTP, SP.form(9)]


@pytest.fixture(scope="module")
def folded():
    return {family: trained_by("folded", family, FOLDED) for family in OPTIMIZERS}


@pytest.mark.parametrize("family", ["sgd", "adam"])
@pytest.mark.parametrize(("first", "other"), EQUIVALENT)
def test_equivalent_tables_train_alike(by_multipliers, family, first, other):
    dataset = by_multipliers[family]
    for decay in (0.0, 0.1):
        expected = curve(dataset, parametrization=first, weight_decay=decay)
        got = curve(dataset, parametrization=other, weight_decay=decay)
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["sgd", "adam"])
@pytest.mark.parametrize("name", [p.name for p in FOLDED])
def test_equivalent_routes_folded_or_by_multipliers(by_multipliers, folded, family, name):
    for variable in ("train_loss", "eval_loss"):
        got, expected = (
            runs[family][variable].sel(parametrization=name).values
            for runs in (folded, by_multipliers)
        )
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["sgd", "adam"])
def test_equivalence_is_not_trivial(by_multipliers, family):
    dataset = by_multipliers[family]
    curves = [curve(dataset, parametrization=name, weight_decay=0.1) for name in FORMS]
    curves.append(curve(dataset, parametrization="muP", weight_decay=0.0))
    for i, one in enumerate(curves):
        for other in curves[:i]:
            assert np.max(np.abs(one / other - 1)) > 1e-3


# --- Adam's epsilon -----------------------------------------------------------------------------


def test_adam_epsilon_unscaled_would_make_the_tables_differ(by_multipliers):
    # With the exponents of epsilon left out, Tables 3 and 8 are no longer the same training;
    # with them they are (test_equivalent_tables_train_alike, where epsilon is large too).
    unscaled = [eps_unscaled(p).name for p in (muP, muP.form(8))]
    dataset = by_multipliers["adam"]
    three, eight = (curve(dataset, parametrization=name, weight_decay=0.0) for name in unscaled)
    assert np.max(np.abs(three / eight - 1)) > 1e-3
    scaled = curve(dataset, parametrization="muP", weight_decay=0.0)
    assert np.max(np.abs(three / scaled - 1)) > 1e-3


def test_adam_epsilon_of_parameters_in_half_precision():
    half = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}

    class Half(nnx.Module):
        def __init__(self, width, rngs):
            self.first = nnx.Linear(FEATURES, width, rngs=rngs, **half)
            self.last = nnx.Linear(width, OUTPUTS, rngs=rngs, **half)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x))).astype(jnp.float32)

    dataset = sweep(
        lambda width, rngs: Half(width, rngs),
        SETTING,
        lambda learning_rate: optax.adam(learning_rate),
        muP,
        hyperparameters={"learning_rate": 0.01},
        init_exponents={"first/kernel": 0, "last/kernel": 0.5, "*/bias": 0},
        widths=[WIDTH],
        base_width=BASE,
        steps=2,
    )
    assert np.isfinite(curve(dataset)).all()


# --- Weight decay that the optimizer brings along -----------------------------------------------


def test_weight_decay_of_optax_adamw_is_scaled_as_the_engines(folded):
    dataset = sweep(
        FIXED_MLP,
        SETTING,
        lambda learning_rate, weight_decay: optax.adamw(
            learning_rate, eps=EPS, weight_decay=weight_decay
        ),
        [muP.form(8), NTP],
        hyperparameters={"learning_rate": 0.05, "weight_decay": [0.0, 0.1]},
        optimizer_family="adam",
        **COMMON,
    )
    for name in ("muP (Table 8)", "NTP"):
        for decay in (0.0, 0.1):
            where = {"parametrization": name, "weight_decay": decay}
            expected = curve(folded["adam"], **where)
            np.testing.assert_allclose(curve(dataset, **where), expected, rtol=TOLERANCE)


# --- A resumed run whose parametrization differs ------------------------------------------------


def interrupted(dataset, folder):
    """What an interruption after the first width leaves behind."""
    out = folder / "sweep.nc"
    results.save(dataset, results.part_path(out, WIDTH))
    return out


def resume(out, parametrizations):
    optimizer, mode, rate = OPTIMIZERS["sgd"]
    return sweep(
        FIXED_MLP,
        SETTING,
        optimizer,
        parametrizations,
        hyperparameters={"learning_rate": rate, "weight_decay": [0.0, 0.1]},
        weight_decay_mode=mode,
        optimizer_family="sgd",
        out=out,
        existing="resume",
        **COMMON,
    )


def test_resume_with_another_parametrization_is_refused(folded, tmp_path):
    out = interrupted(folded["sgd"], tmp_path)
    with pytest.raises(ValueError, match="width 32 was trained with another parametrization") as no:
        resume(out, [muP.form(8), mean_field, NTP, SP])
    text = str(no.value)
    assert "SP (Table 9)" in text
    assert "existing='replace'" in text
    # Nothing but one exponent, under the same name.
    table = dict(NTP.table("sgd"))
    table["hidden"] = dataclasses.replace(table["hidden"], learning_rate=0.25)
    other = dataclasses.replace(NTP, rows={**NTP.rows, "sgd": table})
    with pytest.raises(ValueError, match="another parametrization"):
        resume(out, [muP.form(8), mean_field, other, SP.form(9)])


def test_resume_names_what_differs_when_only_the_attention_scale_does(folded, tmp_path):
    out = interrupted(folded["sgd"], tmp_path)
    other = dataclasses.replace(NTP, attention=1.0)
    with pytest.raises(ValueError, match="another parametrization") as refusal:
        resume(out, [muP.form(8), mean_field, other, SP.form(9)])
    theirs, ours = str(refusal.value).split("(", 1)[1].split("). Use")[0].split(", not ")
    assert theirs != ours


def test_resume_with_the_same_parametrizations_runs_nothing_again(folded, tmp_path):
    out = interrupted(folded["sgd"], tmp_path)
    again = resume(out, FOLDED)
    assert '"compilations": 0' in again.attrs["timing"]
    np.testing.assert_array_equal(again["train_loss"], folded["sgd"]["train_loss"])
    assert math.isfinite(again["loss"].values.sum())
    assert not results.parts_folder(out).exists()
