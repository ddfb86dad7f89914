"""The report of an evaluation: one HTML file that needs nothing else, neither network nor scripts."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from clip_har_jax.evaluation.evaluator import EvalResult, Mistake
from clip_har_jax.evaluation.plots import draw_confusion

NUM_CONFUSIONS = 10
THUMBNAIL_PX = 160
HEADLINES = (
    ("top1", "top-1", "share of images whose most probable action is right"),
    ("top5", "top-5", "share of images with the right action among the 5 most probable"),
    ("macro_f1", "macro F1", "mean over the actions of the balance of precision and recall"),
    ("nll", "NLL", "negative log-likelihood, in nats; lower is better"),
    ("ece", "ECE", "how far confidence is from accuracy; lower is better"),
)

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #fff; --ink: #1c2430; --soft: #57606a; --line: #d8dee4;
  --bar: #0b4f9c; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e2e8f0; --soft: #9aa7b4;
  --line: #30363d; --bar: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
p { margin: 0 0 .75rem; } .soft { color: var(--soft); font-size: .875rem; }
section, .headlines > div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
section { padding: 1rem; margin: 1rem 0; }
.headlines { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.headlines > div { padding: .75rem 1rem; }
.headlines dt { color: var(--soft); } .headlines dd { margin: 0; }
.headlines .value { font-size: 1.75rem; font-weight: 600; }
.wide { overflow-x: auto; } .wide:focus-visible { outline: 2px solid var(--bar); }
.wide img { display: block; min-width: min(100%, 40rem); max-width: 100%; height: auto; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; color: var(--soft); font-size: .875rem; }
th, td { padding: .35rem .6rem; text-align: left; border-bottom: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; } th[scope=row] { font-weight: 500; }
.bar { width: 30%; min-width: 5rem; } .bar div { height: .7rem; background: var(--bar); border-radius: .2rem; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; margin: 0;
  padding: 0; list-style: none; }
.mistakes img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: .35rem; }
.mistakes li, .about dd, code { overflow-wrap: anywhere; }
.about { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; }
.about dt { color: var(--soft); } .about dd { margin: 0; font-family: ui-monospace, monospace; font-size: .875rem; }
@media (max-width: 30rem) { .about { grid-template-columns: 1fr; gap: 0; } .about dd { margin-bottom: .6rem; }
  .wide img { min-width: 40rem; } .bar { display: none; } th, td { padding: .35rem; font-size: .875rem; }
  td:not(.number) { overflow-wrap: anywhere; } body { padding: .75rem; } section { padding: .75rem; } }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation: top-1 {{ "%.3f"|format(metrics.top1) }} on {{ metrics.num_examples }} images</title>
<style>{{ style|safe }}</style>
</head>
<body>
<h1>Evaluation</h1>
<p>{{ metrics.num_examples }} images of {{ num_classes }} actions{% if metrics.num_unreadable %};
<strong>{{ metrics.num_unreadable }} more could not be read</strong> and count nowhere{% endif %}.</p>
<dl class="headlines">
{% for name, title, meaning in headlines %}
<div><dt>{{ title }}</dt><dd class="value">{{ "%.3f"|format(metrics[name]) }}</dd>
<dd class="soft">{{ meaning }}</dd></div>
{% endfor %}
</dl>

<section>
<h2>Confusion matrix</h2>
<p class="soft">Rows are the true actions, columns the predicted ones; the colour is the share of the row.</p>
<div class="wide" tabindex="0" role="region" aria-label="Confusion matrix">
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ pictures.dark }}">
<img src="{{ pictures.light }}" alt="{{ pictures.alt }}"></picture></div>
</section>

{% if confusions %}
<section>
<h2>Most frequent confusions</h2>
<p class="soft">The share is of all images of the true action.</p>
<div class="wide" tabindex="0" role="region" aria-label="Most frequent confusions">
<table>
<thead><tr><th scope="col">true</th><th scope="col">predicted</th><th scope="col" class="number">images</th>
<th scope="col" class="number">share</th></tr></thead>
<tbody>
{% for row in confusions %}
<tr><td>{{ row.label }}</td><td>{{ row.predicted }}</td><td class="number">{{ row.count }}</td>
<td class="number">{{ "%.0f"|format(100 * row.share) }}%</td></tr>
{% endfor %}
</tbody></table></div>
</section>
{% endif %}

<section>
<h2>Each action</h2>
<div class="wide" tabindex="0" role="region" aria-label="Each action">
<table>
<caption>Weakest first</caption>
<thead><tr><th scope="col">action</th><th scope="col" class="number">F1</th><td class="bar"></td>
<th scope="col" class="number">precision</th><th scope="col" class="number">recall</th>
<th scope="col" class="number">images</th></tr></thead>
<tbody>
{% for label, row in per_class %}
<tr><th scope="row">{{ label }}</th>
<td class="number">{{ "%.3f"|format(row.f1) }}</td>
<td class="bar"><div style="width: {{ "%.1f"|format(100 * row.f1) }}%"></div></td>
<td class="number">{{ "%.3f"|format(row.precision) }}</td><td class="number">{{ "%.3f"|format(row.recall) }}</td>
<td class="number">{{ row.support }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>

{% if mistakes %}
<section>
<h2>Confident mistakes</h2>
<ul class="mistakes">
{% for row in mistakes %}
<li><img src="{{ row.image }}" alt="an image of {{ row.label }}, taken for {{ row.predicted }}">
<strong>{{ row.predicted }}</strong> {{ "%.2f"|format(row.score) }}<br>is {{ row.label }}<br>
<span class="soft">{{ row.name }}</span></li>
{% endfor %}
</ul>
</section>
{% endif %}

<section>
<h2>What was evaluated</h2>
<dl class="about">
{% for name, value in about.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</section>
</body>
</html>
"""


def make_report(result: EvalResult, names: Sequence[str], about: Mapping[str, str]) -> str:
    """The report as HTML; see `evaluator.write_result` for the arguments."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    name_of = dict(zip(result.predictions.index.tolist(), names, strict=True))
    per_class = sorted(result.metrics["per_class"].items(), key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))
    return environment.from_string(TEMPLATE).render(
        style=STYLE,
        metrics=result.metrics,
        num_classes=len(result.labels),
        headlines=HEADLINES,
        pictures=_pictures(result),
        confusions=worst_confusions(result),
        per_class=per_class,
        mistakes=[_describe(mistake, result.labels, name_of[mistake.index]) for mistake in result.mistakes],
        about=about,
    )


def worst_confusions(result: EvalResult) -> list[dict[str, Any]]:
    """The pairs of actions that are confused most often, with their share of the true action's images."""
    counts = result.confusion.copy()
    np.fill_diagonal(counts, 0)
    pairs = np.argsort(-counts, axis=None, kind="stable")[:NUM_CONFUSIONS]
    rows = [divmod(int(pair), len(result.labels)) for pair in pairs]
    return [
        {
            "label": result.labels[true],
            "predicted": result.labels[predicted],
            "count": int(counts[true, predicted]),
            "share": counts[true, predicted] / result.confusion[true].sum(),
        }
        for true, predicted in rows
        if counts[true, predicted]
    ]


def _pictures(result: EvalResult) -> dict[str, str]:
    images = {
        name: _data_uri(draw_confusion(result.confusion, result.labels, dark), "png")
        for name, dark in (("light", False), ("dark", True))
    }
    worst = worst_confusions(result)
    most = f"most often {worst[0]['label']} is taken for {worst[0]['predicted']}" if worst else "none is confused"
    return images | {"alt": f"Confusion matrix of {len(result.labels)} actions; {most}"}


def _describe(mistake: Mistake, labels: Sequence[str], name: str) -> dict[str, Any]:
    thumbnail = Image.fromarray(mistake.image)
    thumbnail.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=80)
    return {
        "label": labels[mistake.label],
        "predicted": labels[mistake.predicted],
        "score": mistake.score,
        "name": name,
        "image": _data_uri(buffer.getvalue(), "jpeg"),
    }


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
