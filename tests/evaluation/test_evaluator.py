"""Evaluating: one exact pass, the files it leaves, the way from a model folder and a SPEC to them."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx
from PIL import Image
from scipy.sparse import csr_array

from clip_har_jax import bundle
from clip_har_jax.batch import Batch
from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.calibration import split_conformal_sets
from clip_har_jax.evaluation.charts import draw_lines
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.evaluation.history import History, read_history
from clip_har_jax.evaluation.output import write_result
from clip_har_jax.evaluation.plots import draw_confusion
from clip_har_jax.evaluation.report import Details, make_report, worst_confusions
from clip_har_jax.evaluation.report_sums import ReportSums
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.evaluation.significance import bootstrap_intervals
from clip_har_jax.files import write_json
from clip_har_jax.image_files import read_image
from clip_har_jax.models.clip import FlaxCLIPModel
from clip_har_jax.models.factory import load
from clip_har_jax.pipelines.evaluate import evaluate_model
from clip_har_jax.preprocess import evaluation_transform
from clip_har_jax.text import make_prompts
from tests.support.model_folders import write_image, write_images, write_model
from tests.support.normalization import normalize

ROOT = Path(__file__).parents[2]
LABELS = ("running", "riding a bike", "sleeping")


def make_batches(label: np.ndarray, mask: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Rows whose image shows their index, the last batch padded."""
    for start in range(0, len(label), batch_size):
        count = len(label[start : start + batch_size])
        padding = batch_size - count
        index = np.concatenate([np.arange(start, start + count), np.full(padding, -1)]).astype(np.int32)
        image = np.broadcast_to(index.astype(np.uint8)[:, None, None, None], (batch_size, 4, 4, 3))
        rows = slice(start, start + batch_size)
        padded = [np.concatenate([part[rows], np.zeros(padding, part.dtype)]) for part in (label, mask)]
        yield Batch(image, padded[0], padded[1], index)


def make_result(
    labels: tuple[str, ...] = LABELS, count: int = 50, bad: tuple[int, ...] = (), batch_size: int = 8, **options: Any
) -> EvalResult:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, len(labels))).astype(np.float32) * 2
    label = rng.integers(0, len(labels), count).astype(np.int32)
    mask = np.ones(count, np.float32)
    mask[list(bad)] = 0
    batches = make_batches(label, mask, batch_size)
    return evaluate(lambda batch: logits[batch.index], batches, labels, **options)


def test_the_pass_does_not_depend_on_the_batch_size() -> None:
    one, other = make_result(batch_size=50, bad=(3, 20)), make_result(batch_size=7, bad=(3, 20))
    assert one.metrics["num_examples"] == other.metrics["num_examples"] == 48
    assert one.metrics["num_unreadable"] == other.metrics["num_unreadable"] == 2
    assert one.metrics["nll"] == pytest.approx(other.metrics["nll"], rel=1e-12)
    np.testing.assert_array_equal(one.confusion.toarray(), other.confusion.toarray())
    np.testing.assert_array_equal(one.predictions.index, np.delete(np.arange(50), [3, 20]))
    np.testing.assert_array_equal(one.predictions.index, other.predictions.index)
    np.testing.assert_array_equal(one.predictions.probs, other.predictions.probs)


def test_predictions_fit_the_metrics() -> None:
    result = make_result()
    rows = result.predictions
    assert np.mean(rows.predicted == rows.label) == result.metrics["top1"]
    np.testing.assert_allclose(rows.probs.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(rows.score, rows.probs.max(axis=1))


def test_the_most_confident_mistakes_are_kept_with_their_images() -> None:
    rows, mistakes = make_result().predictions, make_result(num_shown=4, batch_size=7).mistakes
    wrong = np.flatnonzero(rows.predicted != rows.label)
    wanted = wrong[np.argsort(-rows.score[wrong], kind="stable")][:4]
    assert [mistake.index for mistake in mistakes] == wanted.tolist()
    for mistake in mistakes:
        assert (mistake.label, mistake.predicted) == (rows.label[mistake.index], rows.predicted[mistake.index])
        assert np.all(mistake.image == mistake.index)


def test_uncertain_hits_and_a_sample_are_kept_whatever_the_batches() -> None:
    rows, result = make_result().predictions, make_result(num_shown=4, batch_size=7)
    hits = np.flatnonzero(rows.predicted == rows.label)
    assert [one.index for one in result.unsure] == hits[np.argsort(rows.score[hits], kind="stable")][:4].tolist()
    assert result.sample[0].index in range(50)
    other = make_result(num_shown=4, batch_size=50)
    assert [one.index for one in result.sample] == [one.index for one in other.sample] != [0, 1, 2, 3]


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(UserError, match="none could be read"):
        make_result(count=4, bad=(0, 1, 2, 3))


def test_files_of_a_result(tmp_path: Path) -> None:
    result = make_result(bad=(7,), num_shown=3)
    names = [f"images/{i}.png" for i in result.predictions.index]
    write_result(result, tmp_path / "new" / "out", names, {"model": "m"})
    output = tmp_path / "new" / "out"
    assert json.loads((output / "metrics.json").read_text()) == result.metrics
    table = pq.read_table(output / "predictions.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "input": "string",
        "label": "string",
        "predicted": "string",
        "score": "float",
        "probs": "list<element: float>",
    }
    assert json.loads(table.schema.metadata[b"labels"]) == list(LABELS)
    rows = table.to_pylist()
    assert [row["input"] for row in rows] == names
    for i, row in enumerate(rows):
        assert row["label"] == LABELS[result.predictions.label[i]]
        assert row["predicted"] == LABELS[int(np.argmax(row["probs"]))]
        assert row["score"] == max(row["probs"])
    assert (output / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


class Page(HTMLParser):
    """Collects what a browser would load, and the alternative texts."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.alts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")]
        if tag == "img":
            self.alts.append(values.get("alt") or "")


def report_of(result: EvalResult, **about: str) -> str:
    return make_report(result, "images/{}.png".format, about)


def test_the_report_needs_nothing_else() -> None:
    text = report_of(make_result(num_shown=3), model="m")
    page = Page(text)
    pictures = [load for load in page.loads if not load.startswith("#")]
    assert len(pictures) == 4 + 9  # the confusion matrix in two ways, light and dark; three examples of each kind
    assert all(load.startswith("data:image/") for load in pictures)
    assert not page.tags & {"link", "iframe", "object"}
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert all(page.alts)
    assert ".headlines > div" in text  # the style stands unescaped
    digest = base64.b64encode(hashlib.sha256(re.findall(r"<script>(.*?)</script>", text, re.S)[0].encode()).digest())
    assert f"script-src 'sha256-{digest.decode()}'" in text  # and no other script runs


def test_the_report_tells_what_is_known_of_the_model(tmp_path: Path) -> None:
    result = make_result(num_shown=2)
    sums = ReportSums(2.0, {"abstain": 0.6, "coverage": 0.9, "split_conformal": 0.1, "aps": 0.95})
    sums(result.predictions)
    details = Details(
        sums,
        {result.mistakes[0].index: np.eye(2, dtype=np.float32)},
        history=write_history(tmp_path),
    )
    text = make_report(result, "images/{}.png".format, {}, details)
    rows = result.predictions
    unsure = rows.score < 0.6
    assert f"here on {unsure.sum()} of 50 images" in text
    covered = split_conformal_sets(rows.probs, 0.1)[np.arange(50), rows.label].mean()
    assert f"{100 * covered:.1f}%" in text
    assert "The temperature of 2.000, fitted on validation images, makes it less sure" in text
    assert text.count("where the model sees") == 1 + 1  # one picture, and the line that explains it
    assert "Loss" in text and "Learning rate" in text and "Throughput" not in text
    assert "75% moved the model forward" in text
    assert "train.num_steps" in text and "checksum abc" in text
    assert "0.500 before, 0.400 after" in text
    assert "0.5 was taken" in text
    assert "Loss" not in report_of(result)


def write_history(root: Path) -> History:
    """Return a work folder of a run that logged loss and rate, read from its model folder."""
    (root / "model").mkdir()
    record = {"run_id": "r1", "goodput": {"productive": 3.0, "start": 1.0}, "command": ["train.py"]}
    record["data"] = {"val": {"spec": "folder:x", "num_examples": 5, "fingerprint": "abc"}}
    write_json(root / "run.json", record)
    write_json(root / "model" / "run.json", {"run_id": "r1"})
    write_json(root / "config.json", make_config({"train": {"num_steps": 7}}).to_dict())
    write_json(root / "retention.json", {"data": "folder:other", "before": 0.5, "after": 0.4})
    points = [{"alpha": alpha, "target_top1": alpha, "retained_top1": 1 - alpha} for alpha in (0.0, 0.5, 1.0)]
    write_json(root / "wise_ft.json", {"curve": points, "chosen": 0.5})
    lines = [json.dumps({"step": i, "train/loss": 3.0 - i, "train/learning_rate": 0.1 * i}) for i in range(3)]
    (root / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "train/lo']))
    return read_history(root / "model")


def test_a_history_is_of_its_own_run_alone(tmp_path: Path) -> None:
    history = write_history(tmp_path)
    assert history.series("train/loss") == ([0, 1, 2], [3.0, 2.0, 1.0])
    assert history.changed == {"train.num_steps": (None, 7)}
    write_json(tmp_path / "run.json", {"run_id": "another"})
    assert read_history(tmp_path / "model").rows == ()


def test_intervals_hold_the_figure_and_shrink_with_more_images() -> None:
    widths = []
    for count in (50, 800):
        result = make_result(count=count)
        intervals = bootstrap_intervals(result.scores, len(LABELS), resamples=200)
        for name, (low, high) in intervals.items():
            assert low <= result.metrics[name] <= high
        widths.append(intervals["top1"][1] - intervals["top1"][0])
    spread = 2 * 1.96 * np.sqrt(result.metrics["top1"] * (1 - result.metrics["top1"]) / 800)
    assert widths[1] == pytest.approx(spread, rel=0.25)  # of a share, by the normal distribution
    assert widths[1] < widths[0] / 2


def test_the_report_says_what_it_found() -> None:
    result = make_result(bad=(2, 5), num_shown=2)
    text = report_of(result, model="a/model", command="python scripts/evaluate.py --model=a/model")
    assert f"{result.metrics['top1']:.3f}" in text
    assert "48 images" in text
    assert "2 more could not be read" in text
    assert "python scripts/evaluate.py --model=a/model" in text
    assert "prefers-color-scheme: dark" in text
    assert all(label in text for label in LABELS)
    assert f"images/{result.mistakes[0].index}.png" in text
    assert "could not be read" not in report_of(make_result())


def test_labels_and_names_are_escaped() -> None:
    nasty = ("<script>alert(1)</script>", 'a "quoted" & label')
    page = report_of(make_result(labels=nasty, num_shown=2), model="<b>bold</b>")
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


def test_a_perfect_result_has_a_report() -> None:
    label = np.asarray([0, 1, 2], np.int32)
    batches = make_batches(label, np.ones(3, np.float32), 3)
    result = evaluate(lambda batch: 9 * np.eye(3, dtype=np.float32)[batch.label], batches, LABELS, num_shown=3)
    text = report_of(result)
    assert "1.000" in text
    assert "Confident mistakes" not in text
    assert "Uncertain hits" in text
    assert "confusions</h3>" not in text


def test_worst_confusions_are_sorted_and_leave_out_what_is_right() -> None:
    rows = worst_confusions(make_result(), LABELS)
    counts = [row["count"] for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert all(row["label"] != row["predicted"] for row in rows)
    assert 0 < rows[0]["share"] <= 1


@pytest.mark.parametrize("count", [2, 15, 100, 400])
def test_the_confusion_matrix_is_drawn_at_any_size(count: int) -> None:
    confusion = np.random.default_rng(0).integers(0, 3, (count, count))
    labels = [f"action number {i}" for i in range(count)]
    with Image.open(io.BytesIO(draw_confusion(csr_array(confusion), labels))) as image:
        assert 250 < min(image.size) <= max(image.size) < 3500


def test_what_a_chart_says_is_in_the_colours_and_the_font_of_the_page() -> None:
    drawn = draw_lines({"training": ([1, 2, 3], [4.0, 1.0, 0.2])}, "step", "loss", "falling", log_y=True)
    texts = {said: style for style, said in re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', drawn)}
    assert set(texts) == {"1", "2", "3", "0.2", "0.5", "step", "loss"}  # plain numbers, whole steps
    assert all("fill: var(--soft)" in style and "family" not in style for style in texts.values())


def test_labels_in_any_script_are_drawn_without_warnings() -> None:
    confusion = csr_array(np.eye(3, dtype=np.int64))
    assert draw_confusion(confusion, ["跑步", "costs $5 and $6", "an action whose name is far too long to be shown"])


def test_a_training_step_imports_no_plotting() -> None:
    code = (
        "import sys, clip_har_jax.evaluation.evaluator, clip_har_jax.bundle\n"
        "print(*{'matplotlib', 'jinja2', 'pyarrow', 'jax', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sealed") / "model", LABELS, temperature=2.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "model")


def test_probabilities_follow_the_published_rule(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", LABELS)
    result = evaluate_model(str(model), f"folder:{images}", tmp_path / "out", batch_size=4)
    loaded = load(str(model))
    paths = sorted(images.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    pixels = np.stack([evaluation_transform(read_image(path), loaded.preprocess) for path in paths])
    encode_image, encode_text = (
        nnx.jit(function) for function in (FlaxCLIPModel.encode_image, FlaxCLIPModel.encode_text)
    )
    inputs = jnp.asarray(normalize(pixels, loaded.preprocess.mean, loaded.preprocess.std))
    features = np.asarray(encode_image(loaded.model, inputs))
    classes = []
    for texts in make_prompts(LABELS).values():
        ids = jnp.asarray(loaded.tokenizer(texts, 24)[0])
        mean = np.asarray(encode_text(loaded.model, ids)).mean(axis=0)
        classes.append(mean / np.linalg.norm(mean))
    logits = np.exp(float(loaded.model.logit_scale[...])) * features @ np.stack(classes).T / 2.0
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    np.testing.assert_allclose(table["probs"].to_pylist(), probs, rtol=1e-4, atol=1e-6)
    assert isinstance(result, EvalResult)
    np.testing.assert_allclose(result.scores.score, probs.max(axis=1), rtol=1e-4)
    assert table["input"].to_pylist() == [str(path) for path in paths]
    assert table["label"].to_pylist() == [path.parent.name for path in paths]


def test_the_classes_of_the_data_serve_a_plain_clip(plain: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["cycling", "sleeping"])
    result = evaluate_model(str(plain), f"folder:{images}", tmp_path / "out")
    assert result.labels == ("cycling", "sleeping")
    assert result.metrics["num_examples"] == 6
    assert "not sealed" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_labels_match_classes_that_are_said_alike(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["cycling", "running"])
    result = evaluate_model(str(model), f"folder:{images}", tmp_path / "out")
    assert result.labels == LABELS
    assert isinstance(result, EvalResult)
    assert [LABELS[i] for i in result.scores.label] == ["riding a bike"] * 3 + ["running"] * 3
    assert result.metrics["per_class"]["sleeping"]["support"] == 0
    assert str(bundle.verify(model)) in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_named_classes_go_before_the_folders_own(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["cycling"])
    result = evaluate_model(str(model), f"folder:{images}", tmp_path / "out", classes=("dancing", "riding a bike"))
    assert result.labels == ("dancing", "riding a bike")
    assert isinstance(result, EvalResult)
    assert set(result.scores.label) == {1}


def test_a_label_outside_the_classes_is_refused(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["sleping", "running"])
    with pytest.raises(UserError, match=r"'sleping' \(3 images\) is none of the 3 classes; did you mean 'sleeping'"):
        evaluate_model(str(model), f"folder:{images}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_counted_up_to_the_ceiling(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", LABELS)
    (images / "running" / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"running/1\.png"):
        evaluate_model(str(model), f"folder:{images}", tmp_path / "out")
    result = evaluate_model(str(model), f"folder:{images}", tmp_path / "out", max_bad_fraction=0.2)
    assert (result.metrics["num_examples"], result.metrics["num_unreadable"]) == (8, 1)
    entries = [json.loads(line) for line in (tmp_path / "out" / "bad_inputs.jsonl").read_text().splitlines()]
    assert [entry["input"] for entry in entries] == [str(images / "running" / "1.png")]
    inputs = pq.read_table(tmp_path / "out" / "predictions.parquet")["input"].to_pylist()
    assert str(images / "running" / "1.png") not in inputs


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", LABELS)
    images = write_images(tmp_path / "images", LABELS, per_class=1)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors: changed since the model was sealed"):
        evaluate_model(str(model), f"folder:{images}", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
        ({"classes": ("running",)}, "two or more"),
        ({"classes": ("cycling", "riding a bike")}, "mean the same"),
        ({"classes": ("Fixing Cars", "fixing cars")}, "mean the same"),
        ({"model": "nowhere"}, "nowhere"),
        ({"data": "folder:nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_named(model: Path, tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    images = write_images(tmp_path / "images", LABELS, per_class=1)
    given: dict[str, Any] = {"model": str(model), "data": f"folder:{images}", "output": tmp_path / "out"}
    with pytest.raises(UserError, match=message):
        evaluate_model(**given | arguments)


def test_an_output_that_is_a_file_is_a_mistake(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", LABELS, per_class=1)
    with pytest.raises(UserError, match="--output"):
        evaluate_model(str(model), f"folder:{images}", write_image(tmp_path / "taken.png", 0))


def test_the_command(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["cycling", "sleeping"])
    command = [sys.executable, "scripts/evaluate.py", f"--model={model}", f"--data=folder:{images}"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'out'}", "--classes=riding a bike, sleeping"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "out" / "report.html") in done.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) >= {"num_examples", "top1", "top5", "macro_f1", "nll", "ece", "per_class"}
    assert list(metrics["per_class"]) == ["riding a bike", "sleeping"]
    assert "--classes=riding a bike,sleeping" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["evaluate", "predict"])
def test_help_and_wrong_flags(script: str) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"scripts/{script}.py", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)

    shown = run("--help")
    assert shown.returncode == 0
    assert "--model=runs/demo/model" in shown.stdout
    wrong = run("--modle=x")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
