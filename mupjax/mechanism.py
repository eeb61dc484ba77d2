"""A sweep with the decomposition observer, judged: is transfer explained by a stable top-κ part?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mupjax import results
from theory.curves import Scale, to_scale
from theory.mechanism_report import (
    Conditions,
    Explanation,
    MechanismReport,
    Number,
    explain_transfer,
)

__all__ = [
    "Decomposed",
    "Mechanism",
    "decomposed",
    "explain_dataset",
    "format_mechanisms",
    "json_of_mechanisms",
    "load_decomposition",
]

FloatArray = NDArray[np.float64]

_DIMS = ("parametrization", "width", "seed")
_HOW = (
    "add the observer to the sweep: a table [decomposition] in CONFIG.toml, or in Python "
    "observers=[theory.decomposition.decomposition_observer(theory.trajectory.LAPTOP)]"
)


@dataclass(frozen=True)
class Decomposed:
    """One parametrization's profiles, in the form `theory` reads.

    Attributes:
      name: of the parametrization.
      hp_name: the hyperparameter in question.
      hp_values: its values, shape (g,).
      scale: how they are compared.
      profiles: width → `L(w_0) + φ_n^k`, the loss that the k leading components alone lead to,
        shape (S, g, n); NaN where the run diverged, or where the linearized loss is off by more
        than the loss falls in any run of this width. The initial loss, the same at every rate,
        is counted in because it differs a little between widths and seeds: else that would pass
        for a difference of the trained parts.
      initial_loss, final_loss: width → loss at both ends of the averaged trajectory, (S, g).
      faithfulness: width → `|φ − ΔL|/|ΔL|`, (S, g).
      times: number of updates at which `paths` and `losses` were taken, shape (R,); empty if none.
      paths: width → change of loss `φ_n^k` on the way, (S, g, R, n).
      losses: width → loss on the way, (S, g, R).
      fixed: values at which other hyperparameters are held.
      truncated: widths of which fewer components were recorded than there are.
    """

    name: str
    hp_name: str
    hp_values: FloatArray
    scale: Scale
    profiles: Mapping[int, FloatArray]
    initial_loss: Mapping[int, FloatArray]
    final_loss: Mapping[int, FloatArray]
    faithfulness: Mapping[int, FloatArray]
    times: NDArray[np.int64]
    paths: Mapping[int, FloatArray]
    losses: Mapping[int, FloatArray]
    fixed: Mapping[str, float]
    truncated: tuple[int, ...]

    @property
    def grid(self) -> FloatArray:
        """Hyperparameters on their scale."""
        return to_scale(self.hp_values, self.scale)


@dataclass(frozen=True)
class Mechanism:
    """Profiles and what they say; `warnings` joins the report's and the dataset's."""

    data: Decomposed
    report: MechanismReport
    warnings: tuple[str, ...]


def load_decomposition(path: Path) -> xr.Dataset:
    """A dataset, or the one in a run's folder, that has the decomposition.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it is no result of a sweep, or was run without the observer.
    """
    if path.suffix not in (".nc", ".zarr"):
        found = [p for p in (path / "sweep.nc", path / "sweep.zarr") if p.exists()]
        if not found:
            raise FileNotFoundError(f"{str(path)!r} holds no result of a sweep.")
        path = found[0]
    dataset = results.load(path)
    if "decomposition_top" not in dataset:
        raise ValueError(f"{str(path)!r} holds no decomposition of the loss: {_HOW}.")
    return dataset


def decomposed(
    dataset: xr.Dataset,
    hp: str | None = None,
    *,
    scale: Scale = "log2",
    fix: Mapping[str, float] | None = None,
) -> dict[str, Decomposed]:
    """Profiles of every parametrization of a sweep.

    Args:
      dataset: a sweep with the decomposition observer.
      hp: the hyperparameter; None for the only one with several values.
      scale: how it is compared.
      fix: values of the others, needed for those with several values.

    Raises:
      ValueError: no such variable or value; or a choice that has to be made.
    """
    if "decomposition_top" not in dataset:
        raise ValueError(f"the dataset holds no decomposition of the loss: {_HOW}.")
    top = dataset["decomposition_top"]
    names = [str(d) for d in top.dims if d not in (*_DIMS, "component")]
    several = [d for d in names if top.sizes[d] > 1]
    if hp is None:
        if len(several) != 1:
            raise ValueError(
                f"say which hyperparameter is in question: {', '.join(several or names)} have "
                f"{'several values each' if several else 'one value each'}."
            )
        hp = several[0]
    if hp not in names:
        raise ValueError(f"the sweep has no hyperparameter {hp!r}; it has {', '.join(names)}.")
    given = dict(fix or {})
    unknown = sorted(given.keys() - (set(names) - {hp}))
    if unknown:
        raise ValueError(f"cannot fix {unknown[0]!r}: it is no other hyperparameter of the sweep.")
    fixed: dict[str, float] = {}
    for other in (d for d in names if d != hp):
        values = dataset[other].values.astype(np.float64)
        if other not in given and values.size > 1:
            raise ValueError(
                f"{other} has the values {', '.join(f'{v:g}' for v in values)}: fix one of them."
            )
        wanted = given.get(other, float(values[0]))
        nearest = int(np.abs(values - wanted).argmin())
        if not math.isclose(values[nearest], wanted, rel_tol=1e-6):
            raise ValueError(
                f"{other} was not run at {wanted:g}, only at {', '.join(f'{v:g}' for v in values)}."
            )
        dataset = dataset.isel({other: nearest})
        fixed[other] = float(values[nearest])
    dataset = results.with_parametrizations(dataset.sortby(hp))
    return {
        str(name): _arrays(dataset.sel(parametrization=name), str(name), hp, scale, fixed)
        for name in dataset["parametrization"].values
    }


def _arrays(
    dataset: xr.Dataset, name: str, hp: str, scale: Scale, fixed: Mapping[str, float]
) -> Decomposed:
    died = dataset["status"] != 0
    lost = died | _lost(dataset, died, hp)
    recorded = "decomposition_time_top" in dataset

    def read(variable: str, width: int, *own: str, but: xr.DataArray = lost) -> FloatArray:
        array = dataset[variable].where(~but).sel(width=width).transpose("seed", hp, *own)
        return array.values.astype(np.float64)

    profiles, paths, losses = {}, {}, {}
    ends: dict[str, dict[int, FloatArray]] = {
        key: {} for key in ("initial_loss", "final_loss", "faithfulness")
    }
    widths = [int(width) for width in dataset["width"].values]
    tops = {n: read("decomposition_top", n, "component") for n in widths}
    totals = {n: read("decomposition_total", n) for n in widths}
    # Beyond the width's own components there is padding.
    counts = {n: int(np.isfinite(top).any(axis=(0, 1)).sum()) for n, top in tops.items()}
    # As many were recorded everywhere: if these leave anything out at one width, they are cut off.
    most = max(counts.values())
    cut = any(
        counts[n] == most > 0 and _leaves_out(tops[n][..., most - 1], totals[n]) for n in widths
    )
    truncated = [n for n in widths if cut and counts[n] == most]
    for n in widths:
        shown = max(counts[n], 1)
        profile = tops[n][..., :shown]
        if n in truncated:
            profile = np.concatenate([profile, totals[n][..., None]], axis=-1)
        profiles[n] = profile + read("decomposition_initial_loss", n)[..., None]
        for key, values in ends.items():
            values[n] = read(f"decomposition_{key}", n, but=died)
        if recorded:
            paths[n] = read("decomposition_time_top", n, "time", "component")[..., :shown]
            losses[n] = read("decomposition_time_loss", n, "time")
    return Decomposed(
        name=name,
        hp_name=hp,
        hp_values=dataset[hp].values.astype(np.float64),
        scale=scale,
        profiles=profiles,
        initial_loss=ends["initial_loss"],
        final_loss=ends["final_loss"],
        faithfulness=ends["faithfulness"],
        times=dataset["time"].values.astype(np.int64) if recorded else np.zeros(0, np.int64),
        paths=paths,
        losses=losses,
        fixed=fixed,
        truncated=tuple(truncated),
    )


def _lost(dataset: xr.Dataset, died: xr.DataArray, hp: str) -> xr.DataArray:
    """Where parts of the linearized change say nothing: it is off by more than any loss falls."""
    change = dataset["decomposition_final_loss"] - dataset["decomposition_initial_loss"]
    fall = (-change).where(np.isfinite(change) & ~died).clip(min=0).max([hp, "seed"])
    # Also where either of the two is no number.
    return ~(abs(dataset["decomposition_total"] - change) <= fall)


def _leaves_out(last: FloatArray, total: FloatArray) -> bool:
    """Whether the last recorded component is not the whole."""
    alive = np.isfinite(total)
    return not np.allclose(last[alive], total[alive], rtol=1e-3, atol=1e-5)


def explain_dataset(
    dataset: xr.Dataset,
    hp: str | None = None,
    *,
    scale: Scale = "log2",
    fix: Mapping[str, float] | None = None,
    conditions: Conditions | None = None,
    confidence: float = 0.9,
) -> dict[str, Mechanism]:
    """Judge every parametrization of a sweep; arguments as for `decomposed` and
    `theory.mechanism_report.explain_transfer`.

    A parametrization that cannot be judged is left out, with a warning at the others.

    Raises:
      ValueError: as these, where no parametrization can be judged; the message names it.
    """
    found: dict[str, Mechanism] = {}
    failed: list[str] = []
    for name, data in decomposed(dataset, hp, scale=scale, fix=fix).items():
        try:
            report = explain_transfer(
                data.grid, data.profiles, conditions=conditions, confidence=confidence
            )
        except ValueError as error:
            failed.append("; ".join([f"{name}: {error}", *_left_out(data)]))
            continue
        warnings = (*report.warnings, *_left_out(data), *_doubts(data))
        found[name] = Mechanism(data, report, warnings)
    if not found:
        raise ValueError("; ".join(failed))
    missing = tuple(f"left out: {text}" for text in failed)
    return {name: replace(one, warnings=(*one.warnings, *missing)) for name, one in found.items()}


def _left_out(data: Decomposed) -> list[str]:
    found = []
    for n, profile in data.profiles.items():
        lost = np.isnan(profile).all(axis=2) & np.isfinite(data.final_loss[n])
        if lost.any():
            values = ", ".join(f"{v:.4g}" for v in data.hp_values[lost.any(axis=0)])
            found.append(
                f"width {n}: {lost.sum()} of {lost.size} runs are left out, at {data.hp_name} "
                f"{values}, as the linearized loss is off by more than the loss falls in any run "
                "(single updates change the loss too much, or the observer's stride is too long)"
            )
    return found


def _doubts(data: Decomposed) -> list[str]:
    found = []
    for n, off in data.faithfulness.items():
        off = np.where(np.isfinite(data.profiles[n]).any(axis=2), off, np.nan)
        if np.isfinite(off).any() and np.nanmax(off) > 0.05:
            worst = data.hp_values[np.unravel_index(np.nanargmax(off), off.shape)[1]]
            found.append(
                f"width {n}: the linearized loss is off by {np.nanmax(off):.0%} of the change at "
                f"{data.hp_name} {worst:.4g}: look at its curve with care"
            )
    if data.truncated:
        found.append(
            f"not all components were recorded at widths {', '.join(map(str, data.truncated))}: "
            "the last one stands for all others"
        )
    return found


_ROWS = (
    ("loss_gap", "loss gap"),
    ("hp_gap", "HP gap b_n"),
    ("bound", "bound t_n"),
    ("overlap", "overlap"),
    ("flatness_ratio", "flatness"),
    ("top_share", "top's share"),
    ("displacement", "displaced"),
    ("kappa_hat", "κ̂(n)"),
)


def format_mechanisms(mechanisms: Mapping[str, Mechanism]) -> str:
    """All reports, one after another, for a terminal."""
    return "\n\n".join(_format(name, m) for name, m in mechanisms.items())


def _format(name: str, mechanism: Mechanism) -> str:
    report, data = mechanism.report, mechanism.data
    held = "".join(f", {k} = {v:g}" for k, v in data.fixed.items())
    rows = [["width", *(str(e.width) for e in report.explanations)]]
    for key, title in _ROWS:
        rows.append([title, *(_cell(getattr(e, key)) for e in report.explanations)])
    rows.append(["at κ", *map(_kappa, report.explanations)])
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True)]
        return "   ".join([row[0].ljust(sizes[0]), *cells])

    lines = [
        f"{name}: top-κ part against {data.hp_name}{held}, each width against {report.widths[-1]}",
        "",
        line(rows[0]),
        "─" * len(line(rows[0])),
        *map(line, rows[1:]),
    ]
    lines += ["", f"verdict        {report.verdict}"]
    lines += [f"  {e.width}: {e.verdict}: {e.reason}" for e in report.explanations]
    lines += [f"warning        {text}" for text in mechanism.warnings]
    return "\n".join(lines)


def _cell(number: Number) -> str:
    if math.isnan(number.value):
        return "none"
    low, high = number.interval
    ends = "" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]"
    return f"{number.value:.3g}{ends}"


def _kappa(explanation: Explanation) -> str:
    low, high = explanation.kappa.min(), explanation.kappa.max()
    return f"{low}" if low == high else f"{low} to {high}"


def json_of_mechanisms(mechanisms: Mapping[str, Mechanism]) -> dict[str, Any]:
    """`{"parametrizations": {name: ...}}` in strict JSON values: what is not finite is None."""
    return {
        "parametrizations": {
            name: {
                "hp": m.data.hp_name,
                "fixed": dict(m.data.fixed),
                "verdict": m.report.verdict,
                "seeds": m.report.seeds,
                "widths": list(m.report.widths),
                "hp_values_on_scale": m.report.hp_values.tolist(),
                "left_out_on_scale": list(m.report.dropped),
                "warnings": list(m.warnings),
                "against_largest": [_json_of(e) for e in m.report.explanations],
            }
            for name, m in mechanisms.items()
        }
    }


def _json_of(explanation: Explanation) -> dict[str, Any]:
    e = explanation
    numbers = {f.name: getattr(e, f.name) for f in fields(e)}
    hat = e.truncation.kappa
    return {
        "width": e.width,
        "verdict": e.verdict,
        "reason": e.reason,
        "broken": e.broken,
        "probability": _finite(e.probability),
        "outcomes": dict(e.outcomes),
        "kappa": e.kappa.tolist(),
        "kappa_hat_by_hp": None if hat is None else hat.tolist(),
        "window": list(e.window),
    } | {
        name: {
            "value": _finite(number.value),
            "interval": [_finite(end) for end in number.interval],
        }
        for name, number in numbers.items()
        if isinstance(number, Number)
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
