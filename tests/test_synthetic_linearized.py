"""Linearized networks: linear in the displacement, right at first order.

That the engine trains them as the closed form says is in `test_theory_vs_simulation_ntk.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mupjax
from mupjax.roles import Layout
from synthetic.linearized import fixed_points, linearize, random_features, two_layer_relu

D, N = 3, 8
X = np.random.default_rng(0).normal(size=(5, D))
Y = np.sin(X[:, 0])


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_network_is_the_sum_over_units() -> None:
    model = two_layer_relu(D)(N)
    params = model.init(jax.random.key(0))
    W, a = np.asarray(params["hidden"]["kernel"]), np.asarray(params["readout"]["kernel"])
    by_hand = [sum(a[j, 0] * max(x @ W[:, j], 0) for j in range(N)) / np.sqrt(N) for x in X]
    np.testing.assert_allclose(model.apply(params, X), by_hand, rtol=1e-5, atol=1e-6)
    draws = jax.vmap(two_layer_relu(D)(1000).init)(jax.random.split(jax.random.key(1), 10))
    for leaf in jax.tree.leaves(draws):
        # Unit variance: the standard error of a variance of N Gaussians is sqrt(2 / N).
        assert abs(float(jnp.mean(leaf**2)) - 1) < 4 * np.sqrt(2 / leaf.size)


def test_the_linearization_is_the_first_order_expansion() -> None:
    with jax.enable_x64(True):
        model, linear = two_layer_relu(D)(N), linearize(two_layer_relu(D))(N)
        params = linear.init(jax.random.key(3))
        initial = params["initial"]
        np.testing.assert_array_equal(linear.apply(params, X), model.apply(initial, X))
        key = jax.random.key(4)
        move = jax.tree.map(lambda p: jax.random.normal(key, p.shape), initial)

        def at(t: float) -> jax.Array:
            shift = jax.tree.map(lambda m: t * m, move)
            return linear.apply({"initial": initial, "displacement": shift}, X)

        # Linear: twice as far is twice the change.
        np.testing.assert_allclose(at(2.0) - at(0.0), 2 * (at(1.0) - at(0.0)), rtol=1e-12)
        # And tangent: what is left of the model itself is of second order.
        for t in (1e-2, 1e-3):
            moved = jax.tree.map(lambda p, m, t=t: p + t * m, initial, move)
            left = np.abs(model.apply(moved, X) - at(t)).max()
            assert left < 10 * t**2
        gradient = jax.grad(lambda p: jnp.sum(linear.apply(p, X) ** 2))(params)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["initial"]))
        assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient["displacement"]))


def test_a_centred_linearization_starts_from_nothing() -> None:
    """And changes as the other does; random features start from nothing and are linear."""
    whole, centred = linearize(two_layer_relu(D))(N), linearize(two_layer_relu(D), centred=True)(N)
    params = whole.init(jax.random.key(5))
    params["displacement"] = jax.tree.map(jnp.ones_like, params["initial"])
    start = two_layer_relu(D)(N).apply(params["initial"], X)
    np.testing.assert_allclose(
        centred.apply(params, X), whole.apply(params, X) - start, rtol=1e-4, atol=1e-5
    )
    features = random_features(D, "relu")(N)
    params = features.init(jax.random.key(6))
    assert (np.asarray(features.apply(params, X)) == 0).all()
    params["readout"] = {"kernel": jnp.arange(1.0, N + 1)[:, None]}
    h = np.maximum(X @ np.asarray(params["features"]["kernel"]), 0)
    expected = h @ np.arange(1, N + 1) / np.sqrt(N)
    np.testing.assert_allclose(features.apply(params, X), expected, rtol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(features.apply(p, X) ** 2))(params)
    assert (gradient["features"]["kernel"] == 0).all()
    assert (gradient["readout"]["kernel"] != 0).any()


def test_layouts_and_options_are_carried_over() -> None:
    def factory(width: int) -> mupjax.Model:
        base = two_layer_relu(D)(width)
        return mupjax.Model(
            base.init, base.apply, {"hidden/kernel": Layout("vector")}, base.options
        )

    linear = linearize(factory)(N)
    assert set(linear.layouts) == {"initial/hidden/kernel", "displacement/hidden/kernel"}
    assert linear.options == {"width"}


# Bad input --------------------------------------------------------------------------------------

FRACTION: Any = 1.5
NO_MODEL: Any = lambda width: np.ones(3)  # noqa: E731


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: two_layer_relu(0), "input_dim must be whole and at least 1, got 0"),
        (lambda: two_layer_relu(2)(FRACTION), "width must be whole"),
        (lambda: random_features(2, "tanh"), "activation='tanh' is not known"),
        (lambda: linearize(NO_MODEL)(2), "gave ndarray at width 2"),
        (lambda: fixed_points(X, Y[:3]), r"x and y have shapes \(5, 3\) and \(3,\)"),
        (lambda: fixed_points(X, Y * np.nan), "x and y hold entries that are not finite"),
        (lambda: fixed_points(X, Y, validation=(X[:, :2], Y)), r"points of shapes \(2,\)"),
        (lambda: fixed_points(X, Y).loss(lambda x: x, (X, Y)), r"outputs have shape \(5, 3\)"),
    ],
)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()
