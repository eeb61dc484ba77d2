"""What a budget of flops buys: tuning at the target width against tuning small and transferring.

After Ghosh, Wu and Bietti (GWB, arXiv 2512.22768, section 2, the theorem on compute-optimal grid
search). A run at width n costs `C n^r` flops. h hyperparameters are tuned on a grid of ρ^{-h}
points, `1/ρ` for each one. The loss above its infinite-width, perfectly tuned limit is, with
F flops in all,

    direct (grid at width n):                E = K ρ² + A n^{-α},              C ρ^{-h} n^r = F
    transfer (grid at n, one run at M):      E = K ρ² + D n^{-2β} + A M^{-α},
                                             C ρ^{-h} n^r + C M^r = F

where `a_n = A n^{-α}` is the loss gap, `b_n ∝ n^{-β}` the gap of the optimal hyperparameters and
`c_n = D n^{-2β}` the loss lost by moving the optimum of width n to infinite width: an upper bound
on what moving it to M loses, if the optimum walks to its limit without turning. `E ~ F^{-e}` with

    direct:    e = 2α/(hα + 2r),                     n ~ F^{2/(hα+2r)}
    transfer:  e = min(2β/(hβ + r), α/r),            n ~ F^{1/(hβ+r)},   M ~ F^{1/r}

**When is transfer useful** (has the larger exponent)? Multiplied out, `2β/(hβ+r) > 2α/(hα+2r)` is
`β > α/2`, and `α/r > 2α/(hα+2r)` is `hα > 0`, always true. So transfer is useful if and only if
`β > α/2`, which is when it is fast: `c_n = o(a_n)`.

**At a finite budget** both minima are found exactly. With Lagrange's condition for the grid, the
error of the tuning part of the transfer strategy is a pure power `P T^{-2β/(hβ+r)}` of the flops T
spent on tuning, so the whole is `P T^{-e} + A ((F−T)/C)^{-α/r}`, convex in T. By the envelope
theorem its local exponent in F is the average of `2β/(hβ+r)` and `α/r` weighted by the two errors:
always between the two, and falling from the larger to the smaller as F grows. Hence the ratio of
the strategies' errors crosses 1 at most once where transfer is useful, and where it is not,
transfer wins on at most one interval of budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

from scipy.optimize import brentq

__all__ = [
    "Budget",
    "Problem",
    "best_tuning",
    "break_even_budgets",
    "continuous_direct",
    "continuous_transfer",
    "direct_budget",
    "direct_exponent",
    "grid_prefactor_of",
    "is_useful",
    "split_total",
    "transfer_budget",
    "transfer_exponent",
]


@dataclass(frozen=True)
class Problem:
    """The rates and constants of this module's docstring, checked.

    Attributes:
      alpha: α > 0, rate of the loss gap.
      beta: β > 0, rate of the gap of the optimal hyperparameters.
      num_hps: h ≥ 1, how many hyperparameters are tuned.
      cost_exponent: r > 0; 2 where a run's tokens do not depend on its width.
      loss_prefactor: A > 0, in units of the loss.
      transfer_prefactor: D > 0, in units of the loss.
      grid_prefactor: K > 0, in units of the loss: a grid of `1/ρ` points for each hyperparameter
        misses `K ρ²`. See `grid_prefactor_of`.
      cost_constant: C > 0, flops of one run at width 1 (extrapolated from real widths).
    """

    alpha: float
    beta: float
    num_hps: int
    cost_exponent: float = 2.0
    loss_prefactor: float = 1.0
    transfer_prefactor: float = 1.0
    grid_prefactor: float = 1.0
    cost_constant: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.num_hps, int) and not isinstance(self.num_hps, bool)
        if not whole or not 1 <= self.num_hps <= _MOST_HPS:
            raise ValueError(
                f"num_hps={self.num_hps!r} must be a whole number from 1 to {_MOST_HPS}"
            )
        for name, meaning in _POSITIVE.items():
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a positive, finite number: {meaning}")
            if not 1 / _EXTREME <= value <= _EXTREME:
                raise ValueError(
                    f"{name}={value!r} must lie between {1 / _EXTREME:g} and {_EXTREME:g}: "
                    f"{meaning}; use other units"
                )


# Grids over more have no second point within any budget.
_MOST_HPS = 1000
_EXTREME = 1e60
_POSITIVE = {
    "alpha": "the loss gap falls as width^-alpha",
    "beta": "the optimal hyperparameters' gap falls as width^-beta",
    "cost_exponent": "a run costs cost_constant * width^cost_exponent flops",
    "loss_prefactor": "the loss gap is loss_prefactor * width^-alpha",
    "transfer_prefactor": "transfer loses transfer_prefactor * width^(-2 beta)",
    "grid_prefactor": "a grid of 1/rho points for each hyperparameter misses grid_prefactor rho^2",
    "cost_constant": "the flops of one run at width 1",
}


@dataclass(frozen=True)
class Budget:
    """How one strategy spends its flops, and what is left of the loss.

    Attributes:
      proxy_width: where the grid is run.
      target_width: what is trained in the end; the same as `proxy_width` for direct tuning.
      grid_points: per hyperparameter; `resolution` is its inverse, ρ.
      tuning_flops, final_flops: what the grid and the final run cost. The final run of direct
        tuning is one of the grid's, so it costs nothing more.
      excess_loss: expected loss above the tuned infinite-width limit, `grid_error +
        transfer_error + width_error`.
    """

    proxy_width: float
    target_width: float
    grid_points: float
    tuning_flops: float
    final_flops: float
    grid_error: float
    transfer_error: float
    width_error: float

    @property
    def excess_loss(self) -> float:
        """E, in units of the loss."""
        return self.grid_error + self.transfer_error + self.width_error

    @property
    def resolution(self) -> float:
        """ρ."""
        return 1 / self.grid_points

    def to_json(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self) | {"resolution": self.resolution, "excess_loss": self.excess_loss}


def direct_exponent(alpha: float, num_hps: int, cost_exponent: float) -> float:
    """`2α/(hα + 2r)`: the excess loss of tuning at the target falls as the budget to minus this."""
    return 2 * alpha / (num_hps * alpha + 2 * cost_exponent)


def transfer_exponent(alpha: float, beta: float, num_hps: int, cost_exponent: float) -> float:
    """`min(2β/(hβ + r), α/r)`: the excess loss of transfer falls as the budget to minus this."""
    return min(2 * beta / (num_hps * beta + cost_exponent), alpha / cost_exponent)


def is_useful(alpha: float, beta: float) -> bool:
    """Whether transfer has the larger exponent: β > α/2, whatever h and r are."""
    return beta > alpha / 2


def continuous_direct(problem: Problem, flops: float) -> Budget:
    """The best direct tuning with `flops`, widths and grid points being real numbers; closed form.

    `d/d log n` of `K (C n^r/F)^{2/h} + A n^{-α}` is zero at `n^{α+2r/h} = (αhA / 2rK) (F/C)^{2/h}`.
    """
    p, h, r = problem, problem.num_hps, problem.cost_exponent
    ratio = p.alpha * h * p.loss_prefactor / (2 * r * p.grid_prefactor)
    runs = flops / p.cost_constant
    log_n = (math.log(ratio) + 2 / h * math.log(runs)) / (p.alpha + 2 * r / h)
    n = math.exp(log_n)
    return direct_budget(p, n, math.exp((math.log(runs) - r * log_n) / h))


def continuous_transfer(problem: Problem, flops: float) -> Budget:
    """The best transfer with `flops`, widths and grid points being real numbers.

    The tuning part is in closed form given the share of the budget it gets; the share is the root
    of one increasing function.
    """
    p = problem
    log_runs = math.log(flops / p.cost_constant)
    log_tuning, log_final = split_total(
        _tuning_error(p, 1.0),
        2 * p.beta / (p.num_hps * p.beta + p.cost_exponent),
        p.loss_prefactor,
        p.alpha / p.cost_exponent,
        log_runs,
    )
    n, points = best_tuning(p, math.exp(log_tuning))
    return transfer_budget(p, n, math.exp(log_final / p.cost_exponent), points)


def break_even_budgets(problem: Problem) -> tuple[float, float] | None:
    """The budgets between which transfer leaves the smaller loss; `None` where it never does.

    Ends are 0 and `inf` where nothing bounds them. Where transfer is useful, the upper end is
    `inf`. Widths and grid points are real numbers here, even below 1.
    """
    p = problem
    fast = 2 * p.beta / (p.num_hps * p.beta + p.cost_exponent)
    final = p.alpha / p.cost_exponent
    direct = direct_exponent(p.alpha, p.num_hps, p.cost_exponent)

    def advantage(log_runs: float) -> float:
        flops = p.cost_constant * math.exp(log_runs)
        return math.log(
            continuous_direct(p, flops).excess_loss / continuous_transfer(p, flops).excess_loss
        )

    def slope(log_runs: float) -> float:
        """Transfer's local exponent (see the module's docstring) minus that of direct tuning."""
        best = continuous_transfer(p, p.cost_constant * math.exp(log_runs))
        tuning = (best.grid_error + best.transfer_error) / best.excess_loss
        return tuning * fast + (1 - tuning) * final - direct

    # Budgets, widths and losses are all floats between these: e^300 is about 1e130.
    high = 300 / max(1.0, 1 / p.cost_exponent, final, fast, direct)
    low = -high
    if slope(high) >= 0 or is_useful(p.alpha, p.beta):
        peak = high  # the advantage only grows
    elif slope(low) <= 0:
        peak = low
    else:
        peak = _root(slope, low, high)
    if advantage(peak) <= 0:
        return None
    begin, until = 0.0, math.inf
    if advantage(low) <= 0:
        begin = p.cost_constant * math.exp(_root(advantage, low, peak))
    if advantage(high) <= 0:
        until = p.cost_constant * math.exp(_root(advantage, peak, high))
    return begin, until


def grid_prefactor_of(curvature: float, search_range: float, num_hps: int) -> float:
    """K of a loss with second derivative μ along every hyperparameter: `h μ R² / 24`.

    The range R is cut into `1/ρ` cells with a grid point in the middle of each. The optimum lies
    anywhere in its cell, so its distance from the point has mean square `(Rρ)²/12` along each
    hyperparameter, and the loss is `μ/2` times that.

    Args:
      curvature: μ, loss per squared unit (per octave² for learning rates).
      search_range: R, length of the range searched, in the same unit (octaves).
      num_hps: h.
    """
    return num_hps * curvature * search_range**2 / 24


def direct_budget(p: Problem, n: float, points: float) -> Budget:
    """Direct tuning at width n on so many grid points per hyperparameter."""
    return Budget(
        proxy_width=n,
        target_width=n,
        grid_points=points,
        tuning_flops=p.cost_constant * points**p.num_hps * n**p.cost_exponent,
        final_flops=0.0,
        grid_error=p.grid_prefactor / points**2,
        transfer_error=0.0,
        width_error=p.loss_prefactor * n**-p.alpha,
    )


def transfer_budget(p: Problem, n: float, target: float, points: float) -> Budget:
    """Tuning at width n on so many grid points per hyperparameter, and one run at the target."""
    return Budget(
        proxy_width=n,
        target_width=target,
        grid_points=points,
        tuning_flops=p.cost_constant * points**p.num_hps * n**p.cost_exponent,
        final_flops=p.cost_constant * target**p.cost_exponent,
        grid_error=p.grid_prefactor / points**2,
        transfer_error=p.transfer_prefactor * n ** (-2 * p.beta),
        width_error=p.loss_prefactor * target**-p.alpha,
    )


def best_tuning(p: Problem, runs: float) -> tuple[float, float]:
    """Proxy width and grid points that tune best with so many runs at width 1.

    `d/d log n` of `K (n^r/T)^{2/h} + D n^{-2β}` is zero at `n^{2β+2r/h} = (βhD / rK) T^{2/h}`.
    """
    h, r = p.num_hps, p.cost_exponent
    ratio = p.beta * h * p.transfer_prefactor / (r * p.grid_prefactor)
    log_n = (math.log(ratio) + 2 / h * math.log(runs)) / (2 * p.beta + 2 * r / h)
    return math.exp(log_n), math.exp((math.log(runs) - r * log_n) / h)


def _tuning_error(p: Problem, runs: float) -> float:
    n, points = best_tuning(p, runs)
    return p.grid_prefactor / points**2 + p.transfer_prefactor * n ** (-2 * p.beta)


def split_total(
    unit_1: float, exponent_1: float, unit_2: float, exponent_2: float, log_total: float
) -> tuple[float, float]:
    """Logs of the parts T_1 + T_2 of a total for which `Σ unit_i T_i^{-exponent_i}` is smallest.

    The root in the log-odds of T_1's share, which resolve both ends of (0, 1) without rounding.
    """

    def parts(log_odds: float) -> tuple[float, float]:
        return log_total - _softplus(-log_odds), log_total - _softplus(log_odds)

    def surplus(log_odds: float) -> float:
        """log of the ratio of what one more unit brings to part 2 and to part 1; it increases."""
        log_1, log_2 = parts(log_odds)
        gain_1 = math.log(exponent_1 * unit_1) - (exponent_1 + 1) * log_1
        gain_2 = math.log(exponent_2 * unit_2) - (exponent_2 + 1) * log_2
        return gain_2 - gain_1

    bound = 1.0
    while surplus(-bound) > 0 or surplus(bound) < 0:
        bound *= 2
    return parts(_root(surplus, -bound, bound))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return cast("float", brentq(function, low, high, xtol=1e-12))
