"""Parts of every command line: shared flags, exit codes, and errors in one line."""

import argparse
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import lacks_temporary_folder

if TYPE_CHECKING:
    from clip_har_jax.listing import Tally

EXIT_MISTAKE = 2
EXIT_S = 10.0  # from the report of an error to the end of the process


class _Parser(argparse.ArgumentParser):
    """Report a wrong flag in one line, with the most similar known flag, and exit 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._typed = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        known = [*(flag for flag in self._option_string_actions if flag != "--help"), "--config."]
        # Look for a misspelled flag even if the error is a missing required flag: it is often the same one.
        for flag in (item.split("=")[0] for item in self._typed if item.startswith("--")):
            hint = "" if flag == "--help" or flag.startswith("--config.") else nearest(flag, known, "")
            if hint and flag not in known:
                message += f"; {flag}: {hint}"
                break
        self.exit(EXIT_MISTAKE, f"error: {' '.join(message.split())}; --help explains the flags\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that keeps the description's line breaks; `--help` exits 0, a wrong flag exits 2."""
    return _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags and separate the `--config.KEY=VALUE` overrides; exit 2 for any other unknown argument."""
    arguments, rest = parser.parse_known_args(argv)
    for item in rest:
        if not item.startswith("--config."):
            parser.error(f"unrecognized argument {item!r}")
        if "=" not in item:
            parser.error(f"{item!r}: write {item}=VALUE")
    return arguments, rest


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --model: a folder or a Hub name."""
    help = "a model folder, an exported one or a Hub name, e.g. --model=runs/demo/model"
    parser.add_argument("--model", required=required, metavar="PATH", help=help)


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """Add --config: the config file; `parse_with_overrides` returns the overrides of its keys."""
    parser.add_argument("--config", required=True, metavar="FILE", help=f"the config file, e.g. --config={example}")


def add_data(parser: argparse.ArgumentParser, help: str, default: str | None = None, required: bool = False) -> None:
    """Add --data: a SPEC, as `specs.parse_spec` reads it."""
    parser.add_argument("--data", required=required, default=default, metavar="SPEC", help=help)


def add_max_bad_fraction(parser: argparse.ArgumentParser, default: float) -> None:
    """Add --max_bad_fraction: the share of unreadable inputs that a command tolerates."""
    help = f"stop if a larger share of the inputs can't be read, e.g. --max_bad_fraction={default:g} (default)"
    parser.add_argument("--max_bad_fraction", type=float, default=default, metavar="SHARE", help=help)


def add_output(parser: argparse.ArgumentParser, example: str) -> None:
    """Add --output: the folder to write."""
    parser.add_argument("--output", required=True, metavar="DIR", help=f"where to write, e.g. --output={example}")


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add --classes; `inference.backends.split_classes` parses its value."""
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help="recognise these actions, in free words, instead of the model's own classes, e.g. "
        '--classes="riding a bike,sleeping"',
    )


def add_batch_size(parser: argparse.ArgumentParser, default: int = 32) -> None:
    """Add --batch_size: the number of images in one forward pass."""
    help = f"images in one forward pass, e.g. --batch_size={default} (default)"
    parser.add_argument("--batch_size", type=int, default=default, metavar="N", help=help)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add --engine and --ray_address; `inference.ray_cluster.connected` takes the second one."""
    help = "local: in this process; ray: on a Ray cluster, or on this machine (pip install 'clip-har-jax[ray]'), e.g. "
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=f"{help}--engine=ray")
    help = "HOST:PORT of a cluster's head, or auto for the cluster of this machine; default: an own Ray on this machine"
    parser.add_argument("--ray_address", metavar="ADDRESS", help=f"{help}, e.g. --ray_address=10.0.0.1:6379")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags with which the processes of one run find each other; `process_flags` reads them."""
    group = parser.add_argument_group(
        "several processes", "detected under Slurm, Open MPI, JobSet and on Cloud TPU; elsewhere set the first three"
    )
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="of process 0, e.g. --coordinator_address=10.0.0.1:8476"
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="of the whole run, e.g. --num_processes=4")
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1, e.g. --process_id=0")
    for name, default, what in (
        ("join", 300, "time for all processes to join"),
        ("heartbeat", 100, "silence after which a process counts as dead and the run ends"),
        ("barrier", 600, "time to wait for the slowest process"),
    ):
        flag = f"--{name}_timeout_s"
        group.add_argument(flag, type=int, default=default, metavar="S", help=f"{what}, e.g. {flag}={default}")


def process_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_process_flags`, as arguments of `parallel.distributed.join`."""
    names = ("coordinator_address", "num_processes", "process_id")
    timeouts = ("join_timeout_s", "heartbeat_timeout_s", "barrier_timeout_s")
    return {name: getattr(arguments, name) for name in names + timeouts}


def add_gates(parser: argparse.ArgumentParser) -> None:
    """Add the conditions of a promotion; `mlops.gates.Gates` takes them."""
    parser.add_argument(
        "--min_gain",
        type=float,
        default=0.0,
        metavar="X",
        help="lower bound of the 95%% interval of the gain in top-1 over the champion, e.g. --min_gain=-0.02",
    )
    parser.add_argument(
        "--min_retention", type=float, metavar="X", help="share of zero-shot accuracy kept, e.g. --min_retention=0.95"
    )
    parser.add_argument(
        "--max_latency_ms", type=float, metavar="MS", help="of one image, measured here, e.g. --max_latency_ms=50"
    )


def add_event_flags(parser: argparse.ArgumentParser) -> None:
    """Add the rules that turn frames into events; `inference.stream.EventRules` takes them."""
    add = parser.add_argument
    help = "weights of earlier frames: exponential (by age), attention (by similarity) or none, e.g. "
    add("--smoothing", default="exponential", metavar="NAME", help=f"{help}--smoothing=attention")
    for name, default, what in (
        ("memory_s", 1.0, "age at which the weight of a frame is 1/e"),
        ("start_score", 0.6, "probability at which an action starts"),
        ("end_score", 0.4, "probability below which it ends"),
        ("min_duration_s", 0.5, "shorter actions are not reported"),
    ):
        help = f"{what}, e.g. --{name}={default} (default)"
        add(f"--{name}", type=float, default=default, metavar="X", help=help)


def step_range(text: str) -> tuple[int, int]:
    """Parse the value of --profile_steps, FIRST:LAST, counted from 1."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: write FIRST:LAST, e.g. 10:15")
    return int(first), int(last)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print results, one name and value a line. Long paths are not wrapped, so that they can be copied."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {printable(value)}")


def print_tally(where: str, tally: "Tally") -> None:
    """Print to standard error what a listing left out and the notes of the listing."""
    for line in tally.lines:
        print(f"note: {where}: {printable(line)}", file=sys.stderr)


def printable(text: str) -> str:
    """Return text that is safe to print: one line, control characters escaped (file names can hold them)."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its return value (None: 0); print a `UserError` and exit 2."""
    for stream in (sys.stdout, sys.stderr):  # escape the characters that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up messages would hide the command's own
    try:
        sys.exit(main() or 0)
    except UserError as error:
        code = report(error)
        _end_soon(EXIT_S, code)
        sys.exit(code)
    except BrokenPipeError:  # `predict.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError:
        if not lacks_temporary_folder():
            raise
        sys.exit(report(UserError("no folder for temporary files can be written; set TMPDIR to one")))
    except KeyboardInterrupt:  # the person who pressed Ctrl-C needs no traceback
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@cache
def _end_soon(seconds: float, code: int) -> None:
    """End the process if its threads, such as those of a client that repeats its requests, outlive the main one.

    A program that calls `run` itself goes on: only its own end starts the clock.
    """
    began = threading.Event()

    def end() -> None:
        began.wait()
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()
    # Private, as nothing public is early enough: executors wait for their threads in functions registered before this
    # one, and only after them do functions of `atexit` run and does `main_thread().join()` return.
    threading._register_atexit(began.set)  # type: ignore[attr-defined]


def report(error: BaseException) -> int:
    """Print the error that ended a command, a `UserError` in one line; return the exit code."""
    if isinstance(error, UserError):
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_MISTAKE
    traceback.print_exception(error)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
