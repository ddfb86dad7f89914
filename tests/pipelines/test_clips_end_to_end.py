"""A model of clips from training to a stream: trained, evaluated, exported, served over HTTP, streamed."""

import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from websockets.sync.client import connect

from clip_har_jax import Predictor
from clip_har_jax.config import make_config
from clip_har_jax.pipelines.evaluate import evaluate_model
from clip_har_jax.trainer.train import train
from clip_har_jax.video.clips import iter_frames
from export.run import ExportOptions, export_model
from tests.support.serving_setup import running
from tests.support.videos import write_clip

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # jax2onnx warns of its own dependencies
SPLITS = {"train": 24, "test": 8}
NUM_FRAMES, RATE_HZ = 4, 10
KINDS = ("head", "divided")  # frames encoded apart; a tower that looks over the frames


def write_clips(root: Path) -> None:
    """Clips that brighten and clips that darken: only the order of the frames tells which."""
    for split, count in SPLITS.items():
        for label in ("brightening", "darkening"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                write_clip(root / split / label / f"{i}.mp4", 12 + i, RATE_HZ, backwards=label == "darkening")


def frames_of(clip: Path) -> list[bytes]:
    """Return the frames of a clip as PNG files."""
    files = []
    for frame in iter_frames(clip):
        Image.fromarray(frame.image).save(file := io.BytesIO(), format="png")
        files.append(file.getvalue())
    return files


def first_answer(client: httpx.Client, clip: Path, count: int) -> dict[str, Any]:
    """Return the answer for the first window of a stream, as long as the clip of `count` frames."""
    window_s = count / RATE_HZ
    query = httpx.QueryParams({"window_s": window_s, "hop_s": window_s})
    with connect(f"ws://127.0.0.1:{client.base_url.port}/v1/stream?{query}", proxy=None) as socket:
        for file in (files := frames_of(clip)) + files[-1:] * RATE_HZ:
            socket.send(file)
            time.sleep(1 / RATE_HZ)
        while (message := json.loads(socket.recv(timeout=20)))["type"] != "frame":
            pass
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_from_clips_to_a_stream(tmp_path: Path, kind: str) -> None:
    write_clips(tmp_path / "clips")
    config = make_config(
        {
            "data": {
                "train": f"video:{tmp_path / 'clips' / 'train'}",
                "val": f"video:{tmp_path / 'clips' / 'test'}",
                "augment": {"crop_scale_min": 1.0},
                "video": {"num_frames": NUM_FRAMES},
            },
            "model": {"name": "mini", "temporal": kind},
            "train": {"num_steps": 60, "global_batch_size": 16},
            "optim": {"name": "muon", "learning_rate": 5e-3},
            "eval": {"every_steps": 60, "batch_size": 8},
        }
    )
    train(config, tmp_path / "run", quiet=True)
    model, export = tmp_path / "run" / "model", tmp_path / "export"
    spec = f"video:{tmp_path / 'clips' / 'test'}"
    assert evaluate_model(str(model), spec, tmp_path / "test").metrics["top1"] == 1.0
    parity = export_model(str(model), ["onnx"], export, ExportOptions(data=spec, num_examples=32))
    assert parity["onnx"]["passed"], parity

    clips = [tmp_path / "clips" / "test" / label / "3.mp4" for label in ("brightening", "darkening")]
    ours = Predictor(model).predict(clips)
    assert [one.label for one in ours] == ["brightening", "darkening"]
    with running(export, stream_budget_s=20, video_timeout_s=30) as (client, _):
        for clip, mine in zip(clips, ours, strict=True):
            answer = client.post("/v1/predict", content=clip.read_bytes()).raise_for_status().json()
            top = {one["label"]: one["score"] for one in answer["top"]}
            assert top == pytest.approx(dict(mine.top), abs=1e-4)
            assert first_answer(client, clip, count=15)["top"][0]["label"] == mine.label
