"""The empirical kernel against a brute-force Jacobian; its products and top eigenpairs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from theory.ntk import empirical_ntk, ntk_operator, ntk_vector_product, top_eigenpairs
from tolerances import float_tolerance

P, D, WIDTH, C = 7, 3, 6, 2


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def apply(params, x):
    h = jnp.tanh(x @ params["enter"]["kernel"] + params["enter"]["bias"][None])
    return h @ params["readout"]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {
        "enter": {"kernel": rng.normal(size=(D, WIDTH)), "bias": rng.normal(size=WIDTH)},
        "readout": rng.normal(size=(WIDTH, C)),
    }
    return params, rng.normal(size=(P, D)), rng.normal(size=(4, D))


def brute_force(params, x):
    """The Jacobian (PC, parameters) by central differences of the flattened parameters."""
    flat, unravel = ravel_pytree(params)
    step = 1e-6
    columns = []
    for i in range(flat.size):
        ends = [apply(unravel(flat.at[i].add(s * step)), x).reshape(-1) for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module")
def jacobians(problem):
    """By reverse mode on everything at once, checked against central differences."""
    params, x, other = problem
    with jax.enable_x64(True):
        found = []
        for points in (x, other):
            tree = jax.jacrev(lambda p, points=points: apply(p, points).reshape(-1))(params)
            leaves = [
                np.asarray(leaf).reshape(len(points) * C, -1) for leaf in jax.tree.leaves(tree)
            ]
            found.append(np.concatenate(leaves, axis=1))
        params = jax.tree.map(jnp.asarray, params)
        np.testing.assert_allclose(found[1], brute_force(params, jnp.asarray(other)), atol=1e-8)
    return found


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_every_chunking_gives_the_kernel(problem, jacobians, chunk_size) -> None:
    params, x, other = problem
    J, J2 = jacobians
    trace = np.einsum("icjc->ij", (J @ J2.T).reshape(P, C, 4, C)) / C
    with jax.enable_x64(True):
        own = empirical_ntk(apply, params, x, chunk_size=chunk_size)
        cross = empirical_ntk(apply, params, x, other, chunk_size=chunk_size)
        traced = empirical_ntk(apply, params, x, other, form="trace", chunk_size=chunk_size)
    assert own.dtype == np.float64
    np.testing.assert_allclose(own, J @ J.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(cross, J @ J2.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(traced, trace, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(own, own.T, rtol=1e-14, atol=1e-14)


def test_memory_is_bounded_by_the_chunk(problem, monkeypatch) -> None:
    """No more than one chunk of rows of the Jacobian is asked for at a time."""
    from theory.ntk import empirical

    params, x, _ = problem
    asked = []

    def spy(apply, params, chunk, real=empirical._jacobian):
        asked.append(len(chunk))
        return real(apply, params, chunk)

    monkeypatch.setattr(empirical, "_jacobian", spy)
    empirical_ntk(apply, params, x, chunk_size=2)
    # Four chunks: each once as the left factor and for every later one.
    assert asked == [2] * (4 + 3 + 2 + 1)
    asked.clear()
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(empirical, "_JACOBIAN_BYTES", 2 * size * C * 4 * 3)
    empirical_ntk(apply, params, x)
    assert set(asked) == {3}


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_vector_products(problem, jacobians, chunk_size) -> None:
    params, x, _ = problem
    J = jacobians[0]
    v = np.random.default_rng(1).normal(size=(P, C))
    expected = J @ (J.T @ v.reshape(-1))
    with jax.enable_x64(True):
        product = ntk_vector_product(apply, params, x, v, chunk_size=chunk_size)
        flat = ntk_vector_product(apply, params, x, v.reshape(-1), chunk_size=chunk_size)
        assert product.shape == (P, C)
        np.testing.assert_allclose(product.reshape(-1), expected, rtol=1e-12)
        np.testing.assert_array_equal(flat, product.reshape(-1))


def test_outputs_without_an_axis_and_with_two(problem) -> None:
    params, x, _ = problem
    full = empirical_ntk(apply, params, x).reshape(P, C, P, C)
    first = empirical_ntk(lambda p, x: apply(p, x)[:, 0], params, x)
    np.testing.assert_allclose(first, full[:, 0, :, 0], rtol=1e-5, atol=1e-5)
    square = empirical_ntk(lambda p, x: apply(p, x)[:, :, None], params, x)
    np.testing.assert_allclose(square, full.reshape(P * C, P * C), rtol=1e-5, atol=1e-5)


def test_top_eigenpairs_without_forming_the_kernel(problem, jacobians) -> None:
    params, x, _ = problem
    kernel = jacobians[0] @ jacobians[0].T
    values, vectors = np.linalg.eigh(kernel)
    with jax.enable_x64(True):
        operator = ntk_operator(apply, params, x, chunk_size=4)
    # Used outside: it keeps the precision in which it was made.
    found = top_eigenpairs(operator, 4)
    np.testing.assert_allclose(found.values, values[::-1][:4], rtol=1e-10)
    overlaps = np.abs(np.sum(found.vectors * vectors[:, ::-1][:, :4], axis=0))
    np.testing.assert_allclose(overlaps, 1, rtol=1e-10)
    assert (found.residuals < 1e-10 * values[-1]).all()
    again = top_eigenpairs(operator, 4)
    np.testing.assert_array_equal(found.vectors, again.vectors)


def test_residuals_bound_the_error_of_a_rough_answer() -> None:
    rng = np.random.default_rng(2)
    values = np.arange(1, 201) ** -0.5
    q, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    found = top_eigenpairs((q * values) @ q.T, 3, tolerance=1e-2)
    distance = np.abs(found.values[:, None] - values).min(axis=1)
    assert (distance <= found.residuals + 1e-14).all()
    assert found.residuals.max() > 1e-10


def test_single_precision_operator(problem) -> None:
    params, x, _ = problem
    operator = ntk_operator(apply, jax.tree.map(jnp.asarray, params), x)
    assert operator.dtype == np.float32
    found = top_eigenpairs(operator, 2)
    dense = np.linalg.eigvalsh(empirical_ntk(apply, params, x))[::-1][:2]
    tolerance = float_tolerance(np.float32, operations=P * C * WIDTH)
    np.testing.assert_allclose(found.values, dense, rtol=tolerance)


# Bad input --------------------------------------------------------------------------------------

UNKNOWN: Any = "mean"
GOOD = {"weights": np.ones((D, C), np.float32)}


def linear(params, x):
    return x @ params["weights"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: empirical_ntk(linear, GOOD, x, form=UNKNOWN), "form='mean' is not known"),
        (lambda x: empirical_ntk(linear, GOOD, x[:0]), r"x1 has shape \(0, 3\)"),
        (lambda x: empirical_ntk(linear, GOOD, x, x[:, :2]), r"shapes \(3,\) and \(2,\)"),
        (lambda x: empirical_ntk(linear, GOOD, x, chunk_size=0), "chunk_size=0"),
        (lambda x: empirical_ntk(linear, {}, x), "params holds no array"),
        (lambda x: empirical_ntk(lambda p, x: p["weights"].sum(), GOOD, x), "for 2 examples"),
        (lambda x: empirical_ntk(linear, {"weights": np.ones((3, 1), int)}, x), "'weights'.* int"),
        (lambda x: ntk_vector_product(linear, GOOD, x, np.ones(3)), r"vector has shape \(3,\)"),
        (lambda x: top_eigenpairs(np.eye(3), 3), "from 1 to N - 1 = 2"),
        (lambda x: top_eigenpairs(np.ones((2, 3)), 1), r"operator has shape \(2, 3\)"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call(np.ones((P, D), np.float32))


def test_no_convergence_is_an_error() -> None:
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.normal(size=(300, 300)))
    kernel = (q * np.linspace(1, 2, 300)) @ q.T
    with pytest.raises(
        RuntimeError, match="5 largest eigenpairs of an operator of size 300 did not"
    ):
        top_eigenpairs(kernel, 5, max_iterations=1)
