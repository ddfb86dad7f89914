"""Pages that are made when the site is built: what each command's --help says, and every config key."""

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
MODULES = ("export", "serving")  # run by python -m


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"reference/commands.md": commands(), "reference/config.md": config_keys()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands() -> str:
    """Each command's own help."""
    calls = [[f"scripts/{path.name}"] for path in sorted((ROOT / "scripts").glob("*.py"))]
    calls += [["-m", name] for name in MODULES if (ROOT / name / "__main__.py").is_file()]
    parts = ["# Commands", "What each command says to `--help`. All exit 0 when done and 2 on a mistake."]
    for call in calls:
        environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *call, "--help"], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        parts.append(f"## python {' '.join(call)}\n\n```text\n{done.stdout.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def config_keys() -> str:
    """RunConfig's keys with their defaults and comments, from the source, which holds them once."""
    source = (ROOT / "clip_har_jax" / "config.py").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^    (\w+): (\w+Config) = field", source, re.M))
    parts = ["# Config keys", "Each is set by `--config.KEY=VALUE`, or in a config file.", "## Top level"]
    classes = dict(re.findall(r"^class (\w+Config):\n((?:    .*\n|\n)+)", source, re.M))
    parts.append(_table("", classes["RunConfig"]))
    for section, name in sections.items():
        if name in classes and section in classes["RunConfig"]:
            parts += [f"## {section}", _table(f"{section}.", classes[name])]
            for inner, inner_name in re.findall(r"^    (\w+): (\w+Config) = field", classes[name], re.M):
                parts.append(_table(f"{section}.{inner}.", classes[inner_name]))
    return "\n\n".join(parts) + "\n"


def _table(prefix: str, body: str) -> str:
    rows = ["| key | default | what |", "|---|---|---|"]
    for name, hint, default, comment in re.findall(r"^    (\w+): ([^=\n]+) = (.+?)(?:  # (.*))?$", body, re.M):
        if not hint.strip().endswith("Config"):
            rows.append(f"| `{prefix}{name}` | `{_cell(_default(default))}` | {_cell(comment)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _default(text: str) -> str:
    made = re.fullmatch(r"field\(default_factory=(\w+)\)", text)
    return {"dict": "{}"}.get(made[1], made[1]) if made else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
