"""Untrimmed and odd videos: one sentence or a documented answer for each, in bounded memory."""

import re
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from clip_har_jax.data.windows import VideoFile
from clip_har_jax.pipelines.localize import sliding_windows
from clip_har_jax.video.clips import iter_frames, read_clip, video_duration
from clip_har_jax.video.decoding import BadVideo
from clip_har_jax.video.sampling import FrameSampling
from tests.support.videos import write_clip

HOURS = 10


def write_sound(path: Path) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, 1024 * i, Fraction(1, 8000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten hours at a frame each two seconds, which darken and brighten."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.gop_size = 30
        encoded: list[av.Packet] = []
        for i in range(150):
            frame = av.VideoFrame.from_ndarray(np.full((48, 32), 40 + i, np.uint8), format="yuv420p")
            frame.pts, frame.time_base = 2 * i, Fraction(1, 1)
            encoded += stream.encode(frame)
        encoded += stream.encode(None)
        for part in range(HOURS * 1800 // 150):  # encoded once, written again and again
            for packet in encoded:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                later = int(300 * part / packet.time_base)
                copy.pts, copy.dts = (packet.pts or 0) + later, (packet.dts or 0) + later
                container.mux(copy)
    return path


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    write_sound(tmp_path / "sound.m4a")
    for read in (lambda path: read_clip(path, FrameSampling(4)), video_duration, lambda path: list(iter_frames(path))):
        with pytest.raises(BadVideo, match=r"^no video in it$"):
            read(tmp_path / "sound.m4a")


def test_one_frame_is_a_clip(tmp_path: Path) -> None:
    write_clip(tmp_path / "one.mp4", count=1)
    clip = read_clip(tmp_path / "one.mp4", FrameSampling(8))
    assert len(clip.frames) == 8 and all(np.array_equal(frame, clip.frames[0]) for frame in clip.frames)
    windows = list(sliding_windows(iter_frames(tmp_path / "one.mp4"), 4))
    assert len(windows) == 1 and windows[0][1].shape == (4, *clip.frames[0].shape)


def test_a_span_of_a_clip_holds_its_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    clip = read_clip(tmp_path / "a.mp4", FrameSampling(4), span_s=(2.0, 6.0))
    assert clip.times_s == pytest.approx([2.5, 2.9, 2.9, 2.9], abs=0.01)  # the last frame stands for those behind it
    before = read_clip(tmp_path / "a.mp4", FrameSampling(2), span_s=(-2.0, 1.0))
    assert before.times_s == pytest.approx([0.0, 0.2], abs=0.06)


@pytest.mark.parametrize("where", [(0.4, 0.5), (0.7, 0.75)])
def test_damage_in_the_middle_leaves_the_rest(tmp_path: Path, where: tuple[float, float]) -> None:
    write_clip(tmp_path / "whole.ts", count=60, format="mpegts")
    data = bytearray((tmp_path / "whole.ts").read_bytes())
    first, last = (int(len(data) * share) // 188 * 188 for share in where)
    data[first:last] = np.random.default_rng(0).bytes(last - first)
    (tmp_path / "damaged.ts").write_bytes(data)
    clip = read_clip(tmp_path / "damaged.ts", FrameSampling(6))
    assert len(clip.frames) == 6 and clip.damage is not None
    assert re.fullmatch(r"(about )?\d+ of \d+ frames are damaged.*", clip.damage)
    assert np.abs(clip.frames[0].astype(int) - read_clip(tmp_path / "whole.ts", FrameSampling(6)).frames[0]).max() < 3


def test_damage_of_more_than_half_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "whole.ts", count=60, format="mpegts")
    data = bytearray((tmp_path / "whole.ts").read_bytes())
    first, last = (int(len(data) * share) // 188 * 188 for share in (0.2, 0.95))
    data[first:last] = np.random.default_rng(0).bytes(last - first)
    (tmp_path / "damaged.ts").write_bytes(data)
    with pytest.raises(BadVideo, match=r"frames are damaged or missing; save it again"):
        read_clip(tmp_path / "damaged.ts", FrameSampling(6))


def test_damage_that_looks_like_another_stream_leaves_the_rest(tmp_path: Path) -> None:
    """PyAV fails at the end of such a file, in each pass over its packets."""
    write_clip(tmp_path / "whole.ts", count=60, format="mpegts")
    data = bytearray((tmp_path / "whole.ts").read_bytes())
    rng, num_packets = np.random.default_rng(0), len(data) // 188
    for packet in range(int(0.2 * num_packets), int(0.95 * num_packets), 6):
        data[188 * packet : 188 * (packet + 1)] = rng.bytes(188)
    (tmp_path / "damaged.ts").write_bytes(data)
    clip = read_clip(tmp_path / "damaged.ts", FrameSampling(6))
    assert len(clip.frames) == 6 and clip.damage is not None and "frames are damaged or missing" in clip.damage
    with pytest.raises(BadVideo, match=r"^\d+ of \d+ frames are damaged"):  # at the end, after the frames
        list(iter_frames(tmp_path / "damaged.ts"))


def test_ten_hours_are_read_in_bounded_memory(long_video: Path) -> None:
    assert video_duration(long_video) == pytest.approx(HOURS * 3600, rel=0.01)
    tracemalloc.start()
    try:
        clip = read_clip(long_video, FrameSampling(8))
        windows = sliding_windows(VideoFile(str(long_video), 0.0, ()).frames(0.5), 8)
        count = sum(1 for _, window in windows if window.shape == (8, 32, 32, 3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert clip.times_s == pytest.approx([(i + 0.5) * HOURS * 450 for i in range(8)], abs=3)
    assert count == HOURS * 1800
    assert peak < 16e6
