"""Videos: the frames that are asked for, at the times they are shown, upright; damage told and no more lost than it."""

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_har_jax.video.clips import TimedFrame, iter_frames, read_clip
from clip_har_jax.video.decoding import BadVideo, Decoding, find_stream
from clip_har_jax.video.sampling import FrameSampling, sample_times
from tests.support.videos import SIZE, level, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path)
    return path


def numbers(frames: tuple[np.ndarray, ...], count: int) -> list[int]:
    """Return the frames' numbers, read off their right halves."""
    levels = np.array([level(i, count) for i in range(count)])
    return [int(np.abs(levels - frame[:, -SIZE[0] // 4 :].mean()).argmin()) for frame in frames]


@pytest.mark.parametrize("sampling", [FrameSampling(5), FrameSampling(5, "tsn"), FrameSampling(4, "dense", 2.0)])
@pytest.mark.parametrize("view", [0, 1])
def test_frames_are_those_shown_at_the_sampled_times(clip: Path, sampling: FrameSampling, view: int) -> None:
    sampling = FrameSampling(sampling.num_frames, sampling.method, sampling.rate_hz, 2)
    read = read_clip(clip, sampling, view)
    assert read.duration_s == pytest.approx(3.0)
    assert read.damage is None
    expected = [int(time_s * 10 + 1e-9) for time_s in sample_times(3.0, sampling, view)]
    assert numbers(read.frames, 30) == expected
    assert read.times_s == pytest.approx([i / 10 for i in expected], abs=2e-3)


def test_uniform_sampling_takes_the_middles_whatever_the_rate(tmp_path: Path) -> None:
    for rate in (5, 25):
        write_clip(tmp_path / f"{rate}.mp4", count=4 * rate, rate=rate)
        times = read_clip(tmp_path / f"{rate}.mp4", FrameSampling(4)).times_s
        assert times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.5 / rate + 0.1)
    assert sample_times(8.0, FrameSampling(4)).tolist() == [1.0, 3.0, 5.0, 7.0]


def test_varying_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    times = [0.1 * i for i in range(10)] + [1.0 + 1.0 * i for i in range(9)]  # most frames in the first second
    write_clip(tmp_path / "vfr.mp4", count=19, times=times)
    read = read_clip(tmp_path / "vfr.mp4", FrameSampling(9))
    assert sum(time_s >= 1.0 for time_s in read.times_s) == 8


def test_sparse_frames_of_a_long_clip_are_sought(tmp_path: Path) -> None:
    write_clip(tmp_path / "long.mp4", count=80, rate=2)
    for sampling in (FrameSampling(3), FrameSampling(2, "dense", 0.05)):
        expected = [int(time_s * 2 + 1e-9) for time_s in sample_times(40.0, sampling)]
        read = read_clip(tmp_path / "long.mp4", sampling)
        assert numbers(read.frames, 80) == pytest.approx(expected, abs=1)  # grey levels lie 2 apart, and are compressed
        assert [round(time_s * 2) for time_s in read.times_s] == expected


@given(
    st.floats(0.01, 1e4),
    st.sampled_from(["uniform", "dense", "tsn"]),
    st.integers(1, 40),
    st.integers(1, 5),
    st.none() | st.integers(0, 9),
)
def test_times_never_decrease_and_lie_in_the_clip(
    duration_s: float, method: str, count: int, views: int, seed: int | None
) -> None:
    sampling = FrameSampling(count, method, 4.0, views)
    for view in range(views):
        rng = None if seed is None else np.random.default_rng(seed)
        times = sample_times(duration_s, sampling, view, rng)
        assert len(times) == count
        assert (np.diff(times) >= 0).all()
        assert times[0] >= 0
        if method != "dense" or duration_s > count / 4.0:
            assert times[-1] <= duration_s
    if seed is not None and method != "uniform":
        again, other = (sample_times(duration_s, sampling, 0, np.random.default_rng(s)) for s in (seed, seed + 1))
        assert method == "dense" or (again != other).any()


def test_clip_shorter_than_the_sample_repeats_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "short.mp4", count=2)
    for method in ("uniform", "dense", "tsn"):
        read = read_clip(tmp_path / "short.mp4", FrameSampling(6, method), rng=np.random.default_rng(0))
        assert len(read.frames) == 6
        assert read.times_s[-1] <= read.duration_s
    write_clip(tmp_path / "one.mp4", count=1)
    assert len(read_clip(tmp_path / "one.mp4", FrameSampling(3)).frames) == 3


@pytest.mark.parametrize(("rotation", "dark"), [(90, "bottom"), (-90, "top"), (180, "right")])
def test_clips_are_turned_upright(tmp_path: Path, rotation: int, dark: str) -> None:
    write_clip(tmp_path / "turned.mp4", rotation=rotation)
    (frame,) = read_clip(tmp_path / "turned.mp4", FrameSampling(1)).frames
    assert frame.shape[:2] == (SIZE if rotation % 180 else SIZE[::-1])
    halves = np.array_split(frame.astype(float), 2, axis=1 if dark == "right" else 0)
    assert (halves[1].mean() < halves[0].mean()) == (dark in ("bottom", "right"))


def test_frames_of_any_size_and_format_are_as_each_converted_alone(clip: Path) -> None:
    """A stream may change both, and all frames of a pass share one converter."""
    pixels = np.random.default_rng(0)
    with av.open(clip) as container:
        decoding = Decoding(container, find_stream(container), 1.0)
        for width, height, name in ((64, 48, "yuv420p"), (161, 91, "yuv420p"), (64, 48, "yuvj422p"), (64, 48, "rgb24")):
            image = pixels.integers(0, 256, (height, width, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=name)
            assert np.array_equal(decoding.upright(frame), frame.to_ndarray(format="rgb24"))


def test_other_containers_and_open_files(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.avi", codec="mpeg4")
    write_clip(buffer := io.BytesIO(), format="matroska")
    for source in (tmp_path / "clip.avi", io.BytesIO(buffer.getvalue())):
        assert numbers(read_clip(source, FrameSampling(3)).frames, 30) == [5, 15, 25]


def test_streaming_gives_every_frame_or_as_many_as_asked(clip: Path) -> None:
    frames = list(iter_frames(clip))
    assert [frame.time_s for frame in frames] == pytest.approx([i / 10 for i in range(30)])
    assert numbers(tuple(frame.image for frame in frames), 30) == list(range(30))
    slow = [frame.time_s for frame in iter_frames(clip, rate_hz=2.0)]
    assert slow == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert len(list(iter_frames(clip, rate_hz=1000.0))) == 30


def damaged(path: Path, change: Callable[[bytearray], bytearray]) -> Path:
    other = path.with_name("damaged" + path.suffix)
    other.write_bytes(change(bytearray(path.read_bytes())))
    return other


def reason(path: Path) -> str:
    with pytest.raises(BadVideo) as info:
        read_clip(path, FrameSampling(3))
    with pytest.raises(BadVideo):
        list(iter_frames(path))
    assert "\n" not in str(info.value)
    return str(info.value)


def test_what_is_no_video_is_said(tmp_path: Path, clip: Path) -> None:
    for name, data, said in (
        ("empty.mp4", b"", "empty file"),
        ("text.mp4", b"not a video at all" * 50, "not a video"),
        ("cut.mp4", clip.read_bytes()[:200], "not a video"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n" + str(clip).encode(), "not a video"),
    ):
        (tmp_path / name).write_bytes(data)
        assert said in reason(tmp_path / name)
    assert "can't be read" in reason(tmp_path / "none.mp4")
    with av.open(tmp_path / "song.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "no video" in reason(tmp_path / "song.mp4")
    with pytest.raises(BadVideo, match="megapixels"):
        read_clip(clip, FrameSampling(3), max_megapixels=1e-3)


def test_broken_stream_gives_what_can_be_read_and_says_so(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.avi", count=60, codec="mjpeg")

    def spoil(data: bytearray) -> bytearray:
        chunks = [i for i in range(len(data) - 8) if data[i : i + 4] == b"00dc" and data[i + 5] and i < 0.9 * len(data)]
        for start in chunks[10:15]:
            size = int.from_bytes(data[start + 4 : start + 8], "little")
            data[start + 8 : start + 8 + size] = bytes(size)
        return data

    read = read_clip(damaged(tmp_path / "clip.avi", spoil), FrameSampling(60))
    assert read.damage is not None
    assert "frames are damaged" in read.damage
    assert len(read.frames) == 60
    seen: list[TimedFrame] = []
    with pytest.raises(BadVideo, match="damaged"):
        seen.extend(iter_frames(tmp_path / "damaged.avi"))
    assert len(seen) == 55


def test_stream_that_breaks_off_is_told(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mkv", count=100)
    fast = {"movflags": "faststart"}  # what describes the stream comes before it, so that the rest can be cut off
    with av.open(tmp_path / "clip.mp4", "w", options=fast) as out, av.open(tmp_path / "clip.mkv") as container:
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    read = read_clip(damaged(tmp_path / "clip.mp4", lambda data: data[: int(0.7 * len(data))]), FrameSampling(4))
    assert len(read.frames) == 4
    assert read.damage is not None
