"""Small videos for tests."""

import time

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
