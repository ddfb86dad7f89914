"""Predicting: any kind of input, bad ones among good ones, and what the command prints."""

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.image_files import BadImage
from clip_har_jax.inference.backends import Backend, split_classes
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.predictor import ImageLike, Prediction, Predictor, list_inputs
from tests.support.model_folders import IMAGE_SIZE_PX, write_image, write_model

ROOT = Path(__file__).parents[2]
LABELS = ("running", "riding a bike", "sleeping", "eating", "drinking", "dancing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "sealed", LABELS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor(model, batch_size=4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, name in enumerate(["b.png", "a.png", "deep/er/c.png"]):
        write_image(tmp_path / "photos" / name, seed=i)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def scores_of(predictions: Sequence[Prediction]) -> np.ndarray:
    return np.array([prediction.score for prediction in predictions], np.float64)


def test_a_prediction(predictor: Predictor, photos: Path) -> None:
    (prediction,) = predictor.predict([photos / "a.png"])
    assert prediction.input == str(photos / "a.png")
    assert prediction.label in LABELS
    assert (prediction.label, prediction.score) == prediction.top[0]
    scores = [score for _, score in prediction.top]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) < 1
    assert prediction.error is None


def test_every_kind_of_input_gives_the_same(predictor: Predictor, photos: Path) -> None:
    path = photos / "a.png"
    image = Image.open(path)
    image.load()
    inputs: list[ImageLike] = [path, str(path), path.read_bytes(), image, np.asarray(image), image.convert("RGBA")]
    predictions = predictor.predict(inputs)
    assert {prediction.label for prediction in predictions} == {predictions[0].label}
    np.testing.assert_allclose(scores_of(predictions), scores_of(predictions)[0], rtol=1e-6)
    assert [prediction.input for prediction in predictions[2:]] == ["#2", "#3", "#4", "#5"]


def test_batches_and_padding_change_nothing(predictor: Predictor, tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(9)]
    together = predictor.predict(paths)
    alone = [predictor.predict([path])[0] for path in paths]
    assert [p.input for p in together] == [str(path) for path in paths]
    assert [p.label for p in together] == [p.label for p in alone]
    np.testing.assert_allclose(scores_of(together), scores_of(alone), rtol=1e-5)


def test_bad_inputs_are_reported_and_the_rest_go_on(predictor: Predictor, photos: Path) -> None:
    good = photos / "a.png"
    cut = photos / "cut.png"
    cut.write_bytes(good.read_bytes()[:200])
    inputs: list[ImageLike] = [
        good,
        photos / "none.png",
        cut,
        photos,
        b"",
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ]
    inputs += [np.zeros((2, 1000, 3), np.uint8), Image.new("I;16", (8, 8)), good]
    predictions = predictor.predict(inputs)
    assert [prediction.error is None for prediction in predictions] == [True, *[False] * 8, True]
    assert predictions[0].score == pytest.approx(predictions[-1].score, rel=1e-6)
    reasons = [prediction.error or "" for prediction in predictions[1:-1]]
    for reason, said in zip(
        reasons,
        ["No such file", "damaged", "Is a directory", "empty", "uint8", "float32", "1000x2 px", "I;16"],
        strict=True,
    ):
        assert said in reason
    assert predictions[1].label is None


def test_nothing_but_bad_inputs(predictor: Predictor) -> None:
    assert [prediction.error is None for prediction in predictor.predict([b"x", b"y"])] == [False, False]
    assert predictor.predict([]) == []


def test_inputs_are_taken_as_they_are_needed(predictor: Predictor, photos: Path) -> None:
    def endless() -> Iterator[Path]:
        while True:
            yield photos / "a.png"

    stream = predictor.stream(endless())
    assert next(stream).label == next(stream).label


def test_embeddings_are_normalised(predictor: Predictor, photos: Path) -> None:
    embeddings = predictor.embed([photos / "a.png", photos / "b.png"])
    assert embeddings.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    with pytest.raises(BadImage):
        predictor.embed([b"x"])


def test_any_classes_with_any_clip(plain: Path, photos: Path) -> None:
    predictor = Predictor(plain, ["riding a bike", "walking the dog"])
    assert predictor.labels == ("riding a bike", "walking the dog")
    (prediction,) = predictor.predict([photos / "a.png"])
    assert sum(score for _, score in prediction.top) == pytest.approx(1, rel=1e-5)
    assert predictor.backend.digest is None
    with pytest.raises(UserError, match="names no actions"):
        Predictor(plain)


def test_the_backend(model: Path) -> None:
    backend: Backend = JaxBackend(model, batch_size=4)
    images = np.random.default_rng(0).integers(0, 256, (7, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
    logits, probs = backend.logits(images), backend.predict(images)
    np.testing.assert_allclose(probs, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-5)
    assert backend.embed(images).shape == (7, 16)
    assert backend.labels == LABELS
    assert backend.digest == bundle.verify(model)


def test_only_two_sizes_are_compiled(model: Path) -> None:
    backend = JaxBackend(model, batch_size=4)
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for count in (1, 4):
            compiled.clear()
            backend.predict(np.zeros((count, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8))
            assert compiled
        compiled.clear()
        for count in (2, 3, 5, 9, 1):
            backend.predict(np.zeros((count, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8))
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_many_prompts_are_embedded_in_parts(plain: Path) -> None:
    classes = [f"doing thing number {i}" for i in range(50)]  # 150 prompts
    many, few = JaxBackend(plain, classes), JaxBackend(plain, classes[40:])
    np.testing.assert_allclose(many.class_embeddings[40:], few.class_embeddings, atol=1e-6)


def test_temperature_divides_the_logits(tmp_path: Path, model: Path) -> None:
    warm = JaxBackend(write_model(tmp_path / "warm", LABELS, temperature=4.0))
    images = np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
    np.testing.assert_allclose(warm.logits(images) * 4, JaxBackend(model).logits(images), rtol=1e-4)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = np.full_like(weights["visual_projection.weight"], np.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN"):
        Predictor(folder, LABELS).predict([write_image(tmp_path / "a.png", 0)])


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, ()), ("riding a bike, sleeping", ("riding a bike", "sleeping")), (" a ,b", ("a", "b"))],
)
def test_split_classes(text: str | None, names: tuple[str, ...]) -> None:
    assert split_classes(text) == names


@pytest.mark.parametrize("text", ["", "a,,b", "a,"])
def test_empty_class_names_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="a name is empty"):
        split_classes(text)


def test_list_inputs(photos: Path, tmp_path: Path) -> None:
    lines = io.BytesIO(b"one.png\r\n\n two.png\n")
    found = list(list_inputs(["x.png", str(photos), "-"], lines))
    in_folder = [str(photos / name) for name in ("a.png", "b.png", "deep/er/c.png")]
    assert found == ["x.png", *in_folder, "one.png", " two.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images or videos in this folder"):
        list_inputs([str(tmp_path / "empty")], io.BytesIO())


def test_the_command_prints_json(model: Path, photos: Path, predictor: Predictor) -> None:
    (photos / "bad.jpg").write_bytes(b"\xff\xd8 no image")
    done = subprocess.run(
        [sys.executable, "scripts/predict.py", f"--model={model}", "--json", str(photos), "-"],
        input=f"{photos / 'a.png'}\n{photos / 'gone.png'}\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == f"note: INPUT: left out: 1 .txt ({photos / 'notes.txt'})\n"
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["a.png", "b.png", "bad.jpg", "deep/er/c.png", "a.png", "gone.png"]
    assert [entry["input"] for entry in entries] == [str(photos / name) for name in names]
    assert [set(entry) == {"input", "error"} for entry in entries] == [False, False, True, False, False, True]
    wanted = predictor.predict([photos / "a.png"])[0].to_dict()
    assert entries[0]["label"] == wanted["label"]
    assert [item["label"] for item in entries[0]["top"]] == [item["label"] for item in wanted["top"]]
    assert set(entries[0]) == {"input", "label", "score", "top", "abstained"}
    assert set(entries[0]["top"][0]) == {"label", "score"}


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, model: Path) -> Callable[..., int]:
    """Run the script in this process, which has JAX in it already; gives the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["predict.py", f"--model={model}", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
        return int(done.value.code or 0)

    return run


def test_the_command_prints_aligned_lines(
    run_command: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = photos / "gone.png"
    assert run_command("--classes=riding a bike,eating", str(photos), str(gone)) == 1
    shown = capsys.readouterr()
    columns = [line.index(str(photos)) for line in shown.out.splitlines()]
    assert columns == [len("0.000  riding a bike  ")] * 3
    note, error = shown.err.splitlines()
    assert note == f"note: INPUT: left out: 1 .txt ({photos / 'notes.txt'})"
    assert error == f"error: {gone}: can't be read (No such file or directory)"


def test_the_command_names_mistakes(
    run_command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no images or videos in this folder")
    assert run_command("-") == 2
    assert capsys.readouterr().err == "error: no paths on stdin; write one a line\n"


def test_an_error_is_one_json_object() -> None:
    assert Prediction("a.png", error="not an image").to_dict() == {"input": "a.png", "error": "not an image"}
