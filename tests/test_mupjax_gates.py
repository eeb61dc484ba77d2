"""The gate of SwiGLU against JAX's own, with its derivatives, and what they keep in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mupjax.models.gates import swiglu


def theirs(gate, up):
    return jax.nn.silu(gate) * up


def operands(shape=(5, 7), dtype: Any = np.float64, scale=3.0):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_values_are_those_of_jax(dtype):
    with jax.enable_x64(dtype == "float64"):
        gate, up = operands(dtype=dtype)
        out = swiglu(gate, up)
        assert out.dtype == gate.dtype
        np.testing.assert_array_equal(out, theirs(gate, up))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_first_and_second_derivatives_are_those_of_jax(batched, compiled):
    with jax.enable_x64(True):
        gate, up = operands()

        def loss(f: Any, *x: jax.Array) -> jax.Array:
            y = jax.vmap(f)(*x) if batched else f(*x)
            return (jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)).sum()

        for derivative in (jax.grad, jax.jacfwd, jax.hessian):
            both = [derivative(functools.partial(loss, f), (0, 1)) for f in (swiglu, theirs)]
            found, expected = ((jax.jit(f) if compiled else f)(gate, up) for f in both)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)
                assert np.abs(other).max() > 1


@pytest.mark.parametrize("argument", [0, 1])
def test_the_gradient_of_one_argument_alone(argument):
    gate, up = operands(dtype=np.float32)
    found, expected = (
        jax.grad(lambda *x, f=f: f(*x).sum(), argument)(gate, up) for f in (swiglu, theirs)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_derivative_is_left_alone():
    gate, whole = jnp.asarray([-1.0, 0.0, 1.0]), jnp.arange(3)
    found, expected = (jax.grad(lambda g, f=f: f(g, whole).sum())(gate) for f in (swiglu, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Infinity times the zero by which the gate does not change would be nan.
    one, infinite = jnp.ones(1), jnp.full(1, jnp.inf)
    _, change = jax.jvp(lambda x: swiglu(one, x), (infinite,), (one,))
    np.testing.assert_allclose(change, jax.nn.silu(one), rtol=1e-6)


def test_gates_far_open_and_far_shut():
    gate = jnp.asarray([-1e38, -1e4, -100.0, 0.0, 100.0, 1e4, 1e38])
    up = jnp.full(gate.shape, 2.0)
    by_gate, by_up = jax.grad(lambda g, u: swiglu(g, u).sum(), (0, 1))(gate, up)
    np.testing.assert_allclose(by_gate, [0, 0, 0, 1, 2, 2, 2], atol=1e-30)
    np.testing.assert_allclose(by_up, [0, 0, 0, 0, 100, 1e4, 1e38], atol=1e-30)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it is JAX's")
def test_the_gradient_stores_nothing_beside_the_arguments():
    gate, up = operands((64, 1024), np.float32)

    def stored(f: Any) -> int:
        def run(gate: jax.Array, up: jax.Array) -> Any:
            # The output is used before the gradient is known, as it is in a network.
            out, pull = jax.vjp(f, gate, up)
            return out, *pull(jnp.cos(out).sum() * jnp.sin(out))

        found = jax.jit(run).lower(gate, up).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    assert stored(swiglu) < gate.nbytes / 2
    assert stored(theirs) >= gate.nbytes
