"""Predict the actions in any number of images, and resume after a kill.

  python scripts/predict_bulk.py --model=runs/demo/export --inputs=photos --output=predictions
  python scripts/predict_bulk.py --model=runs/demo/export --inputs=list.txt --output=predictions --shard=3/16
  python scripts/predict_bulk.py --model=runs/demo/export --inputs=photos --output=predictions --engine=ray

Writes predictions-III-of-NNN/*.parquet (input, label, score, probs), bad_inputs-III-of-NNN/*.parquet (input, error) and
predictions-III-of-NNN/summary.json.
The same command again continues. Exits 0 when all were read, 1 when some were not, 2 on a mistake.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clip_har_jax import cli

if TYPE_CHECKING:
    from clip_har_jax.inference.bulk import Progress


def main() -> int:
    arguments = _parse()

    end = _predict_on_ray(arguments) if arguments.engine == "ray" else _predict(arguments)
    if end.tally:
        print(file=sys.stderr)
        cli.print_tally("--inputs", end.tally)
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in end.busy.items())
    speed = f"{end.images_per_s:.0f} images/s" + (f" (busy: {busy})" if busy else "")
    print(f"\n{end.done} inputs, {end.failed} of them unreadable, {speed}", file=sys.stderr)
    return 1 if end.failed else 0


def _predict(arguments: argparse.Namespace, on_ray: bool = False) -> "Progress":
    from clip_har_jax.inference.backends import split_classes
    from clip_har_jax.inference.bulk import predict_bulk
    from clip_har_jax.inference.predictor import Predictor

    shard = _own_shard(arguments) if arguments.distributed else arguments.shard
    classes = split_classes(arguments.classes)
    predictor = Predictor(arguments.model, classes, arguments.batch_size)
    engine = None
    if on_ray:
        from clip_har_jax.inference.ray_engine import RayEngine

        engine = RayEngine(predictor, arguments.model, classes)
    output = Path(arguments.output)
    return predict_bulk(
        predictor, arguments.inputs, output, shard, arguments.part_size, arguments.workers, _Report(), engine
    )


def _predict_on_ray(arguments: argparse.Namespace) -> "Progress":
    from clip_har_jax.inference.ray_cluster import connected

    with connected(arguments.ray_address):
        os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators are for the models of the nodes, which Ray has started
        return _predict(arguments, on_ray=True)


def _own_shard(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return this process's shard by its place in the run. The processes aren't joined, so none waits for another."""
    from clip_har_jax.parallel.rendezvous import find_group

    flags = arguments.coordinator_address, arguments.num_processes, arguments.process_id
    group = find_group(*flags, arguments.join_timeout_s)
    return (group.process_id, group.num_processes) if group else (0, 1)


class _Report:
    """A progress line: rewritten in place on a terminal, else printed every few seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, progress: "Progress") -> None:
        now = time.monotonic()
        if now - self._last < (0.2 if sys.stderr.isatty() else 10):
            return
        self._last, left = now, ""
        if progress.total and progress.images_per_s:
            seconds = int((progress.total - progress.done) / progress.images_per_s)
            left = f" of {progress.total}  left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        start = "\r" if sys.stderr.isatty() else "\n"
        print(
            f"{start}{progress.done}{left}  {progress.images_per_s:.0f} images/s", end="", file=sys.stderr, flush=True
        )


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N with I from 0 to N - 1, e.g. 3/16")
    return int(index), int(count)


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(parser)
    add(
        "--inputs",
        required=True,
        metavar="PATH",
        help="a folder, a manifest (.parquet or .csv with a column path) or a list of paths, e.g. --inputs=photos",
    )
    cli.add_output(parser, "predictions")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="every N-th input from the I-th, e.g. --shard=3/16")
    add(
        "--distributed",
        action="store_true",
        help="one shard for each process of a job, e.g. --distributed",
    )
    cli.add_classes(parser)
    cli.add_batch_size(parser)
    add("--part_size", type=int, default=10_000, metavar="N", help="inputs per file, e.g. --part_size=10000 (default)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="decoding threads of the local engine, e.g. --workers=2",
    )
    cli.add_engine(parser)
    cli.add_process_flags(parser)
    arguments = parser.parse_args()
    if arguments.engine == "local" and arguments.ray_address:
        parser.error("--ray_address needs --engine=ray")
    if arguments.engine == "ray" and arguments.distributed:
        parser.error("--distributed starts a process on each host, --engine=ray finds the hosts itself; leave one out")
    return arguments


if __name__ == "__main__":
    cli.run(main)
