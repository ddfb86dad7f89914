"""Follow a camera, a live stream or a video, and print its actions with start and end.

  python scripts/stream.py --model=runs/demo/export rtsp://camera.example/live
  python scripts/stream.py --model=runs/demo/export /dev/video0 --rate_hz=5
  python scripts/stream.py --model=runs/demo/export --json clip.mp4

Prints a line when an action starts and when it ends. If the model is slower than the source, only the newest frame is
used and the others are skipped; --whole uses every frame of a file instead. A live stream that breaks off is
reconnected for up to --reconnect_s seconds; current actions end there. Ends with the source, or with Ctrl-C. Exits 0; 1
if the source doesn't exist or is lost; 2 on a mistake.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clip_har_jax import cli
from clip_har_jax.errors import UserError

GAP_S = 3.0  # longest time without a frame; afterwards the action may have ended

if TYPE_CHECKING:
    from clip_har_jax.inference.stream import Event
    from clip_har_jax.video.clips import TimedFrame


def main() -> int:
    arguments = _parse()

    from clip_har_jax.inference.backends import split_classes
    from clip_har_jax.inference.exported import open_backend
    from clip_har_jax.inference.stream import EventDetector, EventRules, Latest, watch
    from clip_har_jax.video.decoding import BadVideo
    from clip_har_jax.video.live import mask_password

    if not 0 < arguments.rate_hz < float("inf") or not 0 <= arguments.reconnect_s < float("inf"):
        raise UserError("--rate_hz must be above 0, and --reconnect_s 0 or more")
    rules = EventRules(
        arguments.smoothing,
        arguments.memory_s,
        arguments.start_score,
        arguments.end_score,
        arguments.min_duration_s,
        max_gap_s=max(GAP_S, 3 / arguments.rate_hz),
    )
    backend = open_backend(arguments.model, split_classes(arguments.classes))
    detector = EventDetector(backend.labels, rules)
    frames = _frames(arguments.source, arguments.rate_hz, arguments.reconnect_s)
    source = frames if arguments.whole else Latest(frames)
    status = 0
    try:
        for moment in watch(source, backend, detector):
            for event in (*moment.ended, *moment.started):
                _print_event(event, arguments.json)
    except BadVideo as error:
        print(f"error: {mask_password(arguments.source)}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        pass
    for event in detector.finish():
        _print_event(event, arguments.json)
    if isinstance(source, Latest) and source.skipped:
        print(f"{source.skipped} frames were left out: the model is slower than the source", file=sys.stderr)
    return status


def _frames(source: str, rate_hz: float, reconnect_s: float) -> Iterator["TimedFrame"]:
    from clip_har_jax.video.clips import iter_frames
    from clip_har_jax.video.decoding import is_live
    from clip_har_jax.video.live import iter_camera, iter_live

    if source.startswith("/dev/video"):
        return iter_camera(source, rate_hz)
    if is_live(source):
        return iter_live(source, rate_hz, reconnect_s, lambda line: print(line, file=sys.stderr, flush=True))
    return iter_frames(source, rate_hz)


def _print_event(event: "Event", as_json: bool) -> None:
    if as_json:
        what = "end" if event.end_s is not None else "start"
        print(json.dumps({"event": what, **vars(event)}), flush=True)
    elif event.end_s is None:
        print(f"{event.start_s:8.1f} s  starts  {event.label}", flush=True)
    else:
        print(
            f"{event.end_s:8.1f} s  ends    {event.label}  {event.score:.2f}, since {event.start_s:.1f} s", flush=True
        )


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a camera, an address (rtsp, rtmp, srt, udp, tcp, http) or a file, e.g. /dev/video0",
    )
    cli.add_model(parser)
    cli.add_classes(parser)
    add("--rate_hz", type=float, default=4.0, metavar="N", help="frames per second at most, e.g. --rate_hz=4 (default)")
    add(
        "--reconnect_s",
        type=float,
        default=60.0,
        metavar="S",
        help="time limit for reconnecting a stream that broke off, e.g. --reconnect_s=60 (default); 0: don't reconnect",
    )
    cli.add_event_flags(parser)
    add("--whole", action="store_true", help="use every frame, however long it takes, e.g. --whole")
    add("--json", action="store_true", help="print one JSON object per line, e.g. --json")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
