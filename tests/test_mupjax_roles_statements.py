"""Roles that are stated, models that have none, and models too large to draw."""

import functools
import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from layer_chains import (
    BASE,
    CLASSES,
    FEATURES,
    SEQUENCES,
    VECTORS,
    WIDE,
    anatomy,
    chain,
    linear,
    roles,
    setting_for,
)
from mupjax import Model, muP, resolve_sweep
from mupjax.adapters import as_model
from mupjax.models import MLP
from mupjax.resolve import dissect, resolve
from mupjax.roles import infer_roles

# --- Statements ---------------------------------------------------------------------------------

TWO_LAYERS = chain(("first", linear(FEATURES)), ("last", linear(out=CLASSES)))


def test_a_stated_role_overrides_inference():
    found = anatomy(TWO_LAYERS, stated_roles={"last/*": "fixed"})
    assert {p: leaf.role for p, leaf in found.leaves.items()} == {
        "first/kernel": "input",
        "first/bias": "vector",
        "last/kernel": "fixed",
        "last/bias": "fixed",
    }
    assert found.leaves["last/kernel"].stated
    assert not found.leaves["first/kernel"].stated


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"roles\['readout/\*'\] matches no parameter") as refusal:
        roles(TWO_LAYERS, stated_roles={"readout/*": "output"})
    assert "first/kernel" in str(refusal.value)
    models = {w: as_model(TWO_LAYERS, w, VECTORS) for w in (BASE, WIDE)}
    with pytest.raises(ValueError, match=r"init_exponents\['readout/\*'\] matches no parameter"):
        dissect(models, base_width=BASE, stated_init_exponents={"readout/*": 0.5})


def test_two_patterns_for_one_parameter_are_an_error():
    with pytest.raises(
        ValueError, match=r"'last/kernel' is matched by two patterns in roles, '\*/kernel' and 'las"
    ):
        roles(TWO_LAYERS, stated_roles={"*/kernel": "hidden", "last/*": "output"})


def test_an_unknown_role_is_an_error():
    with pytest.raises(
        ValueError, match=r"roles\['last/\*'\] = 'readout' is no role; choose one of"
    ):
        roles(TWO_LAYERS, stated_roles={"last/*": "readout"})


def test_two_patterns_for_one_initial_scale_are_an_error():
    models = {w: as_model(TWO_LAYERS, w, VECTORS) for w in (BASE, WIDE)}
    with pytest.raises(ValueError, match="two patterns in init_exponents"):
        dissect(models, base_width=BASE, stated_init_exponents={"last/kernel": 0.5, "*": 0.0})


def test_an_initial_exponent_passes_by_fixed_parameters_unless_they_are_named():
    models = {w: as_model(TWO_LAYERS, w, VECTORS) for w in (BASE, WIDE)}

    def exponents(stated):
        stated = {"first/*": 0.0, **stated}
        return dissect(models, base_width=BASE, stated_init_exponents=stated).init_exponents

    assert exponents({"last/*": 0.5})["last/bias"] == 0.0
    assert exponents({"last/bias": 0.5})["last/bias"] == 0.5


# --- What cannot be a family of widths ----------------------------------------------------------


def test_a_factory_that_ignores_the_width_is_an_error():
    factory = chain(("first", linear(FEATURES, 16)), ("last", linear(16, CLASSES)))
    with pytest.raises(
        ValueError, match="ignores its argument, so a parametrization would silently"
    ):
        roles(factory)
    with pytest.raises(ValueError, match="no parameter changes its shape between widths"):
        resolve_sweep(
            factory,
            VECTORS,
            lambda learning_rate: optax.sgd(learning_rate),
            muP,
            widths=[BASE],
            base_width=BASE,
            hyperparameters={"learning_rate": 0.1},
        )


@pytest.mark.parametrize(
    "size",
    [lambda n: n + 1, lambda n: n * n // 8, lambda n: 8 if n < 32 else 16],
    ids=["offset", "square", "slower"],
)
def test_disproportionate_growth_is_an_error(size):
    factory = chain(
        ("first", lambda n, rngs: nnx.Linear(FEATURES, size(n), rngs=rngs)),
        ("last", lambda n, rngs: nnx.Linear(size(n), CLASSES, rngs=rngs)),
    )
    with pytest.raises(ValueError, match="grow, but not in proportion to the width") as refusal:
        roles(factory)
    assert "first/" in str(refusal.value)
    assert "State it" in str(refusal.value)


def test_growth_is_checked_at_every_width():
    factory = chain(
        ("first", lambda n, rngs: nnx.Linear(FEATURES, n if n < 64 else 48, rngs=rngs)),
        ("last", lambda n, rngs: nnx.Linear(n if n < 64 else 48, CLASSES, rngs=rngs)),
    )
    assert roles(factory)["first/kernel"] == "input"
    with pytest.raises(ValueError, match="not in proportion"):
        roles(factory, widths=(8, 32, 64))


def test_a_depth_that_depends_on_the_width_is_an_error():
    def factory(width, rngs):
        return MLP(FEATURES, width, CLASSES, depth=1 if width == BASE else 2, rngs=rngs)

    with pytest.raises(ValueError, match="other parameters at width 32 than at width 8") as refusal:
        roles(factory)
    assert "hidden/1/bias" in str(refusal.value)


def test_a_number_of_axes_that_depends_on_the_width_is_an_error():
    shapes = {8: {"kernel": (6, 8)}, 32: {"kernel": (6, 4, 8)}}
    with pytest.raises(ValueError, match="its number of axes depends on the width"):
        infer_roles(shapes, base_width=8)


def test_widths_below_the_base_do_as_well():
    assert roles(TWO_LAYERS, widths=(4, 8), base=8)["last/kernel"] == "output"


# --- Models with state, or drawn too early ------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        lambda n, rngs: nnx.BatchNorm(n, rngs=rngs),
        lambda n, rngs: nnx.Dropout(0.5, rngs=rngs),
    ],
    ids=["batch norm", "dropout"],
)
def test_a_module_with_state_is_refused(layer):
    factory = chain(("first", linear(FEATURES)), ("stateful", layer), ("last", linear(out=1)))
    with pytest.raises(ValueError, match="has state other than parameters") as refusal:
        roles(factory)
    assert "stateful/" in str(refusal.value)


def test_a_recurrent_module_must_not_keep_a_key_for_its_carry():
    def factory(keep):
        class Net(nnx.Module):
            def __init__(self, width, *, rngs):
                cell = nnx.LSTMCell(FEATURES, width, rngs=rngs)
                self.rnn = nnx.RNN(cell, rngs=keep)
                self.last = nnx.Linear(width, CLASSES, rngs=rngs)

            def __call__(self, x):
                return self.last(jnp.asarray(self.rnn(x, rngs=nnx.Rngs(0)))[:, -1])

        return Net

    with pytest.raises(ValueError, match=r"nnx\.RNN: rngs=False when it is made"):
        roles(factory(True), SEQUENCES)
    found = roles(factory(False), SEQUENCES)
    gates = "igo"  # the forget gate is called if_ and hf
    assert {found[f"rnn/cell/i{g}/kernel"] for g in gates} == {"input"}
    assert {found[f"rnn/cell/h{g}/kernel"] for g in gates} == {"hidden"}
    assert {found[f"rnn/cell/h{g}/bias"] for g in gates} == {"vector"}
    model = as_model(factory(False), BASE, SEQUENCES)
    out = jax.eval_shape(model.apply, model.abstract_params(), SEQUENCES.validation)
    assert out.shape == (4, CLASSES)


def test_a_linen_module_with_state_is_refused():
    class WithBatchNorm(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=False)(linen.Dense(self.width)(x))
            return linen.Dense(CLASSES)(x)

    with pytest.raises(ValueError, match=r"variable collections other than params .*batch_stats"):
        roles(WithBatchNorm)


def test_a_factory_that_draws_its_own_random_numbers_is_refused():
    with pytest.raises(
        TypeError, match="every seed would start alike: write it as `lambda width, r"
    ):
        roles(lambda width: MLP(FEATURES, width, CLASSES, rngs=nnx.Rngs(0)))


def test_an_nnx_class_is_a_factory_itself():
    class Net(nnx.Module):
        def __init__(self, width, classes=CLASSES, *, rngs):
            self.first = nnx.Linear(FEATURES, width, rngs=rngs)
            self.last = nnx.Linear(width, classes, rngs=rngs)

        def __call__(self, x):
            return self.last(self.first(x))

    expected = {
        "first/bias": "vector",
        "first/kernel": "input",
        "last/bias": "fixed",
        "last/kernel": "output",
    }
    assert roles(Net) == expected
    assert roles(functools.partial(Net, classes=CLASSES + 1)) == expected
    with pytest.raises(TypeError, match="every seed would start alike"):
        roles(functools.partial(Net, rngs=nnx.Rngs(0)))


def test_something_that_is_no_model_is_refused():
    with pytest.raises(TypeError, match="must be a function of the width"):
        roles(MLP(FEATURES, 8, CLASSES, rngs=nnx.Rngs(0)).hidden)
    with pytest.raises(TypeError, match="returned int at width 8: expected a flax module"):
        roles(lambda width: width)
    with pytest.raises(ValueError, match="the model factory refuses width 8: din, width"):
        roles(lambda width, rngs: MLP(0, width, CLASSES, rngs=rngs))


# --- Nothing is allocated -----------------------------------------------------------------------


def test_roles_of_a_huge_model_are_found_without_allocating_it():
    # A kernel of 2**40 entries: 4 TiB.
    widths = (2**10, 2**20)
    expected = {"first/kernel": "input", "middle/kernel": "hidden", "last/kernel": "output"}
    factory = chain(("first", linear(4)), ("middle", linear()), ("last", linear(out=2)))
    found = anatomy(factory, setting_for((1, 4)), widths=widths, base=2**10)
    assert {path: found.leaves[path].role for path in expected} == expected
    factors = resolve(muP, found, "adam").factors(2**20)
    assert factors.learning_rate["middle/kernel"] == 2.0**-10


def test_roles_of_a_huge_linen_model_are_found_without_allocating_it():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width, name="middle")(linen.Dense(self.width, name="first")(x))
            return linen.Dense(2, name="last")(x)

    found = roles(Net, setting_for((1, 4)), widths=(2**10, 2**20), base=2**10)
    assert found["middle/kernel"] == "hidden"


def test_a_huge_model_goes_through_resolve_sweep():
    resolved = resolve_sweep(
        chain(("first", linear(FEATURES)), ("middle", linear()), ("last", linear(out=2))),
        VECTORS,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[2**20],
        base_width=2**10,
        hyperparameters={"learning_rate": 0.1},
        init_exponents={"first/kernel": 0, "middle/kernel": 0.5, "last/kernel": 0.5, "*bias": 0},
    )
    factors = resolved.factors(2**20)
    assert factors.init == {
        "first/bias": 1.0,
        "first/kernel": 1.0,
        "middle/bias": 1.0,
        "middle/kernel": 1.0,
        "last/bias": 1.0,
        "last/kernel": 2.0**-5,
    }
    assert "(1048576, 1048576)" in resolved.table(2**20)


@pytest.mark.parametrize(
    ("stated", "warned"), [("input", True), ("output", True), ("hidden", False)]
)
def test_a_statement_that_the_model_contradicts_is_warned_of(caplog, stated, warned):
    """Experts in one product: both of a matrix's axes grow."""

    def experts(width):
        def init(key):
            first, second = jax.random.split(key)
            return {
                "enter": jax.random.normal(first, (FEATURES, width)),
                "w": jax.random.normal(second, (3, width, width)) / width**0.5,
                "leave": jnp.ones((width, CLASSES)) / width**0.5,
            }

        def apply(params, x):
            h = jnp.einsum("bd,edh->beh", x @ params["enter"], params["w"])
            return h.mean(axis=1) @ params["leave"]

        return Model(init, apply)

    said = {"enter": "input", "w": stated, "leave": "output"}
    with caplog.at_level(logging.WARNING, logger="mupjax"):
        resolve_sweep(
            experts,
            VECTORS,
            lambda learning_rate: optax.adam(learning_rate),
            muP,
            roles=said,
            widths=[WIDE],
            base_width=BASE,
            hyperparameters={"learning_rate": 0.1},
        )
    assert ("'w' is stated to be of role" in caplog.text) == warned
