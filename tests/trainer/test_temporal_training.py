"""A temporal model trained from an image model: WiSE-FT between the two, and the folder that keeps it."""

import json
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.config import make_config
from clip_har_jax.data.sources import has_clips, make_source
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.models.factory import load
from clip_har_jax.models.params import make_model
from clip_har_jax.models.pretrained import read_config, read_params
from clip_har_jax.models.temporal import is_temporal
from clip_har_jax.trainer import features
from clip_har_jax.trainer.retention import interpolate
from clip_har_jax.trainer.train import train
from tests.support.model_folders import write_model
from tests.support.videos import write_clip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Clips of two classes, an image model, and what training made of it."""
    root = tmp_path_factory.mktemp("temporal")
    for label in ("jump", "wave"):
        (root / "clips" / label).mkdir(parents=True)
        for i in range(4):
            write_clip(root / "clips" / label / f"{i}.mp4", count=10 + i)
    config = make_config(
        {
            "data": {"train": f"video:{root / 'clips'}", "val_fraction": 0.25, "video": {"num_frames": 3}},
            "model": {"name": str(write_model(root / "start")), "temporal": "divided"},
            "method": {"wise_ft": (0.0, 0.5)},
            "train": {"num_steps": 3, "global_batch_size": 8},
            "optim": {"learning_rate": 1e-3},
            "eval": {"every_steps": 3, "batch_size": 8},
        }
    )
    result = train(config, root / "run", quiet=True)
    return root, result


@pytest.mark.slow
def test_wise_ft_goes_from_the_image_model_to_the_video_model(trained):
    root, result = trained
    curve = json.loads((root / "run" / "wise_ft.json").read_text())["curve"]
    assert [point["alpha"] for point in curve] == [0.0, 0.5, 1.0]
    config = read_config(root / "run" / "model")
    assert config.temporal == "divided" and result.model is not None
    image = load(str(root / "start")).model
    end = read_params(root / "run" / "model", config)
    start = {**end, **read_params(root / "start", read_config(root / "start"))}
    start |= {name: np.zeros_like(value) for name, value in end.items() if is_temporal(name)}
    clips = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32, 32, 3)), jnp.float32)
    expected = image.encode_image(clips)
    np.testing.assert_allclose(
        make_model(config, interpolate(start, end, 0.0)).encode_image(clips), expected, atol=1e-6
    )
    middle = make_model(config, interpolate(start, end, 0.5)).encode_image(clips)
    assert np.abs(middle - expected).max() > 0


def test_the_folder_answers_clips(trained):
    root, _ = trained
    backend = JaxBackend(root / "run" / "model", batch_size=2)
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(backend.predict(clips).sum(axis=1), 1, atol=1e-5)


def test_data_that_hold_clips(tmp_path):
    (tmp_path / "timed.csv").write_text("filename,start_s,end_s,label\n")
    (tmp_path / "plain.csv").write_text("filename,label\n")
    assert has_clips(f"csv:{tmp_path / 'timed.csv'}") and has_clips("motion?untrimmed")
    assert not has_clips(f"csv:{tmp_path / 'plain.csv'}") and not has_clips(f"csv:{tmp_path / 'missing.csv'}")


def test_stored_features_of_windows_depend_on_their_times(tmp_path, monkeypatch):
    write_clip(tmp_path / "long.mp4", count=40)
    read, read_file = Counter[str](), features.sha256_file
    monkeypatch.setattr(features, "sha256_file", lambda path: read.update([path]) or read_file(path))

    def digest(end_s):
        table = tmp_path / "times.csv"
        table.write_text(f"filename,start_s,end_s,label\nlong.mp4,0,{end_s},jump\n")
        source = make_source(f"csv:{table}?window_s=1", "train")
        assert [source.labels[i] for i in source.label_ids] == ["jump"] * 4 + ["background"] * 4
        return features.examples_digest(source)

    assert digest(2.0) == digest(2.0) != digest(2.1)
    assert list(read.values()) == [3]  # each source reads its video once
