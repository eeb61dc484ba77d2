"""From a table of anybody's sweep to its diagnosis: rates, verdict, forecast, and what to doubt."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupjax.table import Scale, SweepTable
from theory import TransferDiagnosis, diagnose_transfer
from theory.grid_search import grid_prefactor_of
from theory.planner import GridSearchPlan
from theory.suspicions import duplicates, suspicions

__all__ = [
    "Diagnosis",
    "MeasuredRates",
    "diagnose_tables",
    "format_diagnoses",
    "json_of",
    "read_rates",
]


@dataclass(frozen=True)
class Diagnosis:
    """One parametrization's losses and what they say.

    Attributes:
      table: the losses.
      result: of `theory.diagnose_transfer`, its warnings joined by suspicions about the table and
        notes of reading it.
    """

    table: SweepTable
    result: TransferDiagnosis


def diagnose_tables(
    tables: Mapping[str, SweepTable], *, scale: Scale = "log2", **options: Any
) -> dict[str, Diagnosis]:
    """Diagnose every parametrization of a table.

    Args:
      tables: of `mupjax.table.arrange_sweeps`.
      scale: how the hyperparameter is compared.
      **options: of `theory.diagnose_transfer`.

    Raises:
      ValueError: an option is not as described there.
    """
    copies = duplicates({name: table.losses for name, table in tables.items()})
    diagnoses = {}
    for name, table in tables.items():
        result = diagnose_transfer(
            table.widths,
            table.hp_values,
            table.losses,
            observed=table.observed,
            scale=scale,
            **options,
        )
        odd = suspicions(
            table.widths,
            table.hp_values,
            table.losses,
            observed=table.observed,
            hp_name=table.hp_name,
        )
        found = [text for text in result.warnings if not _said_by(odd, text, table.widths)]
        warnings = dict.fromkeys([*found, *odd, *copies[name], *table.notes])
        diagnoses[name] = Diagnosis(table, dataclasses.replace(result, warnings=tuple(warnings)))
    rules = {name: d.result.optimum for name, d in diagnoses.items()}
    if len(set(rules.values())) < 2:
        return diagnoses
    said = ", ".join(f"{name} by {rule}" for name, rule in rules.items())
    note = (
        f"optima are not all read alike ({said}: not every curve has a bowl of five points), so "
        "the same runs may have other optima: --optimum parabola reads all in one way"
    )
    return {
        name: Diagnosis(d.table, dataclasses.replace(d.result, warnings=(*d.result.warnings, note)))
        for name, d in diagnoses.items()
    }


def _said_by(odd: tuple[str, ...], warning: str, widths: tuple[int, ...]) -> bool:
    """Whether suspicions say with more numbers what a warning of the verdict says."""
    if warning.startswith("one seed per cell:"):
        return any(text.startswith("one seed:") for text in odd)
    return any(
        warning.startswith(f"width {n}: the optimum is not bracketed")
        and any(f" {n} ({side}, " in text for text in odd for side in ("smallest", "largest"))
        for n in widths
    )


def json_of(diagnoses: Mapping[str, Diagnosis]) -> dict[str, Any]:
    """`{"parametrizations": {name: ...}}` in strict JSON values."""
    return {
        "parametrizations": {
            name: {"hp": d.table.hp_name, "loss": d.table.loss_name} | d.result.to_json()
            for name, d in diagnoses.items()
        }
    }


def format_diagnoses(diagnoses: Mapping[str, Diagnosis]) -> str:
    """All tables, one after another, for a terminal."""
    return "\n\n".join(
        f"{name}: {d.table.loss_name} against {d.table.hp_name}\n{d.result.table()}"
        for name, d in diagnoses.items()
    )


@dataclass(frozen=True)
class MeasuredRates:
    """What a saved diagnosis knows of a `theory.grid_search.Problem`; `None` where it does not.

    Attributes:
      widths: those measured.
      alpha, beta, loss_prefactor, penalty, probability_fast, verdict: as in the diagnosis.
      curvature: of the loss at the optimum of the largest width that has one.
      search_range: of the hyperparameter, on the scale of the diagnosis.
    """

    source: str
    widths: tuple[int, ...]
    alpha: float | None
    beta: float | None
    loss_prefactor: float | None
    penalty: float | None
    probability_fast: float | None
    verdict: str
    curvature: float | None
    search_range: float | None

    def grid_prefactor(self, num_hps: int) -> float | None:
        """K of a grid over the same range for each hyperparameter, all with this curvature."""
        if self.curvature is None or self.search_range is None:
            return None
        return grid_prefactor_of(self.curvature, self.search_range, num_hps)

    def prefactor_of_loss(self, alpha: float) -> float | None:
        """A of `a_n = A n^-α`: the measured one, or for another α than the measured the one that
        gives the same loss gap at the largest width.
        """
        if self.loss_prefactor is None or self.alpha is None:
            return None
        return self.loss_prefactor * self.widths[-1] ** (alpha - self.alpha)

    def transfer_prefactor(self, beta: float) -> float | None:
        """D of `c_n = D n^{-2β}`, for which the penalty is `D (n_1^{-β} − N^{-β})²`."""
        first, last = (n**-beta for n in (self.widths[0], self.widths[-1]))
        if not self.penalty or first == last:
            return None
        return self.penalty / (first - last) ** 2

    def warnings(self, plan: GridSearchPlan) -> list[str]:
        """What the diagnosis leaves open about a plan made from it."""
        found = []
        if self.verdict == "cannot tell":
            found.append(f"the diagnosis {self.source!r} cannot tell how fast transfer is")
        elif self.probability_fast is not None and (self.verdict == "fast") != plan.useful:
            found.append(
                f"the diagnosis {self.source!r} says {self.verdict!r}, unlike the rates used here"
            )
        if plan.transfer is not None:
            for what in ("proxy_width", "target_width"):
                width = getattr(plan.transfer, what)
                if not self.widths[0] <= width <= self.widths[-1]:
                    found.append(
                        f"{what} {width} lies outside of the widths measured, {self.widths[0]} to "
                        f"{self.widths[-1]}: the power laws are extrapolated"
                    )
        return found


def read_rates(path: Path, param: str | None = None) -> MeasuredRates:
    """The rates in a file of `mupjax diagnose --json`.

    Args:
      path: the file.
      param: which parametrization; needed if there are several.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, or the parametrization is not in it or not named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["parametrizations"]
        names = list(entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} was not written by mupjax diagnose --json.") from None
    if param is None and len(names) == 1:
        param = names[0]
    if param not in names:
        said = "it has several" if param is None else f"it has no {param!r}"
        raise ValueError(
            f"name a parametrization of {str(path)!r} with --param: {said}: {', '.join(names)}."
        )
    entry = entries[param]
    try:
        rates = MeasuredRates(
            source=str(path),
            widths=tuple(int(n) for n in entry["widths"]),
            alpha=_positive(entry["alpha"]["value"]),
            beta=_positive(entry["beta"]["value"]),
            loss_prefactor=_positive(entry["loss_prefactor"]["value"]),
            penalty=_positive(entry["transfer_penalty"]["value"]),
            probability_fast=entry["probability_fast"],
            verdict=str(entry["verdict"]),
            # Earlier versions did not write these two.
            curvature=next(filter(None, map(_positive, entry.get("curvature", [])[::-1])), None),
            search_range=_positive(entry.get("search_range")),
        )
        if not rates.widths or min(rates.widths) < 1:
            raise ValueError("widths")
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{str(path)!r} lacks what mupjax diagnose --json writes for {param!r}."
        ) from None
    return rates


def _positive(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value > 0 else None
