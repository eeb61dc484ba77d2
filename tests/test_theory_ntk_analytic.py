"""Infinite-width kernels against high-precision references, invariances and finite networks."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from theory.ntk import empirical_ntk, infinite_width_kernels
from tolerances import float_tolerance, standard_error_band

RECORDS = json.loads((Path(__file__).parent / "fixtures" / "ntk_kernels.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_high_precision_references(activation: Any, depth: int) -> None:
    """One compilation serves all pairs: both kernels between all x and all y, on the diagonal."""
    x = np.array([record["x"] for record in RECORDS])
    y = np.array([record["y"] for record in RECORDS])
    found = infinite_width_kernels(x, y, depth=depth, activation=activation)
    tolerance = float_tolerance(np.float64, operations=4 * depth)
    for i, record in enumerate(RECORDS):
        reference = record["kernels"][activation][str(depth)]
        for kind in ("nngp", "ntk"):
            got, want = getattr(found, kind)[i, i], float(reference[kind])
            assert got == pytest.approx(want, rel=_allowed(record, tolerance), abs=1e-300), (
                record["name"],
                kind,
            )


def _allowed(record: dict, tolerance: float) -> float:
    """Where the kernel vanishes with the angle π − θ, what rounding leaves of the angle decides."""
    x, y = np.array(record["x"]), np.array(record["y"])
    if not y.any():
        return tolerance
    supplement = np.linalg.norm(x / np.linalg.norm(x) + y / np.linalg.norm(y))
    return tolerance * max(1.0, 1 / float(supplement) if supplement > 0 else 1.0)


def test_depth_one_relu_is_the_textbook_formula() -> None:
    x = np.random.default_rng(0).normal(size=(6, 4))
    norm = np.linalg.norm(x, axis=1)
    cosine = x @ x.T / np.outer(norm, norm)
    off = ~np.eye(6, dtype=bool)
    theta = np.arccos(np.where(off, cosine, 1.0))
    readout = np.sin(theta) + (np.pi - theta) * cosine
    expected = np.outer(norm, norm) * (readout + (np.pi - theta) * cosine) / (2 * np.pi)
    kernels = infinite_width_kernels(x, depth=1)
    np.testing.assert_allclose(kernels.ntk[off], expected[off], rtol=1e-13)
    np.testing.assert_allclose(np.diag(kernels.ntk), norm**2, rtol=1e-14)
    np.testing.assert_allclose(np.diag(kernels.nngp), norm**2 / 2, rtol=1e-14)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_kernels_are_symmetric_and_positive(activation: Any) -> None:
    x = np.random.default_rng(1).normal(size=(8, 3))
    for kernel in infinite_width_kernels(x, depth=3, activation=activation):
        assert kernel.dtype == np.float64
        np.testing.assert_allclose(kernel, kernel.T, rtol=1e-13)
        assert np.linalg.eigvalsh(kernel)[0] > 1e-6


def test_jax_arrays_stay_in_jax_and_in_their_precision() -> None:
    x = np.random.default_rng(2).normal(size=(3, 4))
    y = np.random.default_rng(3).normal(size=(2, 4))
    exact = infinite_width_kernels(x, y, depth=2)
    single = infinite_width_kernels(jnp.asarray(x), jnp.asarray(y), depth=2)
    assert isinstance(single.ntk, jax.Array)
    assert single.ntk.dtype == jnp.float32
    np.testing.assert_allclose(single.ntk, exact.ntk, rtol=float_tolerance(np.float32, 20))
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


X = np.random.default_rng(4).normal(size=(3, 2))


def summed(a: jax.Array, activation: Any) -> jax.Array:
    kernels = infinite_width_kernels(a, jnp.asarray(X), depth=2, activation=activation)
    return (jnp.sin(kernels.ntk) + kernels.nngp).sum()


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_gradients_are_those_of_finite_differences(activation: Any) -> None:
    step, direction = 1e-5, np.random.default_rng(5).normal(size=X.shape)
    with jax.enable_x64(True):
        at = jnp.asarray(X + 0.3)
        gradient = jax.grad(summed)(at, activation)
        ends = [float(summed(at + sign * step * direction, activation)) for sign in (1, -1)]
    slope = float(np.sum(np.asarray(gradient) * direction))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_gradients_at_parallel_opposite_and_zero_inputs(activation: Any) -> None:
    """Finite; of the NNGP kernel, where two inputs meet, half of its diagonal's, by symmetry."""
    x = np.array([[0.6, -1.1], [-0.6, 1.1], [0.0, 0.0]])

    def kernels(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        return infinite_width_kernels(a, jnp.asarray(x), depth=2, activation=activation)

    with jax.enable_x64(True):
        slopes = jax.jacrev(kernels)(jnp.asarray(x))
        assert all(np.isfinite(s).all() for s in slopes)
        nudge = np.zeros((3, 2))
        nudge[0, 0] = 1e-5
        ends = [
            infinite_width_kernels(x + sign * nudge, depth=2, activation=activation).nngp[0, 0]
            for sign in (1, -1)
        ]
    half = (ends[0] - ends[1]) / 4e-5
    assert float(slopes[0][0, 0, 0, 0]) == pytest.approx(half, rel=1e-8)


# Finite networks --------------------------------------------------------------------------------

POINTS = np.random.default_rng(5).normal(size=(4, 3))
SIGMA = {
    "relu": (lambda h: np.maximum(h, 0), lambda h: (h > 0).astype(float)),
    "erf": (scipy.special.erf, lambda h: 2 / np.sqrt(np.pi) * np.exp(-(h**2))),
}


def draw(rng, sizes: list[int], seeds: int) -> list[np.ndarray]:
    return [rng.normal(size=(seeds, *shape)) for shape in itertools.pairwise(sizes)]


def finite_kernels(activation: Any, weights: list[np.ndarray]) -> np.ndarray:
    """Tangent kernels (S, P, P) of one output by hand-written backpropagation, without JAX.

    The gradient of W^l is an outer product, so the kernel is a sum over layers of the inputs'
    products times the backpropagated signals' products.
    """
    sigma, slope = SIGMA[activation]
    inputs, before = [np.broadcast_to(POINTS, (len(weights[0]), *POINTS.shape))], []
    for w in weights[:-1]:
        before.append(inputs[-1] @ w)
        inputs.append(sigma(before[-1]) / np.sqrt(w.shape[-1]))
    signal = np.ones((*inputs[0].shape[:2], 1))
    kernel = np.zeros((len(weights[0]), len(POINTS), len(POINTS)))
    for layer in reversed(range(len(weights))):
        z = inputs[layer]
        kernel += (z @ z.swapaxes(1, 2)) * (signal @ signal.swapaxes(1, 2))
        if layer:
            back = signal @ weights[layer].swapaxes(1, 2)
            signal = back * slope(before[layer - 1]) / np.sqrt(z.shape[-1])
    return kernel


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_one_hidden_layer_has_the_infinite_kernel_on_average(activation: Any) -> None:
    """The kernel is then a mean over n independent units: exact in expectation at any width."""
    kernels = finite_kernels(activation, draw(np.random.default_rng(6), [3, 16, 1], 20_000))
    limit = infinite_width_kernels(POINTS, depth=1, activation=activation).ntk
    band = standard_error_band(kernels)
    assert (band < 0.02 * np.abs(limit).max()).all()
    assert (np.abs(kernels.mean(axis=0) - limit) < band).all()


@pytest.mark.parametrize(
    ("activation", "depth"), [("relu", 1), ("relu", 3), ("erf", 1), ("erf", 2)]
)
def test_finite_networks_approach_the_limit_as_one_over_root_width(
    activation: Any, depth: int
) -> None:
    """Slope of log RMS deviation on log n, with the standard error that the seeds give it."""
    widths, seeds = [32, 64, 128, 256], 100
    rng = np.random.default_rng(7)
    limit = infinite_width_kernels(POINTS, depth=depth, activation=activation).ntk
    squares = []
    for n in widths:
        kernels = finite_kernels(activation, draw(rng, [3, *[n] * depth, 1], seeds))
        squares.append(np.mean((kernels - limit) ** 2, axis=(1, 2)))
    values = np.array(squares)
    y = 0.5 * np.log(values.mean(axis=1))
    error = 0.5 * values.std(axis=1, ddof=1) / values.mean(axis=1) / np.sqrt(seeds)
    x = np.log(widths) - np.log(widths).mean()
    slope = float(x @ y / (x @ x))
    standard_error = float(np.sqrt(np.sum((x * error) ** 2)) / (x @ x))
    assert standard_error < 0.07
    assert abs(slope + 0.5) < 4 * standard_error


def test_the_hand_written_kernel_is_the_empirical_one() -> None:
    weights = draw(np.random.default_rng(8), [3, 7, 5, 1], 1)

    def apply(params, x):
        h = x @ params[0]
        for w in params[1:]:
            h = jax.nn.relu(h) @ w / np.sqrt(w.shape[0])
        return h

    with jax.enable_x64(True):
        kernel = empirical_ntk(apply, [w[0] for w in weights], POINTS)
    np.testing.assert_allclose(finite_kernels("relu", weights)[0], kernel, rtol=1e-12)


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"depth": 0}, "depth=0 hidden layers"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"depth": True}, "depth=True"),
        ({"depth": 1, "activation": "tanh"}, "'tanh' is not known; use one of 'relu', 'erf'"),
        ({"x1": np.ones(3), "depth": 1}, r"shapes \(3,\) and \(3,\); expected \(N1, d\)"),
        ({"x2": np.ones((2, 4)), "depth": 1}, r"shapes \(2, 3\) and \(2, 4\)"),
        ({"x1": np.array([[1.0, np.nan, 0.0]]), "depth": 1}, r"x1\[0\] = .* is not finite"),
        ({"x2": np.array([[1.0, 0, 0], [0, -1e80, 0]]), "depth": 1}, r"x2\[1\] .* size 1e\+80"),
    ],
)
def test_bad_input(arguments: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"x1": np.ones((2, 3))} | arguments
    with pytest.raises(ValueError, match=text):
        infinite_width_kernels(**given)
