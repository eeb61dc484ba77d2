"""Products of layers against JAX's own, with their derivatives, and inside Flax's layers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from mupjax.models.products import dot_general

LAST_WITH_FIRST = (((1,), (0,)), ((), ()))
LAYOUTS = [
    # shapes of activations and kernel, axes that are summed over
    ((7, 3), (3, 5), LAST_WITH_FIRST),
    ((7, 5), (5, 3), LAST_WITH_FIRST),
    ((7, 4), (4, 4), LAST_WITH_FIRST),
    ((1, 4), (4, 1), LAST_WITH_FIRST),
    ((2, 7, 3), (3, 2, 4), (((2,), (0,)), ((), ()))),
    ((7, 2, 4), (2, 4, 3), (((1, 2), (0, 1)), ((), ()))),
    # those that are JAX's own
    ((7, 3), (5, 3), (((1,), (1,)), ((), ()))),
    ((3, 7), (3, 5), (((0,), (0,)), ((), ()))),
    ((2, 7, 3), (2, 3, 5), (((2,), (1,)), ((0,), (0,)))),
    ((7, 2, 4), (4, 2, 3), (((1, 2), (1, 0)), ((), ()))),
    ((3,), (3, 5), (((0,), (0,)), ((), ()))),
    ((0, 3), (3, 5), LAST_WITH_FIRST),
    ((7, 0), (0, 5), LAST_WITH_FIRST),
]


def operands(lhs, rhs, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=lhs)), jnp.asarray(rng.normal(size=rhs))


def agree(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lhs", "rhs", "axes"), LAYOUTS)
def test_values_and_derivatives_are_those_of_jax(lhs, rhs, axes):
    with jax.enable_x64(True):
        given, along = operands(lhs, rhs), operands(lhs, rhs, seed=1)

        def values(product):
            def f(x, w):
                return jnp.sin(product(x, w, axes))

            def gradient(x, w):
                return jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))(x, w)

            return (
                f(*given),
                jax.jvp(f, given, along),
                gradient(*given),
                jax.jvp(gradient, given, along),
                # one operand alone
                jax.jvp(lambda x: f(x, given[1]), given[:1], along[:1]),
                jax.jvp(lambda w: f(given[0], w), given[1:], along[1:]),
                jax.grad(lambda w: jnp.sum(f(given[0], w)))(given[1]),
                jax.grad(lambda x: jnp.sum(f(x, given[1])))(given[0]),
            )

        agree(values(dot_general), values(lax.dot_general))


@pytest.mark.parametrize(
    ("lhs", "rhs", "axes"),
    [
        ((7, 2, 6), (3, 4, 5), ((1, 2), (0, 1))),
        ((7, 2, 6), (6, 2, 5), ((1, 2), (0, 1))),
        ((7, 2, 3), (6, 5), ((1, 2), (0,))),
        ((7, 6), (2, 3, 5), ((1,), (0, 1))),
        ((7, 3), (4, 5), ((1,), (0,))),
        ((0, 3), (4, 5), ((1,), (0,))),
    ],
)
def test_shapes_that_do_not_fit_are_refused_as_by_jax(lhs, rhs, axes):
    given = operands(lhs, rhs)
    with pytest.raises(TypeError) as theirs:
        lax.dot_general(*given, (axes, ((), ())))
    with pytest.raises(TypeError) as ours:
        dot_general(*given, (axes, ((), ())))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_mapped_over_trials(mapped, shape):
    with jax.enable_x64(True):
        stacks = operands((4, 7, shape[0]), (4, *shape))
        given = tuple(a if axis == 0 else a[0] for a, axis in zip(stacks, mapped, strict=True))

        def gradients(product):
            def loss(x, w):
                return jnp.sum(jnp.sin(product(x, w, LAST_WITH_FIRST)))

            return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), mapped))(*given)

        agree(gradients(dot_general), gradients(lax.dot_general))


def test_types_and_precisions_are_passed_on():
    x, w = (a.astype(jnp.bfloat16) for a in operands((64, 32), (32, 16)))
    wide = dot_general(x, w, LAST_WITH_FIRST, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda w: jnp.sum(dot_general(x, w, LAST_WITH_FIRST) ** 2))(w)
    assert gradient.dtype == jnp.bfloat16
    program = str(
        jax.make_jaxpr(
            jax.grad(lambda w: jnp.sum(dot_general(x, w, LAST_WITH_FIRST, "highest") ** 2))
        )(w)
    )
    assert program.count("dot_general[") == 2
    assert program.count("Precision.HIGHEST") == 4  # of both operands of both products


@pytest.mark.parametrize(
    "precision",
    [
        ("highest", "default"),
        [lax.Precision.HIGH, None],
        lax.DotAlgorithmPreset.F32_F32_F32,
        lax.DotAlgorithm(np.float32, np.float32, np.float32),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_precisions_of_every_form(precision, shape):
    x, w = (a.astype(jnp.float32) for a in operands((7, shape[0]), shape))

    def outcome(product):
        def loss(x, w):
            return jnp.sum(jnp.sin(product(x, w, LAST_WITH_FIRST, precision)))

        try:
            return jax.value_and_grad(loss, (0, 1))(x, w)
        except (TypeError, ValueError) as error:
            return str(error)

    found, expected = outcome(dot_general), outcome(lax.dot_general)
    if isinstance(expected, str):
        assert found == expected
    else:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


EXPLICITLY_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mupjax.models.products import dot_general
mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh):
    x, w = np.arange(96.0).reshape(4, 6, 4), np.arange(24.0).reshape(4, 2, 3)
    for of_x, of_w in ((P("a"), P()), (P(None, "a"), P()), (P(), P(None, "a", None))):
        given = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in ((x, of_x), (w, of_w))]
        out = jax.jit(lambda *a: dot_general(*a, (((2,), (0,)), ((), ()))))(*given)
        np.testing.assert_array_equal(out, np.einsum("bti,ihd->bthd", x, w))
"""


def test_operands_that_are_sharded_explicitly():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", EXPLICITLY_SHARDED],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        timeout=90,
        check=True,
    )


@pytest.mark.parametrize("features", [3, 9])
def test_in_layers_of_flax(features):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 5)), jnp.float32)

    def gradients(module):
        graph, params = nnx.split(module)
        return jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(x))))(params)

    with_and_without: tuple[dict[str, Any], ...] = ({}, {"dot_general": dot_general})
    for make in (nnx.Linear, nnx.LinearGeneral):
        plain, ours = (
            gradients(make(5, features, rngs=nnx.Rngs(0), **options))
            for options in with_and_without
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)

    dense = linen.Dense(features)
    params = dense.init(jax.random.key(0), x)
    plain, ours = (
        jax.grad(lambda p, layer=layer: jnp.sum(jnp.sin(jnp.asarray(layer.apply(p, x)))))(params)
        for layer in (dense, linen.Dense(features, dot_general=dot_general))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it is JAX's product")
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_the_gradient_of_a_kernel_reads_no_operand_by_columns(shape):
    """The point of it: XLA's CPU compiler is slow where the left operand is summed by columns."""
    x, w = (a.astype(jnp.float32) for a in operands((64, shape[0]), shape))

    def columns(product):
        gradient = jax.grad(lambda w: jnp.sum(jnp.sin(product(x, w, LAST_WITH_FIRST))))
        compiled = jax.jit(gradient).lower(w).compile()
        text = compiled.as_text()
        assert text is not None
        assert "lhs_contracting_dims" in text
        return text.count("lhs_contracting_dims={0}")

    assert columns(dot_general) == 0
    assert columns(lax.dot_general) == 1
