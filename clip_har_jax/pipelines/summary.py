"""The result page of an automated training."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from clip_har_jax.pipelines.auto_steps import Step

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Automated training</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884; }
  td { overflow-wrap: anywhere; }
  .outcome { font-size: 1.2rem; padding: .8rem 1rem; border-left: .4rem solid #4a7; background: #8882; }
  .quiet { opacity: .65; }
</style>
<h1>Automated training</h1>
<p class="outcome">{{ outcome }}</p>
<p class="quiet">{{ config }}, {{ when }}</p>
<table>
  <thead><tr><th>step</th><th>what</th><th>seconds</th><th>result</th></tr></thead>
  <tbody>
  {% for step in steps %}
    <tr><th scope="row">{{ step.name }}</th>
      <td>{{ "nothing changed" if step.skipped else "done" }}</td>
      <td>{{ "%.1f" | format(step.seconds) }}</td>
      <td>{% for name, value in step.result.items() %}
        <div><span class="quiet">{{ name }}</span> {{ "%.4f" | format(value) if value is float else value }}</div>
      {% endfor %}</td></tr>
  {% endfor %}
  </tbody>
</table>
<p>{% for link in links %}<a href="{{ link }}">{{ link }}</a>{{ ", " if not loop.last }}{% endfor %}</p>
</html>
"""


def make_summary(config: str, outcome: str, steps: Sequence[Step], workdir: Path) -> str:
    """Return the page, with links to the files beside it."""
    links = [
        name for name in ("test/report.html", "data/report.html", "run/model/README.md") if (workdir / name).exists()
    ]
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(config=config, outcome=outcome, steps=steps, links=links, when=when)
