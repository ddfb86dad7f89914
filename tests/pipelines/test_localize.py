"""Untrimmed videos through a model: windows about each frame, thresholds, files, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_har_jax.data.windows import VideoFile
from clip_har_jax.errors import UserError
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.pipelines.localize import follow, list_videos, localize, sliding_windows
from tests.support.model_folders import write_model
from tests.support.videos import write_clip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model and two annotated videos, in two tables."""
    root = tmp_path_factory.mktemp("localize")
    for name in ("a", "b"):
        write_clip(root / f"{name}.mp4")
        (root / f"{name}.csv").write_text(
            f"filename,start_s,end_s,label\n{name}.mp4,0.5,1.5,jump\n{name}.mp4,1,2.5,wave\n"
        )
    return write_model(root / "model", ("background", "jump", "wave")), root


@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_the_window_about_a_frame(num_frames):
    frames = [(i / 2, np.array([10 * i])) for i in range(6)]
    found = list(sliding_windows(frames, num_frames))
    assert [time_s for time_s, _ in found] == [i / 2 for i in range(6)]
    before = (num_frames - 1) // 2
    for i, (_, window) in enumerate(found):
        expected = np.clip(np.arange(i - before, i - before + num_frames), 0, 5) * 10
        assert window[:, 0].tolist() == expected.tolist()
    assert list(sliding_windows([], num_frames)) == []


def test_a_video_is_followed_at_its_middles(start):
    model, root = start
    backend = JaxBackend(model, batch_size=4)
    track = follow(backend, VideoFile(str(root / "a.mp4"), 3.0, ()), window_s=2.0)
    np.testing.assert_allclose(np.diff(track.times_s), 0.25, atol=0.06)
    assert track.probs.shape == (12, 3) and track.embeddings.shape == (12, 16)
    np.testing.assert_allclose(track.probs.sum(axis=1), 1, atol=1e-5)


def test_each_frame_is_encoded_once_and_the_answers_are_those_of_whole_windows(start, monkeypatch):
    model, root = start
    backend, video = JaxBackend(model, batch_size=5), VideoFile(str(root / "a.mp4"), 3.0, ())
    encoded: list[int] = []
    embed = backend.embed_frames

    def counted(images):
        encoded.append(len(images))
        return embed(images)

    monkeypatch.setattr(backend, "embed_frames", counted)
    ours = follow(backend, video, window_s=2.0)
    assert sum(encoded) == len(ours.times_s) == 12
    monkeypatch.setitem(backend.__dict__, "takes_frames", False)  # as a model whose tower looks over the frames
    whole = follow(backend, video, window_s=2.0)
    assert sum(encoded) == 12
    np.testing.assert_allclose(ours.probs, whole.probs, atol=1e-5)
    np.testing.assert_allclose(ours.embeddings, whole.embeddings, atol=1e-5)


def test_localize_writes_what_it_found(start, tmp_path):
    model, root = start
    command = [sys.executable, "scripts/localize.py", f"--model={model}", f"--data=video:{root / 'a.csv'}"]
    command += [f"--val=video:{root / 'b.csv'}", f"--train=video:{root / 'b.csv'}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "localisation.json").read_text())
    assert result["num_videos"] == 1 and set(result["localisers"]) == {"hysteresis", "boundaries"}
    assert result["chosen"] == max(result["val_mean_map"], key=result["val_mean_map"].get)
    for name in ("segments.json", "timeline.png", "boundaries.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size
    assert "mAP" in done.stdout and "thresholds" in done.stdout


def test_videos_that_judge_fit_nothing(start, tmp_path):
    model, root = start
    with pytest.raises(UserError, match="name the same videos"):
        localize(str(model), f"video:{root / 'a.csv'}", tmp_path / "out", val=f"csv:{root / 'a.csv'}")


def test_a_video_that_cannot_be_read_is_named(start, tmp_path):
    model, root = start
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "bad.csv").write_text("filename,start_s,end_s,label\nbad.mp4,0,1,jump\n")
    with pytest.raises(UserError, match=r"bad\.mp4: not a video that FFmpeg can read"):
        localize(str(model), f"video:{tmp_path / 'bad.csv'}", tmp_path / "out", val=f"csv:{root / 'a.csv'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["synthetic", "motion", "folder:photos"])
def test_data_without_times_is_refused(spec):
    with pytest.raises(UserError, match="annotations with times are needed"):
        list_videos(spec, "test", "--data")


def test_the_embedded_set_is_listed():
    assert len(list_videos("motion?untrimmed", "val", "--val")) == 48
