"""Clip -> timed frames: those of one view, or all of them in order."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.preprocess import MAX_MEGAPIXELS
from clip_har_jax.video.decoding import BadVideo, Decoding, TooSlow, VideoLike, find_stream, open_video, upright
from clip_har_jax.video.sampling import FrameSampling, sample_times

ROUNDING_S = 1e-3  # containers round times, some to milliseconds
SEEK_S = 2.0  # for a frame further ahead, seek instead of decoding up to it


class TimedFrame(NamedTuple):
    """A frame, rotated for display."""

    time_s: float  # from the first frame on; never decreases
    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Clip:
    """The sampled frames of one clip."""

    frames: tuple[np.ndarray, ...]  # in the order of time; uint8 [h, w, 3], or the results of `each`
    times_s: tuple[float, ...]  # of the frames, from the start of the clip
    duration_s: float
    damage: str | None = None  # a description of the part that couldn't be read


def read_clip(
    source: VideoLike,
    sampling: FrameSampling,
    view: int = 0,
    rng: np.random.Generator | None = None,
    each: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    max_megapixels: float = MAX_MEGAPIXELS,
    num_threads: int = 1,
) -> Clip:
    """Read the frames of one view of a clip, rotated for display.

    Args:
      source: the path of a file, or an open seekable binary file.
      sampling, view, rng: as `sample_times` takes them.
      each: applied to each frame at once, so that only one frame is held in full size.
      max_megapixels: larger frames are refused.
      num_threads: of the decoder; 0: as many as there are cores.

    Raises:
      BadVideo: not a video, no frames, or less than half of it readable.
    """
    with open_video(source, num_threads) as container:
        stream = find_stream(container)
        times, keyframes = _scan(container, stream)
        start_s = times[0]
        step_s = (times[-1] - start_s) / (len(times) - 1) if len(times) > 1 else 0.0
        duration_s = times[-1] - start_s + step_s
        wanted = sample_times(duration_s, sampling, view, rng) + start_s
        decoding = Decoding(container, stream, max_megapixels)
        taken = [(frame_s - start_s, image) for frame_s, image in _frames_at(decoding, wanted, keyframes, each)]
        told_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else duration_s
    damage = decoding.damage()
    if duration_s + max(1.0, 2 * step_s) < told_s:
        damage = f"breaks off at {duration_s:.1f} of {told_s:.1f} s"
    return Clip(tuple(image for _, image in taken), tuple(time_s for time_s, _ in taken), duration_s, damage)


def iter_frames(
    source: VideoLike,
    rate_hz: float | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    num_threads: int = 0,
    time_limit_s: float | None = None,
) -> Generator[TimedFrame, None, None]:
    """Yield the frames of a file or a live stream in order, rotated for display.

    Args:
      source: a file's path, an open binary file, or the address of a live stream (rtsp, rtmp, srt, udp, http).
      rate_hz: at most so many frames per second, evenly spaced; None: all.
      max_megapixels: larger frames are refused.
      num_threads: of the decoder; 0: as many as there are cores.
      time_limit_s: for reading and for the caller's work on the frames; None: no limit.

    Raises:
      BadVideo: not a video or no frames in it; or, after the last readable frame, where it is damaged.
      TooSlow: over `time_limit_s`.
    """
    with open_video(source, num_threads) as container:
        yield from timed_frames(container, rate_hz, max_megapixels, time_limit_s)


def timed_frames(
    container: Any,
    rate_hz: float | None,
    max_megapixels: float = MAX_MEGAPIXELS,
    time_limit_s: float | None = None,
) -> Iterator[TimedFrame]:
    """Yield the frames of an open video, rotated for display, at most `rate_hz` per second, with times from the first.

    Raises:
      BadVideo: after the last readable frame, where it is damaged.
      TooSlow: over `time_limit_s`.
    """
    end = float("inf") if time_limit_s is None else time.monotonic() + time_limit_s
    decoding = Decoding(container, find_stream(container), max_megapixels)
    first_s: float | None = None
    due_s = 0.0
    for frame_s, frame in decoding:
        if time.monotonic() > end:  # also between frames that are skipped
            raise TooSlow(f"reading it takes over {time_limit_s:g} s; send a shorter or smaller one")
        first_s = frame_s if first_s is None else first_s
        time_s = frame_s - first_s
        if rate_hz is None or time_s >= due_s - ROUNDING_S:
            yield TimedFrame(time_s, upright(frame))
        if rate_hz is not None:
            due_s = max(due_s, (np.floor((time_s + ROUNDING_S) * rate_hz) + 1) / rate_hz)
    if first_s is None:
        raise BadVideo(f"no frame of it can be decoded{decoding.why()}")
    if damage := decoding.damage():
        raise BadVideo(damage)


def _scan(container: Any, stream: Any) -> tuple[list[float], list[float]]:
    """Return the sorted times of a clip's frames and keyframes; reads the packets without decoding."""
    times, keyframes = [], []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.size:
            times.append(float(stamp * packet.time_base))
            if packet.is_keyframe:
                keyframes.append(times[-1])
    if not times:
        raise BadVideo("no frames in it")
    container.seek(0)
    return sorted(times), sorted(keyframes)


def _frames_at(
    decoding: Decoding, wanted: Sequence[float] | np.ndarray, keyframes: list[float], each: Callable[[Any], Any]
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the frame shown at each of the times, with its own time; `wanted` never decreases."""
    frames = iter(decoding)
    shown: tuple[float, Any] | None = None
    ahead = next(frames, None)
    made: np.ndarray | None = None
    for time_s in wanted:
        key_s = next((key for key in reversed(keyframes) if key <= time_s), None)
        position_s = ahead[0] if ahead is not None else None
        if key_s is not None and position_s is not None and key_s > position_s + SEEK_S:
            decoding.seek(key_s)
            frames = iter(decoding)
            shown, ahead, made = None, next(frames, None), None
        while ahead is not None and (shown is None or ahead[0] <= time_s + ROUNDING_S):
            shown, ahead, made = ahead, next(frames, None), None
        if shown is None:
            raise BadVideo(f"no frame of it can be decoded{decoding.why()}")
        if made is None:
            made = each(upright(shown[1]))
        yield shown[0], made
