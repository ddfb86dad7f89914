"""The page of a prepared data set: one HTML file that needs nothing else, neither network nor scripts."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from clip_har_jax.data.manifest import Manifest
from clip_har_jax.data.quality import MEASURES, Drift, contact_sheet, find_drift
from clip_har_jax.evaluation.report import STYLE
from clip_har_jax.preprocess import BadImage, read_image

SPLITS = ("train", "val", "test", "excluded")
PER_CLASS = 24  # images of a contact sheet
MAX_SHOWN = 30  # groups, suspects and bad files; the rest stands in the files
NOTABLE = 0.1  # distance from which a drift is marked, if it is also beyond chance

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Data: {{ summary.num_examples }} images, {{ classes|length }} classes</title>
<style>{{ style|safe }}
.sheet { display: block; width: 100%; border-radius: .35rem; margin-bottom: .75rem; }
h3 { font-size: 1rem; margin: 0 0 .35rem; }</style>
</head>
<body>
<h1>Data</h1>
<p>{{ summary.num_examples }} images of {{ classes|length }} classes{% if summary.num_unreadable %};
<strong>{{ summary.num_unreadable }} more could not be read</strong>{% endif %}.</p>
<dl class="headlines">
{% for title, value, meaning in headlines %}
<div><dt>{{ title }}</dt><dd class="value">{{ value }}</dd><dd class="soft">{{ meaning }}</dd></div>
{% endfor %}
</dl>

<section>
<h2>Classes</h2>
<div class="wide" tabindex="0" role="region" aria-label="Classes">
<table>
<thead><tr><th scope="col">class</th><th scope="col" class="number">images</th><td class="bar"></td>
{% for split in splits %}<th scope="col" class="number">{{ split }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in classes %}
<tr><th scope="row">{{ row.label }}</th><td class="number">{{ row.total }}</td>
<td class="bar"><div style="width: {{ "%.1f"|format(row.share) }}%"></div></td>
{% for split in splits %}<td class="number">{{ row[split] }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>

<section>
<h2>Images</h2>
<div class="wide" tabindex="0" role="region" aria-label="Images">
<table>
<thead><tr><th scope="col">measure</th><th scope="col" class="number">least</th><th scope="col" class="number">5%</th>
<th scope="col" class="number">median</th><th scope="col" class="number">95%</th>
<th scope="col" class="number">most</th></tr></thead>
<tbody>
{% for name, values in measures %}
<tr><th scope="row">{{ name }}</th>{% for value in values %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>

{% for title, rows in drifts %}
<section>
<h2>{{ title }}</h2>
<p class="soft">The distance is 0 where both are distributed alike and 1 where they have nothing in common
(Kolmogorov-Smirnov; of the class shares the total variation). Marked: {{ notable }} or more, and beyond chance.</p>
<div class="wide" tabindex="0" role="region" aria-label="{{ title }}">
<table>
<thead><tr><th scope="col">measure</th><th scope="col" class="number">median</th>
<th scope="col" class="number">reference</th><th scope="col" class="number">distance</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row.measure }}</th><td class="number">{{ row.median }}</td>
<td class="number">{{ row.reference }}</td>
<td class="number">{% if row.marked %}<strong>{{ row.distance }} !</strong>{% else %}{{ row.distance }}{% endif %}</td>
</tr>
{% endfor %}
</tbody></table></div>
</section>
{% endfor %}

{% if groups %}
<section>
<h2>Near duplicates</h2>
<p class="soft">{{ summary.duplicate_groups }} groups; those with different labels are in no split, all others stay
together. Those across the given sets come first.{% if summary.duplicate_groups > groups|length %} The first
{{ groups|length }}; all stand in duplicates.json.{% endif %}</p>
{% for entry in groups %}
<h3>similarity {{ "%.3f"|format(entry.similarity) }}{% if entry.identical %}, identical files{% endif %}{% if
entry.conflict %}, <strong>different labels</strong>{% endif %}{% if entry.crosses %},
<strong>across the given sets</strong>{% endif %}</h3>
<p class="soft">{% for member in entry.members %}<code>{{ member.path }}</code> ({{ member.label }},
{{ member.split }}){% if not loop.last %}; {% endif %}{% endfor %}</p>
{% if entry.sheet %}<img class="sheet" src="{{ entry.sheet }}" alt="the images of the group side by side"
style="width: auto; max-width: 100%">{% endif %}
{% endfor %}
</section>
{% endif %}

{% if suspects %}
<section>
<h2>Labels that may be wrong</h2>
<p class="soft">Most of the nearest neighbours carry another label.</p>
<div class="wide" tabindex="0" role="region" aria-label="Labels that may be wrong">
<table>
<thead><tr><th scope="col">file</th><th scope="col">label</th><th scope="col">neighbours say</th>
<th scope="col" class="number">share</th></tr></thead>
<tbody>
{% for row in suspects %}
<tr><td><code>{{ row.path }}</code></td><td>{{ row.label }}</td><td>{{ row.suggested }}</td>
<td class="number">{{ "%.0f"|format(100 * row.share) }}%</td></tr>
{% endfor %}
</tbody></table></div>
</section>
{% endif %}

{% if bad %}
<section>
<h2>Could not be read</h2>
<div class="wide" tabindex="0" role="region" aria-label="Could not be read">
<table><tbody>
{% for name, reason in bad %}<tr><td><code>{{ name }}</code></td><td>{{ reason }}</td></tr>{% endfor %}
</tbody></table></div>
</section>
{% endif %}

<section>
<h2>Contact sheets</h2>
{% for label, sheet in sheets %}
<h3>{{ label }}</h3>
<img class="sheet" src="{{ sheet }}" alt="images of {{ label }}">
{% endfor %}
</section>

<section>
<h2>About</h2>
<dl class="about">
{% for name, value in about.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>
</section>
</body>
</html>
"""


def make_data_report(
    manifest: Manifest,
    summary: Mapping[str, Any],
    duplicates: Sequence[Mapping[str, Any]],
    suspects: Sequence[Mapping[str, Any]],
    bad: Sequence[tuple[str, str]],
    reference: Manifest | None,
) -> str:
    """The page.

    Args:
      manifest: the data set.
      summary, duplicates, suspects, bad: what was found in it.
      reference: a data set to compare with; None: its splits alone are compared.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    shown = sorted(duplicates, key=lambda entry: (not entry["crosses"], not entry["conflict"], -len(entry["members"])))
    return environment.from_string(TEMPLATE).render(
        style=STYLE,
        summary=summary,
        headlines=_headlines(summary),
        splits=[split for split in SPLITS if summary["splits"][split]],
        classes=_classes(manifest),
        measures=_measures(manifest),
        drifts=_drifts(manifest, reference),
        notable=NOTABLE,
        groups=[{**entry, "sheet": _group_sheet(manifest, entry)} for entry in shown[:MAX_SHOWN]],
        suspects=suspects[:MAX_SHOWN],
        bad=[(_text(name), reason) for name, reason in bad[:MAX_SHOWN]],
        sheets=_sheets(manifest),
        about={"manifest SHA-256": manifest.digest, "folder": manifest.root, **manifest.about},
    )


def _text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()  # file names needn't be UTF-8


def _headlines(summary: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    splits = [(split, summary["splits"][split], "images") for split in SPLITS if summary["splits"][split]]
    return [
        *splits,
        ("duplicates", summary["duplicate_groups"], f"groups, {summary['identical_groups']} of identical files"),
        ("conflicts", summary["conflicting_groups"], "groups with different labels"),
    ]


def _classes(manifest: Manifest) -> list[dict[str, Any]]:
    labels, splits = manifest.column("label"), manifest.column("split")
    counts: dict[str, dict[str, int]] = {label: dict.fromkeys(SPLITS, 0) for label in sorted(set(labels))}
    for label, split in zip(labels, splits, strict=True):
        counts[label][split] += 1
    most = max(sum(row.values()) for row in counts.values())
    return [
        {"label": label, "total": sum(row.values()), "share": 100 * sum(row.values()) / most, **row}
        for label, row in counts.items()
    ]


def _columns(manifest: Manifest, split: str | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The measures and the labels of a split, or of all."""
    rows = np.array([split in (None, name) for name in manifest.column("split")], bool)
    columns = {name: np.array(manifest.column(name))[rows] for name in MEASURES if name != "aspect"}
    columns["aspect"] = columns["width"] / columns["height"]
    return columns, [label for label, chosen in zip(manifest.column("label"), rows, strict=True) if chosen]


def _measures(manifest: Manifest) -> list[tuple[str, list[str]]]:
    columns, _ = _columns(manifest)
    return [(name, [_number(v) for v in np.percentile(columns[name], (0, 5, 50, 95, 100))]) for name in MEASURES]


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


def _drifts(manifest: Manifest, reference: Manifest | None) -> list[tuple[str, list[dict[str, Any]]]]:
    tables = []
    train, train_labels = _columns(manifest, "train")
    for split in ("val", "test"):
        columns, labels = _columns(manifest, split)
        if labels and train_labels:
            rows = find_drift(columns, train, labels, train_labels)
            tables.append((f"{split} against train", [_drift_row(row) for row in rows]))
    if reference is not None:
        (columns, labels), (old, old_labels) = _columns(manifest), _columns(reference)
        tables.append(
            ("Against the reference", [_drift_row(row) for row in find_drift(columns, old, labels, old_labels)])
        )
    return tables


def _drift_row(row: Drift) -> dict[str, Any]:
    return {
        "measure": row.measure,
        "median": _number(row.median),
        "reference": _number(row.reference_median),
        "distance": f"{row.distance:.3f}",
        "marked": row.distance >= NOTABLE and (row.p_value is None or row.p_value < 0.01),
    }


def _sheets(manifest: Manifest) -> list[tuple[str, str]]:
    """The contact sheet of each class: images spread evenly over its files."""
    paths: dict[str, list[str]] = {}
    for path, label in zip(manifest.column("path"), manifest.column("label"), strict=True):
        paths.setdefault(label, []).append(path)
    chosen = {
        label: [of[round(k)] for k in np.linspace(0, len(of) - 1, min(PER_CLASS, len(of)))]
        for label, of in sorted(paths.items())
    }
    return [(label, _sheet([manifest.root / path for path in of])) for label, of in chosen.items()]


def _group_sheet(manifest: Manifest, entry: Mapping[str, Any]) -> str:
    return _sheet([manifest.root / member["path"] for member in entry["members"][:12]])


def _sheet(paths: Sequence[Path]) -> str:
    images = []
    for path in paths:
        try:
            images.append(read_image(path))
        except BadImage:  # it could be read a moment ago
            continue
    return "data:image/jpeg;base64," + base64.b64encode(contact_sheet(images)).decode() if images else ""
