"""Causal attention against JAX's own, with its derivatives, and where exponentials are extreme."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mupjax.models.attention import causal_attention

SHAPES = [
    # positions, heads of queries, heads of keys
    (1, 4, 4),
    (7, 3, 3),
    (70, 4, 4),
    (7, 6, 2),
    (33, 4, 1),
]


def operands(length, heads, kv_heads, size=6, dtype: Any = np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def textbook(query, key, value):
    """In the precision of its operands, which JAX's own is not beyond float32."""
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], axis=2) for a in (key, value))
    logits = 0.3 * jnp.einsum("btnd,bsnd->bnts", query, key)
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:])) > 0, logits, -jnp.inf)
    return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, axis=-1), value)


def theirs(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, scale=0.3, is_causal=True)


def ours(query, key, value):
    return causal_attention(query, key, value, scale=0.3)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_by_definition(shape):
    with jax.enable_x64(True):
        query, key, value = operands(*shape)
        out = ours(query, key, value)
    each = shape[1] // shape[2]
    for head in range(shape[1]):
        logits = 0.3 * np.einsum("btd,bsd->bts", query[:, :, head], key[:, :, head // each])
        weights = np.exp(logits) * np.tril(np.ones((shape[0], shape[0])))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bts,bsd->btd", weights, value[:, :, head // each])
        np.testing.assert_allclose(out[:, :, head], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives_are_those_of_the_textbook(shape):
    with jax.enable_x64(True):
        given, along = operands(*shape), operands(*shape, seed=1)

        def slope(f):
            """Gradient of a nonlinear function of the output, and how it changes along a line."""
            gradient = jax.grad(lambda args: jnp.sum(jnp.sin(f(*args))))
            return jax.jvp(gradient, (given,), (along,))

        found, expected = (jax.tree.leaves(slope(f)) for f in (ours, textbook))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_each_operand_can_be_differentiated_by_itself_and_again_in_reverse():
    with jax.enable_x64(True):
        given, along = operands(7, 4, 2), operands(7, 4, 2, seed=1)
        for argument in range(3):

            def slope(f, argument=argument):
                def by_one(value):
                    args = (*given[:argument], value, *given[argument + 1 :])
                    return jnp.sum(jnp.sin(f(*args)))

                def along_it(value):
                    return jnp.vdot(jax.grad(by_one)(value), along[argument])

                return jax.grad(along_it)(given[argument])

            found, expected = slope(ours), slope(textbook)
            assert jnp.abs(expected).max() > 0.01
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_jax(shape):
    given = operands(*shape, dtype=np.float32)
    np.testing.assert_allclose(ours(*given), theirs(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_heads_that_do_not_divide_are_refused(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with pytest.raises(ValueError, match="key has 3 heads, which do not divide the 4 of query"):
        ours(*operands(5, 4, 3, dtype=np.float32))


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = operands(5, 4, 4, dtype=np.float32)
    with pytest.raises(ValueError, match="value has 2 heads, key has 4"):
        ours(query, key, value[:, :, :2])
    with pytest.raises(ValueError, match=r"query has shape \(2, 0, 4, 6\): it has no positions"):
        ours(query[:, :0], key, value)
    with pytest.raises(ValueError, match=r"key has shape \(2, 0, 4, 6\): it has no positions"):
        ours(query, key[:, :0], value[:, :0])


def test_later_positions_do_not_reach_earlier_ones():
    query, key, value = operands(9, 4, 2, dtype=np.float32)
    changed = [a.at[:, 5:].add(1.0) for a in (query, key, value)]
    before, after = ours(query, key, value), ours(*changed)
    assert (before[:, :5] == after[:, :5]).all()
    assert (before[:, 5:] != after[:, 5:]).all()


@pytest.mark.parametrize("extreme", [np.nan, np.inf, -np.inf, 1e38])
def test_keys_that_are_not_numbers_or_overflow_do_not_reach_earlier_positions(extreme):
    query, key, value = operands(9, 4, 2, dtype=np.float32)
    before, after = (ours(30 * query, k, value) for k in (key, key.at[:, 5:].set(extreme)))
    assert (before[:, :5] == after[:, :5]).all()


def test_gradients_of_earlier_positions_bear_later_logits_that_overflow():
    given = operands(9, 4, 2, dtype=np.float32)
    given = (30 * given[0].at[:, 5:].set(0), *given[1:])

    def slopes(query, key, value):
        loss = lambda args: jnp.sum(ours(*args)[:, :5] ** 2)  # noqa: E731
        return [a[:, :5] for a in jax.grad(loss)((query, key, value))]

    changed = (given[0], given[1].at[:, 5:].set(1e38), given[2])
    for a, b in zip(slopes(*given), slopes(*changed), strict=True):
        assert jnp.abs(a).max() > 0
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e18])
def test_huge_logits_pick_one_position_and_stay_finite(size):
    query, key, value = operands(12, 2, 2, dtype=np.float32)
    query = query * size
    out, gradient = jax.value_and_grad(lambda v: jnp.sum(ours(query, key, v) ** 2))(value)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(ours(query, key, value), theirs(query, key, value), atol=1e-4)


def test_half_precision_is_kept_outside_and_not_used_inside():
    exact = operands(40, 4, 2, dtype=np.float32)
    half = tuple(a.astype(jnp.bfloat16) for a in exact)
    out = ours(*half)
    assert out.dtype == jnp.bfloat16
    # Rounded once, at the end.
    reference = ours(*(a.astype(jnp.float32) for a in half)).astype(jnp.bfloat16)
    assert (out == reference).all()


def test_without_a_cpu_it_is_jax_that_attends(monkeypatch):
    given = operands(16, 4, 2, dtype=np.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (ours(*given) == theirs(*given)).all()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert (ours(*given) != theirs(*given)).any()
