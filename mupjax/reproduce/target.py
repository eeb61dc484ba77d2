"""What ``mupjax reproduce`` runs: a target checks published claims and says how each one fared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import xarray as xr
from matplotlib.figure import Figure

__all__ = ["Claim", "ClaimVerdict", "Finding", "Outcome", "Scale", "Target"]

Scale = Literal["tiny", "laptop", "paper"]
"""``tiny`` shows in seconds that a target runs and proves nothing; ``laptop`` takes minutes on two
cores; ``paper`` is the published size."""

ClaimVerdict = Literal["reproduced", "not reproduced", "cannot tell at this scale"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published statement that a target checks.

    Attributes:
      key: short name, unique in its target; keys the finding.
      statement: what is claimed, in one sentence.
      source: where, e.g. ``"GWB (arXiv 2512.22768), Theorem 3"``.
      published: the published value in words and numbers, or what the statement predicts.
    """

    key: str
    statement: str
    source: str
    published: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one claim fared.

    Attributes:
      measured: the value measured with its interval, as shown to a reader.
      verdict: by a criterion that ``reason`` states.
      reason: one sentence: why this verdict, or what would tell.
      values: the same numbers for machines (JSON-ready).
    """

    measured: str
    verdict: ClaimVerdict
    reason: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that a run of a target found.

    Attributes:
      findings: one for each of the target's claims, by key.
      dataset: everything measured, labelled; attributes say how.
      figures: by name, the first is the one laid out like the paper's.
      notes: paragraphs for the page: choices the paper leaves open, what does not match, limits.
      summary: further JSON-ready numbers for ``summary.json``.
    """

    findings: Mapping[str, Finding]
    dataset: xr.Dataset
    figures: Mapping[str, Figure]
    notes: tuple[str, ...] = ()
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Target:
    """One entry of ``mupjax reproduce``.

    Attributes:
      name: as typed on the command line, e.g. ``"rf-ridge"``.
      title: headline of the page.
      claims: what is checked.
      duration: how long each scale takes, in words, e.g. ``{"laptop": "1 minute on 2 cores"}``; its
        keys are the scales there are.
      run: ``run(scale, folder, progress) -> Outcome``. ``folder`` exists and is the run's own, so
        that sweeps may keep their datasets there and an interrupted run resumes; the caller writes
        the outcome. ``progress`` is as for :func:`mupjax.sweep`.
      options: keyword arguments that ``run`` takes besides, all optional: ``"seeds"`` (a count),
        ``"max_width"`` (the largest width to train) and ``"data"`` (a folder) are those the command
        line knows.
      check: ``check(scale, **options)`` raises the ValueError that ``run`` would, before the folder
        is claimed and an earlier run removed.
      estimate: ``estimate(scale, **options)`` says what the run will cost, for a reader who may
        then think better of it.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    duration: Mapping[Scale, str]
    run: Callable[..., Outcome]
    options: frozenset[str] = frozenset()
    check: Callable[..., object] | None = None
    estimate: Callable[..., str] | None = None
