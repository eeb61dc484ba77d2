"""Finite networks: their test risk is exact, and tends to the asymptotic one at the right rate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from threadpoolctl import threadpool_limits

from synthetic.random_features import (
    ACTIVATIONS,
    Activation,
    SimulatedRisk,
    asymptotic_risk,
    hermite_coefficients,
    moments,
    optimal_ridge,
    simulate_risk,
)
from tolerances import standard_error_band


@pytest.fixture(autouse=True)
def _one_blas_thread():
    # The matrices are small, and threads that wait for a busy core make them 20 times as slow.
    with threadpool_limits(limits=1, user_api="blas"):
        yield


RELU = moments(ACTIVATIONS["relu"])


def drawn(key, seed, seeds, d, N, n):
    """The random numbers of one seed, by the simulation's recipe."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(key), seeds)
        numbers = np.asarray(jax.random.normal(keys[seed], (n * d + N * d + N,), jnp.float64))
    return (
        numbers[: n * d].reshape(n, d) / math.sqrt(d),
        numbers[n * d : -N].reshape(N, d),
        numbers[-N:],
    )


def readout(sigma, W, X, noise, ridge):
    """Coefficients of the fit by the normal equations, divided by √n; normalised ReLU teacher."""
    y = (np.maximum(X[:, 0], 0) - RELU.mean) / math.sqrt(RELU.variance) + noise
    Z = sigma(X @ W.T) / math.sqrt(len(W))
    return np.linalg.solve(Z.T @ Z + ridge * np.eye(len(W)), Z.T @ y) / math.sqrt(len(W))


@pytest.mark.parametrize(("name", "N", "n"), [("erf", 40, 30), ("sign", 30, 40)])
def test_risk_equals_the_arcsine_kernel_s_closed_form(name, N, n):
    # E erf(u) erf(v) = (2/π) asin(2 Σ_uv/√((1 + 2 Σ_uu)(1 + 2 Σ_vv))) (Williams, 1998), and of
    # the teacher only the part z/2 correlates with an odd student.
    d, ridges, noise = 20, [0.05, 2.0], 0.25
    run = simulate_risk(
        ridges, dimension=d, samples=N, features=n, noise_std=noise, student=name, seeds=2, key=3
    )
    values = moments(ACTIVATIONS[name])
    scale = math.sqrt(values.variance)
    for seed in range(2):
        W, X, normal = drawn(3, seed, 2, d, N, n)
        square, inner = np.sum(W**2, axis=1), W @ W.T
        if name == "erf":
            ratio = 2 * inner / np.sqrt(np.outer(1 + 2 * square, 1 + 2 * square))
            slope = 2 / np.sqrt(np.pi * (1 + 2 * square))
            sigma, tolerance = special.erf, 1e-10
        else:
            ratio = inner / np.sqrt(np.outer(square, square))
            slope = np.sqrt(2 / (np.pi * square))
            sigma, tolerance = np.sign, 1e-6  # its series is cut where 9 % of its weight is left
        kernel = 2 / np.pi * np.arcsin(np.clip(ratio, -1, 1)) / scale**2
        cross = 0.5 * W[:, 0] * slope / (scale * math.sqrt(RELU.variance))
        for i, ridge in enumerate(ridges):
            a = readout(lambda z, f=sigma: f(z) / scale, W, X, noise * normal, ridge)
            expected = 1 + noise**2 - 2 * cross @ a + a @ kernel @ a
            assert run.risk[seed, i] == pytest.approx(expected, rel=tolerance)


def test_risk_equals_an_average_over_test_points():
    name = "hard_tanh"
    d, N, n, noise, ridge = 12, 30, 20, 0.25, 0.1
    run = simulate_risk(
        ridge, dimension=d, samples=N, features=n, noise_std=noise, student=name, seeds=2
    )
    W, X, normal = drawn(0, 1, 2, d, N, n)
    scale = math.sqrt(moments(ACTIVATIONS[name]).variance)
    a = readout(lambda z: np.clip(z, -1, 1) / scale, W, X, noise * normal, ridge)
    points = np.random.default_rng(1).standard_normal((20, 20000, d))
    target = (np.maximum(points[..., 0], 0) - RELU.mean) / math.sqrt(RELU.variance)
    risks = np.mean((target - np.clip(points @ W.T, -1, 1) / scale @ a) ** 2, axis=1)
    assert abs(run.risk[1, 0] - noise**2 - risks.mean()) < standard_error_band(risks)
    assert standard_error_band(risks) < 0.02


def test_mean_risk_lies_by_the_theory_with_more_features_than_samples():
    psi1, psi2 = 1, 4
    d, ridges = 32, np.array([0.05, 0.3, 2.0])
    run = simulate_risk(
        ridges, dimension=d, samples=psi1 * d, features=psi2 * d, noise_std=0.25, seeds=200
    )
    limit = asymptotic_risk(ridges, psi1=float(psi1), psi2=float(psi2), noise_std=0.25)
    # 0.35/d is the largest deviation of the mean, measured with 10^5 networks at smaller d.
    assert (np.abs(run.mean - limit) < standard_error_band(run.risk) + 0.35 / d).all()
    assert (standard_error_band(run.risk) < 0.05).all()
    assert run.risk.dtype == np.float64
    assert run.risk.shape == (200, 3)


def rates(dimensions, seeds):
    """Powers of d of the mean's deviation and of the spread, with the first's standard error."""
    limit = asymptotic_risk(0.05, psi1=2.0, psi2=1.0, noise_std=0.25)
    deviation, error, spread = [], [], []
    for d, count in zip(dimensions, seeds, strict=True):
        run = simulate_risk(
            0.05, dimension=d, samples=2 * d, features=d, noise_std=0.25, seeds=count, key=d
        )
        deviation.append(limit - run.mean[0])
        error.append(run.standard_error[0] / abs(deviation[-1]))
        spread.append(run.risk.std())
    x = np.log(np.asarray(dimensions, dtype=float))
    weights = 1 / np.array(error)
    coefficients, covariance = np.polyfit(x, np.log(deviation), 1, w=weights, cov="unscaled")
    return coefficients[0], math.sqrt(covariance[0, 0]), np.polyfit(x, np.log(spread), 1)[0]


def test_mean_risk_approaches_the_theory_as_one_over_d():
    slope, error, spread = rates((6, 24), (10000, 6000))
    assert error < 0.15
    # The next order in 1/d bends the line between d = 6 and 24 by about as much as is allowed here.
    assert abs(slope + 1) < 4 * error + 0.1
    assert spread == pytest.approx(-0.5, abs=0.05)


@pytest.mark.slow
def test_mean_risk_approaches_the_theory_as_one_over_d_more_closely():
    slope, error, spread = rates((8, 16, 32, 64), (60000, 60000, 60000, 40000))
    assert error < 0.06
    assert abs(slope + 1) < 4 * error
    assert spread == pytest.approx(-0.5, abs=0.03)


def test_the_empirical_optimum_is_the_theory_s():
    run = simulate_risk(
        np.geomspace(0.1, 1.2, 9), dimension=32, samples=64, features=64, noise_std=0.25, seeds=300
    )
    ridge, error = run.best_ridge()
    theory = optimal_ridge(psi1=2.0, psi2=2.0, noise_std=0.25).ridge
    assert 0 < error < 0.05
    # λ* moves by about −0.4/d (measured at d = 8, 16, 32 with thousands of networks).
    assert abs(ridge - theory) < 4 * error + 0.4 / 32


def test_every_ridge_and_seed_is_the_one_alone():
    at = {"dimension": 10, "samples": 24, "features": 16, "noise_std": 0.3}
    together = simulate_risk([0.01, 0.4, 7.0], seeds=3, **at)
    alone = simulate_risk(0.4, seeds=3, **at)
    np.testing.assert_allclose(alone.risk[:, 0], together.risk[:, 1], rtol=1e-12)
    again = simulate_risk([0.01, 0.4, 7.0], seeds=3, **at)
    np.testing.assert_array_equal(again.risk, together.risk)
    other = simulate_risk([0.01, 0.4, 7.0], seeds=3, key=1, **at)
    assert (other.risk != together.risk).all()
    assert len(np.unique(together.risk)) == 9


def test_hermite_coefficients_closed_form_quadrature_and_parseval():
    for name in ("relu", "erf", "sin", "sign", "linear"):
        sigma = ACTIVATIONS[name]
        closed = hermite_coefficients(name, 24)
        by_quadrature = hermite_coefficients(
            Activation(name, sigma.function, kinks=sigma.kinks), 24
        )
        np.testing.assert_allclose(closed, by_quadrature, atol=1e-13)
    # numpy's Gauss–Hermite rule, for a smooth function.
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    weights = weights / math.sqrt(2 * math.pi)
    ours = hermite_coefficients("gelu", 6)
    for k in range(6):
        he_k = np.polynomial.hermite_e.hermeval(nodes, np.eye(6)[k]) / math.sqrt(math.factorial(k))
        gelu = nodes * special.ndtr(nodes)
        assert ours[k] == pytest.approx(weights @ (gelu * he_k), abs=1e-12)
    for name in ("tanh", "gelu", "softplus"):
        normalized = hermite_coefficients(name, 40, normalize=True)
        assert normalized[0] == 0
        assert np.sum(normalized**2) == pytest.approx(1, abs=1e-4)
        assert (normalized[:9:2] ** 2).sum() < (normalized**2).sum() < 1 + 1e-12
        assert normalized[1] == pytest.approx(moments(ACTIVATIONS[name]).linear, rel=1e-12)
    assert moments(ACTIVATIONS["sign"]).linear2 == pytest.approx(2 / math.pi, rel=1e-15)


def test_a_function_will_do_for_a_name():
    at = {"psi1": 4.0, "psi2": 4.0, "noise_std": 0.25}
    by_name = asymptotic_risk(0.3, student="hard_tanh", teacher="softplus", **at)
    by_function = asymptotic_risk(
        0.3,
        # Its kinks are not named; a shift and a scale are normalised away.
        student=lambda z: 3 + 2 * np.clip(z, -1, 1),
        teacher=jax.nn.softplus,
        **at,
    )
    assert by_function == pytest.approx(by_name, rel=1e-12)
    # A student close to linear keeps the digits of its non-linear part.
    nearly = moments(Activation("nearly", lambda z: z + 1e-7 * (z**3 - 3 * z)))
    assert nearly.nonlinear2 == pytest.approx(6e-14, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dimension": 2}, ValueError, "dimension is 2; expected a whole number, at least 4"),
        ({"samples": 3.5}, ValueError, r"samples is 3\.5"),
        ({"seeds": 1}, ValueError, "seeds is 1"),
        ({"ridge": [[0.1]]}, ValueError, r"ridge has shape \(1, 1\)"),
        ({"ridge": -1}, ValueError, "ridge is -1"),
        ({"student": "relu"}, ValueError, "student 'relu' is not odd"),
        ({"student": lambda z: np.tanh(np.asarray(z))}, TypeError, "not a JAX function"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"ridge": 0.1, "dimension": 8, "samples": 9, "features": 7, "noise_std": 0.1}
    with pytest.raises(error, match=message):
        simulate_risk(**{**arguments, **change})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: np.ones_like(z), "is constant"),
        (lambda z: np.exp(z**2), "did not converge"),
        (lambda z: np.ones(3), "element by element"),
    ],
)
def test_functions_without_gaussian_moments_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        moments(Activation("odd one", function))


def test_the_minimum_of_a_parabola_in_log_ridge_is_found_and_its_error_is_the_seeds():
    ridge = np.geomspace(0.1, 10, 9)
    centres = np.array([0.1, 0.3, -0.1, 0.25])
    risk = 1 + (np.log(ridge)[None, :] - centres[:, None]) ** 2
    best, error = SimulatedRisk(4, 4, 4, 0.1, ridge, risk).best_ridge()
    assert best == pytest.approx(math.exp(centres.mean()), rel=1e-12)
    # For a mean the jackknife is the standard error.
    assert error == pytest.approx(best * centres.std(ddof=1) / 2, rel=1e-9)


def test_the_minimum_between_grid_points_is_the_theory_s_for_the_theory_s_curve():
    ridge = np.geomspace(0.05, 1.2, 12)
    curve = asymptotic_risk(ridge, psi1=4.0, psi2=16.0, noise_std=0.25)
    best, error = SimulatedRisk(4, 4, 4, 0.25, ridge, np.stack([curve, curve])).best_ridge()
    theory = optimal_ridge(psi1=4.0, psi2=16.0, noise_std=0.25).ridge
    assert best == pytest.approx(theory, rel=1e-3)
    assert error == 0


def test_an_optimum_at_the_grid_s_edge_is_no_optimum():
    ridge = np.array([3.0, 4.0, 5.0])
    run = SimulatedRisk(4, 4, 4, 0.1, ridge, np.stack([ridge, ridge]))
    with pytest.raises(ValueError, match="edge of the ridges 3 to 5"):
        run.best_ridge()
    run = SimulatedRisk(4, 4, 4, 0.1, ridge[:2], np.stack([ridge, ridge])[:, :2])
    with pytest.raises(ValueError, match="2 values"):
        run.best_ridge()
