"""Linearized training in closed form against the plain iteration, and at its corners."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from theory.ntk import linearized_training

P, C = 6, 2


def kernel_and_residual(rank: int | None = None, outputs: int = C):
    rng = np.random.default_rng(0)
    J = rng.normal(size=(P * outputs, rank or 40))
    return J, J @ J.T, rng.normal(size=(P, outputs))


def iterate(J, r, eta: float, steps: int):
    """Gradient descent on the parameters themselves: losses before each step and after all."""
    delta, residual, losses = np.zeros(J.shape[1]), r.reshape(-1), []
    for _ in range(steps + 1):
        residual = r.reshape(-1) + J @ delta
        losses.append(np.sum(residual**2) / (2 * P))
        delta = delta - eta * J.T @ residual / P
    return np.array(losses), residual.reshape(r.shape), delta + eta * J.T @ residual / P


@pytest.mark.parametrize("rank", [40, 5])
@pytest.mark.parametrize("speed", [0.3, 1.0, 1.9, 2.3])
def test_equals_gradient_descent_step_by_step(rank: int, speed: float) -> None:
    """With zero eigenvalues (rank 5 of 12) and beyond stability (speed 2.3) alike."""
    J, K, r = kernel_and_residual(rank)
    steps = 15
    training = linearized_training(K, r)
    assert np.count_nonzero(training.eigenvalues == 0) == max(0, P * C - rank)
    eta = speed * P / training.eigenvalues[0]
    losses, residual, delta = iterate(J, r, eta, steps)
    np.testing.assert_allclose(training.loss(eta, np.arange(steps + 1)), losses, rtol=1e-11)
    scale = np.abs(residual).max()
    np.testing.assert_allclose(training.residual(eta, steps), residual, atol=1e-11 * scale)
    J_test = np.random.default_rng(1).normal(size=(3 * C, J.shape[1]))
    change = training.change(J_test @ J.T, eta, steps)
    assert change.shape == (3, C)
    expected = J_test @ delta
    np.testing.assert_allclose(change.reshape(-1), expected, atol=1e-10 * np.abs(expected).max())


def test_modes_add_up_and_broadcast() -> None:
    _, K, r = kernel_and_residual()
    training = linearized_training(K, r)
    rates, steps = np.array([0.0, 0.01, 0.1]), np.array([[0], [3], [math.inf]])
    losses = training.loss(rates, steps)
    assert losses.shape == (3, 3)
    np.testing.assert_allclose(training.mode_losses(rates, steps).sum(axis=-1), losses, rtol=1e-13)
    start = np.sum(r**2) / (2 * P)
    np.testing.assert_allclose(losses[0], start, rtol=1e-13)
    np.testing.assert_allclose(losses[:, 0], start, rtol=1e-13)
    np.testing.assert_allclose(training.mode_energies.sum(), np.sum(r**2), rtol=1e-13)


def test_a_kernel_shared_by_all_outputs_is_the_kernel_of_each() -> None:
    rng = np.random.default_rng(2)
    J, r = rng.normal(size=(P, 9)), rng.normal(size=(P, C))
    shared = linearized_training(J @ J.T, r)
    full = linearized_training(np.kron(J @ J.T, np.eye(C)), r)
    cross = rng.normal(size=(4, 9)) @ J.T
    for steps in (0, 1, 20):
        assert shared.loss(0.1, steps) == pytest.approx(float(full.loss(0.1, steps)), rel=1e-12)
        np.testing.assert_allclose(
            shared.residual(0.1, steps), full.residual(0.1, steps), atol=1e-12
        )
        np.testing.assert_allclose(
            shared.change(cross, 0.1, steps),
            full.change(np.kron(cross, np.eye(C)), 0.1, steps),
            atol=1e-12,
        )


def test_infinite_time_is_the_minimum_norm_solution() -> None:
    J, K, r = kernel_and_residual(rank=5)
    training = linearized_training(K, r)
    eta = 0.5 * training.largest_stable_rate
    solution = -np.linalg.pinv(J) @ r.reshape(-1)
    left = r.reshape(-1) + J @ solution
    assert training.loss(eta, math.inf) == pytest.approx(np.sum(left**2) / (2 * P), rel=1e-11)
    np.testing.assert_allclose(training.residual(eta, math.inf), left.reshape(P, C), atol=1e-12)
    J_test = np.random.default_rng(3).normal(size=(2 * C, 5))
    change = training.change(J_test @ J.T, eta, math.inf)
    np.testing.assert_allclose(change.reshape(-1), J_test @ solution, atol=1e-11)
    # A positive definite kernel interpolates, and the limit is that of many steps.
    _, K, r = kernel_and_residual()
    training = linearized_training(K, r)
    eta = 0.5 * training.largest_stable_rate
    assert training.loss(eta, math.inf) == 0
    assert training.log_loss(eta, math.inf) == -math.inf
    np.testing.assert_allclose(
        training.change(K, eta, 10**7), training.change(K, eta, math.inf), atol=1e-9
    )


def test_the_edge_of_stability() -> None:
    training = linearized_training(np.diag([4.0, 1.0]), [3.0, 1.0])
    edge = training.largest_stable_rate
    assert edge == 1.0
    # The first mode flips for ever, the second is solved half-way at every step.
    assert training.loss(edge, 10) == pytest.approx((9 + 0.5**20) / 4, rel=1e-15)
    assert training.loss(edge, math.inf) == 9 / 4
    assert training.loss(1.01, math.inf) == math.inf
    assert np.isnan(training.residual(edge, math.inf)).all()
    assert training.residual(edge, 3)[0] == -3
    # What is not excited does not diverge.
    quiet = linearized_training(np.diag([4.0, 1.0]), [0.0, 1.0])
    assert quiet.largest_stable_rate == 4.0
    assert quiet.loss(3.0, 1000) == pytest.approx(0, abs=1e-300)
    assert quiet.loss(2.0, math.inf) == 0
    flat = linearized_training(np.zeros((2, 2)), [1.0, 1.0])
    assert flat.largest_stable_rate == math.inf
    assert flat.loss(1e6, math.inf) == 0.5


def test_logarithms_neither_overflow_nor_underflow() -> None:
    training = linearized_training(np.diag([2.0, 0.5]), [1.0, 1.0])
    # Factors 1 − η and 1 − η/4.
    assert training.log_loss(11.0, 10**6) == pytest.approx(
        2e6 * math.log(10) - math.log(4), rel=1e-14
    )
    assert training.loss(11.0, 10**6) == math.inf
    assert training.log_loss(0.5, 10**6) == pytest.approx(
        2e6 * math.log(7 / 8) - math.log(4), rel=1e-14
    )
    assert training.loss(0.5, 10**6) == 0
    # Rates far below 1/κ: 1 − z rounds to 1, its power does not.
    assert training.loss(1e-18, 10**18) == pytest.approx(
        (math.exp(-2) + math.exp(-0.5)) / 4, rel=1e-14
    )


@pytest.mark.parametrize("steps", [1, 2, 30, 2000])
def test_the_optimum_is_the_minimum(steps: int) -> None:
    _, K, r = kernel_and_residual()
    training = linearized_training(K, r)
    best = training.optimum(steps)
    nearby = best.learning_rate * np.array([0.5, 0.99, 0.9999, 1.0001, 1.01, 1.5])
    assert (training.log_loss(nearby, steps) > training.log_loss(best.learning_rate, steps)).all()
    if steps == 1:
        # A line search along the gradient, whose step is known.
        gradient = training.eigenvalues * training.mode_energies
        step = P * gradient.sum() / (training.eigenvalues @ gradient)
        assert best.learning_rate == pytest.approx(step, rel=1e-12)


def test_the_optimum_of_a_single_mode_and_of_two_alike() -> None:
    assert linearized_training([[4.0]], [3.0]).optimum(7).learning_rate == pytest.approx(0.25)
    alike = linearized_training(np.diag([4.0, 4.0, 0.0]), [3.0, 1.0, 2.0]).optimum(7)
    assert alike.learning_rate == pytest.approx(3 / 4, rel=1e-14)
    assert alike.loss == pytest.approx(4 / 6, rel=1e-14)
    # Two modes at long times: both must shrink alike, 1 − ηκ_2 = ηκ_1 − 1.
    two = linearized_training(np.diag([4.0, 1.0]), [1.0, 1.0]).optimum(10**6)
    assert two.learning_rate == pytest.approx(2 * 2 / 5, rel=1e-5)


# Bad input --------------------------------------------------------------------------------------

GOOD = linearized_training(np.eye(3), np.ones(3))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: linearized_training(np.eye(3), np.ones(4)),
            r"kernel has shape \(3, 3\); expected",
        ),
        (lambda: linearized_training(np.eye(3), 1.0), r"residual has shape \(\)"),
        (lambda: linearized_training([[1.0, 2], [0, 1]], [1.0, 1]), "not symmetric: .* by 2 "),
        (lambda: linearized_training([[1.0, 2], [2, 1]], [1.0, 1]), "negative eigenvalue -1"),
        (lambda: linearized_training([[np.nan]], [1.0]), r"kernel\[0, 0\] = nan is not finite"),
        (lambda: linearized_training([[1.0]], [np.inf]), r"residual\[0\] = inf is not finite"),
        (lambda: GOOD.loss(-1.0, 3), "learning_rate holds -1.0"),
        (lambda: GOOD.loss([0.1, math.nan], 3), "learning_rate holds nan"),
        (lambda: GOOD.loss(0.1, [1, 2.5]), "steps holds 2.5"),
        (lambda: GOOD.loss(0.1, math.nan), "steps holds nan"),
        (lambda: GOOD.change(np.ones((2, 4)), 0.1, 1), r"cross_kernel has shape \(2, 4\)"),
        (lambda: GOOD.optimum(0), "steps=0"),
        (lambda: linearized_training(np.zeros((2, 2)), [1.0, 1]).optimum(3), "no mode with a"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_a_mode_at_rest_but_for_rounding_bounds_no_rate():
    """A residual without the top mode: rounding excites it by 1e-16, which must not count."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    training = linearized_training(q @ np.diag([10.0, 1.0, 0.1]) @ q.T, q[:, 1] + q[:, 2])
    assert training.largest_stable_rate == pytest.approx(6.0)
    # (1 - η/3)^2T + (1 - η/30)^2T by bisection on its derivative.
    for steps in (5, 20, 100):
        exact = brentq(
            lambda eta, power=2 * steps - 1: (eta / 3 - 1) ** power - (1 - eta / 30) ** power / 10,
            3.0,
            6.0,
            xtol=1e-14,
        )
        assert training.optimum(steps).learning_rate == pytest.approx(exact, rel=1e-9)
