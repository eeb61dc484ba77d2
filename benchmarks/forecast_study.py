"""How far the intervals, verdicts and forecasts of `theory.verdict` can be trusted, measured.

    python benchmarks/forecast_study.py coverage [--repetitions 200]
    python benchmarks/forecast_study.py resampled [--repetitions 12]
    python benchmarks/forecast_study.py forecast [--table sweep.csv …]

`coverage` plants sweeps with known exponents and noise and counts how often the stated 90 %
intervals hold the truth and how often a verdict is wrong; `resampled` does so for the intervals
from refits, families taken together. `forecast` leaves out the one and the two largest widths of
planted sweeps, and of tables given (tidy CSV: width, lr or learning_rate, loss, optional param and
seed), predicts the optimum there, and compares with simpler forecasts. All print Markdown tables;
those in `docs/forecast.md` are theirs. No part of the package imports this file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from theory.forecast import forecast_at
from theory.forecast_models import predict, predict_loss
from theory.losses import loss_table
from theory.readings import Readings, read_optima
from theory.verdict import diagnose_transfer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """Planted sweeps: `phi_n(x) = 2 + 3 n^{-α} + shape(x − x*(n))`, n over the smallest width.

    `x*(n)` is `−4 + shift (n^{-β} − 1/2)`, or `−4 − drift log2 n` where a drift is given.
    """

    name: str
    truth: str
    alpha: float
    beta: float
    shift: float = 2.0
    drift: float = 0.0


FAMILIES = (
    Family("fast, β = α", "fast", 0.5, 0.5),
    Family("fast, β = 1.5 α", "fast", 0.5, 0.75),
    Family("fast, β = α = 1", "fast", 1.0, 1.0),
    Family("border, β = α/2", "border", 0.75, 0.375),
    Family("border, β = α/2, α = 1", "border", 1.0, 0.5),
    Family("weak, β = α/4", "weak", 1.0, 0.25),
    Family("weak, β = 0.4 α", "weak", 1.0, 0.4),
    Family("none, 0.5 octaves per doubling", "no transfer", 0.5, 0.0, drift=0.5),
    Family("none, 0.2 octaves per doubling", "no transfer", 0.5, 0.0, drift=0.2),
    Family("optimum stays", "fast", 0.5, math.nan, shift=0.0),
)


@dataclass(frozen=True)
class Setup:
    """Size and noise of a planted sweep: standard deviations in loss and in octaves."""

    name: str
    widths: int
    seeds: int
    spacing: float
    cell_noise: float
    seed_noise: float
    optimum_noise: float
    steep: float


SETUPS = (
    Setup("8 widths, 5 seeds, quiet", 8, 5, 0.5, 0.001, 0.01, 0.01, 0.3),
    Setup("6 widths, 5 seeds", 6, 5, 0.5, 0.003, 0.01, 0.03, 0.3),
    Setup("6 widths, 3 seeds", 6, 3, 0.5, 0.003, 0.01, 0.03, 0.3),
    Setup("5 widths, 3 seeds, coarse", 5, 3, 1.0, 0.003, 0.01, 0.03, 0.6),
    Setup("6 widths, 3 seeds, noisy", 6, 3, 0.5, 0.01, 0.02, 0.1, 0.3),
)


_QUIET = {"cell_noise": 1e-9, "seed_noise": 0.0, "optimum_noise": 0.0, "spacing": 0.125}


def plant(
    family: Family, setup: Setup, rng: np.random.Generator, widths: int | None = None
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """Widths, hyperparameters and losses (W, H, S) of one planted sweep."""
    n = 64 * 2 ** np.arange(widths or setup.widths)
    ratio = n / n[0]
    x = np.arange(-9.0, 1.0 + setup.spacing / 2, setup.spacing)
    optimum = -4 - family.drift * np.log2(ratio)
    if family.shift:
        optimum = optimum + family.shift * (ratio**-family.beta - 0.5)
    seeds = setup.seeds
    moved = setup.optimum_noise * np.sqrt(0.5) * rng.normal(size=(2, n.size, 1, seeds))
    moved = moved[0, :1] + moved[1]
    away = x[None, :, None] - optimum[:, None, None] - moved
    # Convex, curvature 0.3 per octave², steeper to the right where `steep` is positive.
    k = setup.steep
    shape = 0.3 * (np.expm1(k * away) - k * away) / k**2
    loss = 2 + 3 * ratio[:, None, None] ** -family.alpha + shape
    loss = loss + setup.seed_noise * rng.normal(size=(1, 1, seeds))
    return n, 2.0**x, loss + setup.cell_noise * rng.normal(size=loss.shape)


def coverage(repetitions: int) -> None:
    """Print coverage of the intervals and the verdicts, per family and setup."""
    print(
        "| setup | truth | α | β | 2β − α | c rate | floor "
        "| fast | weak | none | abstains | wrong |"
    )
    print("|" + "---|" * 12)
    for place, (setup, family) in enumerate(itertools.product(SETUPS, FAMILIES)):
        # Noise of its own for each: with the same, families would hit and miss together.
        rng = np.random.default_rng([0, place])
        # The curve is lopsided, so c_n is no exact power law: the estimate without noise is meant.
        ideal = diagnose_transfer(*plant(family, replace(setup, **_QUIET), rng), resamples=100)
        truth = {
            "alpha": family.alpha,
            "beta": family.beta,
            "advantage": 2 * family.beta - family.alpha,
            "c_rate": ideal.c_rate.value,
            "loss_floor": 2.0,
        }
        hits: dict[str, list[bool]] = {name: [] for name in truth}
        verdicts: list[str] = []
        for _ in range(repetitions):
            diagnosis = diagnose_transfer(*plant(family, setup, rng), resamples=200)
            verdicts.append(diagnosis.verdict)
            for name, value in truth.items():
                low, high = getattr(diagnosis, name).interval
                if not (math.isnan(low) or math.isnan(value)):
                    hits[name].append(low <= value <= high)
        share = {v: verdicts.count(v) / repetitions for v in set(verdicts)}
        right = {"border": ("weak",)}.get(family.truth, (family.truth,))
        wrong = sum(s for v, s in share.items() if v not in (*right, "cannot tell"))
        cells = [
            f"{np.mean(hit):.2f}" + (f" ({len(hit)})" if len(hit) < repetitions else "")
            if hit
            else ""
            for hit in hits.values()
        ]
        counts = [f"{share.get(v, 0):.2f}" for v in ("fast", "weak", "no transfer", "cannot tell")]
        row = [setup.name, family.name, *cells, *counts, f"{wrong:.2f}"]
        print("| " + " | ".join(row) + " |", flush=True)


def resampled(repetitions: int) -> None:
    """Print coverage and median width of stated, bootstrap and jackknife intervals, per setup."""
    print("| setup | exponent | stated | seeds resampled | each width left out |")
    print("|" + "---|" * 5)
    for place, setup in enumerate(SETUPS):
        found: dict[tuple[str, str], list[tuple[bool, float]]] = {}
        for index, family in enumerate(FAMILIES):
            rng = np.random.default_rng([1, place, index])
            ideal = diagnose_transfer(*plant(family, replace(setup, **_QUIET), rng), resamples=100)
            beta = family.beta if family.shift else math.nan
            truth = {"alpha": family.alpha, "beta": beta, "c_rate": ideal.c_rate.value}
            for _ in range(repetitions):
                diagnosis = diagnose_transfer(*plant(family, setup, rng), resamples=200)
                for name, value in truth.items():
                    both = diagnosis.resampled[name]
                    for kind, (low, high) in (
                        ("stated", getattr(diagnosis, name).interval),
                        ("seeds", both.bootstrap),
                        ("widths", both.leave_one_width_out),
                    ):
                        if not (math.isnan(low) or math.isnan(value)):
                            hit = (low <= value <= high, high - low)
                            found.setdefault((name, kind), []).append(hit)
        for name in ("alpha", "beta", "c_rate"):
            cells = [np.array(found[name, kind]).T for kind in ("stated", "seeds", "widths")]
            said = [f"{hits.mean():.2f}, {np.median(sizes):.3f}" for hits, sizes in cells]
            print(f"| {setup.name} | {name} | " + " | ".join(said) + " |", flush=True)


def tables(
    path: Path,
) -> Iterator[tuple[str, NDArray[np.int64], FloatArray, FloatArray, FloatArray]]:
    """Name, widths, grid, losses (W, H, S) and observed of every parametrization in a tidy CSV."""
    rows = list(csv.DictReader(path.open()))
    rate = "lr" if "lr" in rows[0] else "learning_rate"
    for param in sorted({row.get("param", "") for row in rows}):
        mine = [row for row in rows if row.get("param", "") == param]
        widths = sorted({int(row["width"]) for row in mine})
        grid = sorted({float(row[rate]) for row in mine})
        seeds = sorted({row.get("seed", "") for row in mine})
        losses = np.full((len(widths), len(grid), len(seeds)), np.nan)
        observed = np.zeros(losses.shape, dtype=bool)
        for row in mine:
            cell = (
                widths.index(int(row["width"])),
                grid.index(float(row[rate])),
                seeds.index(row.get("seed", "")),
            )
            losses[cell] = float(row["loss"] or "nan")
            observed[cell] = True
        name = f"{path.stem} {param}".strip()
        yield name, np.array(widths), np.array(grid), losses, observed


@dataclass
class Score:
    """Errors of each forecast in octaves, hits of the interval, where a naive one was chosen."""

    errors: dict[str, list[float]]
    loss_errors: dict[str, list[float]]
    hits: list[bool]
    loss_hits: list[bool]
    naive: list[bool]
    loss_naive: list[bool]


def score_sweep(readings: Readings, whole: Readings, score: Score) -> None:
    """Forecast the largest width of `whole` from `readings`, which lacks it; add to the score."""
    target = int(whole.table.widths[-1])
    usable = readings.usable
    if whole.edges[-1] or usable.sum() < 3:
        return
    n, x, y = readings.table.widths[usable], readings.coordinate[usable], readings.loss[usable]
    actual, actual_loss = whole.coordinate[-1], whole.loss[-1]
    forecast = forecast_at(readings, target, 0.9)
    slope, level = np.polyfit(np.log2(n), x, 1)
    law, loss_law = readings.fit_optimum(), readings.fit_loss()
    noise = [
        np.zeros(n.size) if drawn is None else drawn[:, usable].var(axis=0)
        for drawn in (readings.drawn_coordinate, readings.drawn_loss)
    ]
    average = predict(n, x, target, variances=noise[0] + readings.resolution**2)
    found = {
        "last optimum": x[-1],
        "line": level + slope * math.log2(target),
        "power law": float(law(target)) if math.isfinite(law.limit) else x[-1],
        "average": average.median,
        "chosen": math.log2(forecast.optimal_hp),
    }
    for name, value in found.items():
        score.errors.setdefault(name, []).append(abs(float(value) - actual))
    slope, level = np.polyfit(np.log(n), np.log(y), 1)
    found = {
        "last optimum": y[-1],
        "line": math.exp(level + slope * math.log(target)),
        "power law": float(loss_law(target)) if math.isfinite(loss_law.limit) else y[-1],
        "average": max(predict_loss(n, y, target, variances=noise[1]).median, 0.0),
        "chosen": forecast.optimal_loss,
    }
    score.naive.append(forecast.method != "average")
    score.loss_naive.append(forecast.loss_method != "average")
    for name, value in found.items():
        score.loss_errors.setdefault(name, []).append(abs(float(value) / actual_loss - 1))
    low, high = forecast.optimal_hp_interval
    score.hits.append(math.log2(low) <= actual <= math.log2(high))
    low, high = forecast.optimal_loss_interval
    score.loss_hits.append(low <= actual_loss <= high)


def forecasts(repetitions: int, paths: list[Path]) -> None:
    """Print errors and coverage of forecasts with one and two of the largest widths left out."""
    methods = ("last optimum", "line", "power law", "average", "chosen")
    print("| sweeps | left out | n | " + " | ".join(methods) + " | naive | holds |", end="")
    print(" loss: " + " | loss: ".join(methods) + " | naive | holds |")
    print("|" + "---|" * (3 + 2 * (len(methods) + 2)))
    for left_out in (1, 2):
        for family in FAMILIES:
            score, rng = Score({}, {}, [], [], [], []), np.random.default_rng(1)
            for setup in SETUPS:
                for _ in range(repetitions):
                    n, hp, losses = plant(family, setup, rng)
                    keep = n.size - left_out
                    whole = read_optima(loss_table(n, hp, losses), resamples=100)
                    part = loss_table(n[:keep], hp, losses[:keep])
                    score_sweep(read_optima(part, resamples=100), whole, score)
            _row(family.name, left_out, methods, score)
        every = Score({}, {}, [], [], [], [])
        for path in paths:
            for name, n, hp, losses, seen in tables(path):
                score, keep = Score({}, {}, [], [], [], []), n.size - left_out
                whole = read_optima(loss_table(n, hp, losses, observed=seen))
                part = loss_table(n[:keep], hp, losses[:keep], observed=seen[:keep])
                for one in (score, every):
                    score_sweep(read_optima(part), whole, one)
                _row(name, left_out, methods, score)
        if paths:
            _row("all tables", left_out, methods, every)
            _pairs(every)


def _pairs(score: Score) -> None:
    """Print how far the chosen forecast's error exceeds naive ones, tables resampled in pairs."""
    rng = np.random.default_rng(0)
    for what, errors in (("optimum", score.errors), ("loss", score.loss_errors)):
        drawn = rng.integers(0, len(errors["chosen"]), (10_000, len(errors["chosen"])))
        root = {
            name: np.sqrt(np.square(np.array(each)[drawn]).mean(1)) for name, each in errors.items()
        }
        for naive in ("line", "last optimum"):
            low, high = np.quantile(root["chosen"] - root[naive], [0.05, 0.95])
            medians = [np.median(errors[name]) for name in ("chosen", naive)]
            print(
                f"{what}: chosen less {naive}, 90 % [{low:.4f}, {high:.4f}]; "
                f"medians {medians[0]:.4f} and {medians[1]:.4f}",
                flush=True,
            )


def _row(name: str, left_out: int, methods: tuple[str, ...], score: Score) -> None:
    if not score.hits:
        print(f"| {name} | {left_out} | 0 |")
        return
    cells = [f"{np.sqrt(np.mean(np.square(score.errors[m]))):.2f}" for m in methods]
    cells += [f"{np.mean(score.naive):.2f}", f"{np.mean(score.hits):.2f}"]
    cells += [f"{100 * np.sqrt(np.mean(np.square(score.loss_errors[m]))):.2f} %" for m in methods]
    cells += [f"{np.mean(score.loss_naive):.2f}", f"{np.mean(score.loss_hits):.2f}"]
    print(f"| {name} | {left_out} | {len(score.hits)} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Command line of this module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=("coverage", "resampled", "forecast"))
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--table", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    if arguments.study == "coverage":
        coverage(arguments.repetitions or 100)
    elif arguments.study == "resampled":
        resampled(arguments.repetitions or 12)
    else:
        forecasts(arguments.repetitions or 20, arguments.table)


if __name__ == "__main__":
    main()
