"""What users of muP packages trip over in optimizers: how an update scales with the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mupjax import Model, sweep
from mupjax.optimizers import examine
from mupjax.roles import leaf_paths, map_leaves
from sine_regression import (
    BASE,
    COMMON,
    FEATURES,
    FIXED_MLP,
    OUTPUTS,
    SETTING,
    TOLERANCE,
    adam,
    curve,
    resolved,
    sgd,
)

# --- How an update scales with the gradient -----------------------------------------------------


def right_or_refused(build, check):
    """A case that cannot be handled may be refused, but not silently done wrong."""
    try:
        built = build()
    except (ValueError, TypeError):
        return
    check(built)


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
        (optax.sgd, "adam", "doubles with the gradient, as SGD's does"),
        (optax.adam, "sgd", "ignores the gradient's scale, as SGD's does not"),
        (optax.sgd, "sgd", None),
        (optax.adagrad, "adam", None),
    ],
)
def test_optimizer_family_that_is_stated_counts_but_not_in_silence(optimizer, stated, text, caplog):
    traits = examine(lambda learning_rate: optimizer(learning_rate), {"learning_rate": 0.1}, stated)
    assert traits.family == stated
    assert (text is None) == (not caplog.records)
    assert text is None or text in caplog.text


MATRICES = {"first": {"kernel": (6, 4)}, "last": {"kernel": (4, 3)}, "t": ()}


def mixed(sgd_times, adam_times):
    """SGD, and Adam for the first layer."""

    def label(params):
        return map_leaves(lambda path, _: "adam" if path.startswith("first") else "sgd", params)

    return lambda learning_rate: optax.partition(
        {
            "sgd": optax.sgd(sgd_times * learning_rate, momentum=0.9),
            "adam": optax.adam(adam_times * learning_rate),
        },
        label,
    )


@pytest.mark.parametrize("times", [(1.0, 1e-3), (1.0, 1.0), (1e-3, 1.0), (1e-6, 1.0)])
def test_optimizer_family_of_a_mixture_must_be_stated(times, caplog):
    """Whichever updates are larger: those of the others have their own row."""
    rates, optimizer = {"learning_rate": 0.1}, mixed(*times)
    with pytest.raises(ValueError, match="like Adam: state optimizer_family='adam'") as refusal:
        examine(optimizer, rates, params=MATRICES)
    assert "'last/kernel', 't' like SGD and 'first/kernel' without" in str(refusal.value)
    assert examine(optimizer, rates, "adam", params=MATRICES).family == "adam"
    assert not caplog.records
    assert examine(optimizer, rates, "sgd", params=MATRICES).family == "sgd"
    assert "ignores the gradient's scale (of 'first/kernel')" in caplog.text


@pytest.mark.parametrize("application", ["folded", "multipliers"])
@pytest.mark.parametrize("table", ["SP", "NTP", "muP"])
def test_what_is_updated_like_sgd_has_its_own_row_in_a_mixture_stated_to_be_adam(
    table, application, caplog
):
    """Of SGD alone, stated to be of Adam's family, every update is what it is without."""
    options = {
        **COMMON,
        "steps": 6,
        "hyperparameters": {"learning_rate": 0.05},
        "application": application,
    }
    plain = sweep(FIXED_MLP, SETTING, sgd, table, **options)
    stated = sweep(FIXED_MLP, SETTING, sgd, table, optimizer_family="adam", **options)
    assert "doubles with the gradient" in caplog.text
    np.testing.assert_allclose(curve(stated), curve(plain), rtol=TOLERANCE)
    assert curve(plain)[-1] < 0.9 * curve(plain)[0]


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
