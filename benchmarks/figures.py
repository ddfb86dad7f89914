"""The measured figures of the documentation: one file holds them, and the texts are checked against it.

    python -m benchmarks.figures run train_step --batch_size=8
    python -m benchmarks.figures set demo.top1 0.947 --unit=accuracy --command="python scripts/train.py ..."
    python -m benchmarks.figures write
    python -m benchmarks.figures check

docs/figures.json has the value, unit, command, date and machine of each figure. A text marks a figure with two comments
that readers don't see: <!--f:train_step.ratio-->1.23<!--/f-->. `run` runs a benchmark and stores all numbers of its
last line as BENCHMARK.KEY; `set` stores one number; both then update the marked places, as `write` does alone. `check`
exits with 1 if a text differs from the file, except by rounding.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object, write_json

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "figures.json"
FIELDS = ("value", "unit", "command", "date", "machine")
MARK = re.compile(r"(<!--f:([\w.\-]+)-->)(.*?)(<!--/f-->)", re.S)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")

Figures = dict[str, dict[str, Any]]


def pages(root: Path = ROOT) -> list[Path]:
    """Return the texts that can contain figures."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def shown(value: float, like: str) -> str:
    """Return a value with as many decimals as the number in `like`, and with thousands separators if it has them.

    Raises:
      UserError: `like` contains no number.
    """
    found = NUMBER.search(like)
    if found is None:
        raise UserError(f"{like!r}: a marked figure needs a number, e.g. 1.2")
    digits = len(found[0].partition(".")[2])
    separator = "," if abs(value) >= 10_000 or "," in found[0] else ""
    return like[: found.start()] + f"{value:{separator}.{digits}f}" + like[found.end() :]


def differences(figures: Figures, root: Path = ROOT) -> Iterator[str]:
    """Yield a line for each marked place that differs from the file."""
    for page in pages(root):
        for _, name, text, _ in MARK.findall(page.read_text(encoding="utf-8")):
            if name not in figures:
                yield f"{page.relative_to(root)}: no figure is called {name}"
            elif shown(figures[name]["value"], text) != text:
                yield f"{page.relative_to(root)}: {name} is {figures[name]['value']}, the text says {text}"


def write_pages(figures: Figures, root: Path = ROOT) -> None:
    """Write the figures to the marked places."""

    def replace(match: re.Match[str]) -> str:
        start, name, text, end = match.groups()
        return start + (shown(figures[name]["value"], text) if name in figures else text) + end

    for page in pages(root):
        old = page.read_text(encoding="utf-8")
        new = MARK.sub(replace, old)
        if new != old:
            page.write_text(new, encoding="utf-8")


def numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a benchmark's JSON line, at any depth, by dotted name."""
    for key, value in values.items():
        name = f"{prefix}.{re.sub(r'[^a-zA-Z0-9_-]+', '_', key)}"
        if isinstance(value, Mapping):
            yield from numbers(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def machine() -> str:
    """Return a description of this machine."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.processor() or platform.machine()}"


def run_benchmark(name: str, flags: list[str]) -> Figures:
    """Run a benchmark and return the figures of its last line.

    Raises:
      UserError: it failed.
    """
    command = ["python", "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: ended with exit code {done.returncode}; its own lines say why")
    print(done.stdout, end="")
    values = json.loads(done.stdout.splitlines()[-1])
    units = values.get("units", {})
    return {
        figure: _figure(value, units.get(figure.rpartition(".")[2], ""), " ".join(command))
        for figure, value in numbers(values, name)
    }


def _figure(value: float, unit: str, command: str) -> dict[str, Any]:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"value": value, "unit": unit, "command": command, "date": today, "machine": machine()}


def main() -> int:
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(required=True, dest="act", metavar="COMMAND")
    one = commands.add_parser("run", help="run a benchmark and store its figures")
    one.add_argument("benchmark", help="e.g. train_step")
    one.add_argument("flags", nargs=argparse.REMAINDER, help="of the benchmark, e.g. --rounds=3")
    new = commands.add_parser("set", help="store one figure")
    new.add_argument("name", help="e.g. demo.top1")
    new.add_argument("value", type=float, help="e.g. 0.947")
    new.add_argument("--unit", required=True, help="e.g. --unit=s")
    new.add_argument("--command", required=True, help='its measurement, e.g. --command="python -m benchmarks.lora"')
    commands.add_parser("write", help="write the figures to the texts")
    commands.add_parser("check", help="compare the texts with the file")
    arguments = parser.parse_args()
    figures: Figures = read_object(FILE) if FILE.exists() else {}
    if arguments.act == "check":
        found = list(differences(figures))
        print("\n".join(found) or f"all texts agree with {FILE.relative_to(ROOT)}")
        return 1 if found else 0
    if arguments.act == "run":
        figures |= run_benchmark(arguments.benchmark, arguments.flags)
    elif arguments.act == "set":
        figures[arguments.name] = _figure(arguments.value, arguments.unit, arguments.command)
    write_json(FILE, dict(sorted(figures.items())))
    write_pages(figures)
    return 0


if __name__ == "__main__":
    cli.run(main)
