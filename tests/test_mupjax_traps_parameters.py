"""What users of muP packages trip over in parameters: factors, roles, initial values, ties."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mupjax import SP, Setting, muP, sweep
from mupjax.adapters import as_model
from mupjax.models import MLP
from sine_regression import (
    BASE,
    BATCH,
    FEATURES,
    KEY,
    MLP_EXPONENTS,
    OUTPUTS,
    STEPS,
    TOLERANCE,
    WIDTH,
    M,
    adam,
    curve,
    mlp,
    resolved,
    sgd,
    train_by_hand,
    with_fixed_weights,
)
from tolerances import standard_error_band

# --- Silent no-op or wrong scale ----------------------------------------------------------------


def test_silent_no_op_every_parameter_of_the_model_gets_its_factor():
    factors = resolved(mlp, optimizer=adam, optimizer_family="adam", init_exponents=MLP_EXPONENTS)
    matrices = {"hidden/0/kernel": 1, "hidden/1/kernel": 1 / M, "readout/kernel": 1 / M}
    vectors = ["hidden/0/bias", "hidden/1/bias", "norms/0/scale", "norms/1/scale", "readout/bias"]
    found = factors.factors(WIDTH)
    assert found.learning_rate == matrices | dict.fromkeys(vectors, 1.0)
    # The readout starts as 1/width instead of 1/sqrt(width).
    assert found.init == dict.fromkeys(found.learning_rate, 1.0) | {"readout/kernel": M**-0.5}
    assert found.adam_eps == dict.fromkeys(found.learning_rate, 1 / M) | {
        "readout/kernel": 1.0,
        "readout/bias": 1.0,
    }
    by_gradient = resolved(mlp, init_exponents=MLP_EXPONENTS).factors(WIDTH)
    assert by_gradient.learning_rate == dict.fromkeys(vectors, float(M)) | {
        "hidden/0/kernel": M,
        "hidden/1/kernel": 1,
        "readout/kernel": 1 / M,
        "readout/bias": 1.0,
    }
    at_base = resolved(mlp, init_exponents=MLP_EXPONENTS).factors(BASE)
    for field in dataclasses.fields(at_base):
        factor = getattr(at_base, field.name)
        assert set(factor.values() if isinstance(factor, dict) else [factor]) == {1.0}


def test_silent_no_op_the_table_shows_every_parameter():
    shown = resolved(mlp, init_exponents=MLP_EXPONENTS).table(WIDTH)
    for path, shape in (("hidden/1/kernel", "(32, 32)"), ("readout/bias", "(3,)")):
        line = next(line for line in shown.split("\n") if line.startswith(path + " "))
        assert shape in line


def test_silent_no_op_a_misspelt_hyperparameter_is_refused():
    with pytest.raises(ValueError, match="unknown hyperparameter 'learning_rat'"):
        resolved(mlp, hyperparameters={"learning_rate": 0.1, "learning_rat": 0.1})
    with pytest.raises(TypeError, match="must name its hyperparameters"):
        resolved(mlp, optimizer=lambda **kwargs: optax.sgd(kwargs["learning_rate"]))


def test_silent_no_op_a_multiplier_for_a_role_that_the_model_lacks_is_refused():
    hyperparameters = {"learning_rate": 0.1, "hidden_learning_rate_multiplier": 2.0}
    with pytest.raises(ValueError, match="would do nothing: the model has no parameter of role"):
        resolved(
            lambda width, rngs: MLP(FEATURES, width, OUTPUTS, depth=1, rngs=rngs),
            hyperparameters=hyperparameters,
            init_exponents={"*": 0},
        )


def test_silent_no_op_the_base_width_must_be_given():
    with pytest.raises(ValueError, match="base_width must be given: the factors of muP"):
        resolved(mlp, base_width=None, init_exponents=MLP_EXPONENTS)
    # Under SP nothing scales, so nothing needs to be said.
    resolved(mlp, parametrization="SP", base_width=None, init_exponents=MLP_EXPONENTS)


# --- A parameter that matches no row, or two ----------------------------------------------------


class OddlyNamed(nnx.Module):
    def __init__(self, width, rngs):
        self.matrix = nnx.Param(jax.random.normal(rngs.params(), (FEATURES, width)))
        self.readout = nnx.Linear(width, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        return self.readout(jnp.tanh(x @ self.matrix[...]))


def oddly_named(width, rngs):
    return OddlyNamed(width, rngs)


def test_unmatched_parameter_there_is_no_default_role():
    with pytest.raises(ValueError, match="cannot infer the role of parameter 'matrix'"):
        resolved(oddly_named, init_exponents={"*": 0})
    stated = resolved(oddly_named, init_exponents={"*": 0}, roles={"matrix": "input"})
    assert stated.roles["matrix"] == "input"
    assert "input (stated)" in stated.table(WIDTH)


def test_doubly_matched_parameter():
    with pytest.raises(ValueError, match="'matrix' is matched by two patterns in roles"):
        resolved(oddly_named, init_exponents={"*": 0}, roles={"matrix": "input", "mat*": "hidden"})


# --- Initialisers that do not scale as the table assumes ----------------------------------------


def test_embedding_flax_draws_it_smaller_at_larger_width_and_mup_must_not():
    tokens = token_setting()

    def factory(width, rngs):
        return Untied(width, rngs)

    anatomy = resolved(factory, setting=tokens, init_exponents={"*kernel": 0.5, "*bias": 0})
    assert anatomy.anatomy.init_exponents["embed/embedding"] == 0.5
    factors = {width: anatomy.factors(width).init["embed/embedding"] for width in (BASE, WIDTH)}
    assert factors == {BASE: 1.0, WIDTH: M**0.5}

    def log_std(width):
        model = as_model(factory, width, tokens)
        seeds = jax.random.split(jax.random.key(0), 8)
        drawn = jax.jit(jax.vmap(lambda key: model.init(key)["embed"]["embedding"]))(seeds)
        return np.log(factors[width] * np.std(np.asarray(drawn), axis=(1, 2)))

    # The drawn values times the factor: the same initial scale at both widths.
    difference = log_std(WIDTH) - log_std(BASE)
    assert abs(difference.mean()) < standard_error_band(difference)


def test_glorot_follows_no_power_of_the_width_and_is_refused():
    def factory(width, rngs):
        glorot = nnx.initializers.glorot_normal()
        return MLPWithInit(width, glorot, rngs)

    with pytest.raises(ValueError, match="as with Glorot's initializer") as refusal:
        resolved(factory, init_exponents={"last/kernel": 0.5, "*/bias": 0})
    text = str(refusal.value)
    assert "'first/kernel'" in text
    assert "lecun_normal" in text
    # Glorot's std is (2 / (fan_in + fan_out))^(1/2): the power of 1/width, not of the width.
    power = math.log((FEATURES + WIDTH) / (FEATURES + BASE)) / (2 * math.log(WIDTH / BASE))
    found = re.search(r"init_exponents=\{'first/kernel': (.*?)\}", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(power, abs=0.02)
    stated = resolved(factory, init_exponents={"*/kernel": 0.5, "*/bias": 0})
    assert stated.factors(WIDTH).init["first/kernel"] == M**0.5


class MLPWithInit(nnx.Module):
    def __init__(self, width, kernel_init, rngs):
        self.first = nnx.Linear(FEATURES, width, kernel_init=kernel_init, rngs=rngs)
        self.last = nnx.Linear(width, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


# --- Tied embeddings ----------------------------------------------------------------------------

VOCABULARY = 11


def token_setting():
    rng = np.random.default_rng(1)
    data = jnp.asarray(rng.integers(VOCABULARY, size=(STEPS, BATCH, 4)), jnp.int32)

    def loss(predict, tokens):
        following = (3 * tokens + 1) % VOCABULARY
        logits = predict(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    return Setting("tokens", lambda data, key, step: data[step], loss, data[0], data)


class Untied(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.readout = nnx.Linear(width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.readout(self.embed(tokens))


class Tied(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.middle = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, tokens, readout_multiplier=1.0):
        hidden = jnp.tanh(self.middle(self.embed(tokens)))
        return self.embed.attend(hidden) * readout_multiplier


class TiedWithoutMultiplier(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.middle = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.middle(self.embed(tokens))))


def tied(width, rngs):
    return Tied(width, rngs)


TIED = {
    "setting": token_setting(),
    "init_exponents": {"embed/embedding": 0.5, "middle/kernel": 0.5, "middle/bias": 0},
    "roles": {"embed/*": "tied"},
}


@pytest.mark.parametrize("optimizer", [sgd, optax.adam], ids=["sgd", "adam"])
def test_tied_embedding_needs_a_table_whose_two_ends_agree(optimizer):
    with pytest.raises(ValueError, match="one tied matrix cannot serve both") as refusal:
        resolved(
            tied,
            optimizer=lambda learning_rate: optimizer(learning_rate),
            parametrization=SP,
            **TIED,
        )
    assert "muP" in str(refusal.value)
    assert "mean-field" in str(refusal.value)
    allowed = resolved(tied, optimizer=lambda learning_rate: optimizer(learning_rate), **TIED)
    assert allowed.factors(WIDTH).readout_multiplier == 1 / M
    assert allowed.roles["embed/embedding"] == "tied"


def test_tied_embedding_needs_a_model_that_multiplies_its_logits():
    with pytest.raises(ValueError, match="let the model's __call__ take `readout_multiplier`"):
        resolved(lambda width, rngs: TiedWithoutMultiplier(width, rngs), **TIED)


def test_tied_embedding_left_unstated_is_refused():
    # One embedding and no readout: by shapes alone it would be an input layer, and the logits
    # would grow with the width.
    unstated = {key: TIED[key] for key in ("setting", "init_exponents")}
    with pytest.raises(ValueError, match="no readout") as refusal:
        resolved(tied, **unstated)
    assert "roles={'embed/embedding': 'tied'}" in str(refusal.value)
    resolved(tied, roles={"embed/embedding": "input"}, **unstated)


def test_tied_embedding_trains_as_mup_prescribes():
    rate = 0.03
    factory = with_fixed_weights(tied, TIED["setting"])
    dataset = sweep(
        factory,
        TIED["setting"],
        lambda learning_rate: optax.adam(learning_rate),
        muP,
        hyperparameters={"learning_rate": rate},
        init_exponents=TIED["init_exponents"],
        roles=TIED["roles"],
        widths=[WIDTH],
        base_width=BASE,
        steps=STEPS,
        evaluations=1,
    )
    model = factory(WIDTH)
    params = model.init(KEY)
    # Flax draws it with std width**-1/2; muP starts it at the base width's scale.
    params["embed"]["embedding"] = params["embed"]["embedding"] * M**0.5
    transforms = {
        "embed/embedding": optax.adam(rate),
        "middle/kernel": optax.adam(rate / M),
        "middle/bias": optax.adam(rate),
    }
    expected = train_by_hand(
        params,
        transforms,
        lambda params, tokens: model.apply(params, tokens) / M,
        TIED["setting"],
    )
    np.testing.assert_allclose(curve(dataset), expected, rtol=TOLERANCE)
    assert expected[-1] < expected[0]
