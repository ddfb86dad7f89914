"""Frames at given times with the least exact decoding.

A frame depends on packets between the last keyframe and itself, and only on those that other frames refer to. So whole
intervals between wanted frames are skipped at keyframes, and frames to which no other refers (about half of x264's
H.264) are never decoded. The frames are bit-equal to those of full decoding.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_har_jax.video.decoding import BadVideo, Decoding, read_packets

CODECS = ("h264", "hevc")  # their packets show whether other frames refer to them
ROUNDING_S = 1e-3  # containers round times, some to milliseconds


@dataclass(frozen=True)
class Index:
    """The packets of a stream in decoding order.

    Attributes:
      stamps: display time of each packet's frame, in units of `unit_s`.
      is_key: whether decoding can start there.
      unit_s: seconds.
      is_whole: all packets have display times, without duplicates.
      is_damaged: the container says that a packet is damaged; others may be missing then.
    """

    stamps: tuple[int, ...]
    is_key: tuple[bool, ...]
    unit_s: float
    is_whole: bool
    is_damaged: bool = False

    @property
    def times_s(self) -> list[float]:
        """The times of the frames in display order."""
        return [stamp * self.unit_s for stamp in sorted(self.stamps)]

    @property
    def keyframes_s(self) -> list[float]:
        """The times of the keyframes in display order."""
        keys = (stamp for stamp, is_key in zip(self.stamps, self.is_key, strict=True) if is_key)
        return [stamp * self.unit_s for stamp in sorted(keys)]


def index_packets(container: Any, stream: Any) -> Index:
    """Read a stream's packets without decoding, and return to its start.

    Raises:
      BadVideo: no frames in it.
    """
    stamps, is_key, is_whole, is_damaged = [], [], True, False
    for packet in read_packets(container, stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        is_damaged = is_damaged or packet.is_corrupt
        if stamp is not None and packet.size:
            is_whole = is_whole and packet.pts is not None and not packet.is_discard
            stamps.append(int(stamp))
            is_key.append(bool(packet.is_keyframe))
    if not stamps:
        raise BadVideo("no frames in it")
    container.seek(0)
    is_whole = is_whole and len(set(stamps)) == len(stamps)
    return Index(tuple(stamps), tuple(is_key), float(stream.time_base), is_whole, is_damaged)


def count_lost(index: Index) -> int:
    """Return about how many frames a damaged stream has lost, by the gaps between its frames; at least 1.

    Without damage there are none: then gaps are those of a varying frame rate.
    """
    if not index.is_damaged:
        return 0
    steps = np.diff(np.unique(index.stamps))
    return max(1, round(float(np.maximum(steps / np.median(steps) - 1, 0).sum()))) if len(steps) else 1


def shown_at(index: Index, times_s: Sequence[float] | np.ndarray) -> list[int]:
    """Return the stamp of the frame displayed at each time, [n] seconds: the last that began by then, or the first."""
    ordered = sorted(index.stamps)
    return [ordered[max(0, bisect_right(ordered, (time_s + ROUNDING_S) / index.unit_s) - 1)] for time_s in times_s]


def needed_packets(index: Index, wanted: Collection[int]) -> list[bool]:
    """Return which packets the wanted frames can depend on: from the last keyframe before each one to itself.

    >>> index = Index((0, 3, 1, 2, 4, 6, 5), (True, False, False, False, True, False, False), 0.1, True)
    >>> needed_packets(index, {1, 5})
    [True, True, True, False, True, True, True]
    """
    position = {stamp: i for i, stamp in enumerate(index.stamps)}
    keys = sorted((index.stamps[i], i) for i, is_key in enumerate(index.is_key) if is_key)
    needed = [False] * len(index.stamps)
    for stamp in wanted:
        before = bisect_right(keys, (stamp, len(needed))) - 1
        first = keys[before][1] if before >= 0 else 0
        for i in range(min(first, position[stamp]), position[stamp] + 1):
            needed[i] = True
    return needed


def decode_selected(
    container: Any,
    stream: Any,
    index: Index,
    wanted: Collection[int],
    each: Callable[[np.ndarray], np.ndarray],
    max_megapixels: float,
) -> dict[int, np.ndarray] | None:
    """Return the wanted frames, uint8 [h, w, 3], by their stamps: rotated for display and transformed by `each`.

    None if it can't be done exactly: another codec, packets without times, or damage. The container is then at its
    start.

    Raises:
      BadVideo: the frames are too large.
    """
    from av.error import FFmpegError

    context = stream.codec_context
    if context.name not in CODECS or not index.is_whole:
        return None
    found: dict[int, np.ndarray] = {}
    decoding = Decoding(container, stream, max_megapixels)

    def take(frames: Sequence[Any]) -> bool:
        for frame in frames:
            decoding.check_size(frame)
            if frame.is_corrupt:
                return False
            if frame.pts in wanted:
                found[frame.pts] = each(decoding.upright(frame))
        return True

    try:
        is_exact = _decode(container, stream, needed_packets(index, wanted), wanted, take)
    except (FFmpegError, EOFError):
        is_exact = False
    finally:
        context.skip_frame = "DEFAULT"
    if is_exact and len(found) == len(set(wanted)):
        return found
    context.flush_buffers()
    container.seek(0)
    return None


def _decode(
    container: Any, stream: Any, needed: list[bool], wanted: Collection[int], take: Callable[[Sequence[Any]], bool]
) -> bool:
    """Decode the needed packets; return whether the frames given to `take` were undamaged."""
    context, left = stream.codec_context, sum(needed)
    is_behind_gap, position = False, 0
    for packet in read_packets(container, stream):
        if packet.pts is None or not packet.size:
            continue
        if not needed[position]:
            is_behind_gap = True
        else:
            if is_behind_gap:  # flush buffered frames before the decoder starts again
                if not take(context.decode(None)):
                    return False
                context.flush_buffers()
                is_behind_gap = False
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            if packet.is_corrupt or not take(packet.decode()):
                return False
            left -= 1
        position += 1
        if not left:
            break
    return take(context.decode(None))
