"""Frames of a video at given times."""

import io

import av
from PIL import Image


def frame_at(content: bytes, time_s: float) -> Image.Image | None:
    """Return the picture shown at a time; None if the video can't be decoded."""
    try:
        with av.open(io.BytesIO(content), "r") as container:
            stream = container.streams.video[0]
            if stream.time_base is None:
                return None
            container.seek(int(time_s / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= time_s - 0.05:
                    return frame.to_image()
    except (av.FFmpegError, IndexError, ValueError, OSError):
        return None
    return None


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds."""
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"
