"""`in_turn`: the same numbers as `vmap`, by a loop on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mupjax.turns import in_turn
from tolerances import float_tolerance


def random(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=float_tolerance(np.float32, 20), atol=1e-6)


def network(params, x):
    return {"sum": jnp.sum(jnp.tanh(x @ params["w"]) @ params["v"]), "count": jnp.int32(len(x))}


def test_values_are_those_of_vmap():
    params, x = {"w": random(3, 4, 5), "v": random(3, 5)}, random(7, 4)
    plain = jax.vmap(network, (0, None))
    turned = jax.vmap(in_turn(network), (0, None))
    same(turned(params, x), plain(params, x))
    same(jax.jit(turned)(params, x), plain(params, x))
    # Without vmap nothing happens.
    one = jax.tree.map(lambda a: a[0], params)
    same(in_turn(network)(one, x), network(one, x))


AXES = [(0, 0, 0), (0, 0, None), (None, None, 0), (None, 0, None)]


@pytest.mark.parametrize(("w", "v", "x"), AXES)
def test_any_arguments_may_be_mapped(w, v, x):
    def array(axis, *shape):
        return random(*shape) if axis is None else random(3, *shape)

    arguments = {"w": array(w, 4, 5), "v": array(v, 5)}, array(x, 7, 4)
    axes = ({"w": w, "v": v}, x)
    same(jax.vmap(in_turn(network), axes)(*arguments), jax.vmap(network, axes)(*arguments))


def test_what_is_closed_over_may_be_mapped_twice():
    # A float, an integer and a random key from outside, by two maps, one of each of which is inner.
    def of(turn):
        def single(scale, index, key, x):
            def inner(x):
                noise = jax.random.normal(key, x.shape)
                return scale * x[index] + noise, jnp.argmax(x)

            return turn(inner)(x)

        seeds = jax.vmap(single, (None, 0, 0, None))
        return jax.vmap(seeds, (0, None, None, 0))

    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (random(2), jnp.arange(3), keys, random(2, 5))
    same(of(in_turn)(*arguments), of(lambda f: f)(*arguments))


def test_inside_a_branch_and_a_loop():
    gradient = jax.grad(lambda x: jnp.sum(jnp.cos(x) * x))

    def of(turn):
        def single(x):
            def body(step, x):
                descend = turn(lambda x: x - 0.1 * gradient(x))
                return jax.lax.cond(step % 2 == 0, descend, jnp.sin, x)

            return jax.lax.fori_loop(0, 5, body, x)

        return jax.jit(jax.vmap(single))

    x = random(4, 6)
    same(of(in_turn)(x), of(lambda f: f)(x))


def test_on_a_cpu_products_are_not_batched():
    params, x = {"w": random(3, 4, 5), "v": random(3, 5)}, random(7, 4)

    def products(turn):
        lowered = jax.jit(jax.vmap(turn(network), (0, None))).lower(params, x)
        return lowered.as_text()

    assert "tensor<7x3x5xf32>" in products(lambda f: f)
    text = products(in_turn)
    assert "stablehlo.while" in text
    assert "tensor<7x5xf32>" in text
    assert "tensor<7x3x5xf32>" not in text
    assert "tensor<3x7x5xf32>" not in text
