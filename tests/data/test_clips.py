"""Clips as data: the layouts that are recognised, batches of frames, and a model that is trained on them and tells."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax import bundle
from clip_har_jax.batch import Batch
from clip_har_jax.caches import cache_folder
from clip_har_jax.config import DataConfig, VideoConfig, make_config
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.pipeline import eval_batches, train_batches
from clip_har_jax.data.sources import ClipFile, Source, SubsetSource, make_source
from clip_har_jax.errors import UserError
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.predictor import Predictor, list_inputs
from clip_har_jax.models.head_file import read_head
from clip_har_jax.models.heads import Features, head_logits, init_head
from clip_har_jax.pipelines.evaluate import evaluate_model, frames_add
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.trainer.train import train
from clip_har_jax.video.clips import read_clip
from clip_har_jax.video.sampling import FrameSampling
from tests.support.model_folders import write_model
from tests.support.videos import write_clip

LABELS = ("jump", "wave")
PREPROCESS = Preprocess(16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, count=20)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """Four clips of each class; one more without frames."""
    root = tmp_path_factory.mktemp("clips")
    for k, label in enumerate(LABELS):
        (root / label).mkdir()
        for i in range(4):
            write_clip(root / label / f"{i}.mp4", count=6 + 5 * i + k)
    (root / "wave" / "5.mp4").write_bytes(b"")
    return root


def refused(spec: str, split: str = "train") -> str:
    with pytest.raises(UserError) as info:
        make_source(spec, split)
    assert "\n" not in str(info.value)
    return str(info.value)


def names(spec: str, split: str) -> list[str]:
    source = make_source(spec, split)
    assert all(source.labels[i] == Path(source[k].name).parent.name for k, i in enumerate(source.label_ids))
    return sorted(Path(source[k].name).name for k in range(len(source)))


def test_folder_of_clips(clips: Path) -> None:
    source = make_source(f"video:{clips}", "train")
    assert source.labels == LABELS
    assert len(source) == 9
    assert source[0].data == ClipFile(str(clips / "jump" / "0.mp4"))
    assert source.clips and SubsetSource(source, np.arange(2)).clips
    assert not make_source("synthetic", "test").clips
    assert "has no folds" in refused(f"video:{clips}?fold=2")
    assert "no class folders" in refused(f"video:{clips}/jump")


def write_ucf(root: Path, inside: str, clip: Path) -> None:
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    for label in LABELS:
        (root / inside / label).mkdir(parents=True)
        for group in (1, 2, 3):
            shutil.copy(clip, root / inside / label / f"v_{label}_g0{group}_c01.avi")
    for fold in (1, 2, 3):
        test = [f"{label}/v_{label}_g0{fold}_c01.avi" for label in LABELS]
        rest = [
            (i, f"{label}/v_{label}_g0{g}_c01.avi") for i, label in enumerate(LABELS, 1) for g in (1, 2, 3) if g != fold
        ]
        (lists / f"testlist0{fold}.txt").write_text("\n".join(test) + "\n")
        (lists / f"trainlist0{fold}.txt").write_text("\r\n".join(f"{name} {i}" for i, name in rest))


@pytest.mark.parametrize("inside", [".", "UCF-101"])
def test_ucf101_and_its_official_splits(tmp_path: Path, clip: Path, inside: str) -> None:
    write_ucf(tmp_path / "ucf", inside, clip)
    for place in {tmp_path / "ucf", tmp_path / "ucf" / inside}:
        assert names(f"video:{place}", "test") == ["v_jump_g01_c01.avi", "v_wave_g01_c01.avi"]
        assert names(f"video:{place}?fold=2", "val") == ["v_jump_g02_c01.avi", "v_wave_g02_c01.avi"]
        assert len(names(f"video:{place}?fold=3", "train")) == 4
        assert make_source(f"video:{place}", "train").tally.to_json()["kept"] == 4
    assert "official ones are 1, 2 and 3" in refused(f"video:{tmp_path}/ucf?fold=4")
    (tmp_path / "ucf" / inside / "jump" / "v_jump_g02_c01.avi").unlink()
    assert "1 of the 4 clips" in refused(f"video:{tmp_path}/ucf")
    assert "v_jump_g02_c01.avi" in refused(f"video:{tmp_path}/ucf")


def test_hmdb51_and_its_official_splits(tmp_path: Path, clip: Path) -> None:
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for label in LABELS:
        (tmp_path / "hmdb51" / label).mkdir(parents=True)
        for i in range(4):
            shutil.copy(clip, tmp_path / "hmdb51" / label / f"{label} (no. {i}).avi")
        for fold in (1, 2, 3):
            use = [0, 1, 2, 1]
            lines = [f"{label} (no. {i}).avi {use[(i + fold) % 4]} " for i in range(4)]
            (lists / f"{label}_test_split{fold}.txt").write_text("\n".join(lines) + "\n")
    for place in (tmp_path, tmp_path / "hmdb51"):
        assert names(f"video:{place}", "test") == ["jump (no. 1).avi", "wave (no. 1).avi"]
        assert names(f"video:{place}", "train") == sorted(f"{label} (no. {i}).avi" for label in LABELS for i in (0, 2))
        assert names(f"video:{place}?fold=2", "test") == ["jump (no. 0).avi", "wave (no. 0).avi"]


def batches_of(source: Source, config: DataConfig, steps: int) -> list[Batch]:
    bad = BadInputs(source, 1.0)
    with train_batches(source, config, PREPROCESS, seed=0, global_batch_size=3, bad_inputs=bad) as batches:
        return list(islice(batches, steps))


@pytest.mark.parametrize("sampling", ["uniform", "tsn", "dense"])
def test_batches_of_frames_are_functions_of_the_seed(clips: Path, sampling: str) -> None:
    source = make_source(f"video:{clips}", "train")
    config = DataConfig(video=VideoConfig(num_frames=3, sampling=sampling), num_workers=0)
    first, second = (batches_of(source, replace(config, num_threads=threads), 4) for threads in (1, 2))
    for one, other in zip(first, second, strict=True):
        assert (one.image.shape, one.image.dtype) == ((3, 3, 16, 16, 3), np.uint8)
        np.testing.assert_array_equal(one.image, other.image)
    empty = np.concatenate([batch.mask[batch.index == 8] for batch in first])
    assert len(empty) and not empty.any()


def test_frames_of_a_clip_are_cropped_and_mirrored_alike(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_clip(tmp_path / "a" / "still.mp4", count=8)
    source = make_source(f"video:{tmp_path}", "train")
    config = DataConfig(video=VideoConfig(num_frames=4), num_workers=0)
    darker = []
    for batch in batches_of(source, config, 8):
        halves = batch.image[..., :8, :].astype(float).mean((2, 3, 4)) < batch.image[..., 8:, :].mean((2, 3, 4))
        assert all(len(set(row)) == 1 for row in halves.tolist())
        darker += halves[:, 0].tolist()
    assert len(set(darker)) == 2  # some clips are mirrored


def test_evaluation_takes_the_views_of_each_clip(clips: Path) -> None:
    source = make_source(f"video:{clips}", "test")
    config = DataConfig(video=VideoConfig(num_frames=2, num_views=3), num_workers=0)
    with eval_batches(source, config, PREPROCESS, batch_size=9, bad_inputs=BadInputs(source, 1.0)) as batches:
        (batch,) = batches
    assert batch.image.shape == (9, 3, 2, 16, 16, 3)
    sampling = FrameSampling(2, "tsn", 4.0, 3)
    for view in range(3):
        read = read_clip(source[3].name, sampling, view).frames
        expected = [evaluation_transform(frame, PREPROCESS) for frame in read]
        np.testing.assert_array_equal(batch.image[3, view], np.stack(expected))


def features(seed: int, frames: int | None) -> Features:
    values = np.random.default_rng(seed).normal(size=(5, frames or 1, 8)).astype(np.float32)
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    mean = values.mean(axis=1)
    return Features(
        jnp.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True)),
        None,
        None if frames is None else jnp.asarray(values),
    )


@pytest.mark.parametrize("name", ["frame_attention", "temporal"])
def test_untrained_temporal_heads_answer_as_clip_does(name: str) -> None:
    classes = np.eye(3, 8, dtype=np.float32)
    params = init_head(name, classes, 50.0, seed=0, hidden=6)
    for frames in (None, 1, 7):
        found = features(1, frames)
        np.testing.assert_allclose(head_logits(name, params, found), 50 * found.image @ classes.T, atol=2e-4)


def test_temporal_head_sees_the_order_and_attention_what_counts() -> None:
    classes = np.eye(3, 8, dtype=np.float32)
    rng = np.random.default_rng(0)
    given = features(1, 6)
    reverse = given._replace(frames=given.frames[:, ::-1])
    differs = {}
    for name in ("frame_attention", "temporal"):
        params = init_head(name, classes, 1.0, seed=0, hidden=6)
        params = {key: value + rng.normal(0, 1, value.shape).astype(np.float32) for key, value in params.items()}
        one, other = (np.asarray(head_logits(name, params, of)) for of in (given, reverse))
        differs[name] = np.abs(one - other).max()
        assert np.isfinite(one).all()
    assert differs["frame_attention"] < 1e-4 < 1e-2 < differs["temporal"]


def trained_with(folder: Path, clips: Path, method: dict[str, object], num_frames: int = 2) -> Path:
    model = write_model(folder / "start")
    spec = f"video:{clips}"
    video = {"num_frames": num_frames, "sampling": "dense", "rate_hz": 5.0}
    config = make_config(
        {
            "data": {"train": spec, "val": spec, "video": video, "max_bad_fraction": 0.2, "num_workers": 0},
            "model": {"name": str(model)},
            "method": method,
            "optim": {"learning_rate": 1e-2},
            "train": {"global_batch_size": 8, "num_steps": 2},
            "eval": {"batch_size": 8, "every_steps": 2},
        }
    )
    return Path(str(train(config, folder / "run", quiet=True).model))


@pytest.fixture(scope="module")
def trained(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_with(tmp_path_factory.mktemp("run"), clips, {})


@pytest.mark.slow
@pytest.mark.parametrize("head", ["frame_attention", "temporal"])
def test_heads_over_frames_are_trained_like_any_other(head: str, clips: Path, tmp_path: Path) -> None:
    model = trained_with(tmp_path, clips, {"name": "full", "head": head})
    assert bundle.read_actions(model).head == head
    params = read_head(model, head, 16, 2)
    learned = "score.kernel" if head == "frame_attention" else "out.kernel"
    assert np.abs(params[learned]).max() > 0  # it starts as zero
    (found,) = Predictor(model).predict([clips / "jump" / "1.mp4"])
    assert found.error is None


def test_features_of_other_frames_are_others(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for num_frames, kept in ((2, 1), (3, 2)):
        trained_with(tmp_path / str(num_frames), clips, {"name": "linear_probe"}, num_frames)
        assert len(list(cache_folder("features").iterdir())) == kept


def test_training_on_clips_leaves_a_model_that_knows_how_to_sample(trained: Path) -> None:
    video = bundle.read_actions(trained).video
    assert video == {"num_frames": 2, "sampling": "dense", "rate_hz": 5.0, "num_views": 1}


def test_predicting_a_clip_averages_its_frames(trained: Path, clips: Path, tmp_path: Path) -> None:
    predictor = Predictor(trained)
    paths = list_inputs([str(clips / "jump"), str(clips / "wave" / "5.mp4")], [])
    found = predictor.predict(paths)
    assert [prediction.error for prediction in found] == [None] * 4 + ["empty file"]
    assert all(prediction.label in LABELS for prediction in found[:4])
    read = read_clip(clips / "jump" / "3.mp4", FrameSampling(2, "dense", 5.0)).frames
    embeddings = predictor.embed(list(read)).mean(axis=0)
    assert isinstance(predictor.backend, JaxBackend)
    cosine = predictor.backend.class_embeddings @ (embeddings / np.linalg.norm(embeddings))
    logits = predictor.backend.scale * cosine
    probs = np.exp(logits - logits.max())
    assert found[3].score == pytest.approx(probs.max() / probs.sum(), abs=1e-4)


def evaluated(trained: Path, clips: Path, output: Path, views: Sequence[int | None]) -> list[float]:
    return [
        evaluate_model(
            str(trained), f"video:{clips}", output, batch_size=4, max_bad_fraction=0.2, num_views=number
        ).metrics["nll"]
        for number in views
    ]


def test_evaluating_clips_by_one_and_by_several_views(trained: Path, clips: Path, tmp_path: Path) -> None:
    one, same, three = evaluated(trained, clips, tmp_path, (None, 1, 3))
    assert one == same
    assert three != one
    assert three == pytest.approx(one, abs=0.2)
    assert json.loads((tmp_path / "metrics.json").read_text())["num_examples"] == 8
    strips = (tmp_path / "report.html").read_text().split('<ol class="strip"')[1:]
    assert strips and all(strip.partition("</ol>")[0].count("<img") == 2 for strip in strips)


def test_what_a_frame_adds_is_what_the_clip_loses_without_it() -> None:
    def logits(clips: np.ndarray) -> np.ndarray:
        """The log-odds of class 1 are the mean brightness."""
        bright = clips.mean(axis=(1, 2, 3, 4), dtype=np.float32) / 255
        return np.stack([np.zeros_like(bright), bright], axis=1)

    levels = np.array([[0, 51, 255], [255, 255, 255]], np.uint8)
    clips = np.broadcast_to(levels[..., None, None, None], (2, 3, 4, 4, 3))
    np.testing.assert_allclose(frames_add(logits, clips, [1, 0]), np.array([[-0.2, -0.1, 0.3], [0, 0, 0]]), atol=1e-6)
    np.testing.assert_array_equal(frames_add(logits, clips[:, :1], [1, 0]), np.zeros((2, 1)))


def test_exported_models_answer_with_the_mean_over_the_frames(trained: Path, clips: Path) -> None:
    predictor = Predictor(trained)
    asked = []

    class Exported:
        """Takes single images, as older exports do."""

        takes_clips = takes_frames = False
        sigmoid = None
        labels, actions, preprocess = predictor.labels, predictor.backend.actions, predictor.backend.preprocess

        def logits(self, images: np.ndarray) -> np.ndarray:
            asked.append(images.shape)
            return np.tile(np.log(np.array([0.25, 0.75], np.float32)), (len(images), 1))

    predictor.backend = Exported()  # type: ignore[assignment]
    found = predictor.predict_clip(clips / "jump" / "3.mp4")
    assert found.label == "wave" and found.score == pytest.approx(0.75)
    assert asked == [(2, 32, 32, 3)]
