"""One page for a reader who was not there: what was run, what came out, how sure that is.

The page is one HTML file without scripts or outside references: styles are inline, the figure is
embedded, and so it can be mailed, archived beside the dataset, and printed.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure

from mupjax.figures import style
from theory.drift import (
    Interval,
    TransferSummary,
    format_edge,
    format_rate,
    format_rate_interval,
    format_with_interval,
)

__all__ = [
    "PAGE_STYLE",
    "RECORD",
    "page_template",
    "record_rows",
    "svg_base64",
    "verdict_sentence",
    "write_report",
]

RECORD = {"configuration": "Configuration", "versions": "Versions", "device": "Device"}
"""Attributes of the dataset that say what was run (JSON, or plain text), with their headings."""

PAGE_STYLE = """\
:root { --ink: #1a1a1a; --muted: #5f5f5f; --rule: #d4d4d4; --page: #ffffff; --panel: #f5f6f7;
  --good: #14623c; --bad: #9c2f10; --open: #6b5300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --muted: #a8a8a8; --rule: #454545; --page: #16181b; --panel: #212428;
    --good: #6fd3a0; --bad: #ff9d7a; --open: #e6c65c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 62rem; color: var(--ink);
  background: var(--page); font: 1rem/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial,
    sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, ul { margin: .4rem 0; max-width: 46rem; }
.muted { color: var(--muted); }
.verdict { font-weight: 650; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
/* Plots have dark ink: they stay on white paper on a dark page. */
figure { margin: 1rem 0; padding: .5rem; background: #ffffff; border: 1px solid var(--rule);
  border-radius: 4px; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
sup { line-height: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th.number, td.number { text-align: right; }
.number, .line { white-space: nowrap; }
thead th { white-space: nowrap; border-bottom: 2px solid var(--muted); font-weight: 600; }
/* Side by side where there is room. */
.parts { display: flex; flex-wrap: wrap; column-gap: 3rem; }
.record th { font-weight: 400; color: var(--muted); white-space: nowrap; }
.record td { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em;
  overflow-wrap: anywhere; }
.warnings { border-left: 3px solid var(--open); padding-left: .75rem; list-style: none; }
@media print {
  :root { --ink: #000000; --muted: #444444; --rule: #bbbbbb; --page: #ffffff;
    --good: #000000; --bad: #000000; --open: #000000; }
  @page { margin: 15mm; }
  html { font-size: 9pt; }
  body { max-width: none; padding: 0; line-height: 1.35; }
  figure, table, section.result { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
"""Style sheet of every page: light, dark and printed. Colours of verdicts: good, bad, open."""

_VERDICT_CLASSES = {"stays": "good", "drifts": "bad", "cannot tell": "open"}

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{{ page_style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="muted">{{ scope }}</p>
</header>

<section>
<h2>In short</h2>
<ul>
{%- for result in results %}
<li><strong>{{ result.label }}</strong>:
<span class="verdict {{ result.verdict_class }}">{{ result.verdict }}</span>.
{{ result.sentence | typeset }}</li>
{%- endfor %}
</ul>
</section>

<figure>
<img src="data:image/svg+xml;base64,{{ figure }}" alt="{{ alternative }}">
</figure>

<section>
<h2>How to read the figure</h2>
<p>Each point is a set of networks trained from scratch: its height is the loss they end with,
averaged over {{ seeds }}; lower is better. Each curve is one width, darker for wider, and its star
marks the learning rate that serves this width best, by a parabola through the three lowest
neighbouring points. Where the stars stand above one another, a learning rate tuned on a small,
cheap network can be used on a large one: that is <em>transfer</em>. Where they walk sideways, the
rate has to be tuned again for each width.</p>
<p>An octave is a factor of two in the learning rate, and a doubling a factor of two in the width.
An open star is an optimum without a usable learning rate on both sides, so the true one may lie
further out. A cross is a learning rate at which at least one training diverged; it has no mean and
is never an optimum.{% if bands %} A band is the range over seeds.{% endif %}</p>
</section>

<section>
<h2>Numbers</h2>
{%- for result in results %}
<section class="result">
<h3>{{ result.label }}</h3>
<div class="scroll">
<table>
<thead><tr><th class="number">width</th><th class="number">best learning rate</th>
<th>{{ level }} interval</th><th class="number">loss there</th><th>{{ level }} interval</th>
<th class="number">not diverged</th><th></th></tr></thead>
<tbody>
{%- for row in result.rows %}
<tr><td class="number">{{ row.width }}</td><td class="number">{{ row.rate | typeset }}</td>
<td class="line">{{ row.rate_interval | typeset }}</td><td class="number">{{ row.loss }}</td>
<td class="line">{{ row.loss_interval }}</td>
<td class="number">{{ row.stability }}</td><td>{{ row.flag }}</td></tr>
{%- endfor %}
</tbody>
</table>
</div>
<p>Drift per doubling of the width: {{ result.slope | typeset }}; from the smallest to the largest
width: {{ result.drift | typeset }}. Penalty: {{ result.penalty }}. Not diverged:
{{ result.stability | typeset }} of all trainings.</p>
{%- if result.warnings %}
<ul class="warnings">
{%- for warning in result.warnings %}
<li>{{ (warning[:1] | upper ~ warning[1:]) | typeset }}.</li>
{%- endfor %}
</ul>
{%- endif %}
</section>
{%- endfor %}
<p class="muted">Intervals hold with {{ level }} confidence for the sampling noise of the seeds,
which are resampled jointly for all trainings (bootstrap standard error, Student's t). They do not
hold the choice of data, the length of training or the spacing of the grid.</p>
</section>

<section>
<h2>What was run</h2>
<div class="parts">
{%- for part in record %}
<div>
<h3>{{ part.heading }}</h3>
{%- if part.rows %}
<div class="scroll">
<table class="record">
<tbody>
{%- for key, value in part.rows %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- else %}
<p class="muted">Not recorded in the dataset.</p>
{%- endif %}
</div>
{%- endfor %}
</div>
</section>
</body>
</html>
"""


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    dataset: xr.Dataset,
    summaries: Mapping[str, TransferSummary],
    figure: Figure,
) -> Path:
    """Write the report as one self-contained HTML file.

    Args:
      path: the file to write; missing folders are made.
      title: headline.
      dataset: results with dims `parametrization`, `width`, `learning_rate`, `seed`, and what was
        run in the attributes named by `RECORD`; an attribute that is missing is said to be missing.
      summaries: `theory.drift.transfer_summary` of each parametrization, by name, in the order in
        which they are shown; at least one.
      figure: what to show, usually `mupjax.figures.learning_rate_figure`'s.

    Returns:
      The path written.

    Raises:
      ValueError: there is no summary, or one for a parametrization that the dataset lacks.
    """
    known = [str(name) for name in dataset["parametrization"].values]
    if not summaries:
        raise ValueError(f"summaries is empty; give one for each parametrization, {known}")
    if unknown := [name for name in summaries if name not in known]:
        raise ValueError(
            f"summaries has an entry {unknown[0]!r}, but the dataset has only {known}; they must "
            "come from the same sweep"
        )
    first = next(iter(summaries.values()))
    page = page_template(_TEMPLATE).render(
        title=title,
        scope=_scope(dataset),
        results=[_result(name, summary) for name, summary in summaries.items()],
        figure=svg_base64(figure),
        alternative=_alternative(summaries),
        seeds=_count(first.seeds, "seed"),
        bands=first.seeds > 1,
        level=f"{100 * first.confidence:g} %",
        record=[
            {"heading": heading, "rows": record_rows(dataset.attrs.get(key))}
            for key, heading in RECORD.items()
        ],
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def verdict_sentence(summary: TransferSummary) -> str:
    """What the verdict means for someone who has to choose a learning rate."""
    smallest, largest = summary.widths[0], summary.widths[-1]
    if summary.verdict == "cannot tell":
        return f"This sweep does not settle whether the best learning rate moves: {summary.reason}."
    low, high = summary.drift_per_doubling_interval
    if summary.verdict == "stays":
        return (
            f"Each doubling of the width moves the best learning rate by less than "
            f"{summary.tolerance:g} octaves ({100 * summary.confidence:g} % interval {low:.2f} to "
            f"{high:.2f}). Tune on width {smallest}, train at width {largest}: "
            f"{summary.penalty_sentence()}."
        )
    way = "lower" if high < 0 or summary.drift_interval[1] < 0 else "higher"
    # A slope through optima that are only bounds is no estimate of a factor.
    factor = (
        ""
        if any(summary.at_edge)
        else f", by a factor of {2 ** abs(summary.drift_per_doubling):.2f} for each doubling"
    )
    return (
        f"The best learning rate becomes {way} with width{factor}: {summary.reason}. A rate tuned "
        f"on width {smallest} does not carry over to width {largest}: {summary.penalty_sentence()}."
    )


def _result(name: str, summary: TransferSummary) -> dict[str, Any]:
    rows = []
    for k, width in enumerate(summary.widths):
        rate, loss = summary.optimal_lr[k], summary.optimal_loss[k]
        low, high = summary.optimal_loss_interval[k]
        rows.append(
            {
                "width": width,
                "rate": "none" if math.isnan(rate) else f"{format_rate(rate)} = {rate:.3g}",
                "rate_interval": format_rate_interval(summary.optimal_lr_interval[k]),
                "loss": f"{loss:.4g}" if math.isfinite(loss) else "none",
                "loss_interval": "unknown" if math.isnan(low) else f"{low:.4g} to {high:.4g}",
                "stability": f"{100 * summary.stability_per_width[k]:.0f} %",
                "flag": format_edge(summary.edge[k]),
            }
        )
    return {
        "label": style.label_parametrization(name),
        "verdict": summary.verdict,
        "verdict_class": _VERDICT_CLASSES[summary.verdict],
        "sentence": verdict_sentence(summary),
        "rows": rows,
        "drift": _in_octaves(summary.drift_octaves, summary.drift_interval),
        "slope": _in_octaves(summary.drift_per_doubling, summary.drift_per_doubling_interval),
        "penalty": summary.penalty_sentence(),
        "stability": f"{100 * summary.stability:.0f} %",
        "warnings": summary.warnings,
    }


def _in_octaves(value: float, interval: Interval) -> str:
    return format_with_interval(value, interval) + ("" if math.isnan(value) else " octaves")


def _scope(dataset: xr.Dataset) -> str:
    widths, rates = dataset["width"].values, dataset["learning_rate"].values
    sizes = dataset.sizes
    trials = math.prod(
        sizes[name] for name in ("parametrization", "width", "learning_rate", "seed")
    )
    parts = [
        _count(sizes["parametrization"], "parametrization"),
        f"{_count(sizes['width'], 'width')} from {widths.min()} to {widths.max()}",
        f"{_count(sizes['learning_rate'], 'learning rate')} from {rates.min():.3g} to "
        f"{rates.max():.3g}",
        _count(sizes["seed"], "seed"),
    ]
    return f"{_count(trials, 'training')}: {', '.join(parts)}."


def page_template(source: str) -> jinja2.Template:
    """A page's template, which knows ``page_style`` and the filter ``typeset``; text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["typeset"] = _typeset
    environment.globals["page_style"] = markupsafe.Markup(PAGE_STYLE)
    return environment.from_string(source)


def _typeset(text: str) -> markupsafe.Markup:
    """Powers of two raised, minus signs for hyphens before numbers, no line break before a unit."""
    html = re.sub(r"2\^(-?[\d.]*\d)", r"2<sup>\1</sup>", str(markupsafe.escape(text)))
    html = re.sub(r"(?<!\w)-(?=\d|inf)", "\N{MINUS SIGN}", html)
    html = re.sub(r"(?<!\w)inf(?!\w)", "\N{INFINITY}", html)
    return markupsafe.Markup(html.replace(" %", "\N{NO-BREAK SPACE}%"))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _alternative(summaries: Mapping[str, TransferSummary]) -> str:
    """The figure in words, for those who cannot see it."""
    drifts = [
        f"{style.label_parametrization(name)}: "
        f"{_in_octaves(summary.drift_per_doubling, summary.drift_per_doubling_interval)} "
        f"per doubling, {summary.verdict}"
        for name, summary in summaries.items()
    ]
    return (
        "Final loss against learning rate, one panel for each parametrization and one curve for "
        f"each width, with the optimum of each curve starred. Drift of the optimum: "
        f"{'; '.join(drifts)}."
    )


def svg_base64(figure: Figure) -> str:
    """A figure as the data of an ``<img>``."""
    # An image, not inline markup: its identifiers and styles cannot clash with the page's.
    buffer = io.BytesIO()
    with mpl.rc_context(style.RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def record_rows(attribute: Any) -> list[tuple[str, str]]:
    """A JSON attribute as rows of (dotted key, value); text that is no JSON is one row."""
    if attribute is None:
        return []
    if isinstance(attribute, str):
        try:
            attribute = json.loads(attribute)
        except json.JSONDecodeError:
            return [("", attribute)]
    return _flatten(attribute, "")


def _flatten(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [
            row
            for name, item in value.items()
            for row in _flatten(item, f"{key}.{name}" if key else str(name))
        ]
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [row for i, item in enumerate(value) for row in _flatten(item, f"{key}[{i}]")]
    if isinstance(value, list):
        return [(key, ", ".join(_text(item) for item in value))]
    return [(key, _text(value))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
