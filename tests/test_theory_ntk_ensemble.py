"""Mean loss curves over initialisations, by modes: against gradient descent written out."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from theory.ntk import LinearizedTraining, linearized_ensemble, linearized_training
from tolerances import float_tolerance

P, T, S = 6, 7, 4
RATES = np.array([0.0, 0.2, 1.0, 2.5])


def kernels(seed: int, members: int, spread: float):
    """Random kernels around diag(1, 1/2, 1/4, …), and one residual."""
    rng = np.random.default_rng(seed)
    root = np.diag(2.0 ** (-np.arange(P) / 2)) @ np.linalg.qr(rng.normal(size=(P, P)))[0]
    noise = spread * rng.normal(size=(members, P, 40)) / np.sqrt(40)
    draws = np.eye(P, 40)[None] + noise
    return P * np.einsum("ai,sij,skj,kb->sab", root.T, draws, draws, root), rng.normal(size=P)


@pytest.fixture(scope="module")
def family():
    K, r = kernels(0, S, 0.3)
    return K, r, linearized_ensemble([linearized_training(k, r) for k in K])


def test_every_mode_against_steps_of_gradient_descent(family) -> None:
    K, r, ensemble = family
    expected, losses = np.zeros((RATES.size, P)), np.zeros((S, RATES.size))
    trapezoid = np.zeros((RATES.size, P))
    for s, kernel in enumerate(K):
        U = np.linalg.eigh(kernel)[1][:, ::-1]
        for i, eta in enumerate(RATES):
            now = r
            for _ in range(T):
                later = now - eta * kernel @ now / P
                mean_gradient = (now + later) / 2 / P
                trapezoid[i] += (U.T @ mean_gradient) * (U.T @ (later - now)) / S
                now = later
            losses[s, i] = now @ now / (2 * P)
            expected[i] += ((U.T @ now) ** 2 - (U.T @ r) ** 2) / (2 * P) / S
    tolerance = float_tolerance(np.float64, operations=1000) * np.abs(expected).max()
    found = ensemble.mode_changes(RATES, T)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    # What an observer sums along the trajectory is the same, exactly, for a squared loss.
    np.testing.assert_allclose(found, trapezoid, atol=tolerance)
    np.testing.assert_allclose(ensemble.loss(RATES, T), losses, rtol=1e-11)
    before = r @ r / (2 * P)
    np.testing.assert_allclose(
        ensemble.top(RATES, T)[:, -1], losses.mean(axis=0) - before, atol=tolerance
    )
    np.testing.assert_allclose(ensemble.top(RATES, T)[:, 1], found[:, :2].sum(axis=1), rtol=1e-12)


def test_the_optimum_is_that_of_the_mean_loss(family) -> None:
    _, _, ensemble = family
    best = ensemble.optimum(T)
    found: Any = minimize_scalar(
        lambda eta: ensemble.loss(eta, T).mean(), bounds=(0.1, 3.0), options={"xatol": 1e-10}
    )
    assert best.learning_rate == pytest.approx(found.x, rel=1e-6)
    assert best.loss == pytest.approx(found.fun, rel=1e-12)
    own = [member.optimum(T).learning_rate for member in ensemble.members]
    assert min(own) < best.learning_rate < max(own)


def test_gaps_are_the_definitions(family) -> None:
    K, r, ensemble = family
    limit = linearized_training(K.mean(axis=0), r)
    gaps = ensemble.gaps(limit, T, draws=3)
    best, here = limit.optimum(T), ensemble.optimum(T)
    assert gaps.optimum == here
    assert gaps.loss_gap == pytest.approx(abs(here.loss - best.loss), rel=1e-12)
    assert gaps.hp_gap == pytest.approx(abs(np.log2(here.learning_rate / best.learning_rate)))
    excess = float(limit.loss(here.learning_rate, T)) - best.loss
    assert gaps.suboptimality == pytest.approx(excess, rel=1e-9)
    assert gaps.hp_gap > 0.01
    same = linearized_ensemble([limit]).gaps(limit, T, draws=3)
    assert (same.loss_gap, same.suboptimality) == (0, 0)
    np.testing.assert_allclose(same.draws, 0, atol=1e-8)


def test_a_bootstrap_draw_is_the_ensemble_of_the_members_drawn() -> None:
    """Against the exact optimum of an ensemble with members repeated, at a strongly unstable T."""
    K, r = kernels(1, 5, 0.6)
    members = [linearized_training(k, r) for k in K]
    limit, steps = linearized_training(K.mean(axis=0), r), 200
    gaps = linearized_ensemble(members).gaps(limit, steps, draws=20, rng_seed=3)
    weights = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), size=20)
    for drawn, found in zip(weights, gaps.draws, strict=True):
        repeated = [member for member, n in zip(members, drawn, strict=True) for _ in range(n)]
        exact = linearized_ensemble(repeated).gaps(limit, steps, draws=1)
        assert found[1] == pytest.approx(exact.hp_gap, abs=2e-3)
        assert found[2] == pytest.approx(exact.suboptimality, rel=0.02, abs=1e-6)
        assert found[0] == pytest.approx(exact.loss_gap, rel=0.02, abs=1e-6)
    assert gaps.draws[:, 1].std() > 0.01


@pytest.mark.slow
def test_draws_have_the_spread_of_new_ensembles() -> None:
    """The bootstrap's standard error against that of 60 independent ensembles, within 35 %."""
    K, r = kernels(2, 60 * 40, 0.3)
    limit = linearized_training(K.mean(axis=0), r)
    trainings = [linearized_training(k, r) for k in K]
    ensembles = [linearized_ensemble(trainings[40 * i : 40 * i + 40]) for i in range(60)]
    true = np.std([np.log2(e.optimum(T).learning_rate) for e in ensembles], ddof=1)
    estimates = [e.gaps(limit, T, draws=200).draws[:, 1].std() for e in ensembles[:10]]
    assert np.mean(estimates) == pytest.approx(true, rel=0.35)


# Bad input ----------------------------------------------------------------------------------------

ONE = linearized_training(np.eye(3), np.ones(3))
OTHER = linearized_training(np.eye(2), np.ones(2))
FRACTION: Any = 1.5


def gaps(limit: LinearizedTraining, steps: Any) -> Any:
    return linearized_ensemble([ONE]).gaps(limit, steps)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: linearized_ensemble([]), "members is empty"),
        (lambda: linearized_ensemble([ONE, OTHER]), r"\[\(2, 2\), \(3, 3\)\]"),
        (lambda: gaps(OTHER, 3), "limit has 2 points, the members 3"),
        (lambda: linearized_ensemble([ONE]).optimum(FRACTION), r"steps=1\.5"),
        (lambda: gaps(ONE, 0), "steps=0"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
