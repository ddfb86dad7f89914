"""Register, promote, roll back, list and pull models in MLflow's registry.

  python scripts/registry.py register --model=runs/demo/model --export=runs/demo/export --evaluation=runs/demo/test
  python scripts/registry.py promote --version=1 --max_latency_ms=50
  python scripts/registry.py rollback
  python scripts/registry.py list
  python scripts/registry.py pull --output=served/har
  python scripts/registry.py pull --output=served/har --watch --reload_url=http://127.0.0.1:8000/v1/models/har/load

The registry is at MLFLOW_TRACKING_URI, or else in mlflow.db of this folder. Exits 0 when done, 1 when a gate refused a
promotion, 2 on a mistake.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clip_har_jax import cli

if TYPE_CHECKING:
    from clip_har_jax.mlops.model_registry import ModelRegistry, RegisteredVersion


def main() -> int:
    arguments = _parse()

    from clip_har_jax.mlops.model_registry import open_registry

    registry = open_registry(arguments.name)
    return arguments.act(registry, arguments)


def register(registry: "ModelRegistry", arguments: argparse.Namespace) -> int:
    version = registry.register(arguments.model, arguments.export, arguments.evaluation)
    print(f"version {version.number} of {version.name}, digest {version.digest}")
    return 0


def promote(registry: "ModelRegistry", arguments: argparse.Namespace) -> int:
    from clip_har_jax.mlops.gates import Gates

    gates = Gates(arguments.min_gain, arguments.min_retention, arguments.max_latency_ms)
    checks = registry.promote(arguments.version, arguments.alias, gates)
    for check in checks:
        print(f"{'passed' if check.passed else 'REFUSED'}  {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        print(f"version {arguments.version} was not promoted", file=sys.stderr)
        return 1
    print(f"version {arguments.version} is the {arguments.alias}")
    return 0


def rollback(registry: "ModelRegistry", arguments: argparse.Namespace) -> int:
    version = registry.rollback(arguments.alias)
    print(f"version {version.number} is the {arguments.alias} again, digest {version.digest}")
    return 0


def show(registry: "ModelRegistry", arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    versions = registry.versions()
    if not versions:
        print(f"no version of {arguments.name!r} yet; scripts/registry.py register makes the first")
        return 0
    table = Table("version", "aliases", "digest", "top-1", "run", "git", box=None)
    for version in versions:
        dirty = " (dirty)" if version.tags.get("git_dirty") == "True" else ""
        git = version.tags.get("git_sha", "")[:10] + dirty
        table.add_row(
            str(version.number),
            ", ".join(version.aliases),
            version.digest[:12],
            version.tags.get("top1", ""),
            version.tags.get("run_id", ""),
            git,
        )
    Console(highlight=False, soft_wrap=True).print(table)
    return 0


def pull(registry: "ModelRegistry", arguments: argparse.Namespace) -> int:
    if not arguments.watch:
        _announce(registry.pull(arguments.version, arguments.part, arguments.output), arguments)
        return 0
    here = None
    while True:
        try:
            version = registry.find(arguments.version)
            if version.number != here:
                registry.pull(arguments.version, arguments.part, arguments.output)
                _announce(version, arguments)
                if arguments.reload_url:
                    _reload(arguments.reload_url)
                here = version.number
        except Exception as error:  # the server keeps its model, and the loop continues
            print(f"warning: {str(error).splitlines()[0]}; trying again", file=sys.stderr, flush=True)
        time.sleep(arguments.every_s)


def _announce(version: "RegisteredVersion", arguments: argparse.Namespace) -> None:
    print(f"version {version.number} of {version.name} in {arguments.output}, digest {version.digest}", flush=True)


def _reload(url: str) -> None:
    """Make a server load the new folder; RELOAD_KEY holds an admin's key if the server needs one."""
    import urllib.request

    key = os.environ.get("RELOAD_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=json.dumps({}).encode(), headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: object, what: str) -> argparse.ArgumentParser:
        child = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        child.set_defaults(act=act)
        child.add_argument("--name", default="har", help="name of the registered model, e.g. --name=har (default)")
        return child

    new = command("register", register, "upload a model as a new version")
    new.add_argument("--model", type=Path, required=True, metavar="DIR", help="sealed, e.g. --model=runs/demo/model")
    new.add_argument("--export", type=Path, metavar="DIR", help="exported from it, e.g. --export=runs/demo/export")
    new.add_argument("--evaluation", type=Path, metavar="DIR", help="its evaluation, e.g. --evaluation=runs/demo/test")
    up = command("promote", promote, "point an alias to a version that passes the gates")
    up.add_argument("--version", required=True, help="number or alias, e.g. --version=3")
    cli.add_gates(up)
    down = command("rollback", rollback, "point an alias to its previous version")
    for child in (up, down):
        child.add_argument("--alias", default="champion", help="e.g. --alias=champion (default)")
    command("list", show, "show all versions")
    get = command("pull", pull, "write a version's folder, verified by its digest")
    get.add_argument("--version", default="champion", help="alias or number, e.g. --version=champion (default)")
    get.add_argument(
        "--part",
        choices=("export", "model", "evaluation"),
        default="export",
        help="folder of the version, e.g. --part=export (default), for servers",
    )
    get.add_argument("--output", type=Path, required=True, metavar="DIR", help="to write, e.g. --output=served/har")
    get.add_argument("--watch", action="store_true", help="follow the alias until stopped, e.g. --watch")
    get.add_argument(
        "--every_s",
        type=float,
        default=30,
        metavar="S",
        help="seconds between checks, e.g. --every_s=30",
    )
    get.add_argument("--reload_url", metavar="URL", help="notified (POST) after each pull, e.g. of a local server")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
