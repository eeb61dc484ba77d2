"""Running a target in a folder of its own: refused, resumed or replaced, and written whole."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mupjax import results
from mupjax.figures import style
from mupjax.reproduce.page import write_page
from mupjax.reproduce.target import Outcome, Scale, Target

__all__ = ["DATASET", "Run", "format_findings", "reproduce"]

DATASET, SUMMARY, PAGE = "dataset.nc", "summary.json", "index.html"
_MARKER, _SWEEPS, _DRAFT = "run.json", "sweeps", ".draft"
_FORMAT = "mupjax reproduce"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: what it found and the files it wrote."""

    target: Target
    scale: Scale
    outcome: Outcome
    files: tuple[Path, ...]


def reproduce(
    target: Target,
    folder: str | os.PathLike[str],
    *,
    scale: Scale = "laptop",
    replace: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Run:
    """Run a target and write what it found.

    The folder receives ``dataset.nc``, ``summary.json``, the figures (PNG and SVG), ``index.html``,
    the record ``run.json`` of what was asked for, and ``sweeps/``, where a target keeps its sweeps.
    A run that was interrupted, and is asked for again alike, takes up the widths that ended. All
    results are written to a draft first and moved into place together.

    Args:
      target: what to run.
      folder: where to; made if it is missing.
      scale: one of the target's scales.
      replace: start anew where the folder holds a run of this target, whatever it was asked for.
      progress: as for :func:`mupjax.sweep`.
      options: for the target, among ``target.options``; ``None`` is as if not given.

    Raises:
      ValueError: the target has no such scale or option, or an option has no such value.
      FileExistsError: the folder holds something else, or a run that was asked for otherwise.
    """
    if scale not in target.duration:
        raise ValueError(
            f"{target.name} has no scale {scale!r}: choose from {', '.join(target.duration)}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(set(given) - target.options):
        takes = ", ".join(sorted(target.options)) or "none"
        raise ValueError(f"{target.name} does not take the option {unknown[0]!r} (takes: {takes}).")
    if target.check is not None:
        target.check(scale, **given)
    folder = Path(folder)
    record = {"format": _FORMAT, "target": target.name, "scale": scale, "options": given}
    _claim_folder(folder, record, replace)
    sweeps = folder / _SWEEPS
    sweeps.mkdir(exist_ok=True)
    outcome = target.run(scale, sweeps, progress, **given)
    _check_outcome(target, outcome)
    files = _write(target, scale, outcome, folder)
    if not any(sweeps.iterdir()):
        sweeps.rmdir()
    return Run(target, scale, outcome, files)


def format_findings(target: Target, outcome: Outcome) -> str:
    """Claim, published value, measured value and verdict of every claim, for a terminal."""
    blocks = []
    for claim in target.claims:
        finding = outcome.findings[claim.key]
        lines = [
            ("claim", f"{claim.statement} [{claim.source}]"),
            ("published", claim.published),
            ("measured", finding.measured),
            ("verdict", f"{finding.verdict.upper()}: {finding.reason}"),
        ]
        blocks.append(
            "\n".join(
                textwrap.fill(
                    text,
                    width=110,
                    initial_indent=f"{name:<11}",
                    subsequent_indent=" " * 11,
                    break_on_hyphens=False,
                )
                for name, text in lines
            )
        )
    return "\n\n".join(blocks)


def _claim_folder(folder: Path, record: Mapping[str, Any], replace: bool) -> None:
    """Make the folder this run's own, or refuse."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{str(path)!r} is a file: choose another folder with --out.")
    marker = folder / _MARKER
    if folder.exists() and any(folder.iterdir()):
        earlier = _read_marker(marker)
        if earlier is None or earlier.get("target") != record["target"]:
            what = "something else" if earlier is None else f"a run of {earlier.get('target')}"
            raise FileExistsError(
                f"{str(folder)!r} holds {what}: choose another folder with --out."
            )
        if replace:
            _remove_run(folder)
        elif earlier != json.loads(json.dumps(record)):
            raise FileExistsError(
                f"{str(folder)!r} holds a run at scale {earlier.get('scale')} with options "
                f"{earlier.get('options')}: choose another folder with --out, or say --replace."
            )
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{_MARKER}.draft"
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(marker)


def _read_marker(marker: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing that someone put beside it."""
    for name in [*_files_of(folder), _SWEEPS, _DRAFT]:
        results.remove(folder / name)


def _files_of(folder: Path) -> list[str]:
    try:
        listed = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in listed if Path(name).name == name != ".."]


def _check_outcome(target: Target, outcome: Outcome) -> None:
    claimed = {claim.key for claim in target.claims}
    if claimed != set(outcome.findings):
        raise RuntimeError(
            f"{target.name} claims {sorted(claimed)} but found {sorted(outcome.findings)}."
        )
    if not outcome.figures:
        raise RuntimeError(f"{target.name} drew no figure.")


def _write(target: Target, scale: Scale, outcome: Outcome, folder: Path) -> tuple[Path, ...]:
    draft = folder / _DRAFT
    results.remove(draft)
    draft.mkdir()
    try:
        dataset = outcome.dataset.assign_attrs(target=target.name, scale=scale)
        results.save(dataset, draft / DATASET)
        for name, figure in outcome.figures.items():
            style.save(figure, draft / name, formats=("png", "svg"))
        write_page(draft / PAGE, target=target, scale=scale, outcome=outcome)
        names = [*sorted(path.name for path in draft.iterdir()), SUMMARY]
        summary = _summary(target, scale, outcome, names)
        (draft / SUMMARY).write_text(summary, encoding="utf-8")
        for stale in set(_files_of(folder)) - set(names):
            results.remove(folder / stale)
        for name in names:
            (draft / name).replace(folder / name)
    finally:
        results.remove(draft)
    return tuple(folder / name for name in names)


def _summary(target: Target, scale: Scale, outcome: Outcome, files: list[str]) -> str:
    record = {
        "target": target.name,
        "title": target.title,
        "scale": scale,
        "claims": {
            claim.key: dataclasses.asdict(claim) | dataclasses.asdict(outcome.findings[claim.key])
            for claim in target.claims
        },
        "summary": outcome.summary,
        "notes": outcome.notes,
        "versions": results.versions(),
        "files": files,
    }
    return json.dumps(_plain(record), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON-ready: arrays as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
