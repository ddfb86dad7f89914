"""Predict the actions in images and videos.

  python scripts/predict.py --model=runs/demo/model photo.jpg clip.mp4 holiday/
  python scripts/predict.py --model=runs/motion/model --hop_s=0.25 long.mp4
  python scripts/predict.py --model=runs/demo/model --events clip.mp4
  find photos -name '*.jpg' | python scripts/predict.py --model=runs/demo/model --json -

Prints a line for each image or video: probability, action, file; of a multi-label model all labels that reach their
thresholds. Of a video some frames are read, by default 8 spread over it. For a long video, the lines below it are the
actions with their times, found by sliding windows (--whole leaves them out). --events smooths the scores of single
frames instead. A file that can't be read is reported, and the others are still predicted. Exits 0 when all were read, 1
when some were not, 2 on a mistake.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from clip_har_jax import cli

if TYPE_CHECKING:
    from clip_har_jax.inference.predictor import Prediction, Predictor
    from clip_har_jax.inference.sliding_windows import FoundSegments
    from clip_har_jax.video.clips import TimedFrame

LONG_WINDOWS = 2  # a video of more windows than this is long: its segments are printed
PROGRESS_S = 5.0  # between two lines of progress


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
    find = _segment_finder(predictor, arguments)
    for prediction in predictor.stream(inputs):
        found = find(prediction)
        if arguments.json:
            segments = {} if found is None else {"segments": [segment._asdict() for segment in found.segments]}
            print(json.dumps(prediction.to_dict() | segments), flush=True)
        else:
            _print_line(prediction, width)
            for segment in found.segments if found is not None else ():
                print(f"       {segment.start_s:8.2f} to {segment.end_s:.2f} s  {segment.score:.3f}  {segment.label}")
        count, failed = count + 1, failed + (prediction.error is not None)
    if not count:
        raise UserError("no paths on stdin; write one a line")
    return 1 if failed else 0


def _segment_finder(
    predictor: "Predictor", arguments: argparse.Namespace
) -> Callable[["Prediction"], "FoundSegments | None"]:
    """Return the function that finds the segments of a video; it returns None for what has none to print."""
    from clip_har_jax.errors import UserError
    from clip_har_jax.inference.sliding_windows import choose_windows
    from clip_har_jax.video.segments import SegmentRules

    if predictor.backend.actions.multi_label and arguments.window_s is None and arguments.hop_s is None:
        return lambda prediction: None  # windows follow one action at a time
    if not predictor.backend.takes_clips:
        if arguments.window_s is not None or arguments.hop_s is not None:
            raise UserError(f"{arguments.model}: an export for images only has no windows; export the model again")
        return lambda prediction: None
    windows = choose_windows(predictor.backend, arguments.window_s, arguments.hop_s)
    rules = SegmentRules(arguments.start_score, arguments.end_score, arguments.max_gap_s, arguments.min_duration_s)

    def find(prediction: "Prediction") -> "FoundSegments | None":
        duration_s = prediction.duration_s
        if duration_s is None or arguments.whole:
            return None
        if not arguments.json and duration_s <= LONG_WINDOWS * windows.window_s:
            return None
        name = cli.printable(prediction.input)
        return predictor.segments(prediction.input, windows, rules, lambda frames: _progress(frames, name, duration_s))

    return find


def _progress(frames: Iterator["TimedFrame"], name: str, duration_s: float) -> Iterator["TimedFrame"]:
    """Yield the frames of a video, and report now and then how long the rest takes."""
    start_s = told_s = time.monotonic()
    for frame in frames:
        yield frame
        now_s = time.monotonic()
        if now_s - told_s >= PROGRESS_S and frame.time_s > 0:
            told_s = now_s
            left_s = (now_s - start_s) * max(0.0, duration_s / frame.time_s - 1)
            print(f"{name}: {frame.time_s:.0f} of {duration_s:.0f} s, about {left_s:.0f} s left", file=sys.stderr)


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
        if prediction.labels is not None:
            told = ", ".join(f"{score:.3f} {label}" for label, score in prediction.labels)
            print(f"{told or 'no label'}  {name}", flush=True)
            return
        print(f"{prediction.score:.3f}  {prediction.label:<{width}}  {name}", flush=True)


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a video, a folder, or - for paths on stdin, e.g. a.jpg")
    cli.add_model(parser)
    cli.add_classes(parser)
    cli.add_batch_size(parser)
    for name, what in (("window_s", "length of a window"), ("hop_s", "time from one window to the next")):
        add(f"--{name}", type=float, metavar="S", help=f"{what}; default: the model's own, e.g. --{name}=0.5")
    help = "that are joined to one, in long videos, e.g. --max_gap_s=0 (default)"
    add(
        "--max_gap_s",
        type=float,
        default=0.0,
        metavar="S",
        help=f"longest gap between two segments of an action {help}",
    )
    add("--whole", action="store_true", help="predict videos as a whole, without segments, e.g. --whole")
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
