"""What users of muP packages trip over, one section for each trap; most make no noise elsewhere."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mupjax import (
    NTP,
    SP,
    Model,
    Setting,
    mean_field,
    muP,
    resolve_sweep,
    results,
    sweep,
    wsd_schedule,
)
from mupjax.adapters import as_model
from mupjax.models import MLP
from mupjax.optimizers import check_schedule, examine
from mupjax.resolve import resolve
from mupjax.roles import leaf_paths, map_leaves
from tolerances import float_tolerance, standard_error_band

BASE, WIDTH, M = 8, 32, 4
STEPS, BATCH, FEATURES, OUTPUTS = 12, 16, 6, 3
# Single precision; every step sums over up to 32 units.
TOLERANCE = float_tolerance(np.float32, operations=STEPS * WIDTH)


# --- A small problem, and training by hand ------------------------------------------------------


def regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, BATCH, FEATURES))
    y = np.sin(x @ rng.normal(size=(FEATURES, OUTPUTS)))
    data = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    return Setting(
        "sines",
        sample=lambda data, key, step: jax.tree.map(lambda a: a[step], data),
        loss=lambda predict, batch: jnp.mean(jnp.square(predict(batch[0]) - batch[1])),
        validation=jax.tree.map(lambda a: a[0], data),
        data=data,
    )


SETTING = regression()
# Where the answer does not depend on it.
KEY = jax.random.key(0)


def with_fixed_weights(factory, setting=SETTING):
    """The same model, whose every seed starts from the same weights; biases are not zero."""

    @functools.cache
    def fixed(width):
        model = as_model(factory, width, setting)
        rng = np.random.default_rng(width)

        def draw(path, leaf):
            noise = rng.normal(size=leaf.shape)
            if leaf.ndim < 2:
                value = path.endswith("scale") + 0.1 * noise
            else:
                # Flax draws an embedding with std 1/sqrt(features).
                value = noise / leaf.shape[path.endswith("embedding")] ** 0.5
            return jnp.asarray(value, jnp.float32)

        params = map_leaves(draw, model.abstract_params())
        return dataclasses.replace(model, init=lambda key: jax.tree.map(lambda a: a, params))

    return fixed


def mlp(width, rngs):
    return MLP(FEATURES, width, OUTPUTS, depth=2, norm=True, rngs=rngs)


FIXED_MLP = with_fixed_weights(mlp)
MLP_EXPONENTS = {
    "hidden/0/kernel": 0,
    "hidden/1/kernel": 0.5,
    "readout/kernel": 0.5,
    "*bias": 0,
    "*scale": 0,
}
COMMON = {
    "base_width": BASE,
    "widths": [WIDTH],
    "init_exponents": MLP_EXPONENTS,
    "steps": STEPS,
    "evaluations": 1,
}
# So large that it decides as much as the gradients do.
EPS = 1e-2


def sgd(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def adam(learning_rate):
    return optax.adam(learning_rate, eps=EPS)


def resolved(factory, optimizer=sgd, parametrization: Any = muP, setting=SETTING, **options):
    """What the sweep would do, without training."""
    options = {
        "widths": [WIDTH],
        "base_width": BASE,
        "hyperparameters": {"learning_rate": 0.1},
        **options,
    }
    return resolve_sweep(factory, setting, optimizer, parametrization, **options)


def train_by_hand(params, transforms, predict, setting=SETTING, clip=math.inf):
    """Losses before every update; each parameter has an optimizer of its own, by path."""

    @jax.jit
    def step(params, states, batch):
        def loss_of(params):
            return setting.loss(lambda *inputs: predict(params, *inputs), batch)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm), gradient)
        gradients, now = leaf_paths(gradient), leaf_paths(params)
        moved, new_states = {}, {}
        for path, transform in transforms.items():
            update, new_states[path] = transform.update(gradients[path], states[path], now[path])
            moved[path] = now[path] + update
        return map_leaves(lambda path, leaf: moved[path], params), new_states, loss

    states = {path: transforms[path].init(leaf) for path, leaf in leaf_paths(params).items()}
    losses = []
    for t in range(STEPS):
        batch = setting.sample(setting.data, KEY, jnp.int32(t))
        params, states, loss = step(params, states, batch)
        losses.append(float(loss))
    return np.array(losses)


def curve(dataset, **where):
    return dataset["train_loss"].sel(where).values.ravel()


def right_or_refused(build, check):
    """A case that cannot be handled may be refused, but not silently done wrong."""
    try:
        built = build()
    except (ValueError, TypeError):
        return
    check(built)


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
    assert "init_exponents={'first/kernel': ...}" in text
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


# --- The attention scale ------------------------------------------------------------------------

SEQUENCE = jax.random.normal(jax.random.key(2), (4, 3, FEATURES))
SEQUENCES = Setting(
    "sequences",
    lambda data, key, step: SEQUENCE,
    lambda predict, batch: jnp.mean(jnp.square(predict(batch))),
    SEQUENCE,
)


class Attending(nnx.Module):
    def __init__(self, width, heads, embed, options, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs) if embed else None
        into = width if embed else FEATURES
        self.attention = nnx.MultiHeadAttention(
            heads, in_features=into, qkv_features=width, decode=False, rngs=rngs, **options
        )
        self.last = nnx.Linear(into, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        x = x if self.first is None else self.first(x)
        return self.last(self.attention(x))


def attending(heads, embed=True, **options):
    return lambda width, rngs: Attending(width, heads(width), embed, options, rngs)


ATTENTION = {"setting": SEQUENCES, "init_exponents": {"*": 0.0}}
LARGER_HEADS = attending(lambda width: 2)
# Initial values that need no correction, so that only the attention scale is seen.
NO_CORRECTION = {
    "first/*": 0.0,
    "attention/*/kernel": 0.5,
    "attention/*/bias": 0.0,
    "last/kernel": 1.0,
}


def test_attention_scale_larger_heads_must_be_said_what_the_model_does():
    with pytest.raises(ValueError, match=r"attention='1/sqrt\(head_dim\)'") as refusal:
        resolved(LARGER_HEADS, **ATTENTION)
    text = str(refusal.value)
    assert "'attention/query/" in text
    assert "attention='1/head_dim'" in text
    assert "keep the head size fixed" in text
    with pytest.raises(ValueError, match="attention must be"):
        resolved(LARGER_HEADS, attention="1/d", **ATTENTION)
    # SP divides by the root itself: nothing to say.
    resolved(LARGER_HEADS, parametrization=SP, **ATTENTION)


def test_attention_scale_more_heads_of_one_size_need_nothing():
    more = resolved(attending(lambda width: width // 4), **ATTENTION)
    assert set(more.factors(WIDTH).multiplier.values()) == {1.0}
    assert more.roles["attention/query/kernel"] == "hidden"


def with_factors(params, factors):
    """The parameters as the model uses them at the start."""
    return map_leaves(
        lambda path, leaf: leaf * factors.init[path] * factors.multiplier[path], params
    )


def attend_by_hand(params, x, scale):
    params = jax.tree.map(np.asarray, params)

    def project(name, h):
        layer = params["attention"][name]
        return np.einsum("btn,nhd->bthd", h, layer["kernel"]) + layer["bias"]

    h = x @ params["first"]["kernel"] + params["first"]["bias"]
    query, key, value = (project(name, h) for name in ("query", "key", "value"))
    logits = scale * np.einsum("bthd,bshd->bhts", query, key)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhts,bshd->bthd", weights, value)
    out = params["attention"]["out"]
    h = np.einsum("bthd,hdn->btn", mixed, out["kernel"]) + out["bias"]
    return h @ params["last"]["kernel"] + params["last"]["bias"]


@pytest.mark.parametrize("application", ["folded", "multipliers"])
def test_attention_scale_one_over_the_head_size_relative_to_the_base(application):
    of_sweep = resolved(
        LARGER_HEADS,
        setting=SEQUENCES,
        init_exponents=NO_CORRECTION,
        attention="1/sqrt(head_dim)",
        application=application,
    )
    assert of_sweep.roles["attention/query/kernel"] == "query"
    assert of_sweep.roles["attention/query/bias"] == "query_vector"
    model = with_fixed_weights(LARGER_HEADS, SEQUENCES)(WIDTH)
    params = model.init(KEY)
    apply = jax.jit(model.apply)
    got = apply(with_factors(params, of_sweep.factors(WIDTH)), SEQUENCE)
    scale = muP.attention_scale(head_dim=WIDTH // 2, base_head_dim=BASE // 2)
    expected = attend_by_hand(params, np.asarray(SEQUENCE), scale)
    rtol = float_tolerance(np.float32, operations=WIDTH)
    largest = np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * largest)
    assert np.max(np.abs(apply(params, SEQUENCE) - expected)) > 1e-2 * largest


def test_attention_scale_a_model_that_divides_by_the_head_size_itself():
    own = resolved(LARGER_HEADS, attention="1/head_dim", application="multipliers", **ATTENTION)
    assert set(own.factors(WIDTH).multiplier.values()) == {1.0}
    # SP wants the root: the query projection has to carry the rest.
    standard = resolved(
        LARGER_HEADS,
        parametrization=SP,
        attention="1/head_dim",
        application="multipliers",
        **ATTENTION,
    )
    assert standard.factors(WIDTH).multiplier["attention/query/kernel"] == M**0.5


@pytest.mark.parametrize("parametrization", [muP, mean_field], ids=lambda p: p.name)
def test_attention_scale_a_query_that_reads_finite_features_stays_an_input_layer(parametrization):
    both = {
        said: resolved(
            attending(lambda width: 2, embed=False),
            optimizer=optax.adam,
            parametrization=parametrization,
            attention=said,
            application="multipliers",
            **ATTENTION,
        ).factors(WIDTH)
        for said in ("1/head_dim", "1/sqrt(head_dim)")
    }
    path = "attention/query/kernel"
    plain, carrying = both["1/head_dim"], both["1/sqrt(head_dim)"]
    assert carrying.multiplier[path] == M**-0.5 * plain.multiplier[path]
    assert carrying.learning_rate[path] == plain.learning_rate[path] == 1.0
    assert carrying.init[path] == plain.init[path] == 1.0


def test_attention_scale_where_number_and_size_of_heads_grow():
    factors = resolved(
        attending(lambda width: {8: 2, 32: 4}[width]),
        attention="1/sqrt(head_dim)",
        application="multipliers",
        **ATTENTION,
    ).factors(WIDTH)
    # From 2 heads of 4 to 4 heads of 8: the head size doubles while the width quadruples.
    for leaf in ("kernel", "bias"):
        assert factors.multiplier[f"attention/query/{leaf}"] == pytest.approx(2**-0.5)


def test_attention_scale_of_a_head_size_that_goes_as_no_power_is_refused():
    factory = attending(lambda width: {8: 2, 16: 2, 32: 4}[width])
    with pytest.raises(
        ValueError, match=r"4 at width 8, 8 at width 16, 8 at width 32\) goes as no"
    ):
        resolved(factory, widths=[16, 32], attention="1/sqrt(head_dim)", **ATTENTION)
    # Nothing to make up for.
    resolved(factory, widths=[16, 32], attention="1/head_dim", **ATTENTION)


class LinenAttending(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width, name="first")(x)
        x = linen.MultiHeadDotProductAttention(2, normalize_qk=True, name="attention")(x)
        return linen.Dense(OUTPUTS, name="last")(x)


@pytest.mark.parametrize(
    "factory",
    [attending(lambda width: 2, normalize_qk=True), LinenAttending],
    ids=["nnx", "linen"],
)
def test_attention_scale_is_not_lost_in_a_norm_of_the_queries(factory):
    of_sweep = resolved(
        factory,
        attention="1/sqrt(head_dim)",
        setting=SEQUENCES,
        init_exponents={**NO_CORRECTION, "attention/*_ln/scale": 0.0},
    )
    factors = of_sweep.factors(WIDTH)
    assert of_sweep.roles["attention/query_ln/scale"] == "query_vector"
    assert {path for path, factor in factors.init.items() if factor != 1} == {
        "attention/query_ln/scale"
    }
    model = with_fixed_weights(factory, SEQUENCES)(WIDTH)
    params = model.init(KEY)
    apply = jax.jit(model.apply)
    before = apply(params, SEQUENCE)
    after = apply(with_factors(params, factors), SEQUENCE)
    assert jnp.max(jnp.abs(after - before)) > 1e-3 * jnp.max(jnp.abs(before))


# --- Weight decay -------------------------------------------------------------------------------


def column(table, name):
    lines = [line.split("  ") for line in table.split("\n")[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    where = cells[0].index(name)
    return {row[0]: float(row[where]) for row in cells[1:]}


@pytest.fixture(scope="module")
def anatomy():
    return resolved(mlp, init_exponents=MLP_EXPONENTS).anatomy


@pytest.mark.parametrize("parametrization", [muP, mean_field, NTP, SP], ids=lambda p: p.name)
@pytest.mark.parametrize("family", ["sgd", "adam", "spectral"])
def test_weight_decay_shrinks_every_layer_alike_per_step(anatomy, parametrization, family):
    coupled = resolve(parametrization, anatomy, family, weight_decay_mode="coupled")
    factors = coupled.factors(WIDTH)
    for path, rate in factors.learning_rate.items():
        assert rate * factors.weight_decay[path] == pytest.approx(1.0), path
    assert set(column(coupled.table(WIDTH), "lr*wd").values()) == {1.0}
    assert column(coupled.table(WIDTH), "lr") == pytest.approx(factors.learning_rate, rel=1e-3)
    independent = resolve(parametrization, anatomy, family, weight_decay_mode="independent")
    assert set(independent.factors(WIDTH).weight_decay.values()) == {1.0}
    assert set(column(independent.table(WIDTH), "lr*wd").values()) == {1.0}
    assert "weight decay independent" in independent.table(WIDTH)


def test_weight_decay_twice_is_refused():
    with pytest.raises(ValueError, match="would decay them once more"):
        resolved(
            mlp,
            optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.1),
            hyperparameters={"learning_rate": 0.1, "weight_decay": 0.1},
            init_exponents=MLP_EXPONENTS,
        )


@pytest.mark.parametrize("mode", ["l2", "independent"])
def test_weight_decay_of_the_optimizer_is_refused_in_another_mode(mode):
    with pytest.raises(
        ValueError, match="applies coupled weight decay by itself, but weight_decay"
    ):
        resolved(
            mlp,
            optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.1),
            weight_decay_mode=mode,
            init_exponents=MLP_EXPONENTS,
        )


def test_weight_decay_l2_inside_adam_cannot_be_scaled_from_outside():
    def adam_with_l2(learning_rate):
        return optax.chain(optax.add_decayed_weights(0.01), optax.adam(learning_rate))

    options = {"optimizer": adam_with_l2, "init_exponents": MLP_EXPONENTS}
    with pytest.raises(ValueError, match="which muP cannot scale per layer") as refusal:
        resolved(mlp, **options)
    assert "weight_decay_mode='l2'" in str(refusal.value)
    resolved(mlp, parametrization=SP, **options)


def test_weight_decay_l2_inside_sgd_is_scaled():
    def sgd_with_l2(learning_rate):
        return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(learning_rate, momentum=0.9))

    assert examine(sgd_with_l2, {"learning_rate": 0.1}).own_decay == "decoupled"
    factors = resolved(
        mlp, optimizer=sgd_with_l2, weight_decay_mode="l2", init_exponents=MLP_EXPONENTS
    ).factors(WIDTH)
    assert factors.weight_decay["hidden/0/kernel"] == 1 / M
    assert factors.weight_decay["readout/kernel"] == M


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


# --- Learning-rate schedules --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (optax.constant_schedule(0.1), "schedule peaks at 0.1 within 12 steps, not at 1"),
        (optax.linear_schedule(3.0, 0.0, 12), "schedule peaks at 3 within"),
        (optax.linear_schedule(1.0, -1.0, 12), "negative or non-finite"),
        (lambda step: jnp.where(step < 3, 1.0, jnp.nan), "negative or non-finite"),
    ],
)
def test_schedule_must_have_a_unit_peak(schedule, reason):
    with pytest.raises(ValueError, match=reason):
        check_schedule(schedule, STEPS)
    with pytest.raises(ValueError, match=reason):
        sweep(
            mlp, SETTING, sgd, muP, hyperparameters={"learning_rate": 0.1}, schedule=schedule,
            **COMMON,
        )  # fmt: skip


def test_schedule_of_warmup_stable_decay_has_a_unit_peak():
    for steps in (1, 2, 10, 1000):
        check_schedule(wsd_schedule(steps), steps)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=3, decay_steps=STEPS)
RATES, DECAY, NEVER, OFTEN = [0.01, 0.05], 0.1, 1e6, 0.3


@pytest.fixture(scope="module")
def scheduled():
    """A schedule, and clipping by norms that are never and often reached."""

    return sweep(
        FIXED_MLP,
        SETTING,
        lambda learning_rate: optax.adam(learning_rate, eps=EPS),
        [muP, muP.form(8)],
        hyperparameters={
            "learning_rate": RATES,
            "max_gradient_norm": [OFTEN, NEVER],
            "weight_decay": DECAY,
        },
        optimizer_family="adam",
        application="multipliers",
        schedule=SCHEDULE,
        **COMMON,
    )


def scheduled_by_hand(anatomy, parametrization, rate, clip=math.inf):
    """AdamW with optax, parameter by parameter."""
    factors = resolve(parametrization, anatomy, "adam", application="multipliers").factors(WIDTH)
    model = FIXED_MLP(WIDTH)

    def predict(params, x):
        return model.apply(map_leaves(lambda path, w: w * factors.multiplier[path], params), x)

    def of_layer(path):
        # A warm-up that pinned every layer to the global rate would not be this product.
        return lambda step: rate * factors.learning_rate[path] * SCHEDULE(step)

    transforms = {
        path: optax.adamw(
            of_layer(path),
            eps=EPS * factors.adam_eps[path],
            weight_decay=DECAY * factors.weight_decay[path],
        )
        for path in factors.init
    }
    params = map_leaves(lambda path, leaf: leaf * factors.init[path], model.init(KEY))
    return train_by_hand(params, transforms, predict, clip=clip)


def test_schedule_with_warmup_and_cosine_acts_before_the_layers_factor(scheduled, anatomy):
    got = curve(scheduled, parametrization="muP", learning_rate=RATES[1], max_gradient_norm=NEVER)
    expected = scheduled_by_hand(anatomy, muP, RATES[1])
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


def test_schedule_leaves_the_rates_swept(scheduled):
    slow, fast = (
        curve(scheduled, parametrization="muP", learning_rate=rate, max_gradient_norm=NEVER)
        for rate in RATES
    )
    assert slow[0] == fast[0]
    assert not np.allclose(slow, fast, rtol=1e-2)


# --- Clipping -----------------------------------------------------------------------------------


def test_clipping_at_a_norm_that_is_never_reached_changes_nothing(scheduled):
    forms = [
        curve(scheduled, parametrization=name, learning_rate=RATES[1], max_gradient_norm=NEVER)
        for name in ("muP", "muP (Table 8)")
    ]
    np.testing.assert_allclose(*forms, rtol=TOLERANCE)
    for name, free in zip(("muP", "muP (Table 8)"), forms, strict=True):
        where = {"parametrization": name, "learning_rate": RATES[1]}
        often = curve(scheduled, **where, max_gradient_norm=OFTEN)
        assert not np.allclose(often, free, rtol=1e-3)


def test_clipping_is_by_the_norm_of_the_gradient(scheduled, anatomy):
    # Table 8 by multipliers: the optimizer trains the very parameters of mup's own code.
    where = {"parametrization": "muP (Table 8)", "max_gradient_norm": OFTEN}
    expected = scheduled_by_hand(anatomy, muP.form(8), RATES[1], clip=OFTEN)
    got = curve(scheduled, learning_rate=RATES[1], **where)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


def clipped_adam(learning_rate):
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adam(learning_rate))


def test_clip_inside_the_optimizer_is_refused_where_epsilon_scales():
    # Epsilon is scaled by scaling Adam's gradients, in front of which the clip would stand.
    with pytest.raises(ValueError, match="max_gradient_norm"):
        resolved(mlp, optimizer=clipped_adam)
    resolved(mlp, parametrization="SP", optimizer=clipped_adam)


# --- How an update scales with the gradient -----------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "family", "own_decay"),
    [
        (lambda learning_rate: optax.sgd(learning_rate), "sgd", "none"),
        (lambda learning_rate: optax.sgd(learning_rate, momentum=0.9), "sgd", "none"),
        (lambda learning_rate: optax.sgd(learning_rate, 0.9, nesterov=True), "sgd", "none"),
        (lambda learning_rate: optax.adam(learning_rate), "adam", "none"),
        (lambda learning_rate: optax.adamw(learning_rate), "adam", "decoupled"),
        (lambda learning_rate: optax.lion(learning_rate), "adam", "decoupled"),
        (lambda learning_rate: optax.lion(learning_rate, weight_decay=0.0), "adam", "none"),
        (lambda learning_rate: optax.rmsprop(learning_rate), "adam", "none"),
        (lambda learning_rate: optax.contrib.muon(learning_rate), "spectral", "none"),
        (
            lambda learning_rate: optax.chain(
                optax.clip_by_global_norm(1.0), optax.sgd(learning_rate)
            ),
            "sgd",
            "none",
        ),
    ],
    ids=[
        "sgd",
        "momentum",
        "nesterov",
        "adam",
        "adamw",
        "lion",
        "lion without decay",
        "rmsprop",
        "muon",
        "clipped sgd",
    ],
)
def test_optimizer_family_is_found_out(optimizer, family, own_decay):
    traits = examine(optimizer, {"learning_rate": 0.1})
    assert (traits.family, traits.own_decay) == (family, own_decay)


def test_optimizer_family_adagrad_must_be_stated():
    def adagrad(learning_rate):
        return optax.adagrad(learning_rate)

    with pytest.raises(
        ValueError, match="cannot tell how this optimizer's update scales"
    ) as refusal:
        examine(adagrad, {"learning_rate": 0.1})
    assert "state optimizer_family=" in str(refusal.value)
    assert examine(adagrad, {"learning_rate": 0.1}, "adam").family == "adam"


@pytest.mark.parametrize(
    ("optimizer", "stated", "text"),
    [
        (optax.sgd, "adam", "doubles with the gradient, as of family 'sgd'"),
        (optax.adam, "sgd", "ignores the gradient's scale, as of family 'adam'"),
        (optax.sgd, "sgd", None),
        (optax.adagrad, "adam", None),
    ],
)
def test_optimizer_family_that_is_stated_counts_but_not_in_silence(optimizer, stated, text, caplog):
    traits = examine(lambda learning_rate: optimizer(learning_rate), {"learning_rate": 0.1}, stated)
    assert traits.family == stated
    assert (text is None) == (not caplog.records)
    assert text is None or text in caplog.text


def test_optimizer_family_of_adam_with_a_large_epsilon_must_be_stated():
    with pytest.raises(ValueError, match="cannot tell"):
        examine(adam, {"learning_rate": 0.1})


@pytest.mark.parametrize("every", [2, 4])
def test_an_optimizer_that_accumulates_gradients_shows_its_decay(every):
    def accumulating(learning_rate):
        decaying = optax.adamw(learning_rate, weight_decay=0.1)
        return optax.MultiSteps(decaying, every).gradient_transformation()

    traits = examine(accumulating, {"learning_rate": 0.1})
    assert (traits.family, traits.own_decay) == ("adam", "decoupled")


def test_an_optimizer_that_shows_nothing_is_refused():
    def accumulating(learning_rate):
        return optax.MultiSteps(optax.adamw(learning_rate), 5).gradient_transformation()

    with pytest.raises(ValueError, match="moves nothing in its update number 12"):
        examine(accumulating, {"learning_rate": 0.1}, "adam")


def test_optimizer_family_is_not_that_of_the_first_update_alone():
    # RAdam's first updates are momentum steps; from the sixth on it is Adam.
    right_or_refused(
        lambda: examine(lambda learning_rate: optax.radam(learning_rate), {"learning_rate": 0.1}),
        lambda traits: _expect_equal(traits.family, "adam"),
    )


def _expect_equal(got, expected):
    assert got == expected


# --- Muon and friends ---------------------------------------------------------------------------


def three_matrices(width):
    def init(key):
        first, middle, last = jax.random.split(key, 3)
        return {
            "first": {"kernel": jax.random.normal(first, (FEATURES, width))},
            "middle": {"kernel": jax.random.normal(middle, (width, width)) / width**0.5},
            "last": {"kernel": jax.random.normal(last, (width, OUTPUTS)) / width**0.5},
        }

    def apply(params, x):
        x = jnp.tanh(x @ params["first"]["kernel"])
        return jnp.tanh(x @ params["middle"]["kernel"]) @ params["last"]["kernel"]

    return Model(init, apply)


def muon_for_hidden(learning_rate):
    """Muon by name, Adam for the first and the last layer."""

    def dimensions(params):
        return map_leaves(
            lambda path, leaf: (
                optax.contrib.MuonDimensionNumbers() if path.startswith("middle") else None
            ),
            params,
        )

    return optax.contrib.muon(learning_rate, ns_steps=1, muon_weight_dimension_numbers=dimensions)


FRIENDS = {
    "adam": (lambda learning_rate: optax.adam(learning_rate), None),
    "lion": (lambda learning_rate: optax.lion(learning_rate), None),
    "muon for hidden layers, stated": (muon_for_hidden, "spectral"),
    "muon for hidden layers": (muon_for_hidden, None),
    "muon for every matrix": (
        lambda learning_rate: optax.contrib.muon(learning_rate, ns_steps=3),
        None,
    ),
    "muon with consistent rms": (
        lambda learning_rate: optax.contrib.muon(learning_rate, ns_steps=3, consistent_rms=0.2),
        None,
    ),
}


@pytest.mark.parametrize("name", FRIENDS)
def test_muon_and_friends_update_has_the_spectral_norm_that_mup_asks_for(name):
    # Yang, Simon and Bernstein (arXiv 2310.17813): the norm of an update goes as
    # sqrt(fan_out / fan_in), in every layer, here for a gradient of rank one.
    optimizer, family = FRIENDS[name]
    wide = 16 * BASE

    def norms(of_sweep, width):
        rng = np.random.default_rng(width)
        params = jax.tree.map(
            lambda w: jnp.zeros(w.shape, w.dtype), three_matrices(width).abstract_params()
        )
        gradient = jax.tree.map(
            lambda w: jnp.asarray(
                rng.normal(size=(w.shape[0], 1)) * rng.normal(size=(1, w.shape[1])), jnp.float32
            ),
            params,
        )
        transform = optimizer(0.1)
        first_update = jax.jit(lambda g: transform.update(g, transform.init(params), params)[0])
        updates = first_update(gradient)
        factors = of_sweep.factors(width).learning_rate
        return {
            path: factors[path] * np.linalg.norm(update, 2)
            for path, update in leaf_paths(updates).items()
        }

    def check(of_sweep):
        low, high = norms(of_sweep, BASE), norms(of_sweep, wide)
        growth = {path: high[path] / low[path] for path in low}
        expected = {"first/kernel": 4.0, "middle/kernel": 1.0, "last/kernel": 0.25}
        # For rank one, Newton-Schulz is exact up to a common factor; a wrong power is off by 4.
        assert growth == pytest.approx(expected, rel=0.1)

    right_or_refused(
        lambda: resolved(
            three_matrices,
            optimizer=optimizer,
            optimizer_family=family,
            widths=[wide],
            init_exponents={"first/*": 0, "middle/*": 0.5, "last/*": 0.5},
        ),
        check,
    )


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
