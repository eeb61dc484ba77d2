"""Whether a decomposition adds up to the change of the loss, and if not, what is to blame.

Faithfulness is `|φ − ΔL| / |ΔL|`. The linearization of a step from a mark to the next is off by the
loss's third derivatives (trapezoid) or curvature (forward) along it, so what makes steps long makes
it fail. Which of the causes it is shows in numbers that cost nothing to record:

| cause | sign | remedy |
|---|---|---|
| ``no change`` | the loss changes by less than single precision tells | nothing to decompose |
| ``rule`` | the forward sum fails, the trapezoid would not | ``rule="trapezoid"`` |
| ``EMA window`` | the path between marks is rough: straightness below 0.7 | a longer window |
| ``learning rate`` | `Σ |ΔL|` is twice `|ΔL|` or more, or every update is a mark | a smaller one |
| ``subsampling`` | the path between marks is straight, and there is room | a smaller stride |

The first that applies is named. Where several act together, so that its remedy does not suffice,
the next report names the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr

from mupjax.results import configuration_of

__all__ = ["Cause", "FaithfulnessReport", "faithfulness_report", "faithfulness_warnings"]

Cause = Literal["", "no mark", "no change", "rule", "learning rate", "EMA window", "subsampling"]

REMEDIES: Mapping[str, str] = {
    "no mark": "training ends before the first mark: more steps, or a smaller stride",
    "no change": "the loss hardly changes, so that there is nothing to decompose",
    "rule": 'use rule="trapezoid"',
    "EMA window": "the average is rough between marks: raise its coefficient",
    "learning rate": "single updates change the loss too much: lower the learning rate",
    "subsampling": "the marks lie too far apart: lower the stride",
}

_NO_CHANGE, _VARIATION, _STRAIGHTNESS = 1e-4, 2.0, 0.7


@dataclasses.dataclass(frozen=True)
class FaithfulnessReport:
    """How faithful the trials of a sweep are.

    Attributes:
      tolerance: above which a trial counts as unfaithful.
      trials: number of trials that did not diverge.
      unfaithful: number of those beyond the tolerance.
      worst: the largest faithfulness (nan without trials), and `worst_at`: its coordinates.
      causes: number of unfaithful trials by cause.
      cause: the cause of every trial, "" where it is faithful or diverged; the sweep's dimensions.
    """

    tolerance: float
    trials: int
    unfaithful: int
    worst: float
    worst_at: Mapping[str, Any]
    causes: Mapping[str, int]
    cause: xr.DataArray

    def __str__(self) -> str:
        """One sentence, and one for each cause."""
        place = ", ".join(f"{key}={value}" for key, value in self.worst_at.items())
        text = (
            f"the linearized change of the loss is off by more than {self.tolerance:.0%} in "
            f"{self.unfaithful} of {self.trials} trials"
        )
        if not self.trials:
            return text + "."
        text += f"; the worst, {self.worst:.3g} of the true change, at {place}."
        for cause, count in self.causes.items():
            text += f" Cause in {count}: {cause} ({REMEDIES[cause]})."
        return text


def faithfulness_report(
    dataset: xr.Dataset, *, name: str = "decomposition", tolerance: float = 0.05
) -> FaithfulnessReport:
    """Judge every trial of a sweep that ran `theory.decomposition.decomposition_observer`.

    Args:
      dataset: of :func:`mupjax.sweep`.
      name: the observer's.
      tolerance: largest faithfulness that will do.

    Raises:
      ValueError: the dataset holds no such decomposition.
    """
    if f"{name}_faithfulness" not in dataset:
        raise ValueError(
            f"the dataset has no variable {name + '_faithfulness'!r}: it was run without "
            f"decomposition_observer(name={name!r})."
        )

    def of(variable: str) -> xr.DataArray:
        return dataset[f"{name}_{variable}"]

    change = of("final_loss") - of("initial_loss")
    off = of("faithfulness")
    # 1 and 2: the loss was not finite, or beyond the threshold, on the way.
    alive = ~dataset["status"].isin([1, 2]) & np.isfinite(change)
    bad = alive & ~(off <= tolerance)
    finest = xr.full_like(bad, _every_update(dataset, name))
    trapezoid = abs(of("trapezoid_total") - change) <= tolerance * abs(change)
    signs: list[tuple[Cause, xr.DataArray]] = [
        ("no mark", of("updates") == 0),
        ("no change", abs(change) <= _NO_CHANGE * abs(of("initial_loss"))),
        ("rule", trapezoid),
        ("EMA window", of("straightness") < _STRAIGHTNESS),
        ("learning rate", finest | (of("variation") >= _VARIATION * abs(change))),
        ("subsampling", xr.ones_like(bad)),
    ]
    cause = xr.full_like(off, "", dtype=object)
    for label, sign in reversed(signs):
        cause = xr.where(bad & sign, label, cause)
    cause = cause.transpose(*off.dims)
    counts = {str(label): int((cause == label).sum()) for label, _ in signs}
    worst, place = float("nan"), {}
    if bool(alive.any()):
        # 0/0, where the loss did not change at all, is worst.
        index = off.fillna(np.inf).where(alive, -1).argmax(...)
        at = off.isel(index)
        worst = float(at)
        place = {str(key): at[key].item() for key in off.dims}
    return FaithfulnessReport(
        tolerance=tolerance,
        trials=int(alive.sum()),
        unfaithful=int(bad.sum()),
        worst=worst,
        worst_at=place,
        causes={label: count for label, count in counts.items() if count},
        cause=cause,
    )


def _every_update(dataset: xr.Dataset, name: str) -> bool:
    """Whether every update was a mark."""
    for facts in configuration_of(dataset)["observers"]:
        if facts["name"] == name:
            strides = facts["averaging"]["first_stride"], facts["averaging"]["last_stride"]
            return strides == (1, 1)
    return False


def faithfulness_warnings(dataset: xr.Dataset, *, name: str) -> list[str]:
    """What to warn of after a sweep: nothing where all trials are faithful."""
    report = faithfulness_report(dataset, name=name)
    return [f"{name}: {report}"] if report.unfaithful else []
