"""The record of `theory.drift`: attributes, JSON, a table, and its numbers in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from theory.curves import Edge

__all__ = [
    "Interval",
    "TransferSummary",
    "Verdict",
    "fixed",
    "format_edge",
    "format_rate",
    "format_rate_interval",
    "format_with_interval",
]

Verdict = Literal["stays", "drifts", "cannot tell"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class TransferSummary:
    """What a sweep over widths and learning rates says about learning-rate transfer.

    Tuples run over `widths`. Intervals are at level `confidence`; an end is infinite where an
    optimum at the grid's edge leaves that side open, and NaN where there is no spread to judge by
    (one seed).

    Attributes:
      widths: strictly increasing.
      optimal_lr: `eta*(n)`; a bound where `edge` is not empty, NaN where every learning rate
        diverged.
      optimal_loss: mean loss at `eta*(n)`, interpolated; `inf` where every learning rate diverged.
      edge: side on which the optimum is not bracketed (`theory.curves.Edge`).
      drift_octaves: log2 of `eta*` at the largest width over that at the smallest.
      drift_per_doubling: least-squares slope of `log2 eta*` on `log2 n`, over widths that have an
        optimum.
      transfer_penalty: loss lost at the largest width by training at the smallest width's optimum;
        ≥ 0; `inf` where that learning rate diverged. It includes what the noise in both optima
        costs.
      stability: fraction of all trials that did not diverge.
      stability_per_width: the same, per width.
      verdict: `"drifts"` or `"stays"` if the interval of `drift_per_doubling` lies wholly outside
        or inside `±tolerance`, else `"cannot tell"`; never `"stays"` when an optimum is at an edge.
      reason: one sentence for the verdict, with what would settle it when it is open.
      warnings: what a reader should know before trusting the numbers.
      confidence: nominal level of the intervals.
      tolerance: octaves per doubling below which a drift counts as none.
      seeds: number of seeds S.
    """

    widths: tuple[int, ...]
    optimal_lr: tuple[float, ...]
    optimal_lr_interval: tuple[Interval, ...]
    optimal_loss: tuple[float, ...]
    optimal_loss_interval: tuple[Interval, ...]
    edge: tuple[Edge, ...]
    drift_octaves: float
    drift_interval: Interval
    drift_per_doubling: float
    drift_per_doubling_interval: Interval
    transfer_penalty: float
    stability: float
    stability_per_width: tuple[float, ...]
    verdict: Verdict
    reason: str
    warnings: tuple[str, ...]
    confidence: float
    tolerance: float
    seeds: int

    @property
    def at_edge(self) -> tuple[bool, ...]:
        """Per width: no usable grid points bracket the optimum, so `optimal_lr` is a bound."""
        return tuple(edge != "" for edge in self.edge)

    def to_json(self) -> dict[str, Any]:
        """All attributes and `at_edge` as strict JSON values, `null` for NaN and for infinity.

        A `null` end of an interval means that nothing bounds it; a `null` number that there is
        none, and `warnings` then says why.
        """
        record = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        record["at_edge"] = list(self.at_edge)
        return record

    def table(self) -> str:
        """Aligned columns for a terminal, then the drift, the penalty, verdict and warnings."""
        level = f"{100 * self.confidence:g} %"
        header = ("width", "optimal lr", "", f"{level} interval", "loss", "", "stability", "")
        rows: list[tuple[str, ...]] = [header]
        for k, width in enumerate(self.widths):
            rate = self.optimal_lr[k]
            low, high = self.optimal_loss_interval[k]
            rows.append(
                (
                    f"{width}",
                    format_rate(rate),
                    "" if math.isnan(rate) else f"{rate:.3g}",
                    format_rate_interval(self.optimal_lr_interval[k]),
                    f"{self.optimal_loss[k]:.4g}",
                    "" if math.isnan(low) else f"± {(high - low) / 2:.2g}",
                    f"{self.stability_per_width[k]:.2f}",
                    format_edge(self.edge[k]),
                )
            )
        widest = [max(len(row[column]) for row in rows) for column in range(len(header))]
        right = (True, True, True, False, True, False, True, False)
        lines = [
            "  ".join(
                cell.rjust(size) if to_right else cell.ljust(size)
                for cell, size, to_right in zip(row, widest, right, strict=True)
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "─" * max(len(line) for line in lines))
        total = format_with_interval(self.drift_octaves, self.drift_interval)
        slope = format_with_interval(self.drift_per_doubling, self.drift_per_doubling_interval)
        lines += [
            "",
            f"drift      {total} octaves from smallest to largest width, {slope} per doubling",
            f"penalty    {self.penalty_sentence()}",
            f"stability  {self.stability:.2f} of all trials did not diverge",
            f"verdict    {self.verdict}: {self.reason}",
        ]
        lines += [f"warning    {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def penalty_sentence(self) -> str:
        """What using the smallest width's optimum at the largest width costs, in words."""
        penalty = self.transfer_penalty
        if math.isnan(penalty):
            return "unknown: the smallest and the largest of two widths or more need an optimum"
        rate = f"width {self.widths[0]}'s best learning rate"
        if math.isinf(penalty):
            return f"{rate} diverges at width {self.widths[-1]}"
        bound = "at least " if self.edge[-1] else ""
        return f"{rate} costs {bound}{penalty:.2g} in loss at width {self.widths[-1]}"


def format_rate(value: float) -> str:
    """A learning rate as a power of two, for people: `2^-7.03`."""
    return "unknown" if math.isnan(value) else f"2^{fixed(math.log2(value))}"


def format_rate_interval(interval: Interval) -> str:
    """An interval of learning rates as powers of two; an open end is said in words."""
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    if low == 0 and math.isinf(high):
        return "unbounded"
    if low == 0:
        return f"below {format_rate(high)}"
    if math.isinf(high):
        return f"above {format_rate(low)}"
    return f"{format_rate(low)} to {format_rate(high)}"


def format_with_interval(value: float, interval: Interval) -> str:
    """A number with two decimals and its interval in brackets."""
    if math.isnan(value):
        return "unknown"
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return f"{fixed(value)} [no interval]"
    return f"{fixed(value)} [{fixed(low)}, {fixed(high)}]"


def format_edge(edge: Edge) -> str:
    """A flag for a table; empty when the optimum is bracketed."""
    if edge == "":
        return ""
    if edge == "all diverged":
        return "every learning rate diverged"
    return f"not bracketed ({edge})"


def fixed(value: float) -> str:
    """Two decimals."""
    # −0.00 would suggest a direction.
    return f"{0.0 if abs(value) < 0.005 else value:.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
