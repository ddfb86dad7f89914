"""Pages generated when the site is built: the --help text of each command, and every config key."""

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from clip_har_jax.config import RunConfig
from clip_har_jax.settings import leaves, settings_of

ROOT = Path(__file__).parents[1]
MODULES = ("export", "serving")  # run by python -m


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"reference/commands.md": commands(), "reference/config.md": config_keys()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands() -> str:
    """Return the page with the help text of each command."""
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
    """Return RunConfig's keys with default, accepted values, policy at resume and the comments of the source."""
    parts = ["# Config keys", "Each is set by `--config.KEY=VALUE`, or in a config file."]
    parts.append("At resume: free, warned of, or refused ([What may change at resume](../reliability.md)).")
    comments = _comments((ROOT / "clip_har_jax" / "config.py").read_text(encoding="utf-8"))
    defaults = dict(leaves(RunConfig()))
    sections: dict[str, list[str]] = {}
    for key, hint, found in settings_of(RunConfig):
        head = ["| key | default | accepted | at resume | meaning |", "|---|---|---|---|---|"]
        rows = sections.setdefault(key.rpartition(".")[0].partition(".")[0] or "Top level", head)
        accepted = str(found.accepted) or re.sub(r"<class '(\w+)'>", r"\1", str(hint))
        cells = (f"`{key}`", f"`{defaults[key]!r}`", accepted, found.at_resume, comments[key])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for section, rows in sorted(sections.items(), key=lambda item: item[0] != "Top level"):
        parts += [f"## {section}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _comments(source: str) -> dict[str, str]:
    """Return the comment of each key: that on its line, or the lines above it."""
    classes = dict(re.findall(r"^class (\w+Config):\n((?:    .*\n|\n)+)", source, re.M))

    def read(name: str, prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        above: list[str] = []
        for line in classes[name].splitlines():
            if line.strip().startswith("#"):
                above.append(line.strip().removeprefix("# "))
            elif section := re.match(r"    (\w+): (\w+Config) = field", line):
                found |= read(section[2], f"{prefix}{section[1]}.")
            elif field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
                found[prefix + field[1]] = " ".join(above) or field[2] or ""
                above = []
        return found

    return read("RunConfig", "")
