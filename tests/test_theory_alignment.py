"""Spectra of alignment matrices against dense eigenvalues and singular values in double."""

import jax
import numpy as np
import pytest

from theory.alignment import alignment_eigenvalues, alignment_spectrum
from tolerances import float_tolerance

SHAPES = [(3, 40), (20, 41), (20, 40), (20, 39), (20, 20), (30, 8), (1, 1), (1, 9), (9, 1)]


def pair(shape, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.normal(size=shape), rng.normal(size=shape)
    m, n = shape[-2:]
    g = rng.normal(size=(*shape[:-2], m, rank)) @ rng.normal(size=(*shape[:-2], rank, n))
    return g, rng.normal(size=shape)


def dense(gradient, update):
    """All n eigenvalues by decreasing magnitude, from the whole matrix in double precision."""
    product = np.swapaxes(gradient, -1, -2) @ update
    values = np.linalg.eigvalsh((product + np.swapaxes(product, -1, -2)) / 2)
    order = np.argsort(-np.abs(values), axis=-1)
    return np.take_along_axis(values, order, axis=-1)


def size_of(gradient, update):
    norms = [np.sqrt(np.sum(a**2, axis=(-2, -1))) for a in (gradient, update)]
    return norms[0] * norms[1]


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_eigenvalues_are_those_of_the_whole_matrix(shape, rank):
    m, n = shape
    gradient, update = pair((4, *shape), rank)
    expected = dense(gradient, update)
    for dtype, enable in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(enable):
            values = np.asarray(alignment_eigenvalues(gradient.astype(dtype), update.astype(dtype)))
        assert values.shape == (4, min(n, 2 * m))
        assert values.dtype == dtype
        bound = float_tolerance(dtype, m * n) * size_of(gradient, update)
        assert (np.abs(values - expected[:, : values.shape[1]]).max(axis=1) <= bound).all()
        # What the thin route leaves out is zero.
        assert (np.abs(expected[:, values.shape[1] :]).max(axis=1, initial=0.0) <= bound).all()
        magnitudes = np.abs(values)
        assert (np.diff(magnitudes, axis=1) <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_eigenvalues_add_up_to_the_inner_product(shape):
    gradient, update = pair((3, *shape), seed=1)
    with jax.enable_x64(True):
        values = np.asarray(alignment_eigenvalues(gradient, update))
    np.testing.assert_allclose(
        values.sum(axis=-1),
        np.sum(gradient * update, axis=(-2, -1)),
        rtol=0,
        atol=float_tolerance(np.float64, 400) * size_of(gradient, update).max(),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_descent_gives_squared_singular_values(shape):
    gradient, _ = pair(shape, seed=2)
    with jax.enable_x64(True):
        values = np.asarray(alignment_eigenvalues(gradient, -0.3 * gradient))
    squares = np.zeros(min(shape[1], 2 * shape[0]))
    singular = np.linalg.svd(gradient, compute_uv=False)
    squares[: singular.size] = -0.3 * singular**2
    atol = float_tolerance(np.float64, 400) * singular[0] ** 2
    np.testing.assert_allclose(values, squares, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(6, 30), (20, 15)])
def test_rotations_of_either_space_change_nothing(shape):
    gradient, update = pair(shape, seed=3)
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in shape)
    with jax.enable_x64(True):
        values = alignment_eigenvalues(gradient, update)
        turned = alignment_eigenvalues(left @ gradient @ right, left @ update @ right)
    atol = float_tolerance(np.float64, 400) * size_of(gradient, update)
    np.testing.assert_allclose(values, turned, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_eigenvectors_diagonalise_the_matrix(shape):
    gradient, update = pair((2, *shape), seed=5)
    with jax.enable_x64(True):
        spectrum = alignment_spectrum(gradient, update)
        values = alignment_eigenvalues(gradient, update)
    vectors = np.asarray(spectrum.eigenvectors)
    atol = float_tolerance(np.float64, 400) * size_of(gradient, update).max()
    np.testing.assert_allclose(spectrum.eigenvalues, values, rtol=0, atol=atol)
    assert vectors.shape == (2, shape[1], min(shape[1], 2 * shape[0]))
    gram = np.swapaxes(vectors, -1, -2) @ vectors
    identity = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
    np.testing.assert_allclose(gram, identity, rtol=0, atol=float_tolerance(np.float64, 400))
    rebuilt = (vectors * np.asarray(spectrum.eigenvalues)[:, None, :]) @ np.swapaxes(
        vectors, -1, -2
    )
    product = np.swapaxes(gradient, -1, -2) @ update
    whole = (product + np.swapaxes(product, -1, -2)) / 2
    np.testing.assert_allclose(rebuilt, whole, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(3, 40), (20, 20)])
def test_zero_updates_and_tiny_gradients(shape):
    gradient, update = (a.astype(np.float32) for a in pair(shape, seed=6))
    zeros = np.zeros(shape, np.float32)
    for g, d in ((zeros, update), (gradient, zeros), (zeros, zeros)):
        values = np.asarray(alignment_eigenvalues(g, d))
        assert (values == 0).all()
    # The squares of these entries are far below the smallest single-precision number.
    tiny = np.asarray(alignment_eigenvalues(gradient * np.float32(1e-30), update))
    plain = np.asarray(alignment_eigenvalues(gradient, update))
    atol = float_tolerance(np.float32, gradient.size) * np.abs(plain[0])
    np.testing.assert_allclose(tiny * 1e30, plain, rtol=0, atol=atol)


def test_batches_are_a_loop_over_matrices():
    gradient, update = (a.astype(np.float32) for a in pair((2, 3, 5, 30), seed=7))
    together = np.asarray(alignment_eigenvalues(gradient, update))
    mapped = jax.vmap(jax.vmap(alignment_eigenvalues))(gradient, update)
    atol = float_tolerance(np.float32, 150) * size_of(gradient, update).max()
    np.testing.assert_allclose(together, mapped, rtol=0, atol=atol)
    for i in range(2):
        for j in range(3):
            alone = alignment_eigenvalues(gradient[i, j], update[i, j])
            np.testing.assert_allclose(together[i, j], alone, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("gradient", "update", "error", "text"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), ValueError, r"\(2, 3\) and update \(3, 2\)"),
        (np.ones(3), np.ones(3), ValueError, "vectors have no spectrum"),
        (np.ones((2, 3), int), np.ones((2, 3), int), TypeError, "must be float32"),
        (np.ones((2, 3), np.float16), np.ones((2, 3), np.float16), TypeError, "got float16"),
        (np.ones((0, 3)), np.ones((0, 3)), ValueError, "empty, of shape"),
        (
            np.ones((2, 3), complex),
            np.ones((2, 3), complex),
            TypeError,
            "must be float32 or float64",
        ),
    ],
)
def test_bad_arguments(gradient, update, error, text):
    with pytest.raises(error, match=text):
        alignment_eigenvalues(gradient, update)


@pytest.mark.parametrize("function", [alignment_eigenvalues, alignment_spectrum])
@pytest.mark.parametrize("shape", [(3, 40), (30, 8)])
def test_products_are_of_full_single_precision_on_any_device(function, shape):
    program = str(jax.make_jaxpr(function)(*pair(shape)))
    assert program.count("Precision.HIGHEST") == 2 * program.count("dot_general") > 0
