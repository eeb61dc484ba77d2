"""The compute-optimal theorem against brute force, and the planner's whole numbers."""

import math

import numpy as np
import pytest
from scipy import optimize

from theory.grid_search import (
    Problem,
    break_even_budgets,
    continuous_direct,
    continuous_transfer,
    direct_exponent,
    grid_prefactor_of,
    is_useful,
    transfer_exponent,
)
from theory.planner import plan_grid_search

CASES = [
    # alpha, beta, h, r
    (0.5, 0.5, 1, 2.0),
    (0.74, 0.39, 1, 2.0),
    (1.0, 1.0, 2, 2.0),
    (0.5, 0.1, 1, 2.0),
    (1.0, 0.3, 3, 1.0),
    (0.6, 0.6, 2, 3.0),
]


def brute_force(problem, flops, strategy, points=1500):
    """The smallest excess loss over a fine grid of (n, M, ρ), by the definition alone."""
    p, h, r = problem, problem.num_hps, problem.cost_exponent
    runs = flops / p.cost_constant
    n = np.exp(np.linspace(0, np.log(runs) / r, points))
    if strategy == "direct":
        rho = (n**r / runs) ** (1 / h)
        return np.min(p.grid_prefactor * rho**2 + p.loss_prefactor * n**-p.alpha)
    # The tuning share on a logistic grid: both ends matter.
    share = 1 / (1 + np.exp(-np.linspace(-60, 20, points)))[:, None]
    final = (runs * (1 - share)) ** (1 / r)
    rho = (n[None] ** r / (runs * share)) ** (1 / h)
    excess = (
        p.grid_prefactor * rho**2
        + p.transfer_prefactor * n[None] ** (-2 * p.beta)
        + p.loss_prefactor * final**-p.alpha
    )
    return np.min(excess)


@pytest.mark.parametrize(("alpha", "beta", "h", "r"), CASES)
def test_exponents_are_those_of_brute_force(alpha, beta, h, r):
    problem = Problem(alpha, beta, h, r, 0.7, 3.0, 2.0, 5.0)
    budgets = np.geomspace(1e26, 1e34, 5)
    for strategy, exponent in (
        ("direct", direct_exponent(alpha, h, r)),
        ("transfer", transfer_exponent(alpha, beta, h, r)),
    ):
        excess = [brute_force(problem, flops, strategy) for flops in budgets]
        slope = -np.polyfit(np.log(budgets), np.log(excess), 1)[0]
        assert slope == pytest.approx(exponent, rel=0.02)


@pytest.mark.parametrize(("alpha", "beta", "h", "r"), CASES)
def test_best_budgets_are_those_of_brute_force(alpha, beta, h, r):
    problem = Problem(alpha, beta, h, r, 0.7, 3.0, 2.0, 5.0)
    for flops in (1e6, 1e14):
        direct, transfer = continuous_direct(problem, flops), continuous_transfer(problem, flops)
        # A grid of 1500 steps misses a minimum by the square of half a step.
        assert direct.excess_loss == pytest.approx(brute_force(problem, flops, "direct"), rel=1e-3)
        assert transfer.excess_loss == pytest.approx(
            brute_force(problem, flops, "transfer"), rel=1e-3
        )
        assert transfer.excess_loss <= brute_force(problem, flops, "transfer")
        assert direct.tuning_flops == pytest.approx(flops)
        assert transfer.tuning_flops + transfer.final_flops == pytest.approx(flops)


def test_widths_grow_with_the_theorem_s_powers():
    problem = Problem(0.6, 0.5, 2, 2.0)
    (a, b) = (continuous_transfer(problem, flops) for flops in (1e20, 1e24))
    (c, d) = (continuous_direct(problem, flops) for flops in (1e20, 1e24))

    def power(low, high):
        return math.log(high / low) / math.log(1e4)

    assert power(c.proxy_width, d.proxy_width) == pytest.approx(2 / (2 * 0.6 + 4), rel=1e-9)
    assert power(a.target_width, b.target_width) == pytest.approx(1 / 2, rel=0.02)
    # The proxy's power is that of its own share of the budget.
    share = power(a.tuning_flops, b.tuning_flops)
    assert power(a.proxy_width, b.proxy_width) == pytest.approx(share / (2 * 0.5 + 2), rel=1e-9)


def test_useful_is_fast_whatever_h_and_r():
    rng = np.random.default_rng(0)
    for alpha, beta, r in rng.uniform(0.05, 3, (300, 3)):
        for h in (1, 3):
            better = transfer_exponent(alpha, beta, h, r) > direct_exponent(alpha, h, r)
            assert better == is_useful(alpha, beta) == (beta > alpha / 2)


@pytest.mark.parametrize("h", [1, 2])
@pytest.mark.parametrize("points", [4, 10])
def test_the_grid_s_error_is_that_of_real_grids(h, points):
    """Minima of a quadratic on cell-centred grids, over all positions of its optimum."""
    mu, search_range = 1.7, 5.0
    centres = (np.arange(points) + 0.5) / points * search_range
    where = np.linspace(0, search_range, 20001)
    nearest = np.abs(where[:, None] - centres).min(axis=1)
    measured = h * np.trapezoid(mu / 2 * nearest**2, where) / search_range
    assert grid_prefactor_of(mu, search_range, h) / points**2 == pytest.approx(measured, rel=1e-6)


def test_planning_a_simulated_search_end_to_end():
    """Excess losses of a plan are those of running it on losses with its rates and constants."""
    alpha, beta, h, r, mu, search_range, a, b = 0.8, 0.6, 2, 2.0, 0.3, 6.0, 2.0, 3.0
    problem = Problem(
        alpha, beta, h, r, a, mu / 2 * b**2, grid_prefactor_of(mu, search_range, h), 10.0
    )
    plan = plan_grid_search(problem, 1e7)
    rng = np.random.default_rng(1)
    transfer = plan.transfer
    assert transfer is not None
    direction = np.array([0.6, 0.8])
    g = int(transfer.grid_points)
    grid = (np.arange(g) + 0.5) / g * search_range
    excess = []
    for _ in range(20000):
        # The proxy's optimum anywhere in the middle; the infinite width's is b_n further.
        proxy = rng.uniform(2, 4, h)
        limit = proxy + b * transfer.proxy_width**-beta * direction
        tuned = grid[np.abs(grid - proxy[:, None]).argmin(axis=1)]
        excess.append(mu / 2 * np.sum((tuned - limit) ** 2) + a * transfer.target_width**-alpha)
    error = np.std(excess) / math.sqrt(len(excess))
    assert np.mean(excess) == pytest.approx(transfer.excess_loss, abs=4 * float(error))


def best_whole(problem, flops, target):
    """The least excess losses of direct tuning and of transfer over all whole plans."""
    p, h, r = problem, problem.num_hps, problem.cost_exponent
    runs = flops / p.cost_constant * (1 + 1e-9)
    direct = transfer = math.inf
    for points in range(1, int(runs ** (1 / h)) + 1):
        grid = p.grid_prefactor / points**2
        n = np.arange(1, int((runs / points**h) ** (1 / r)) + 1)
        if target is None or target in n:
            final = target or int(n[-1])
            direct = min(direct, grid + p.loss_prefactor * final**-p.alpha)
        left = np.maximum(runs - points**h * n**r, 0) ** (1 / r)
        final = np.floor(left) if target is None else np.full(n.size, target)
        excess = (
            grid
            + p.transfer_prefactor * n ** (-2 * p.beta)
            + p.loss_prefactor * np.maximum(final, 1) ** -p.alpha
        )
        fits = (final >= n) & (final <= left)
        transfer = min(transfer, np.min(excess, where=fits, initial=math.inf))
    return direct, transfer


@pytest.mark.parametrize("target", [None, 40, 60])
@pytest.mark.parametrize("prefactors", [(1, 1, 1), (3, 0.1, 5), (0.2, 4, 0.5)])
def test_whole_plans_are_near_the_best_of_all_whole_plans(target, prefactors):
    problem = Problem(0.7, 0.5, 1, 2.0, *prefactors)
    flops = 5000.0
    plan = plan_grid_search(problem, flops, target_width=target)
    transfer = plan.transfer
    assert transfer is not None
    assert transfer.tuning_flops + transfer.final_flops <= flops * (1 + 1e-9)
    assert transfer.proxy_width <= transfer.target_width == (target or transfer.target_width)
    best = best_whole(problem, flops, target)[1]
    assert best * (1 - 1e-9) <= transfer.excess_loss <= 1.005 * best


@pytest.mark.parametrize("target", [None, 3])
@pytest.mark.parametrize("h", [1, 2, 3])
@pytest.mark.parametrize("r", [1.0, 2.0, 3.0])
def test_small_budgets_are_used_up(target, h, r):
    """A width of 2.9 rounded down to 2 must not waste what 3 and a coarser grid would use."""
    rng = np.random.default_rng(int(10 * h + r))
    worst = 0.0
    for _ in range(12):
        problem = Problem(
            rng.uniform(0.2, 1.5), rng.uniform(0.1, 1.5), h, r, *10 ** rng.uniform(-1, 1, 3)
        )
        flops = (target or 1) ** r * 10 ** rng.uniform(0.1, 3)
        plan = plan_grid_search(problem, flops, target_width=target)
        for found, best in zip(
            (plan.direct, plan.transfer), best_whole(problem, flops, target), strict=True
        ):
            assert (found is None) == (best == math.inf)
            if found is not None:
                assert found.tuning_flops + found.final_flops <= flops * (1 + 1e-9)
                assert found.excess_loss >= best * (1 - 1e-9)
                worst = max(worst, found.excess_loss / best - 1)
    assert worst < 0.05


def test_direct_tuning_at_a_given_target_uses_all_that_is_left():
    plan = plan_grid_search(Problem(0.5, 0.5, 2, 2.0), 1e6, target_width=100)
    assert plan.direct is not None
    # 1e6 / 100² = 100 = 10² runs.
    assert (plan.direct.grid_points, plan.direct.proxy_width) == (10, 100)


@pytest.mark.parametrize(("beta", "unbounded"), [(0.2, False), (0.25, True), (0.4, True)])
def test_break_even_budgets_are_where_the_curves_cross(beta, unbounded):
    problem = Problem(0.5, beta, 1, 2.0, 1.0, 0.05, 10.0, 7.0)
    wins = break_even_budgets(problem)
    assert wins is not None
    assert (wins[1] == math.inf) == unbounded

    def ratio(log_flops):
        flops = math.exp(log_flops)

        def direct(x):
            return 10 * (7 * math.exp(2 * x) / flops) ** 2 + math.exp(-0.5 * x)

        best = optimize.fminbound(direct, -50, 50, xtol=1e-10)
        return continuous_transfer(problem, flops).excess_loss / direct(best)

    for end in wins:
        if 0 < end < math.inf:
            assert ratio(math.log(end)) == pytest.approx(1, abs=1e-8)
    inside = math.log(wins[0] * 1e3)
    assert ratio(inside) < 1
    assert ratio(math.log(wins[0]) - 1) > 1


def test_where_transfer_never_wins_there_is_no_break_even():
    plan = plan_grid_search(Problem(0.5, 0.05, 2, 2.0), 1e12)
    assert not plan.useful
    assert plan.transfer_wins_from is None
    assert plan.to_json()["break_even_flops"] is None


def test_a_budget_too_small_for_the_theorem_is_said_to_be():
    text = " ".join(plan_grid_search(Problem(0.5, 0.5, 8, 2.0), 1e4).warnings)
    assert "too small" in text
    text = " ".join(plan_grid_search(Problem(0.5, 0.5, 1, 2.0), 1.5).warnings)
    assert "does not pay a final run" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"num_hps": 0}, "num_hps=0"),
        ({"num_hps": 1.5}, "num_hps=1.5"),
        ({"cost_exponent": math.inf}, "cost_exponent=inf"),
        ({"cost_constant": 0}, "cost_constant=0"),
    ],
)
def test_silly_problems_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        Problem(**({"alpha": 0.5, "beta": 0.5, "num_hps": 1} | change))


@pytest.mark.parametrize(
    ("flops", "target", "named"),
    [(0.0, None, "flops=0"), (math.inf, None, "flops=inf"), (0.5, None, "does not pay"),
     (50.0, 10, "does not pay one run at width 10"), (50.0, 0, "target_width=0")],
)  # fmt: skip
def test_silly_budgets_are_refused(flops, target, named):
    with pytest.raises(ValueError, match=named):
        plan_grid_search(Problem(0.5, 0.5, 1), flops, target_width=target)


@pytest.mark.parametrize("name", ["grid_prefactor", "loss_prefactor", "cost_constant"])
@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_units_that_leave_no_room_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=1e.*must lie between 1e-60 and 1e\\+60"):
        Problem(alpha=0.5, beta=0.6, num_hps=2, **{name: value})


@pytest.mark.parametrize("change", [{"beta": 1e6}, {"cost_exponent": 1e-6}])
def test_numbers_beyond_floats_are_refused(change):
    problem = Problem(**({"alpha": 0.5, "beta": 0.6, "num_hps": 2} | change))
    with pytest.raises(ValueError, match=r"overflow.*flops=1e\+18"):
        plan_grid_search(problem, 1e18)
