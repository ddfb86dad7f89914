"""Clip -> timed frames: decoding by PyAV, and which frames of a clip a model sees.

Times, not frame numbers, say what is taken, so that clips of any frame rate, and of a varying one, are sampled alike.
"""

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import MAX_MEGAPIXELS, BadImage

if TYPE_CHECKING:
    import av

# Formats that hold their pictures themselves: a playlist would have FFmpeg open other files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg"
LIVE = ("rtsp://", "rtsps://", "rtmp://", "rtmps://", "srt://", "udp://", "tcp://", "http://", "https://")
LIVE_FORMATS = CONTAINERS + ",rtsp,rtp,live_flv,mjpeg,mpjpeg"
LIVE_TIMEOUT_S = 10.0
MIN_READABLE = 0.5  # share of a clip's packets that must decode for its prediction to be worth something
ROUNDING_S = 1e-3  # containers round times, some to milliseconds
SEEK_S = 2.0  # a wanted frame further ahead than this is sought, not decoded up to

VideoLike = str | os.PathLike[str] | BinaryIO | io.IOBase


class BadVideo(BadImage):
    """A clip that can't serve; as for an image, the message is the reason alone."""


class TooSlow(BadVideo):
    """Reading it takes longer than was allowed."""


class TimedFrame(NamedTuple):
    """A frame as it is to be looked at."""

    time_s: float  # from the first frame on; never decreases
    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a clip a model sees.

    Attributes:
      num_frames: of a view.
      method: uniform: the middles of equal parts of the clip. tsn: the same, but while training a random time of each
        part (Wang et al. 2016). dense: `rate_hz` frames a second from a random start, when not training from starts
        spread evenly.
      rate_hz: of dense sampling.
      num_views: how often a clip is sampled, each time at other times, when not training; what the model says of them
        is averaged.
    """

    num_frames: int = 8
    method: str = "uniform"
    rate_hz: float = 4.0
    num_views: int = 1


METHODS = ("uniform", "dense", "tsn")


@dataclass(frozen=True)
class Clip:
    """The sampled frames of one clip."""

    frames: tuple[np.ndarray, ...]  # in the order of time; uint8 [h, w, 3], or what `each` made of it
    times_s: tuple[float, ...]  # of the frames, from the start of the clip
    duration_s: float
    damage: str | None = None  # what of the clip couldn't be read, if something


def sample_times(
    duration_s: float, sampling: FrameSampling, view: int = 0, rng: np.random.Generator | None = None
) -> Float64[np.ndarray, " n"]:
    """Return the times of a view's frames, 0 to `duration_s`; those past the end of a short clip stand for its last
    frame.

    Args:
      duration_s: of the clip.
      sampling: what is sampled.
      view: 0 to num_views - 1; what it is doesn't matter while training.
      rng: while training: a source of randomness; None: the times are the same each time.
    """
    count, views = sampling.num_frames, sampling.num_views
    if sampling.method == "dense":
        free_s = max(duration_s - count / sampling.rate_hz, 0.0)  # where a view can start
        start_s = free_s * (rng.random() if rng is not None else (view + 0.5) / views)
        return start_s + (np.arange(count) + 0.5) / sampling.rate_hz
    within = np.full(count, (view + 0.5) / views)
    if sampling.method == "tsn" and rng is not None:
        within = rng.random(count)
    return (np.arange(count) + within) / count * duration_s


def read_clip(
    source: VideoLike,
    sampling: FrameSampling,
    view: int = 0,
    rng: np.random.Generator | None = None,
    each: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    max_megapixels: float = MAX_MEGAPIXELS,
    num_threads: int = 1,
) -> Clip:
    """Read the frames of one view of a clip, upright.

    Args:
      source: a file's path, or an open binary file that can seek.
      sampling, view, rng: as `sample_times` takes them.
      each: applied to each frame at once, so that no more than one frame is held in full size.
      max_megapixels: of a frame; more is refused.
      num_threads: of the decoder; 0: as many as the machine has cores.

    Raises:
      BadVideo: not a video, no frame in it, or less than half of it readable.
    """
    with open_video(source, num_threads) as container:
        stream = _video_stream(container)
        times, keyframes = _scan(container, stream)
        start_s = times[0]
        step_s = (times[-1] - start_s) / (len(times) - 1) if len(times) > 1 else 0.0
        duration_s = times[-1] - start_s + step_s
        wanted = sample_times(duration_s, sampling, view, rng) + start_s
        decoding = _Decoding(container, stream, max_megapixels)
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
) -> Iterator[TimedFrame]:
    """Return the frames of a file or a live stream, upright, one after the other.

    Args:
      source: a file's path, an open binary file, or the address of a live stream (rtsp, rtmp, srt, udp, http).
      rate_hz: at most so many frames a second, evenly over time; None: all.
      max_megapixels: of a frame; more is refused.
      num_threads: of the decoder; 0: as many as the machine has cores.
      time_limit_s: for reading and for what is done with each frame; None: as long as it takes.

    Raises:
      BadVideo: not a video or no frame in it; or, after the frames that could be read, where it is damaged.
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
    """Upright frames of an open video at most at `rate_hz`, timed from the first; damage is raised behind them."""
    end = float("inf") if time_limit_s is None else time.monotonic() + time_limit_s
    decoding = _Decoding(container, _video_stream(container), max_megapixels)
    first_s: float | None = None
    due_s = 0.0
    for frame_s, frame in decoding:
        if time.monotonic() > end:  # also among frames that nobody looks at
            raise TooSlow(f"reading it takes over {time_limit_s:g} s; send a shorter or smaller one")
        first_s = frame_s if first_s is None else first_s
        time_s = frame_s - first_s
        if rate_hz is None or time_s >= due_s - ROUNDING_S:
            yield TimedFrame(time_s, _upright(frame))
        if rate_hz is not None:
            due_s = max(due_s, (np.floor((time_s + ROUNDING_S) * rate_hz) + 1) / rate_hz)
    if first_s is None:
        raise BadVideo(f"no frame of it can be decoded{decoding.why()}")
    if damage := decoding.damage():
        raise BadVideo(damage)


def import_av() -> Any:
    """PyAV, which only those who have videos need.

    Raises:
      UserError: it isn't installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need PyAV ({error}); pip install 'clip-har-jax[data]'") from error
    av.logging.set_level(None)  # what FFmpeg finds is told by us, with the file's name
    return av


def is_live(source: VideoLike) -> bool:
    """Return whether it is the address of a stream, not a file."""
    return isinstance(source, str) and source.lower().startswith(LIVE)


@contextmanager
def open_video(source: VideoLike, num_threads: int) -> Iterator[Any]:
    """Return an open PyAV container of a file or a live stream.

    Raises:
      BadVideo: no video that can be read; as well where the block fails to read on.
    """
    av = import_av()
    live = is_live(source)
    formats = {"format_whitelist": LIVE_FORMATS if live else CONTAINERS}
    try:
        if live:
            # By UDP a camera's packets are lost on the way, and by firewalls; where it has TCP, that is taken.
            options = formats | {"rtsp_flags": "prefer_tcp"} if str(source).lower().startswith("rtsp") else formats
            with av.open(source, container_options=options, timeout=LIVE_TIMEOUT_S) as container:
                yield _with_threads(container, num_threads)
        elif isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise BadVideo("empty file")
                with av.open(file, container_options=formats) as container:
                    yield _with_threads(container, num_threads)
        else:
            with av.open(source, container_options=formats) as container:
                yield _with_threads(container, num_threads)
    except av.error.FFmpegError as error:  # before OSError, of which most of its kinds are
        text = (error.strerror or type(error).__name__).lower()
        if live:
            text = "nothing came for too long" if isinstance(error, av.error.ExitError) else text
            raise BadVideo(f"no stream that can be read ({text}); check the address, and that it sends") from error
        raise BadVideo(f"not a video that FFmpeg can read ({text}); convert or remove it") from error
    except OSError as error:
        raise BadVideo(f"can't be read ({error.strerror or error})") from error


def _with_threads(container: Any, num_threads: int) -> Any:
    for stream in container.streams.video:
        stream.codec_context.thread_count = num_threads
        stream.thread_type = "SLICE" if num_threads == 1 else "AUTO"
    return container


def _video_stream(container: Any) -> Any:
    # A song's cover is a video stream of one picture.
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        raise BadVideo("no video in it")
    return streams[0]


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _scan(container: Any, stream: Any) -> tuple[list[float], list[float]]:
    """Return the times of a clip's frames and of its keyframes, both sorted; reads the packets, decodes nothing."""
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


class _Decoding:
    """The frames of a stream with their times, in order; counts what can't be decoded and goes on behind it."""

    def __init__(self, container: Any, stream: Any, max_megapixels: float):
        self.container, self.stream, self.max_megapixels = container, stream, max_megapixels
        self.good, self.bad = 0, 0
        self.reason = ""
        self.last_s = 0.0

    def __iter__(self) -> Iterator[tuple[float, "av.VideoFrame"]]:
        from av.error import FFmpegError

        last_s: float | None = None
        rate = self.stream.average_rate or self.stream.guessed_rate or 25
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
                frames = packet.decode()
            except StopIteration:
                return
            except EOFError:
                return
            except FFmpegError as error:
                self.bad, self.reason = self.bad + 1, (error.strerror or type(error).__name__).lower()
                if self.bad > 100 and self.bad > self.good:  # a demuxer that fails for good would fail for ever
                    return
                continue
            for frame in frames:
                self._check_size(frame)
                time_s = frame.time if frame.time is not None else (0.0 if last_s is None else last_s + 1 / float(rate))
                last_s = self.last_s = time_s if last_s is None else max(last_s, time_s)
                self.good, self.bad = self.good + (not frame.is_corrupt), self.bad + frame.is_corrupt
                yield last_s, frame

    def seek(self, time_s: float) -> None:
        self.container.seek(int(time_s / self.stream.time_base), stream=self.stream)

    def _check_size(self, frame: "av.VideoFrame") -> None:
        if frame.width * frame.height > self.max_megapixels * 1e6:
            raise BadVideo(
                f"frames of {frame.width}x{frame.height} px, over {self.max_megapixels:g} megapixels; make it smaller"
            )

    def why(self) -> str:
        return f" ({self.reason})" if self.reason else ""

    def damage(self) -> str | None:
        """What couldn't be decoded; None where all could.

        Raises:
          BadVideo: more than half.
        """
        if not self.bad:
            return None
        found = f"{self.bad} of {self.good + self.bad} frames are damaged{self.why()}"
        if self.good < MIN_READABLE * (self.good + self.bad):
            raise BadVideo(f"{found}; save it again")
        return found


def _frames_at(
    decoding: _Decoding, wanted: Sequence[float] | np.ndarray, keyframes: list[float], each: Callable[[Any], Any]
) -> Iterator[tuple[float, np.ndarray]]:
    """Return the frame that is shown at each of the times, with its own time; `wanted` never decreases."""
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
            made = each(_upright(shown[1]))
        yield shown[0], made


def _upright(frame: "av.VideoFrame") -> UInt8[np.ndarray, "h w 3"]:
    """RGB, turned as the container's display matrix says (PyAV gives degrees counterclockwise)."""
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
