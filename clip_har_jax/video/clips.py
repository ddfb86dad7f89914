"""Clip -> timed frames: those of one view, or all of them in order."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from clip_har_jax.image_files import MAX_MEGAPIXELS
from clip_har_jax.video.decoding import MIN_READABLE, BadVideo, Decoding, TooSlow, VideoLike, find_stream, open_video
from clip_har_jax.video.sampling import FrameSampling, sample_times
from clip_har_jax.video.selective import ROUNDING_S, Index, count_lost, decode_selected, index_packets, shown_at

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
    span_s: tuple[float, float] | None = None,
) -> Clip:
    """Read the frames of one view of a clip, rotated for display.

    Args:
      source: the path of a file, or an open seekable binary file.
      sampling, view, rng: as `sample_times` takes them.
      each: applied to each frame, uint8 [h, w, 3], at once, so that only one frame is held in full size.
      max_megapixels: larger frames are refused.
      num_threads: of the decoder; 0: as many as there are cores.
      span_s: the part of the video that is the clip; times outside the video give its first or last frame. None: all
        of it.

    Raises:
      BadVideo: not a video, no frames, less than half of it readable, or a part outside the video.
    """
    return read_views(source, sampling, (view,), rng, each, max_megapixels, num_threads, span_s)[0]


def read_views(
    source: VideoLike,
    sampling: FrameSampling,
    views: Sequence[int],
    rng: np.random.Generator | None = None,
    each: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    max_megapixels: float = MAX_MEGAPIXELS,
    num_threads: int = 1,
    span_s: tuple[float, float] | None = None,
) -> list[Clip]:
    """Read several views of a clip from one pass over its packets; arguments, shapes and errors as in `read_clip`."""
    with open_video(source, num_threads) as container:
        stream = find_stream(container)
        index = index_packets(container, stream)
        times = index.times_s
        start_s = times[0]
        step_s = (times[-1] - start_s) / (len(times) - 1) if len(times) > 1 else 0.0
        duration_s = times[-1] - start_s + step_s
        from_s, to_s = (0.0, duration_s) if span_s is None else span_s
        if span_s is not None and (from_s >= duration_s or to_s <= 0):
            raise BadVideo(f"{from_s:.1f} to {to_s:.1f} s lies outside of it; it has {duration_s:.1f} s")
        wanted = [
            np.clip(from_s + sample_times(to_s - from_s, sampling, view, rng), 0, None) + start_s for view in views
        ]
        shown, damage = _shown_frames(container, stream, index, np.unique(np.concatenate(wanted)), each, max_megapixels)
        damage = _losses(index) or damage
        told_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else duration_s
    if duration_s + max(1.0, 2 * step_s) < told_s:
        damage = f"breaks off at {duration_s:.1f} of {told_s:.1f} s"
    clips = []
    for view_times_s in wanted:
        taken = [shown[time_s] for time_s in view_times_s.tolist()]
        times_s = tuple(frame_s - start_s for frame_s, _ in taken)
        clips.append(Clip(tuple(image for _, image in taken), times_s, duration_s, damage))
    return clips


def _losses(index: Index) -> str | None:
    """Return a description of the frames that a damaged container has lost; None: it isn't damaged.

    Raises:
      BadVideo: more than half.
    """
    if not (lost := count_lost(index)):
        return None
    total = lost + len(index.stamps)
    found = f"about {lost} of {total} frames are damaged or missing"
    if len(index.stamps) < MIN_READABLE * total:
        raise BadVideo(f"{found}; save it again")
    return found


def _shown_frames(
    container: Any,
    stream: Any,
    index: Index,
    times_s: Float64[np.ndarray, " n"],
    each: Callable[[np.ndarray], np.ndarray],
    max_megapixels: float,
) -> tuple[dict[float, tuple[float, np.ndarray]], str | None]:
    """Return the frame that is shown at each time, with its own time, and what of the clip is damaged."""
    stamps = shown_at(index, times_s)
    selected = decode_selected(container, stream, index, set(stamps), each, max_megapixels)
    if selected is not None:
        frames = [(stamp * index.unit_s, selected[stamp]) for stamp in stamps]
        return dict(zip(times_s.tolist(), frames, strict=True)), None
    decoding = Decoding(container, stream, max_megapixels)
    frames = list(_frames_at(decoding, times_s, index.keyframes_s, each))
    return dict(zip(times_s.tolist(), frames, strict=True)), decoding.damage()


def video_duration(source: VideoLike) -> float:
    """Return the length of a video as its container tells it, else by its packets; nothing is decoded.

    Raises:
      BadVideo: not a video, or no frames in it.
    """
    with open_video(source, 1) as container:
        stream = find_stream(container)
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        times = index_packets(container, stream).times_s
        return times[-1] - times[0] + ((times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0)


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
            yield TimedFrame(time_s, decoding.upright(frame))
        if rate_hz is not None:
            due_s = max(due_s, (np.floor((time_s + ROUNDING_S) * rate_hz) + 1) / rate_hz)
    if first_s is None:
        raise BadVideo(f"no frame of it can be decoded{decoding.why()}")
    if damage := decoding.damage():
        raise BadVideo(damage)


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
            made = each(decoding.upright(shown[1]))
        yield shown[0], made
