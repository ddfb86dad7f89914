"""Selective decoding: bit-equal to decoding all, whatever the codec, with fewer frames decoded."""

from pathlib import Path

import av
import numpy as np
import pytest

from clip_har_jax.video import clips, selective
from clip_har_jax.video.clips import read_clip, read_views
from clip_har_jax.video.sampling import FrameSampling
from clip_har_jax.video.selective import Index, decode_selected, index_packets, needed_packets, shown_at

KINDS = {
    "h264": ("libx264", {}, 12),
    "h264_open_gop": ("libx264", {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}, 12),
    "h264_no_b": ("libx264", {"bf": "0"}, 250),
    "hevc": ("libx265", {"x265-params": "log-level=none"}, 12),
    "mpeg4": ("mpeg4", {"bf": "2"}, 12),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, 12),
}


def write(path: Path, kind: str, count: int = 60, times: list[float] | None = None) -> None:
    """Write a moving pattern, so that frames refer to one another."""
    codec, options, gop = KINDS[kind]
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=20, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.gop_size = gop
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[i : i + 64, 2 * i % 90 : 2 * i % 90 + 96]))
            frame.pts = i if times is None else round(times[i] * 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("codecs")
    for kind in KINDS:
        write(root / f"{kind}.{'webm' if kind == 'vp9' else 'mp4'}", kind)
    return {path.stem: path for path in root.iterdir()}


def decode_all(path: Path) -> dict[float, np.ndarray]:
    with av.open(path) as container:
        return {frame.time: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}


@pytest.mark.parametrize("sampling", [FrameSampling(1), FrameSampling(8), FrameSampling(4, "dense", 7.0, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_all(written, kind, sampling):
    everything = decode_all(written[kind])
    start_s = min(everything)
    for view in range(sampling.num_views):
        read = read_clip(written[kind], sampling, view)
        assert read.damage is None
        for time_s, image in zip(read.times_s, read.frames, strict=True):
            nearest = min(everything, key=lambda one: abs(one - start_s - time_s))
            assert nearest - start_s == pytest.approx(time_s, abs=1e-3)
            np.testing.assert_array_equal(image, everything[nearest])


@pytest.mark.parametrize("kind", ["h264", "h264_open_gop", "h264_no_b", "hevc"])
def test_every_single_frame_can_be_had(written, kind):
    everything = decode_all(written[kind])
    with av.open(written[kind]) as container:
        stream = container.streams.video[0]
        index = index_packets(container, stream)
        for stamp in sorted(index.stamps)[::7]:
            found = decode_selected(container, stream, index, {stamp}, lambda image: image, 1.0)
            assert found is not None
            wanted = min(everything, key=lambda time_s: abs(time_s - stamp * index.unit_s))
            np.testing.assert_array_equal(found[stamp], everything[wanted])
            container.seek(0)
            stream.codec_context.flush_buffers()


def test_fewer_packets_are_decoded(written, monkeypatch):
    plans = []

    def noting(index, wanted):
        plans.append(needed_packets(index, wanted))
        return plans[-1]

    monkeypatch.setattr(selective, "needed_packets", noting)
    read_clip(written["h264"], FrameSampling(2))
    assert len(plans) == 1 and sum(plans[0]) < len(plans[0]) / 2


def test_views_share_one_pass(written, monkeypatch):
    opened: list[int] = []
    real = clips.open_video

    def counted(*rest):
        opened.append(1)
        return real(*rest)

    monkeypatch.setattr(clips, "open_video", counted)
    sampling = FrameSampling(3, num_views=3)
    together = read_views(written["h264"], sampling, range(3))
    assert len(opened) == 1
    for view, clip in enumerate(together):
        alone = read_clip(written["h264"], sampling, view)
        assert alone.times_s == clip.times_s
        np.testing.assert_array_equal(np.stack(alone.frames), np.stack(clip.frames))


def test_the_frame_that_is_shown_at_a_time():
    index = Index((0, 300, 100, 200, 400), (True, False, False, False, True), 0.01, True)
    assert shown_at(index, [-1.0, 0.0, 0.9995, 1.5, 9.0]) == [0, 0, 100, 100, 400]
    assert needed_packets(index, {200}) == [True, True, True, True, False]
    assert needed_packets(index, {400}) == [False, False, False, False, True]
    assert index.times_s == [0.0, 1.0, 2.0, 3.0, 4.0] and index.keyframes_s == [0.0, 4.0]


def test_damage_is_read_by_decoding_all(written, tmp_path):
    """A damaged reference can't be passed over: what is left is decoded as before, and told."""
    data = bytearray(written["h264"].read_bytes())
    middle = data.index(b"mdat") + 4000
    data[middle : middle + 2500] = bytes(2500)
    (tmp_path / "damaged.mp4").write_bytes(data)
    read = read_clip(tmp_path / "damaged.mp4", FrameSampling(8))
    assert len(read.frames) == 8 and "damaged" in str(read.damage)
