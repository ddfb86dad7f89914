"""Small videos for tests."""

import io
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(target: str, format: str | None = None, seconds: float = 2.0, realtime: bool = False) -> None:
    """Write a moving square, 64 x 48 px at 10 frames a second, in MPEG-4; `realtime`: paced, for an address."""
    with av.open(target, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for i in range(int(10 * seconds)):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[10:30, i % 40 : i % 40 + 20] = 200
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
            if realtime:
                time.sleep(0.03)
        for packet in stream.encode():
            container.mux(packet)


SIZE = (64, 48)  # width, height


def level(i: int, count: int) -> int:
    return 40 + 160 * i // max(count - 1, 1)


def write_clip(
    path: Path | io.BytesIO,
    count: int = 30,
    rate: int = 10,
    codec: str = "libx264",
    rotation: int = 0,
    times: list[float] | None = None,
    format: str | None = None,
    backwards: bool = False,
) -> None:
    """Frames whose grey level tells their number; the left half of each is darker by 30."""
    with av.open(path, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 8
        if rotation:
            stream.set_display_rotation(rotation)
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            image = np.full((SIZE[1], SIZE[0], 3), level(count - 1 - i if backwards else i, count), np.uint8)
            image[:, : SIZE[0] // 2] -= 30
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (times[i] if times else i / rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
