"""The change of the loss by modes of a kernel: against an explicit Jacobian; one linear layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory.alignment import alignment_eigenvalues
from theory.ntk import decompose_update, infinite_width_kernels, mode_contributions
from theory.trajectory import LAPTOP
from tolerances import float_tolerance

P, D, WIDTH, C = 6, 3, 5, 2
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(P, D)), RNG.normal(size=(P, C))
PARAMS = {"enter": RNG.normal(size=(D, WIDTH)), "readout": RNG.normal(size=(WIDTH, C))}
UPDATE = {"enter": RNG.normal(size=(D, WIDTH)), "readout": RNG.normal(size=(WIDTH, C))}
TOLERANCE = float_tolerance(np.float64, operations=100 * P * C)


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def apply(params, x):
    return jnp.tanh(x @ params["enter"]) @ params["readout"]


def loss(outputs):
    return jnp.mean(jnp.logaddexp(outputs, 0) - Y * outputs)


@pytest.fixture(scope="module")
def by_hand():
    """Jacobian (PC, parameters), outputs' gradient and the flattened update, by NumPy."""
    hidden = np.tanh(X @ PARAMS["enter"])
    rows = []
    for i in range(P):
        for c in range(C):
            slope = (1 - hidden[i] ** 2) * PARAMS["readout"][:, c]
            readout = np.zeros((WIDTH, C))
            readout[:, c] = hidden[i]
            rows.append(np.concatenate([np.outer(X[i], slope).ravel(), readout.ravel()]))
    outputs = hidden @ PARAMS["readout"]
    gradient = (1 / (1 + np.exp(-outputs)) - Y) / (P * C)
    update = np.concatenate([UPDATE["enter"].ravel(), UPDATE["readout"].ravel()])
    return np.stack(rows), gradient.ravel(), update


def decompose(update=UPDATE, **options):
    with jax.enable_x64(True):
        return decompose_update(apply, PARAMS, update, X, loss, **options)


def test_any_update_against_an_explicit_jacobian(by_hand) -> None:
    J, g, update = by_hand
    kappa, U = np.linalg.eigh(J @ J.T)
    kappa, U = kappa[::-1], U[:, ::-1]
    found = decompose()
    np.testing.assert_allclose(found.eigenvalues, kappa, atol=TOLERANCE * kappa[0])
    expected = (U.T @ g) * (U.T @ (J @ update))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.contributions, expected, atol=TOLERANCE * scale)
    exact = g @ J @ update
    assert found.total == pytest.approx(exact, rel=TOLERANCE)
    np.testing.assert_allclose(found.top, np.cumsum(expected), atol=TOLERANCE * scale)
    np.testing.assert_allclose(found.residual + found.top, exact, atol=TOLERANCE * scale)
    assert abs(found.top[0] - exact) > 0.01 * abs(exact)


def test_gradient_descent_has_the_closed_form(by_hand) -> None:
    J, g, _ = by_hand
    eta = 0.3
    step = -eta * (J.T @ g)
    cut = D * WIDTH
    update = {"enter": step[:cut].reshape(D, WIDTH), "readout": step[cut:].reshape(WIDTH, C)}
    kappa, U = np.linalg.eigh(J @ J.T)
    expected = (-eta * kappa * (U.T @ g) ** 2)[::-1]
    found = decompose(update)
    np.testing.assert_allclose(found.contributions, expected, atol=TOLERANCE * -expected.min())
    assert (found.contributions < TOLERANCE).all()


@pytest.mark.parametrize("shared", [False, True])
def test_other_kernels_split_the_same_total(by_hand, shared) -> None:
    """A kernel of other parameters, or that of infinite width, shared by all outputs."""
    J, g, update = by_hand
    kernel = infinite_width_kernels(X, depth=1, activation="erf").ntk
    full = kernel if shared else np.kron(kernel, np.diag([1.0, 2.0]))
    found = decompose(kernel=full)
    assert found.contributions.shape == ((P,) if shared else (P * C,))
    assert found.total == pytest.approx(g @ J @ update, rel=TOLERANCE)
    kappa, U = np.linalg.eigh(kernel)
    np.testing.assert_allclose(
        found.eigenvalues[0], kappa[-1] * (1 if shared else 2), rtol=TOLERANCE
    )
    if shared:
        change = (J @ update).reshape(P, C)
        expected = np.sum((U.T @ g.reshape(P, C)) * (U.T @ change), axis=1)[::-1]
        np.testing.assert_allclose(found.contributions, expected, atol=1e-12)


# One linear layer under gradient descent ----------------------------------------------------------
# f = W x: the kernel is XᵀX for every output, with principal directions q_j of the inputs.


def linear_layer(x, g, eta=0.1):
    """Kernel contributions by direction, alignment eigenvalues, G and principal directions."""
    with jax.enable_x64(True):
        G = g.T @ x
        found = decompose_update(
            lambda W, x: x @ W.T,
            np.zeros((g.shape[1], x.shape[1])),
            -eta * G,
            x,
            lambda f: jnp.sum(g * f),
            kernel=x @ x.T,
        )
        spectrum = np.asarray(alignment_eigenvalues(G, -eta * G))
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    return found.contributions[: len(directions)], spectrum, G, directions.T


def test_modes_are_the_diagonal_of_the_alignment_matrix_in_the_principal_basis() -> None:
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(P, 4)) * np.array([3.0, 2.0, 1.0, 0.5]), rng.normal(size=(P, 3))
    modes, spectrum, G, q = linear_layer(x, g)
    S = -0.1 * G.T @ G
    np.testing.assert_allclose(modes, np.diag(q.T @ S @ q), rtol=1e-10)
    np.testing.assert_allclose(modes.sum(), spectrum.sum(), rtol=1e-12)
    # Schur and Horn: the k leading eigenvalues hold at least as much as any k modes.
    held = np.cumsum(np.sort(modes))
    assert (np.cumsum(spectrum) <= held + 1e-12).all()
    assert np.cumsum(spectrum)[0] < 1.05 * held[0]


def test_one_output_has_one_alignment_component_and_many_modes() -> None:
    rng = np.random.default_rng(2)
    modes, spectrum, G, _ = linear_layer(rng.normal(size=(P, 4)), rng.normal(size=(P, 1)))
    np.testing.assert_allclose(spectrum[0], -0.1 * np.sum(G**2), rtol=1e-12)
    np.testing.assert_allclose(spectrum[1:], 0, atol=1e-12)
    assert modes.min() > 0.9 * spectrum[0]
    assert (np.abs(modes) > 1e-6 * np.abs(spectrum[0])).sum() == 4


def test_they_agree_for_white_inputs_in_the_gradient_s_own_basis() -> None:
    rng = np.random.default_rng(3)
    x = np.linalg.qr(rng.normal(size=(P, 4)))[0]
    g = rng.normal(size=(P, 3))
    _, spectrum, G, _ = linear_layer(x, g)
    _, _, q = np.linalg.svd(G)
    modes = x @ q.T
    # All are eigenvectors of the kernel, which has one eigenvalue.
    np.testing.assert_allclose(x @ x.T @ modes, modes, atol=1e-14)
    with jax.enable_x64(True):
        found = mode_contributions(modes, g, x @ (-0.1 * G).T)
    np.testing.assert_allclose(found, spectrum, atol=1e-14)


def test_they_agree_for_a_single_input() -> None:
    rng = np.random.default_rng(4)
    modes, spectrum, _, _ = linear_layer(rng.normal(size=(1, 4)), rng.normal(size=(1, 3)))
    np.testing.assert_allclose(modes, spectrum[:1], rtol=1e-12)
    np.testing.assert_allclose(spectrum[1:], 0, atol=1e-14)


def test_they_agree_along_training_towards_targets_aligned_with_the_inputs() -> None:
    """Targets whose singular directions are the inputs' principal ones, learned from W = 0."""
    rng = np.random.default_rng(5)
    u, q, a = (np.linalg.qr(rng.normal(size=shape))[0] for shape in ((P, 3), (3, 3), (3, 3)))
    x = u * np.array([3.0, 2.0, 1.0]) @ q.T
    y = u * np.array([1.0, -2.0, 1.5]) @ a.T
    W = np.zeros((3, 3))
    for _ in range(5):
        modes, spectrum, G, _ = linear_layer(x, x @ W.T - y, eta=0.02)
        np.testing.assert_allclose(np.sort(modes), spectrum, rtol=1e-9, atol=1e-13)
        assert abs(spectrum[2]) > 1e-3
        W = W - 0.02 * G


# Bad input ----------------------------------------------------------------------------------------

WRONG: Any = {"enter": UPDATE["enter"]}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mode_contributions(np.eye(3), np.ones(3), np.ones(2)), r"\(3,\) and output_chan"),
        (lambda: mode_contributions(np.eye(4), np.ones((3, 2)), np.ones((3, 2))), r"\(6, r\) or"),
        (lambda: decompose_update(apply, PARAMS, WRONG, X, loss), "update has shapes"),
        (lambda: decompose_update(apply, PARAMS, UPDATE, X[:0], loss), "outputs|shape"),
        (lambda: decompose(kernel=np.eye(4)), r"modes has shape \(4, 4\)"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel": "final"}, "kernel='final'"),
        ({"kernel": np.ones((2, 3))}, r"kernel has shape \(2, 3\)"),
        ({"kernel": np.triu(np.ones((6, 6)))}, "kernel is not symmetric: entries differ by 1 "),
        ({"kernel": 1j * np.eye(6)}, "expected a square matrix of finite real numbers"),
        ({"rule": "simpson"}, "rule must be one of"),
        ({"columns": 0}, "columns=0"),
    ],
)
def test_bad_observer(options: Any, text: str) -> None:
    from theory.ntk import ntk_observer

    with pytest.raises(ValueError, match=text):
        ntk_observer(LAPTOP, **options)
