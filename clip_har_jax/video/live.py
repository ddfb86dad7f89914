"""Continuous sources: network streams, with reconnection, and cameras of this machine."""

import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from clip_har_jax.video.clips import TimedFrame, timed_frames
from clip_har_jax.video.decoding import LIVE_TIMEOUT_S, BadVideo, import_av, open_video

PAUSES_S = (0.5, 1.0, 2.0, 5.0)  # between attempts to reconnect; the last one repeats


def mask_password(address: str) -> str:
    """Return an address with its password masked, for messages and logs."""
    password = urlsplit(address).password if "://" in address else None
    return address.replace(f":{password}@", ":***@", 1) if password else address


def iter_live(
    address: str,
    rate_hz: float | None = None,
    patience_s: float = 60.0,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[TimedFrame]:
    """Yield the frames of a live stream; reconnect when it breaks off.

    Times continue over the gap, by this machine's clock. A file at an address (it has a duration) ends at its end.

    Args:
      address: of `video.LIVE`.
      rate_hz: at most so many frames per second; None: all.
      patience_s: time limit for reconnecting; 0: don't reconnect.
      tell: called with a message when the stream breaks off and when it is back.

    Raises:
      BadVideo: no stream at the start, or it couldn't be reconnected.
    """
    start: float | None = None
    lost: float | None = None
    attempt = 0
    while True:
        try:
            with open_video(address, num_threads=0) as container:
                ends = container.duration is not None
                offset_s: float | None = None
                for frame in timed_frames(container, rate_hz):
                    now = time.monotonic()
                    if start is None:
                        start = now - frame.time_s
                    if offset_s is None:
                        offset_s = now - start - frame.time_s
                    if lost is not None:
                        tell(f"{mask_password(address)}: back after {now - lost:.1f} s")
                        lost, attempt = None, 0
                    yield TimedFrame(frame.time_s + offset_s, frame.image)
            if ends:
                return
            reason = BadVideo("it broke off")
        except BadVideo as error:
            reason = error
        now = time.monotonic()
        if start is None:
            raise reason
        if lost is None:
            lost = now
            if patience_s:
                tell(f"{mask_password(address)}: {reason}; connecting again")
        if now - lost >= patience_s:
            raise BadVideo(f"{reason}; gone for {now - lost:.0f} s" if patience_s else str(reason))
        time.sleep(min(PAUSES_S[min(attempt, len(PAUSES_S) - 1)], lost + patience_s - now))
        attempt += 1


def iter_camera(device: str, rate_hz: float | None = None) -> Iterator[TimedFrame]:
    """Yield the frames of a camera of this machine, such as `/dev/video0`, with Video4Linux.

    Raises:
      BadVideo: no such camera, or it stopped.
    """
    av = import_av()
    try:
        with av.open(device, format="v4l2", timeout=LIVE_TIMEOUT_S) as container:
            yield from timed_frames(container, rate_hz)
    except av.error.FFmpegError as error:
        raise BadVideo(f"no camera that can be read ({(error.strerror or '').lower()})") from error
