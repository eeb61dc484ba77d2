"""Widths that share a program: padded, they train as if alone, or are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mupjax
from mupjax.adapters import as_model
from mupjax.models import MLP, RMSNorm
from mupjax.plan import pads_exactly
from small_sweeps import (
    OUTPUTS,
    D,
    adam,
    assert_same_results,
    one_draw,
    regression,
    sgd,
    timing,
    unoptimised_programs,  # noqa: F401
)


def momentum(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def adamw(learning_rate, weight_decay=0.1):
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def mlp(width):
    """The built-in MLP with biases and norms, none of which starts as a constant."""

    def build(width, rngs):
        return MLP(D, width, OUTPUTS, depth=2, activation=jnp.tanh, norm=True, rngs=rngs)

    model = as_model(build, width, regression())
    return dataclasses.replace(model, init=one_draw(model.abstract_params()))


def mlp_sweep(optimizer, strategy, widths, rates):
    return mupjax.sweep(
        mlp,
        regression(),
        optimizer,
        ["SP", "muP", "NTP"],
        widths=widths,
        hyperparameters={"learning_rate": rates},
        steps=6,
        seeds=2,
        base_width=4,
        evaluations=2,
        strategy=strategy,
        init_exponents={
            "hidden/0/*": 0.0,
            "hidden/1/bias": 0.0,
            "norms/*": 0.0,
            "hidden/1/kernel": 0.5,
            "readout/kernel": 0.5,
        },
    )


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        pytest.param(momentum, [0.01, 0.1], marks=pytest.mark.slow),
        (adam, [1e-3, 1e-2]),
        pytest.param(adamw, [1e-3, 1e-2], marks=pytest.mark.slow),
    ],
)
def test_padded_widths_train_as_if_alone(optimizer, rates):
    padded = mlp_sweep(optimizer, "padded", [4, 6, 16], rates)
    assert timing(padded)["compilations"] == 1
    assert timing(padded)["programs"][0]["widths"] == [4, 6, 16]
    assert np.isfinite(padded.loss).all()
    # The narrowest is padded most.
    alone = [4, 6] if optimizer is momentum else [4]
    bucketed = mlp_sweep(optimizer, "bucketed", alone, rates)
    assert timing(bucketed)["compilations"] == len(alone)
    assert_same_results(padded.sel(width=alone), bucketed, steps=6)
    if optimizer is momentum:
        assert_same_results(mlp_sweep(optimizer, "auto", alone, rates), bucketed, steps=6)


class Normed(nnx.Module):
    """A net whose norm may ignore the true width, and whose padded units are not zero."""

    def __init__(self, width, norm, *, rngs):
        self.enter = nnx.Linear(D, width, rngs=rngs)
        self.norm = norm(width, rngs=rngs)
        self.readout = nnx.Linear(width, OUTPUTS, rngs=rngs)

    def __call__(self, x, width=None):
        x = jax.nn.sigmoid(self.enter(x))
        x = self.norm(x, width) if isinstance(self.norm, RMSNorm) else self.norm(x)
        return self.readout(x)


def normed_sweep(norm, strategy):
    return mupjax.sweep(
        lambda width, rngs: Normed(width, norm, rngs=rngs),
        regression(),
        sgd,
        "SP",
        widths=[4, 6],
        hyperparameters={"learning_rate": 0.1},
        steps=3,
        evaluations=1,
        base_width=4,
        strategy=strategy,
        init_exponents={"readout/kernel": 0.5, "enter/*": 0.0, "norm/*": 0.0},
    )


def test_units_that_an_activation_lifts_from_zero_are_not_counted_by_the_norm():
    padded, alone = (normed_sweep(RMSNorm, s) for s in ("padded", "bucketed"))
    assert timing(padded)["compilations"] == 1
    assert_same_results(padded, alone, steps=3)


def test_a_model_that_takes_its_width_and_ignores_it_is_never_padded():
    with pytest.raises(ValueError, match=r"at width 4, zero-padded to 6, it has another loss"):
        normed_sweep(nnx.LayerNorm, "padded")
    found = normed_sweep(nnx.LayerNorm, "auto")
    assert timing(found)["compilations"] == 2


def test_half_precision_is_no_reason_not_to_pad():
    class Half(nnx.Module):
        def __init__(self, width, *, rngs):
            self.enter = nnx.Linear(D, width, rngs=rngs, dtype=jnp.bfloat16)
            self.readout = nnx.Linear(width, OUTPUTS, rngs=rngs, dtype=jnp.bfloat16)

        def __call__(self, x, width=None):
            return self.readout(jnp.tanh(self.enter(x))).astype(jnp.float32)

    narrow, wide = (as_model(Half, width, regression()) for width in (48, 600))
    assert pads_exactly(narrow, wide, 48, regression())


def leaky(width):
    """A net whose last output is the largest absolute value stored beyond `width`."""

    shapes = {
        "enter": {"kernel": jnp.zeros((D, width))},
        "readout": {"kernel": jnp.zeros((width, OUTPUTS))},
    }

    def apply(params, x, width=None):
        enter, readout = params["enter"]["kernel"], params["readout"]["kernel"]
        if width is None:
            width = enter.shape[1]
        beyond = jnp.arange(enter.shape[1]) >= width
        largest = jnp.maximum(
            jnp.max(jnp.where(beyond[None, :], jnp.abs(enter), 0.0)),
            jnp.max(jnp.where(beyond[:, None], jnp.abs(readout), 0.0)),
        )
        out = jnp.tanh(x @ enter) @ readout
        return jnp.concatenate([out, jnp.broadcast_to(largest, (len(x), 1))], axis=1)

    return mupjax.Model(one_draw(shapes), apply, options=frozenset({"width"}))


def leak_setting():
    base = regression()
    return mupjax.Setting(
        "leak",
        base.sample,
        lambda predict, batch: jnp.mean((predict(batch[0])[:, :OUTPUTS] - batch[1]) ** 2),
        base.validation,
        base.data,
        metrics={"leak": lambda predict, batch: jnp.max(predict(batch[0])[:, OUTPUTS])},
    )


def with_constant(learning_rate):
    """Moves every coordinate by 0.02, whatever its gradient."""
    shift = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u + 0.02, updates))
    return optax.chain(optax.sgd(learning_rate), shift)


def test_padding_stays_zero_though_the_optimizer_moves_every_coordinate():
    model = leaky(6)
    unmasked = model.apply(model.init(jax.random.key(0)), jnp.ones((1, D)), width=4)
    assert float(unmasked[0, OUTPUTS]) > 0.01  # the leak would be seen
    found = mupjax.sweep(
        leaky,
        leak_setting(),
        with_constant,
        "SP",
        widths=[4, 6],
        hyperparameters={"learning_rate": [0.01, 0.1]},
        steps=4,
        base_width=4,
        strategy="padded",
        optimizer_family="sgd",
        init_exponents={"enter/*": 0.0, "readout/*": 0.5},
        evaluations=4,
    )
    assert float(abs(found.leak).max()) == 0.0
    assert np.isfinite(found.loss).all()


def scaled_by_shape(learning_rate):
    """As in Muon, the step depends on a matrix's shape, which padding changes."""

    def update(updates, state, params=None):
        def scale(u):
            return u * max(1.0, u.shape[1] / u.shape[0]) ** 0.5 if u.ndim == 2 else u

        return jax.tree.map(scale, updates), state

    shaped = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(shaped, optax.sgd(learning_rate))


@pytest.mark.parametrize("strategy", ["padded", "auto"])
def test_an_optimizer_that_looks_at_shapes_is_never_silently_padded(strategy):
    arguments = {
        "hyperparameters": {"learning_rate": 0.05},
        "steps": 3,
        "base_width": 4,
        "init_exponents": {"enter/*": 0.0, "readout/*": 0.5},
    }
    setting = leak_setting()
    try:
        found = mupjax.sweep(
            leaky, setting, scaled_by_shape, "SP", widths=[4, 16], strategy=strategy, **arguments
        )
    except ValueError as error:
        assert strategy == "padded"  # to refuse is right, but "auto" has another way
        assert "strategy" in str(error)  # noqa: PT017
        return
    alone = mupjax.sweep(
        leaky, setting, scaled_by_shape, "SP", widths=[4], strategy="bucketed", **arguments
    )
    assert_same_results(found.sel(width=[4]), alone, steps=3)
