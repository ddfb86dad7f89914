"""Predict the actions in images and videos.

  python scripts/predict.py --model=runs/demo/model photo.jpg clip.mp4 holiday/
  python scripts/predict.py --model=runs/demo/model --events clip.mp4
  find photos -name '*.jpg' | python scripts/predict.py --model=runs/demo/model --json -

Prints a line for each image or video: probability, action, file; with --events one for each action in a video. A file
that can't be read is reported, and the others are still predicted. Of a video some frames are read, by default 8 spread
over it. Exits 0 when all were read, 1 when some were not, 2 on a mistake.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from clip_har_jax import cli

if TYPE_CHECKING:
    from clip_har_jax.inference.predictor import Prediction, Predictor


def main() -> int:
    arguments = _parse()

    from clip_har_jax.errors import UserError
    from clip_har_jax.inference.backends import split_classes
    from clip_har_jax.inference.predictor import Predictor, list_inputs
    from clip_har_jax.listing import Tally

    tally = Tally()
    inputs = list_inputs(arguments.inputs, sys.stdin.buffer, tally)
    cli.print_tally("INPUT", tally)
    predictor = Predictor(arguments.model, split_classes(arguments.classes), arguments.batch_size)
    if arguments.events:
        return _print_events(predictor, inputs, arguments)
    width, count, failed = max(map(len, predictor.labels)), 0, 0
    for prediction in predictor.stream(inputs):
        if arguments.json:
            print(json.dumps(prediction.to_dict()), flush=True)
        else:
            _print_line(prediction, width)
        count, failed = count + 1, failed + (prediction.error is not None)
    if not count:
        raise UserError("no paths on stdin; write one a line")
    return 1 if failed else 0


def _print_events(predictor: "Predictor", videos: Iterable[str], arguments: argparse.Namespace) -> int:
    """Print the actions of each video, one after the other; return the exit code."""
    from clip_har_jax.inference.stream import EventRules, find_events
    from clip_har_jax.video.clips import iter_frames
    from clip_har_jax.video.decoding import BadVideo

    names = ("smoothing", "memory_s", "start_score", "end_score", "min_duration_s")
    rules = EventRules(**{name: getattr(arguments, name) for name in names})
    failed = False
    for video in videos:
        name = cli.printable(video)
        try:
            watched = find_events(iter_frames(video, arguments.rate_hz), predictor.backend, rules, arguments.batch_size)
        except BadVideo as error:
            failed = True
            message = json.dumps({"input": video, "error": str(error)}) if arguments.json else f"error: {name}: {error}"
            print(message, file=sys.stdout if arguments.json else sys.stderr, flush=True)
            continue
        if arguments.json:
            events = {**vars(watched), "events": [vars(event) for event in watched.events]}
            print(json.dumps({"input": video, **events}), flush=True)
            continue
        for event in watched.events:
            print(f"{event.start_s:8.1f} to {event.end_s:.1f} s  {event.score:.3f}  {event.label}  {name}", flush=True)
        if watched.damage:
            print(f"warning: {name}: {watched.damage}", file=sys.stderr)
    return 1 if failed else 0


def _print_line(prediction: "Prediction", width: int) -> None:
    name = cli.printable(prediction.input)
    if prediction.error is not None:
        print(f"error: {name}: {prediction.error}", file=sys.stderr)
    else:
        if prediction.damage is not None:
            print(f"warning: {name}: {prediction.damage}", file=sys.stderr)
        print(f"{prediction.score:.3f}  {prediction.label:<{width}}  {name}", flush=True)


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a video, a folder, or - for paths on stdin, e.g. a.jpg")
    cli.add_model(parser)
    cli.add_classes(parser)
    cli.add_batch_size(parser)
    add("--events", action="store_true", help="find the actions in videos, with start and end, e.g. --events")
    add(
        "--rate_hz",
        type=float,
        default=4.0,
        metavar="N",
        help="with --events: analysed frames per second, e.g. --rate_hz=4 (default)",
    )
    cli.add_event_flags(parser)
    add(
        "--json",
        action="store_true",
        help="print one JSON object per line, with the 5 most probable actions, e.g. --json",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
