"""The record of a diagnosis: what `theory.verdict` found, as attributes, as JSON and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from theory.curves import Edge, Scale
from theory.forecast import Forecast, json_interval, json_number
from theory.gaps import Gaps
from theory.rates import UNKNOWN, Interval
from theory.rates_resampling import ResampledIntervals
from theory.readings import OptimumRule

__all__ = ["Estimate", "TransferDiagnosis", "Verdict"]

Verdict = Literal["fast", "weak", "no transfer", "cannot tell"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; NaN where there is none."""

    value: float
    interval: Interval = UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """`{"value": v, "interval": [low, high]}`, null for what is not known or not finite."""
        return {"value": json_number(self.value), "interval": json_interval(self.interval)}


@dataclass(frozen=True)
class TransferDiagnosis:
    """What a table of losses says about hyperparameter transfer across width.

    Attributes:
      widths: strictly increasing.
      optimal_hp: `nu*(n)` per width, in the hyperparameter's units.
      optimal_loss: `phi*_n` per width.
      edges: side on which the grid does not bracket an optimum, per width.
      alpha: exponent of the loss gap, `phi*_n = loss_floor + loss_prefactor n^{-α}`.
      beta: exponent of the hyperparameter gap; `≤ 0` where the optimum moves like log n or faster.
      c_rate: exponent of the transfer suboptimality measured at the largest width, 2β if its curve
        is a parabola.
      curvature: second derivative of the loss at the optimum on `scale` (per octave² of a learning
        rate), per width; NaN where the optimum is not bracketed.
      curvature_exponent: γ, curvature at the optimum `~ n^γ`.
      advantage: `ρ = 2β − α`, the rate at which `c_n/a_n` vanishes.
      kappa: `α − 2β + γ`.
      transfer_penalty: loss lost at the largest width with the smallest width's optimum; NaN where
        one of the two is not bracketed.
      loss_floor, loss_prefactor: of the fit for alpha.
      resampled: further intervals of `"alpha"`, `"beta"` and `"c_rate"`, from resampled seeds and
        from leaving out each width.
      gaps: a_n, b_n and c_n, and what stood for infinity.
      verdict, reason: the answer and one sentence for it, with what would settle it when open.
      probability_fast: of β > α/2, or, where β is not determined, of `c_n < 0.05 a_n` at every
        width below the largest, if that is the larger of the two; NaN where neither is known.
      verdict_kappa: the same judgement by κ: `"fast"`, `"not fast"` or `"cannot tell"`.
      forecast: at `target_width`, or None.
      seeds, confidence, optimum, scale: of the analysis.
      search_range: from the smallest to the largest value of the hyperparameter, on `scale`.
      warnings: what a reader should know before trusting the numbers.
    """

    widths: tuple[int, ...]
    optimal_hp: tuple[Estimate, ...]
    optimal_loss: tuple[Estimate, ...]
    edges: tuple[Edge, ...]
    alpha: Estimate
    beta: Estimate
    c_rate: Estimate
    curvature: tuple[float, ...]
    curvature_exponent: Estimate
    advantage: Estimate
    kappa: Estimate
    transfer_penalty: Estimate
    loss_floor: Estimate
    loss_prefactor: Estimate
    resampled: dict[str, ResampledIntervals]
    gaps: Gaps
    verdict: Verdict
    reason: str
    probability_fast: float
    verdict_kappa: Literal["fast", "not fast", "cannot tell"]
    forecast: Forecast | None
    seeds: int
    confidence: float
    optimum: OptimumRule
    scale: Scale
    search_range: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values: null for what is not known or not finite."""
        record: dict[str, Any] = {"widths": list(self.widths)}
        for name in ("optimal_hp", "optimal_loss"):
            each = [estimate.to_json() for estimate in getattr(self, name)]
            record[name] = {key: [one[key] for one in each] for key in ("value", "interval")}
        for name in (
            *("alpha", "beta", "c_rate", "curvature_exponent", "advantage", "kappa"),
            *("transfer_penalty", "loss_floor", "loss_prefactor"),
        ):
            record[name] = getattr(self, name).to_json()
        record["resampled"] = {
            name: {
                "bootstrap": json_interval(intervals.bootstrap),
                "leave_one_width_out": json_interval(intervals.leave_one_width_out),
            }
            for name, intervals in self.resampled.items()
        }
        record |= {
            "loss_gap": [json_number(a) for a in self.gaps.loss_gap],
            "hp_gap": [json_number(b) for b in self.gaps.hp_gap],
            "suboptimality": [json_number(c) for c in self.gaps.suboptimality],
            "infinity": self.gaps.infinity,
            "hp_infinity": self.gaps.hp_infinity,
            "curvature": [json_number(c) for c in self.curvature],
            "search_range": json_number(self.search_range),
            "scale": self.scale,
            "optimum": self.optimum,
            "edges": list(self.edges),
            "verdict": self.verdict,
            "reason": self.reason,
            "probability_fast": json_number(self.probability_fast),
            "verdict_kappa": self.verdict_kappa,
            "seeds": self.seeds,
            "confidence": self.confidence,
            "warnings": list(self.warnings),
        }
        if self.forecast is not None:
            record["forecast"] = self.forecast.to_json()
        return record

    def table(self) -> str:
        """Aligned columns for a terminal, then exponents, verdict and warnings."""
        header = ("width", "optimal hp", "interval", "loss", "a_n", "b_n", "c_n", "")
        rows: list[tuple[str, ...]] = [header]
        for k, width in enumerate(self.widths):
            rows.append(
                (
                    f"{width}",
                    _text(self.optimal_hp[k].value),
                    _range(self.optimal_hp[k].interval),
                    _text(self.optimal_loss[k].value),
                    _text(float(self.gaps.loss_gap[k]), 2),
                    _text(float(self.gaps.hp_gap[k]), 2),
                    _text(float(self.gaps.suboptimality[k]), 2),
                    f"not bracketed ({self.edges[k]})" if self.edges[k] else "",
                )
            )
        widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(size) if place in (2, 7) else cell.rjust(size)
                for place, (cell, size) in enumerate(zip(row, widest, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        lines.append("")
        for name, estimate, meaning in (
            ("alpha", self.alpha, "loss gap a_n ~ n^-alpha"),
            ("beta", self.beta, "hyperparameter gap b_n ~ n^-beta"),
            ("2b - a", self.advantage, "c_n/a_n falls at this rate: fast if above 0"),
            ("c rate", self.c_rate, "transfer suboptimality c_n, measured"),
            ("gamma", self.curvature_exponent, "curvature at the optimum ~ n^gamma"),
            ("kappa", self.kappa, "alpha - 2 beta + gamma: fast if below 0"),
            ("floor", self.loss_floor, "loss at infinite width"),
            ("penalty", self.transfer_penalty, "loss lost at the largest width"),
        ):
            value = f"{_text(estimate.value)} {_range(estimate.interval)}".strip()
            lines.append(f"{name:9s}{value:31s} {meaning}")
        for name, key in (("alpha", "alpha"), ("beta", "beta"), ("c rate", "c_rate")):
            both = self.resampled[key]
            seeds, widths = _range(both.bootstrap), _range(both.leave_one_width_out)
            if seeds or widths:
                lines.append(
                    f"{name:9s}seeds resampled {seeds or 'unknown'}, "
                    f"each width left out {widths or 'unknown'}"
                )
        infinity = {"limit": "extrapolated limit", "largest": "largest width"}
        lines.append(
            f"infinity is the {infinity[self.gaps.infinity]} for a_n, the "
            f"{infinity[self.gaps.hp_infinity]} for b_n and c_n; optimum by {self.optimum}; "
            f"intervals at {100 * self.confidence:g} %"
        )
        if self.forecast is not None:
            lines += ["", self.forecast.table(self.widths)]
        fast = self.probability_fast
        chance = "" if math.isnan(fast) else f" (P(fast) = {fast:.2f})"
        lines += ["", f"verdict  {self.verdict}{chance}: {self.reason}"]
        lines += [f"warning  {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _text(value: float, digits: int = 4) -> str:
    return "unknown" if math.isnan(value) else f"{value:.{digits}g}"


def _range(interval: Interval) -> str:
    return "" if math.isnan(interval[0]) else f"[{interval[0]:.4g}, {interval[1]:.4g}]"
