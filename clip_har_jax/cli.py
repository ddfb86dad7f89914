"""What every command shares: flags, exit codes, one line for a person's mistake."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from clip_har_jax.errors import UserError

EXIT_MISTAKE = 2


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that keeps the description's line breaks; `--help` exits 0, a wrong flag exits 2."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses flags and sets aside the `--config.KEY=VALUE` overrides; anything else left over exits 2."""
    arguments, rest = parser.parse_known_args(argv)
    for item in rest:
        if not item.startswith("--config."):
            parser.error(f"unrecognized argument {item!r}")
        if "=" not in item:
            parser.error(f"{item!r}: write {item}=VALUE")
    return arguments, rest


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with what it returns (None: 0); a `UserError` is printed and exits 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # libraries' start-up chatter hides what the person looks for
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except BrokenPipeError:  # `predict.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
