"""The page of a reproduced target: claims and how each fared, the figure, choices, what was run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mupjax.report import RECORD, page_template, record_rows, svg_base64
from mupjax.reproduce.target import ClaimVerdict, Outcome, Scale, Target

__all__ = ["write_page"]

_CLASSES: Mapping[ClaimVerdict, str] = {
    "reproduced": "good",
    "not reproduced": "bad",
    "cannot tell at this scale": "open",
}

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{{ page_style }}
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
  margin: .3rem 0 1.2rem; max-width: 52rem; }
dt { color: var(--muted); } dd { margin: 0; }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="muted">Target {{ name }} of mupjax reproduce, at scale {{ scale }}
({{ duration }}).{% if scale == "tiny" %} This scale shows that the target runs, and nothing about
the claims.{% endif %}</p>
</header>

<section>
<h2>Claims</h2>
{%- for claim, finding, colour in claims %}
<section class="result">
<h3>{{ claim.statement | typeset }}</h3>
<dl>
<dt>source</dt><dd>{{ claim.source }}</dd>
<dt>published</dt><dd>{{ claim.published | typeset }}</dd>
<dt>measured</dt><dd>{{ finding.measured | typeset }}</dd>
<dt>verdict</dt><dd><span class="verdict {{ colour }}">{{ finding.verdict }}</span>:
{{ finding.reason | typeset }}</dd>
</dl>
</section>
{%- endfor %}
</section>
{% for alternative, figure in figures %}
<figure>
<img src="data:image/svg+xml;base64,{{ figure }}" alt="{{ alternative }}">
</figure>
{%- endfor %}
{%- if notes %}

<section>
<h2>Notes</h2>
{%- for note in notes %}
<p>{{ note | typeset }}</p>
{%- endfor %}
</section>
{%- endif %}
{%- if summary %}

<section>
<h2>Numbers</h2>
<div class="scroll">
<table class="record">
<tbody>
{%- for key, value in summary %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody>
</table>
</div>
</section>
{%- endif %}

<section>
<h2>What was run</h2>
<div class="parts">
{%- for heading, rows in record %}
<div>
<h3>{{ heading }}</h3>
<div class="scroll">
<table class="record">
<tbody>
{%- for key, value in rows %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody>
</table>
</div>
</div>
{%- endfor %}
</div>
</section>
</body>
</html>
"""


def write_page(
    path: str | os.PathLike[str], *, target: Target, scale: Scale, outcome: Outcome
) -> Path:
    """Write the page of a run as one self-contained HTML file; returns its path.

    Attributes of the dataset named in :data:`mupjax.report.RECORD` are shown as what was run.
    """
    pairs = [(claim, outcome.findings[claim.key]) for claim in target.claims]
    alternatives = [f"{target.title}: {name.replace('_', ' ')}" for name in outcome.figures]
    attributes = outcome.dataset.attrs
    page = page_template(_TEMPLATE).render(
        title=target.title,
        name=target.name,
        scale=scale,
        duration=target.duration[scale],
        claims=[(claim, finding, _CLASSES[finding.verdict]) for claim, finding in pairs],
        figures=list(zip(alternatives, map(svg_base64, outcome.figures.values()), strict=True)),
        notes=outcome.notes,
        summary=record_rows(outcome.summary) if outcome.summary else [],
        record=[
            (heading, record_rows(attributes[key]))
            for key, heading in RECORD.items()
            if key in attributes
        ],
    )
    target_path = Path(path)
    target_path.write_text(page, encoding="utf-8")
    return target_path
