"""Truncation by coordinate descent against brute force, and its refusals."""

import itertools

import numpy as np
import pytest

from theory.truncation import proxy_objective, select_truncation

GRID = np.array([-9.0, -8.0, -7.5, -6.5])


def random_curves(seed, n=4, n_max=6, g=GRID.size):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(g, n)).cumsum(1), rng.normal(size=(g, n_max)).cumsum(1)


def proxy_by_hand(grid, phi_n, phi_max, kappa, penalties):
    """The formula, in loops."""
    g = len(grid)
    total = sum(abs(phi_n[i][kappa[i] - 1] - phi_max[i][kappa[i] - 1]) for i in range(g)) / g
    for weight, phi in zip(penalties, (phi_n, phi_max), strict=True):
        rest = [phi[i][-1] - phi[i][kappa[i] - 1] for i in range(g)]
        total += weight * max(
            abs(rest[i + 1] - rest[i]) / (grid[i + 1] - grid[i]) for i in range(g - 1)
        )
    return total


def select(phi_n, phi_max, penalties, convexity=1.0, argmin=np.inf, grid=GRID):
    return select_truncation(
        grid,
        phi_n,
        phi_max,
        penalties=penalties,
        convexity_tolerance=convexity,
        argmin_tolerance=min(argmin, 1e9),
    )


@pytest.mark.parametrize("penalties", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (1.0, 2.0)])
@pytest.mark.parametrize("seed", range(8))
def test_result_is_one_of_the_brute_force_coordinatewise_optima(seed, penalties):
    phi_n, phi_max = random_curves(seed)
    values = {
        kappa: proxy_by_hand(GRID, phi_n, phi_max, kappa, penalties)
        for kappa in itertools.product(range(1, 5), repeat=GRID.size)
    }
    optima = [
        kappa
        for kappa, value in values.items()
        if all(
            value <= values[(*kappa[:i], k, *kappa[i + 1 :])] + 1e-12
            for i in range(GRID.size)
            for k in range(1, 5)
        )
    ]
    result = select(phi_n, phi_max, [penalties])
    assert result.kappa is not None
    assert tuple(result.kappa) in optima
    (attempt,) = result.attempts
    assert attempt.objective == pytest.approx(values[tuple(result.kappa)], rel=1e-12)
    if penalties == (0.0, 0.0):
        # Separable: every coordinate-wise optimum is a global one.
        assert attempt.objective == pytest.approx(min(values.values()), rel=1e-12)
    for kappa in optima:
        measured = proxy_objective(GRID, phi_n, phi_max, np.array(kappa), penalties)
        assert measured == pytest.approx(values[kappa], rel=1e-12)


def test_descent_starts_at_half_the_width_and_stays_on_ties():
    # Nothing depends on k, so nothing may move.
    phi = np.repeat(((GRID + 7.5) ** 2)[:, None], 6, axis=1)
    result = select(phi, phi, [(1.0, 1.0)])
    np.testing.assert_array_equal(result.kappa, [3] * GRID.size)
    one = phi[:, :1]
    np.testing.assert_array_equal(select(one, phi, [(1.0, 1.0)]).kappa, [1] * GRID.size)


def planted(kappa=3, n=8, n_max=16):
    """The first κ components are the same parabola's parts; the rest is flat and shrinks with n."""
    grid = np.linspace(-3.0, 3.0, 13)
    bowl = grid**2 - 10
    parts = bowl[:, None] * np.array([0.5, 0.3, 0.2])

    def curves(width):
        tail = np.full((grid.size, width - kappa), 1.0 / width**2)
        # Components before the κ-th differ between widths by exchanging weight.
        shift = np.zeros((grid.size, kappa))
        shift[:, 0], shift[:, 1] = 1.0 / width, -1.0 / width
        return np.cumsum(np.concatenate([parts + shift, tail], axis=1), axis=1)

    return grid, curves(n), curves(n_max)


def test_planted_truncation_is_found():
    grid, phi_n, phi_max = planted()
    result = select(phi_n, phi_max, [(1.0, 1.0), (0.01, 0.01)], 0.0, 0.0, grid=grid)
    assert result.accepted
    assert result.top_n is not None
    assert result.residual_n is not None
    assert result.top_max is not None
    assert result.residual_max is not None
    assert result.penalties == (0.01, 0.01)
    np.testing.assert_array_equal(result.kappa, [3] * grid.size)
    np.testing.assert_allclose(result.top_n, result.top_max, rtol=0, atol=1e-14)
    np.testing.assert_allclose(result.top_n + result.residual_n, phi_n[:, -1], rtol=1e-14)
    np.testing.assert_allclose(result.top_max + result.residual_max, phi_max[:, -1], rtol=1e-14)
    assert np.ptp(result.residual_n) < 1e-13


def test_penalties_are_walked_by_their_sum_and_then_the_first():
    phi_n, phi_max = random_curves(3)
    pairs = [(2.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.2)]
    result = select(-np.abs(phi_n), -np.abs(phi_max), pairs, convexity=0.0, argmin=0.0)
    walked = [attempt.penalties for attempt in result.attempts]
    expected = [(0.0, 0.2), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (2.0, 0.0)]
    assert walked == expected[: len(walked)]
    assert result.accepted or walked == expected


def test_failure_says_which_condition_failed():
    grid = np.linspace(-2.0, 2.0, 5)
    hill = np.repeat((-(grid**2))[:, None], 3, axis=1)
    result = select(hill, hill, [(0.1, 0.1)], convexity=0.5, argmin=0.0, grid=grid)
    assert result.kappa is None
    assert not result.accepted
    assert result.top_n is None
    assert result.attempts[0].concave_fraction == (1.0, 1.0)
    assert "concave at 100% of the interior points" in result.reason
    # The leading component has its minimum at one end, the whole curve at the other.
    slope = np.stack([grid, -grid], axis=1)
    phi_n, phi_max = np.stack([slope[:, 0], -grid], 1), np.stack([slope[:, 0], -grid], 1)
    moved = select_truncation(
        grid,
        phi_n[:, :1].repeat(1, axis=1),
        phi_max,
        penalties=[(0.0, 0.0)],
        convexity_tolerance=0.0,
        argmin_tolerance=1.0,
    )
    assert not moved.accepted
    assert moved.attempts[0].argmin_distance == (0.0, 4.0)
    assert "its minimum 4 from the whole curve's (allowed 1)" in moved.reason


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hp_grid": [1.0, 3.0, 2.0, 4.0]}, "strictly increasing"),
        ({"hp_grid": [1.0, 2.0]}, "at least 3"),
        ({"phi_n": np.ones((3, 4))}, r"phi_n has shape \(3, 4\), expected \(4, width\)"),
        ({"phi_max": np.ones((4, 2))}, "fewer than the 4 of phi_n"),
        ({"phi_n": np.full((4, 4), np.nan)}, r"phi_n is not finite at hp_grid\[0\]"),
        ({"penalties": []}, "at least one"),
        ({"penalties": [(-1.0, 0.0)]}, "not negative"),
        ({"penalties": [1.0, 2.0]}, "must be pairs"),
        ({"convexity_tolerance": np.nan}, "convexity_tolerance must be finite"),
        ({"argmin_tolerance": -1.0}, "argmin_tolerance must be finite"),
    ],
)
def test_bad_arguments(change, text):
    phi_n, phi_max = random_curves(0)
    arguments = {
        "hp_grid": GRID,
        "phi_n": phi_n,
        "phi_max": phi_max,
        "penalties": [(1.0, 1.0)],
        "convexity_tolerance": 0.1,
        "argmin_tolerance": 1.0,
    } | change
    with pytest.raises(ValueError, match=text):
        select_truncation(**arguments)
    with pytest.raises(ValueError, match="from 1 to 4"):
        proxy_objective(GRID, phi_n, phi_max, [0, 1, 1, 1], (0.0, 0.0))
