"""Calibration against references: scikit-learn, plain loops, and the coverage that conformal sets promise."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss, log_loss

from clip_har_jax import bundle, load_model
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation import calibration
from clip_har_jax.image_files import read_image
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.pipelines.calibrate import calibrate_model
from clip_har_jax.preprocess import evaluation_transform
from tests.support.model_folders import write_images, write_model, write_siglip

ROOT = Path(__file__).parents[2]
LABELS = ("running", "riding a bike", "sleeping")


def synthetic(seed: int, count: int, temperature: float = 1.0, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at `temperature` is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(count, classes)) * rng.uniform(0.5, 4, (count, 1))
    probs = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    label = (rng.random((count, 1)) > probs.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    return (true * temperature).astype(np.float32), label.astype(np.int32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    logits, label = synthetic(0, 20000, temperature)
    assert calibration.fit_temperature(logits, label) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_is_scikit_learns() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV

    logits, label = synthetic(1, 2000, 2.5)

    class Given(ClassifierMixin, BaseEstimator):
        def fit(self, x: np.ndarray, y: np.ndarray) -> "Given":
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(axis=1)

    given = FrozenEstimator(Given().fit(logits, label))
    reference = CalibratedClassifierCV(given, method="temperature", ensemble=False).fit(logits, label)
    probs = reference.predict_proba(logits)
    ours = calibration.softmax_float64(logits / calibration.fit_temperature(logits, label))
    np.testing.assert_allclose(ours, probs, atol=2e-4)


def test_the_sigmoid_is_scikit_learns_over_all_pairs() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV

    logits, label = synthetic(10, 500, 2.5, classes=4)
    logits = logits * 2 - 7  # a slope and a bias to find

    class Given(ClassifierMixin, BaseEstimator):
        def fit(self, x: np.ndarray, y: np.ndarray) -> "Given":
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x: np.ndarray) -> np.ndarray:
            return x[:, 0]

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x[:, 0] > 0

    pairs, true = logits.reshape(-1, 1), (label[:, None] == np.arange(4)).ravel()
    given = FrozenEstimator(Given().fit(pairs, true))
    reference = CalibratedClassifierCV(given, method="sigmoid", ensemble=False).fit(pairs, true)
    found = calibration.calibrate(logits, label, logit_bias=-10.0)
    assert found.sigmoid is not None
    probs = found.sigmoid(logits / found.temperature)
    np.testing.assert_allclose(probs.ravel(), reference.predict_proba(pairs)[:, 1], atol=1e-4)
    told = found.report["sigmoid"]
    assert told["after"]["nll"] == pytest.approx(log_loss(true, probs.ravel()))
    before = 1 / (1 + np.exp(10.0 - logits.ravel().astype(np.float64)))
    assert told["before"]["nll"] == pytest.approx(log_loss(true, before))
    assert told["after"]["ece"] < told["before"]["ece"]


def test_separable_pairs_and_a_useless_model_give_finite_sigmoids() -> None:
    label = np.arange(12, dtype=np.int32) % 3
    logits = 30 * np.eye(3, dtype=np.float32)[label]
    apart = calibration.fit_sigmoid(logits, label)
    # Platt's targets: 13/14 of 12 true pairs, 1/26 of 24 false ones
    np.testing.assert_allclose(apart(logits[:1])[0], [13 / 14, 1 / 26, 1 / 26], atol=1e-5)
    even = (12 * 13 / 14 + 24 / 26) / 36
    for useless in (-logits, np.zeros_like(logits)):
        np.testing.assert_allclose(calibration.fit_sigmoid(useless, label)(useless), even, atol=1e-5)


def test_a_model_without_mistakes_keeps_its_temperature() -> None:
    label = np.arange(12, dtype=np.int32) % 3
    logits = 3 * np.eye(3, dtype=np.float32)[label]
    found = calibration.calibrate(logits, label)
    assert found.temperature == 1.0
    assert found.thresholds["abstain"] == pytest.approx(calibration.softmax_float64(logits).max(axis=1).min())
    assert found.report["abstention"]["answered"] == 1.0


def test_scores_are_scikit_learns() -> None:
    logits, label = synthetic(2, 3000, 2.0)
    probs = calibration.softmax_float64(logits)
    scores = calibration.calibration_scores(probs, label)
    assert scores["nll"] == pytest.approx(log_loss(label, probs, labels=range(10)))
    assert scores["brier"] == pytest.approx(brier_score_loss(label, probs, labels=range(10), scale_by_half=False))


@pytest.mark.parametrize(("adaptive", "strategy"), [(False, "uniform"), (True, "quantile")])
def test_the_calibration_error_is_that_of_the_reliability_curve(adaptive: bool, strategy: str) -> None:
    logits, label = synthetic(3, 3000, 2.0)
    probs = calibration.softmax_float64(logits)
    confidence, right = probs.max(axis=1), (probs.argmax(axis=1) == label).astype(int)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy=strategy)
    if adaptive:
        weights = np.full(15, 1 / 15)
    else:
        counts = np.histogram(confidence, np.linspace(0, 1, 16))[0]
        weights = counts[counts > 0] / len(label)
    expected = float((weights * np.abs(accuracy - mean)).sum())
    confidence, right = probs.max(axis=-1), probs.argmax(axis=-1) == label
    assert calibration.calibration_error(confidence, right, adaptive) == pytest.approx(expected, abs=2e-4)


def test_scaling_mends_an_overconfident_model() -> None:
    found = calibration.calibrate(*synthetic(4, 4000, 3.0))
    before, after = found.report["before"], found.report["after"]
    for name in ("nll", "ece", "ece_adaptive", "brier"):
        assert after[name] < before[name]
    assert after["ece"] < 0.03


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_conformal_sets_cover_new_examples(coverage: float) -> None:
    logits, label = synthetic(5, 4000, 2.0)
    probs = calibration.softmax_float64(logits)
    lowest, together = (fit(probs, label, coverage) for fit in (calibration.fit_split_conformal, calibration.fit_aps))
    new_logits, new = synthetic(6, 20000, 2.0)
    new_probs, rows = calibration.softmax_float64(new_logits), np.arange(len(new))
    split, aps = calibration.split_conformal_sets(new_probs, lowest), calibration.aps_sets(new_probs, together)
    assert split[rows, new].mean() == pytest.approx(coverage, abs=0.015)  # two standard errors
    assert coverage - 0.015 < aps[rows, new].mean() <= 1
    assert split.sum(axis=1).mean() <= aps.sum(axis=1).mean()
    assert aps.any(axis=1).all()


def test_aps_scores_and_sets_by_hand() -> None:
    probs = np.asarray([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]])
    assert calibration.aps_sets(probs, 0.79).tolist() == [[True, True, False], [True, False, True], [True] * 3]
    assert calibration.aps_sets(probs, 0.0).sum() == 3  # the first class is always there
    label = np.asarray([1, 0, 2], np.int32)
    u = np.random.default_rng(7).random(3)
    expected = sorted([0.5 + u[0] * 0.3, 0.6 + u[1] * 0.2, 2 / 3 + u[2] / 3])
    assert calibration.fit_aps(probs, label, coverage=0.5, seed=7) == pytest.approx(expected[1])


def test_too_few_examples_put_every_class_into_the_sets() -> None:
    logits, label = synthetic(8, 5)
    probs = calibration.softmax_float64(logits)
    assert calibration.fit_split_conformal(probs, label, 0.9) == 0.0
    assert calibration.fit_aps(probs, label, 0.9) == 1.0
    assert calibration.split_conformal_sets(probs, 0.0).all()


def test_abstaining_withholds_half_of_the_mistakes_or_a_fifth_of_the_answers() -> None:
    logits, label = synthetic(9, 4000, 2.0)
    told = calibration.calibrate(logits, label).report["abstention"]
    assert told["answered"] == 0.8  # this one errs too often to withhold half
    assert told["accuracy_of_answered"] > told["accuracy"] + 0.05
    sure = logits.max(axis=1) - np.median(logits, axis=1) > 14
    told = calibration.calibrate(logits[sure], label[sure]).report["abstention"]
    assert told["mistakes_withheld"] == told["mistakes"] // 2 > 5
    assert 0.8 < told["answered"] < 1


@pytest.mark.parametrize(
    ("thresholds", "named"),
    [
        ({"abstian": 0.5}, "did you mean 'abstain'"),
        ({"abstain": 1.5}, "'thresholds.abstain'"),
        ({"abstain": True}, "'thresholds.abstain'"),
        ({"aps": float("nan")}, "'thresholds.aps'"),
        ([0.5], "'thresholds'"),
    ],
)
def test_wrong_thresholds_name_file_and_key(tmp_path: Path, thresholds: object, named: str) -> None:
    values = {"labels": ["x"], "prompts": {"x": ["y"]}, "thresholds": thresholds}
    (tmp_path / "actions.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        bundle.read_actions(tmp_path)
    assert str(tmp_path / "actions.json") in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize("sigmoid", [0.5, {"slope": 1.0}, {"slope": -1.0, "bias": 0.0}, {"slope": 1.0, "bias": "0"}])
def test_a_wrong_sigmoid_names_file_and_key(tmp_path: Path, sigmoid: object) -> None:
    (tmp_path / "actions.json").write_text(json.dumps({"labels": ["x"], "prompts": {"x": ["y"]}, "sigmoid": sigmoid}))
    with pytest.raises(UserError, match=r"actions\.json: key 'sigmoid"):
        bundle.read_actions(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("calibrate")
    return write_model(root / "model", LABELS, temperature=2.0), write_images(root / "images", LABELS, per_class=8)


def test_recalibrating_writes_a_new_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = folders
    digest = bundle.verify(model)
    found = calibrate_model(str(model), f"folder:{images}", tmp_path / "new")
    assert bundle.verify(model) == digest
    assert bundle.verify(tmp_path / "new") not in (None, digest)
    actions = bundle.read_actions(tmp_path / "new")
    assert actions.temperature == found.temperature
    assert actions.thresholds == found.thresholds
    assert json.loads((tmp_path / "new" / "calibration.json").read_text())["temperature"] == found.temperature
    # Whatever temperature was there before, the one that is found is the same.
    again = calibrate_model(str(tmp_path / "new"), f"folder:{images}", tmp_path / "again")
    assert again.temperature == pytest.approx(found.temperature, rel=1e-3)
    old, new = JaxBackend(model), JaxBackend(tmp_path / "new")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(new.logits(pixels) * found.temperature, old.logits(pixels) * 2.0, rtol=1e-4)


def test_an_unsure_answer_abstains(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = folders
    photo = images / "running" / "0.png"
    assert not Predictor(model).predict([photo])[0].abstained  # without a threshold, never
    calibrate_model(str(model), f"folder:{images}", tmp_path / "new")
    prediction = Predictor(tmp_path / "new").predict([photo])[0]
    threshold = bundle.read_actions(tmp_path / "new").thresholds["abstain"]
    assert prediction.score is not None
    assert prediction.abstained == (prediction.score < threshold) == prediction.to_dict()["abstained"]
    assert not Predictor(tmp_path / "new", ("eating", "drinking")).predict([photo])[0].abstained  # its own classes only


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_taken_output_is_left_alone(folders: tuple[Path, Path], tmp_path: Path, taken: str) -> None:
    target = write_model(tmp_path / "taken") if taken == "folder" else tmp_path / "taken"
    if taken == "file":
        target.write_text("mine")
    with pytest.raises(UserError, match="--output"):
        calibrate_model(str(folders[0]), f"folder:{folders[1]}", target)
    assert target.is_file() or (target / "model.safetensors").is_file()


def test_the_command(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = folders
    command = [sys.executable, "scripts/calibrate.py", f"--model={model}", f"--data=folder:{images}"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'new'}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "temperature" in done.stdout
    assert bundle.read_actions(tmp_path / "new").thresholds


@pytest.mark.slow
def test_a_siglip_has_the_sigmoid_of_each_action_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Before the calibration it is the sigmoid of the model's own logits, and afterwards the fitted one."""
    plain, (_, images) = write_siglip(tmp_path / "siglip", LABELS), folders
    prompts: dict[str, tuple[str, ...]] = {label: (f"a person {label}",) for label in LABELS}
    bundle.write_actions(plain, bundle.Actions(LABELS, prompts, temperature=2.0))
    photo = images / "running" / "0.png"
    loaded, predictor = load_model(str(plain)), Predictor(plain)
    pixels = evaluation_transform(read_image(photo), predictor.backend.preprocess)[None]
    normalized = np.moveaxis((pixels / np.float32(255) - 0.5) / 0.5, -1, 1)
    ids, _ = loaded.tokenizer([texts[0] for texts in prompts.values()], loaded.model.config.text.context_length)
    own = np.asarray(loaded(input_ids=ids, pixel_values=normalized).logits_per_image)[0]

    prediction = predictor.predict([photo])[0]
    order = [LABELS.index(label) for label, _ in prediction.top]
    np.testing.assert_allclose(prediction.sigmoid, 1 / (1 + np.exp(-own[order])), rtol=1e-4)
    told = [entry["sigmoid"] for entry in prediction.to_dict()["top"]]
    assert told == list(prediction.sigmoid)

    found = calibrate_model(str(plain), f"folder:{images}", tmp_path / "new")
    assert bundle.read_actions(tmp_path / "new").sigmoid == found.sigmoid is not None
    prediction = Predictor(tmp_path / "new").predict([photo])[0]
    cosines = own + 10.0  # a SigLIP that we make has a bias of -10
    z = found.sigmoid.slope * cosines[order] / found.temperature + found.sigmoid.bias
    np.testing.assert_allclose(sorted(prediction.sigmoid), sorted(1 / (1 + np.exp(-z))), rtol=1e-3)
    # Other actions have the model's own sigmoid, not the one fitted to these.
    free = Predictor(tmp_path / "new", ("eating", "drinking"))
    assert free.backend.sigmoid == bundle.Sigmoid(1.0, -10.0)
    assert Predictor(folders[0]).predict([photo])[0].sigmoid == ()  # a CLIP
