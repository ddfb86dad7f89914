"""Videos opened and decoded by PyAV: files and live streams, damaged ones too, within limits."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from clip_har_jax.errors import UserError
from clip_har_jax.image_files import BadImage

if TYPE_CHECKING:
    import av

# Formats that contain their own pictures: a playlist would make FFmpeg open other files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg"
LIVE = ("rtsp://", "rtsps://", "rtmp://", "rtmps://", "srt://", "udp://", "tcp://", "http://", "https://")
LIVE_FORMATS = CONTAINERS + ",rtsp,rtp,live_flv,mjpeg,mpjpeg"
LIVE_TIMEOUT_S = 10.0
MIN_READABLE = 0.5  # least share of packets that must decode for a useful prediction

VideoLike = str | os.PathLike[str] | BinaryIO | io.IOBase


class BadVideo(BadImage):
    """A clip that can't be used; as for an image, the message is only the reason."""


class TooSlow(BadVideo):
    """Reading the video takes longer than allowed."""


def import_av() -> Any:
    """Return PyAV, which is needed for videos only.

    Raises:
      UserError: it isn't installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need PyAV ({error}); pip install 'clip-har-jax[data]'") from error
    av.logging.set_level(None)  # FFmpeg's messages are reported here, with the file's name
    return av


def is_video(data: bytes) -> bool:
    """Return whether bytes begin as a container of videos does; HEIC and AVIF images begin as MP4 does."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") or (data[:4], data[8:12]) == (b"RIFF", b"AVI "):
        return True
    starts = (b"\x1aE\xdf\xa3", b"FLV", b"OggS", b"0&\xb2u\x8ef\xcf\x11", b"\0\0\1\xba", b"\0\0\1\xb3")
    return data.startswith(starts) or (data[:1] == b"G" and data[188:189] == b"G")  # the last: an MPEG transport stream


def is_live(source: VideoLike) -> bool:
    """Return whether a source is the address of a stream instead of a file."""
    return isinstance(source, str) and source.lower().startswith(LIVE)


@contextmanager
def open_video(source: VideoLike, num_threads: int) -> Iterator[Any]:
    """Return an open PyAV container of a file or a live stream; a context manager.

    Raises:
      BadVideo: not a readable video, or reading fails inside the block.
    """
    av = import_av()
    live = is_live(source)
    formats = {"format_whitelist": LIVE_FORMATS if live else CONTAINERS}
    try:
        if live:
            # Prefer TCP: with UDP, packets of a camera are lost on the way and in firewalls.
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
    except av.error.FFmpegError as error:  # most of its subclasses are OSErrors too
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


def find_stream(container: Any) -> Any:
    """Return the first video stream that isn't a cover picture.

    Raises:
      BadVideo: there is none.
    """
    # the cover of a song is a video stream with one picture
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        raise BadVideo("no video in it")
    return streams[0]


def read_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of a stream, at last an empty one that flushes the decoder."""
    # Where damage looks like the start of another stream, PyAV fails at the end, as it tries to flush that one too.
    with suppress(IndexError):
        yield from container.demux(stream)


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


class Decoding:
    """The frames of a stream with their times, in order; damaged ones are counted and skipped."""

    def __init__(self, container: Any, stream: Any, max_megapixels: float):
        from av.video.reformatter import VideoReformatter

        self.container, self.stream, self.max_megapixels = container, stream, max_megapixels
        self._reformatter = VideoReformatter()  # shared: its set-up takes longer than converting a small frame
        self.good, self.bad = 0, 0
        self.reason = ""
        self.last_s = 0.0

    def __iter__(self) -> Iterator[tuple[float, "av.VideoFrame"]]:
        from av.error import FFmpegError

        last_s: float | None = None
        rate = self.stream.average_rate or self.stream.guessed_rate or 25
        packets = read_packets(self.container, self.stream)
        while True:
            try:
                packet = next(packets)
                if packet.is_corrupt:
                    self.bad, self.reason = self.bad + 1, "damaged packets"
                frames = packet.decode()
            except StopIteration:
                return
            except EOFError:
                return
            except FFmpegError as error:
                self.bad, self.reason = self.bad + 1, (error.strerror or type(error).__name__).lower()
                if self.bad > 100 and self.bad > self.good:  # a demuxer that fails permanently would loop for ever
                    return
                continue
            for frame in frames:
                self.check_size(frame)
                time_s = frame.time if frame.time is not None else (0.0 if last_s is None else last_s + 1 / float(rate))
                last_s = self.last_s = time_s if last_s is None else max(last_s, time_s)
                self.good, self.bad = self.good + (not frame.is_corrupt), self.bad + frame.is_corrupt
                yield last_s, frame

    def seek(self, time_s: float) -> None:
        """Seek to the last keyframe before a time."""
        self.container.seek(int(time_s / self.stream.time_base), stream=self.stream)

    def check_size(self, frame: "av.VideoFrame") -> None:
        """Refuse frames that are too large.

        Raises:
          BadVideo: over `max_megapixels`.
        """
        if frame.width * frame.height > self.max_megapixels * 1e6:
            raise BadVideo(
                f"frames of {frame.width}x{frame.height} px, over {self.max_megapixels:g} megapixels; make it smaller"
            )

    def upright(self, frame: "av.VideoFrame") -> UInt8[np.ndarray, "h w 3"]:
        """Return a frame in RGB, rotated by the container's display matrix (PyAV gives degrees counterclockwise)."""
        image = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

    def why(self) -> str:
        """Return the last reason in brackets, as the end of a message."""
        return f" ({self.reason})" if self.reason else ""

    def damage(self) -> str | None:
        """Return a description of the damage; None: everything could be decoded.

        Raises:
          BadVideo: more than half.
        """
        if not self.bad:
            return None
        found = f"{self.bad} of {self.good + self.bad} frames are damaged{self.why()}"
        if self.good < MIN_READABLE * (self.good + self.bad):
            raise BadVideo(f"{found}; save it again")
        return found
