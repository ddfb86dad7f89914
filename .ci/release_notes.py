"""Print the section of CHANGELOG.md of a tag, for the release: `python .ci/release_notes.py v0.1.0`.

Exits with 1 and one line where the tag isn't the version of pyproject.toml and CITATION.cff, or has no section.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str) -> str:
    """Return the section of the changelog, in Markdown, without its heading."""
    version = tag.removeprefix("v")
    declared = {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "CITATION.cff": _first(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text()),
    }
    for name, other in declared.items():
        if other != version or not tag.startswith("v"):
            raise SystemExit(f"error: the tag is {tag}, but {name} has version {other}: tag v{other}, or change {name}")
    section = _first(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## \[|\Z)", (ROOT / "CHANGELOG.md").read_text())
    if not section:
        raise SystemExit(f"error: CHANGELOG.md has no section [{version}], or an empty one")
    return section


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""


if __name__ == "__main__":
    print(notes(sys.argv[1]))
