"""Decoding of images in separate processes, so that no image can stop the service."""

import asyncio
import base64
import io
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np
from loky import ProcessPoolExecutor
from PIL import Image

from clip_har_jax import heatmap
from clip_har_jax.image_files import BadImage, decode
from clip_har_jax.image_formats import format_titles, readable_formats, sniff
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.processes import Lifeline, follow_parent, make_pool
from clip_har_jax.video.decoding import is_video
from serving.problems import Problem
from serving.telemetry import Metrics, log

T = TypeVar("T")
EMA_WEIGHT = 0.1


def check_image(data: bytes) -> bytes:
    """Refuse data that can't be an image before it is sent to a decoding process.

    Raises:
      Problem: empty, or an unsupported format.
    """
    if not data:
        raise Problem("empty_body", f"no bytes came; send an image ({format_titles()})")
    found = sniff(data)
    if found is None:
        raise Problem("unsupported_media_type", f"{_guess(data)}; taken are {format_titles()}")
    if found not in readable_formats():
        raise Problem("unsupported_media_type", f"{found.title} isn't read here; send {format_titles()}")
    return data


def _guess(data: bytes) -> str:
    """Return a guess what the data is, and what to do about it."""
    start = data[:200].lstrip()
    if start.startswith(b"data:") or sniff(decode_base64(data[:64].decode("latin-1"), strict=False)) is not None:
        return "the image is base64 text; send the bytes of the file"
    if is_video(data):
        return "this is a video; /v1/predict and /v1/videos take those"
    if start.startswith((b"{", b"[")):
        return "this is JSON; send the bytes of the file, or a form with the file in the field 'image'"
    if start.startswith((b"image=", b"file=")):
        return "this is a form without a file; with curl write -F image=@FILE or --data-binary @FILE"
    return "not an image by its first bytes"


def decode_base64(text: str, strict: bool = True) -> bytes:
    """Return the bytes of a base64 text: standard or URL-safe, wrapped or not, padded or not, with or without `data:`.

    Args:
      text: it.
      strict: False: return no bytes for text that isn't base64.

    Raises:
      ValueError: not base64.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a data: address without ;base64")
    plain = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError:
        if strict:
            raise
        return b""


def _decode(data: bytes, preprocess: Preprocess, max_megapixels: float) -> np.ndarray:
    return evaluation_transform(decode(data, max_megapixels), preprocess)


def _warm() -> None:
    """Decode an image of each common format, so that the first request isn't slower than others."""
    for name in ("JPEG", "PNG", "WEBP"):  # the common formats
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30)).save(buffer, name)
        _decode(buffer.getvalue(), Preprocess(32), 1.0)
    time.sleep(0.05)  # gives each process one of the calls


def draw_heat_map(pixels: np.ndarray, heat: np.ndarray) -> bytes:
    """Return a PNG of an image, uint8 [h, w, 3], with its heat map, [g, g]: dark where it is 0, reddish at 1."""
    buffer = io.BytesIO()
    Image.fromarray(heatmap.overlay(pixels, heat)).save(buffer, "PNG")
    return buffer.getvalue()


class Decoder:
    """A pool of decoding processes; one that dies is replaced and its image is tried once more.

    Args:
      processes: their number.
      max_megapixels: larger images are refused by their header.
      metrics: counts times.

    Attributes:
      seconds_per_image: moving average.
    """

    def __init__(self, processes: int, max_megapixels: float, metrics: Metrics):
        self._processes, self._max_megapixels, self._metrics = processes, max_megapixels, metrics
        self._waiting, self.seconds_per_image, self._last_end = 0, 0.0, 0.0
        self._lifeline = Lifeline()
        self._pool = self._make_pool()

    @property
    def estimated_wait_s(self) -> float:
        """Return the estimated time until the waiting images are decoded."""
        return self._waiting * self.seconds_per_image

    def _make_pool(self) -> ProcessPoolExecutor:
        return make_pool(self._processes, follow_parent, self._lifeline)

    async def warm(self) -> None:
        """Wait until the processes have started."""
        tasks = (self._submit(_warm) for _ in range(self._processes))
        await asyncio.gather(*tasks)

    async def decode(self, data: bytes, preprocess: Preprocess, deadline: float) -> np.ndarray:
        """Return one image as the model takes it, uint8 [size, size, 3].

        Raises:
          Problem: not a readable image, an image that kills its decoding process, or the deadline passed.
        """
        check_image(data)
        start = time.perf_counter()
        self._waiting += 1
        try:
            pixels = await self.run(deadline, _decode, data, preprocess, self._max_megapixels)
            self._observe(start)
        except BadImage as error:
            self._observe(start)
            raise Problem("bad_image", str(error)) from error
        finally:
            self._waiting -= 1
        return pixels

    def _observe(self, start: float) -> None:
        """Update the mean time per image. Decodings overlap in several processes, so time counts from the last end."""
        end = time.perf_counter()
        self.seconds_per_image += EMA_WEIGHT * (end - max(start, self._last_end) - self.seconds_per_image)
        self._last_end = end
        self._metrics.decode_seconds.observe(end - start)

    async def run(self, deadline: float, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of `function`, called in a decoding process.

        Raises:
          Problem: the process died, and so did its replacement; or the deadline passed.
        """
        for attempt in (1, 2):
            try:
                async with asyncio.timeout_at(deadline):  # a call that hasn't started is removed from the pool
                    return await self._submit(function, *arguments)
            except TimeoutError as error:
                raise Problem("deadline", "not decoded in the time allowed; send less, or allow more") from error
            except BrokenProcessPool:
                log.error("a decoding process died", extra={"fields": {"attempt": attempt}})
        raise Problem("not_ready", "the decoder had to be restarted; try again", retry_after_s=1)

    async def _submit(self, function: Callable[..., T], *arguments: Any) -> T:
        pool = self._pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
        except BrokenProcessPool:
            if self._pool is pool:  # the first of the waiting calls that notices it
                self._pool = self._make_pool()
                self._metrics.decoder_restarts.inc()
                pool.shutdown(wait=False)
            raise

    def close(self) -> None:
        """Stop the processes, even at work: nobody waits for them."""
        self._pool.shutdown(kill_workers=True)
        self._lifeline.close()
