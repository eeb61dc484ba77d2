"""``mupjax plan``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["plan"]


def plan(
    num_hps: int,
    flops: float,
    alpha: float | None = None,
    beta: float | None = None,
    cost_exponent: float = 2.0,
    cost_constant: float | None = None,
    loss_prefactor: float | None = None,
    transfer_prefactor: float | None = None,
    grid_prefactor: float | None = None,
    diagnosis: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    param: str | None = None,
    target_width: int | None = None,
    json: Path | None = None,
) -> None:
    """Spend a budget of flops on tuning small and transferring, or on tuning at the target width.

    A run at width n costs cost_constant * n^cost_exponent flops. A grid of 1/rho points for each
    hyperparameter misses grid_prefactor * rho^2 of the loss, a width loses loss_prefactor *
    n^-alpha, and transfer from it loses transfer_prefactor * n^(-2 beta). With prefactors of 1,
    widths and losses are right up to constant factors only.

    Args:
      num_hps: how many hyperparameters are tuned.
      flops: the whole budget.
      alpha: rate of the loss gap.
      beta: rate of the gap of the optimal hyperparameters.
      cost_exponent: 2 where the tokens of a run do not depend on its width.
      cost_constant: flops of one run at width 1: those of a real run over its width^cost_exponent;
        default 1.
      loss_prefactor: loss gap at width 1; without one that of --from, or 1.
      transfer_prefactor: transfer's loss at width 1; without one that of --from, or 1.
      grid_prefactor: loss missed by a grid of one point, num_hps * curvature * range^2 / 24;
        without one that of --from, for its range and all hyperparameters alike, or 1.
      diagnosis: a file of `mupjax diagnose --json`, for alpha, beta and prefactors not given.
      param: which parametrization of that file, if it has several.
      target_width: the width to train in the end; without one it is chosen too.
      json: file to write the results to.
    """
    from mupjax.commands.output import check_file, write_json
    from mupjax.diagnose import read_rates
    from theory.grid_search import Problem
    from theory.planner import plan_grid_search

    if json is not None:
        check_file(json, "--json", diagnosis)
    if param is not None and diagnosis is None:
        raise ValueError("--param chooses from the file of --from, which is not given.")
    rates = None if diagnosis is None else read_rates(diagnosis, param)
    source = None if rates is None else str(diagnosis)
    alpha = _known("--alpha", alpha, rates and rates.alpha, source)
    if beta is None and rates is not None and rates.beta is None and rates.verdict == "no transfer":
        raise ValueError(
            f"{source!r} says 'no transfer' (its beta is not above 0): no smaller width is a "
            "proxy, so tune at the target width; or give a --beta to plan with."
        )
    beta = _known("--beta", beta, rates and rates.beta, source)
    measured_grid = None if rates is None else rates.grid_prefactor(num_hps)
    problem = Problem(
        alpha=alpha,
        beta=beta,
        num_hps=num_hps,
        cost_exponent=cost_exponent,
        loss_prefactor=_known(
            "--loss-prefactor",
            loss_prefactor,
            rates.prefactor_of_loss(alpha) if rates else 1.0,
            source,
        ),
        transfer_prefactor=_known(
            "--transfer-prefactor",
            transfer_prefactor,
            rates.transfer_prefactor(beta) if rates else 1.0,
            source,
        ),
        grid_prefactor=grid_prefactor if grid_prefactor is not None else measured_grid or 1.0,
        cost_constant=1.0 if cost_constant is None else cost_constant,
    )
    result = plan_grid_search(problem, flops, target_width=target_width)
    if rates is not None:
        notes = rates.warnings(result)
        if grid_prefactor is None and measured_grid is None:
            notes.append("grid_prefactor is 1 for want of a better number (--grid-prefactor)")
        elif grid_prefactor is None and num_hps > 1:
            notes.append(
                f"grid_prefactor is of the one hyperparameter in {source!r}, taken for all "
                f"{num_hps} (--grid-prefactor)"
            )
        if cost_constant is None:
            notes.append("cost_constant is 1 for want of a better number (--cost-constant)")
        result = dataclasses.replace(result, warnings=(*result.warnings, *notes))
    # The file first: whoever reads the output may stop reading.
    if json is not None:
        write_json(json, result.to_json())
    print(result.table())
    if json is not None:
        print(f"\nwrote {json}")


def _known(option: str, value: float | None, measured: float | None, source: str | None) -> float:
    if value is not None:
        return value
    if measured is not None:
        return measured
    if source is None:
        raise ValueError(f"{option} is needed, or --from with a diagnosis that has it.")
    raise ValueError(f"{source!r} does not determine what {option} says: give it.")
