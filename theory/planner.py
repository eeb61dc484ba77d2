"""The better use of a budget of flops, in whole widths and grid points (`theory.grid_search`)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from theory.grid_search import (
    Budget,
    Problem,
    best_tuning,
    break_even_budgets,
    continuous_direct,
    continuous_transfer,
    direct_budget,
    direct_exponent,
    is_useful,
    split_total,
    transfer_budget,
    transfer_exponent,
)

__all__ = ["GridSearchPlan", "plan_grid_search"]

# An optimum cannot be located on fewer: one grid point, and one on each side of it.
_FEWEST_POINTS = 3
# Room for a root of a power to come out a few units in the last place below a whole number.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class GridSearchPlan:
    """The better use of a budget, in whole widths and grid points.

    Attributes:
      problem: the rates and constants.
      flops: F, the budget.
      direct_exponent, transfer_exponent: e of `E ~ F^{-e}`, as F grows.
      useful: transfer's exponent is the larger: β > α/2.
      direct, transfer: the two strategies at this budget, in whole numbers; `None` where the budget
        does not reach for it.
      transfer_wins_from, transfer_wins_until: budgets between which transfer leaves the smaller
        loss (whole numbers set aside): `0` and `inf` where nothing bounds them, `None` and `None`
        where it never wins, or was not asked because the target width is given.
      target_given: the target width was given, not chosen.
      warnings: why the numbers may not hold at this budget.
    """

    problem: Problem
    flops: float
    direct_exponent: float
    transfer_exponent: float
    useful: bool
    direct: Budget | None
    transfer: Budget | None
    transfer_wins_from: float | None
    transfer_wins_until: float | None
    target_given: bool
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values; `null` for what does not exist, and for an unbounded end."""
        transfer, wins_until = self.transfer, self.transfer_wins_until
        return {
            "direct_exponent": self.direct_exponent,
            "transfer_exponent": self.transfer_exponent,
            "useful": self.useful,
            "proxy_width": transfer and transfer.proxy_width,
            "target_width": transfer and transfer.target_width,
            "grid_points_per_hp": transfer and transfer.grid_points,
            "grid_resolution": transfer and transfer.resolution,
            "excess_loss_transfer": transfer and transfer.excess_loss,
            "excess_loss_direct": self.direct and self.direct.excess_loss,
            "break_even_flops": self.transfer_wins_from,
            "transfer_wins_until_flops": None if wins_until == math.inf else wins_until,
            "flops": self.flops,
            "direct": self.direct and self.direct.to_json(),
            "transfer": transfer and transfer.to_json(),
            "problem": asdict(self.problem),
            "warnings": list(self.warnings),
        }

    def table(self) -> str:
        """The two strategies beside one another, for a terminal."""
        p = self.problem
        lines = [
            f"rates       alpha {p.alpha:.3g}, beta {p.beta:.3g}: beta "
            f"{'>' if self.useful else '<='} alpha/2, so transfer "
            f"{'is useful' if self.useful else 'is not useful'} as the budget grows",
            f"excess      ~ flops^-{self.transfer_exponent:.3f} by transfer, "
            f"flops^-{self.direct_exponent:.3f} by direct tuning",
            f"budget      {self.flops:.4g} flops, {p.cost_constant:.4g} * width^"
            f"{p.cost_exponent:g} a run, {p.num_hps} hyperparameter(s)",
            "",
            f"{'':24}{'transfer':>14}{'direct':>14}",
        ]
        for label, what, form in (
            ("tune at width", "proxy_width", "d"),
            ("grid points per hp", "grid_points", "d"),
            ("train at width", "target_width", "d"),
            ("flops of tuning", "tuning_flops", ".3g"),
            ("flops of the final run", "final_flops", ".3g"),
            ("loss lost to the grid", "grid_error", ".3g"),
            ("loss lost to transfer", "transfer_error", ".3g"),
            ("loss lost to the width", "width_error", ".3g"),
            ("expected excess loss", "excess_loss", ".4g"),
        ):
            cells = [
                "none" if budget is None else format(getattr(budget, what), form)
                for budget in (self.transfer, self.direct)
            ]
            lines.append(f"{label:24}{cells[0]:>14}{cells[1]:>14}")
        lines += ["", f"break-even  {self._break_even()}"]
        lines += [f"warning     {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _break_even(self) -> str:
        begin, until = self.transfer_wins_from, self.transfer_wins_until
        if self.target_given:
            return "not computed: the target width is given"
        if begin is None or until is None:
            return "none: direct tuning leaves the smaller loss at every budget"
        start = "at every budget" if begin == 0 else f"above {begin:.3g} flops"
        return f"transfer leaves the smaller loss {start}" + (
            "" if math.isinf(until) else f", until {until:.3g} flops"
        )


def plan_grid_search(
    problem: Problem, flops: float, *, target_width: int | None = None
) -> GridSearchPlan:
    """What each strategy does with the budget, in whole numbers, and what it leaves of the loss.

    Grid points, the proxy's or the target's width are one of the two whole numbers next to the
    real-valued optimum, the rest is then optimal again and rounded so that the budget is kept; the
    best of these plans is taken. A grid has at least one point, and a proxy is never wider than its
    target.

    Args:
      problem: rates and constants.
      flops: F, the budget.
      target_width: M, if it is given rather than chosen; direct tuning is then at M too.

    Raises:
      ValueError: the budget is not positive, does not pay one run at the target width (at width 1
        where that is not given), `target_width` is no positive whole number, or a width, a grid or
        a loss is too large or too small for a float.
    """
    p = problem
    if not (isinstance(flops, int | float) and math.isfinite(flops) and flops > 0):
        raise ValueError(f"flops={flops!r} must be a positive, finite number")
    if target_width is not None and (
        isinstance(target_width, bool)
        or not isinstance(target_width, int)
        or not 1 <= target_width <= 2**53
    ):
        raise ValueError(f"target_width={target_width!r} must be a whole number from 1 to 2^53")
    least = p.cost_constant * (target_width or 1) ** p.cost_exponent
    if flops < least:
        raise ValueError(
            f"flops={flops:g} does not pay one run at width {target_width or 1}, which costs "
            f"{least:.3g} (cost_constant {p.cost_constant:g} times width^{p.cost_exponent:g}); "
            "give a larger budget, a smaller width or another cost_constant"
        )
    try:
        direct = _whole_direct(p, flops, target_width)
        transfer = _whole_transfer(p, flops, target_width)
        wins = break_even_budgets(p) if target_width is None else None
    except OverflowError as error:
        raise ValueError(
            f"numbers overflow for {p} at flops={flops:g}: widths, grids or losses lie beyond what "
            "floating point holds; check the rates and prefactors"
        ) from error
    return GridSearchPlan(
        problem=p,
        flops=float(flops),
        direct_exponent=direct_exponent(p.alpha, p.num_hps, p.cost_exponent),
        transfer_exponent=transfer_exponent(p.alpha, p.beta, p.num_hps, p.cost_exponent),
        useful=is_useful(p.alpha, p.beta),
        direct=direct,
        transfer=transfer,
        transfer_wins_from=wins[0] if wins else None,
        transfer_wins_until=wins[1] if wins else None,
        target_given=target_width is not None,
        warnings=_warnings(p, direct, transfer, target_width),
    )


def _whole_direct(p: Problem, flops: float, target_width: int | None) -> Budget | None:
    h, r = p.num_hps, p.cost_exponent
    runs = flops / p.cost_constant
    if target_width is not None:
        return direct_budget(p, target_width, _floor((runs / target_width**r) ** (1 / h)))
    best = continuous_direct(p, flops)
    pairs = {
        (_floor((runs / points**h) ** (1 / r)), points) for points in _beside(best.grid_points)
    }
    pairs |= {(n, _floor((runs / n**r) ** (1 / h))) for n in _beside(best.proxy_width)}
    plans = [direct_budget(p, n, points) for n, points in sorted(pairs) if min(n, points) >= 1]
    return min(plans, key=lambda plan: plan.excess_loss, default=None)


def _whole_transfer(p: Problem, flops: float, target_width: int | None) -> Budget | None:
    r = p.cost_exponent
    runs = flops / p.cost_constant
    tried = set()
    if target_width is None:
        for n, points in _free_pairs(p, flops):
            left = runs - points**p.num_hps * n**r
            tried.add((n, points, max(_floor(max(left, 0.0) ** (1 / r)), n)))
        # What rounding the target down leaves is the grid's.
        targets = _beside(continuous_transfer(p, flops).target_width)
    else:
        targets = (target_width,)
    tried |= {(n, points, M) for M in targets for n, points in _bound_pairs(p, runs, M)}
    plans = [
        transfer_budget(p, n, M, points)
        for n, points, M in sorted(tried)
        if points**p.num_hps * n**r + M**r <= runs * (1 + (2 + r) * _ROUNDING)
    ]
    return min(plans, key=lambda plan: plan.excess_loss, default=None)


def _free_pairs(p: Problem, flops: float) -> set[tuple[int, int]]:
    """Proxy widths and grid points to try, where the target's width is chosen too.

    Each of the two is taken next to its real-valued optimum, and the other where it is best then.
    """
    h, r = p.num_hps, p.cost_exponent
    runs = flops / p.cost_constant
    best = continuous_transfer(p, flops)

    def tuned(prefactor: float, exponent: float) -> float:
        """What to spend on tuning, in runs at width 1, if it leaves `prefactor T^-exponent`."""
        rest = p.loss_prefactor, p.alpha / r
        return math.exp(split_total(prefactor, exponent, *rest, math.log(runs))[0])

    pairs = set()
    for points in _beside(best.grid_points):
        size = points**h
        spent = tuned(p.transfer_prefactor * size ** (2 * p.beta / r), 2 * p.beta / r)
        widest = (runs / (1 + size)) ** (1 / r)
        pairs |= {(n, points) for n in _beside(min((spent / size) ** (1 / r), widest))}
    for n in _beside(best.proxy_width):
        run = n**r
        spent = min(tuned(p.grid_prefactor * run ** (2 / h), 2 / h), runs - run)
        pairs |= {(n, points) for points in _beside((max(spent, 0.0) / run) ** (1 / h))}
    return pairs


def _bound_pairs(p: Problem, runs: float, target_width: int) -> set[tuple[int, int]]:
    """Proxy widths and grid points to try, where the target's width is given."""
    h, r = p.num_hps, p.cost_exponent
    left = runs - target_width**r
    if left < 1:
        return set()
    width, points = best_tuning(p, left)
    # The last: all that the grid can have where the proxy may not be wider than the target.
    grids = {*_beside(points), *_beside((left / target_width**r) ** (1 / h))}
    pairs = {(min(_floor((left / size**h) ** (1 / r)), target_width), size) for size in grids}
    pairs |= {(n, _floor((left / n**r) ** (1 / h))) for n in _beside(width) if n <= target_width}
    return {(n, size) for n, size in pairs if min(n, size) >= 1}


def _warnings(
    p: Problem, direct: Budget | None, transfer: Budget | None, target_width: int | None
) -> tuple[str, ...]:
    found = []
    if transfer is None:
        found.append(
            "the budget does not pay a final run and even one run of a proxy: there is nothing to "
            "transfer from"
        )
    elif transfer.grid_points < _FEWEST_POINTS:
        found.append(
            f"transfer's grid has {transfer.grid_points} point(s) for each hyperparameter, and "
            f"an optimum cannot be located on fewer than {_FEWEST_POINTS}: the budget is too small "
            "for the theorem, whose rates hold as it grows"
        )
    if transfer is not None and target_width is None:
        if transfer.proxy_width >= transfer.target_width > 1:
            found.append(
                f"the proxy is as wide as the target ({transfer.target_width}): at this budget "
                "transfer is direct tuning with one run more"
            )
        elif transfer.proxy_width == 1:
            found.append(
                "the proxy's width is 1, where no power law holds: check cost_constant (the flops "
                "of one run at width 1) and the prefactors"
            )
    if direct is not None and direct.grid_points < _FEWEST_POINTS:
        found.append(
            f"direct tuning's grid has {direct.grid_points} point(s) for each hyperparameter, "
            f"fewer than the {_FEWEST_POINTS} that locate an optimum"
        )
    return tuple(found)


def _floor(x: float) -> int:
    return math.floor(x * (1 + _ROUNDING))


def _beside(x: float) -> tuple[int, int]:
    """The whole numbers next to x, at least 1."""
    below = max(_floor(x), 1)
    return below, below + 1
