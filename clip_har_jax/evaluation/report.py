"""The report of an evaluation: one HTML file that needs nothing else."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image

from clip_har_jax.evaluation import charts
from clip_har_jax.evaluation.calibration import aps_sets, softmax, split_conformal_sets
from clip_har_jax.evaluation.history import History
from clip_har_jax.evaluation.plots import MAX_NAMED_CLASSES, draw_confusion
from clip_har_jax.evaluation.result import EvalResult, Shown
from clip_har_jax.evaluation.significance import bootstrap_intervals

NUM_CONFUSIONS = 10
THUMBNAIL_PX = 224
NUM_SIZES = 5  # conformal sets of 1, 2 ... and of more classes
TEMPLATES = Path(__file__).parent / "templates"
HEADLINES = (
    ("top1", "top-1", "share of images whose most probable action is right"),
    ("top5", "top-5", "share of images with the right action among the 5 most probable"),
    ("macro_f1", "macro F1", "mean over the actions of the balance of precision and recall"),
    ("nll", "NLL", "negative log-likelihood, in nats; lower is better"),
    ("ece", "ECE", "how far confidence is from accuracy; lower is better"),
)
GALLERIES = (
    ("mistakes", "Confident mistakes", "Wrong, and the surest of it first."),
    ("unsure", "Uncertain hits", "Right, but barely; the least sure first."),
    ("sample", "Random examples", "Neither good nor bad ones were picked."),
)


@dataclass(frozen=True)
class Details:
    """What a report can tell beyond the predictions.

    Attributes:
      temperature: that the logits are already divided by; None: not known.
      thresholds: as in `actions.json`.
      heat_maps: where the model sees the predicted class, of the examples that are shown, by their index.
      history: of the run that made the model.
    """

    temperature: float | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    heat_maps: Mapping[int, Float[np.ndarray, "g g"]] = field(default_factory=dict)
    history: History = field(default_factory=History)


@cache
def templates() -> jinja2.Environment:
    """Return the pages' templates, with what all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    environment.globals |= {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),  # our own files
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment


def make_report(
    result: EvalResult, names: Sequence[str], about: Mapping[str, str], details: Details | None = None
) -> str:
    """Return the report as HTML; see `output.write_result` for the arguments."""
    details = details or Details()
    rows = result.predictions
    name_of = dict(zip(rows.index.tolist(), names, strict=True))
    per_class = sorted(result.metrics["per_class"].items(), key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))
    galleries = [
        {
            "title": title,
            "explained": explained,
            "examples": [_describe(one, result, name_of, details) for one in shown],
        }
        for name, title, explained in GALLERIES
        if (shown := getattr(result, name))
    ]
    return (
        templates()
        .get_template("report.html")
        .render(
            metrics=result.metrics,
            num_classes=len(result.labels),
            matrix_named=len(result.labels) <= MAX_NAMED_CLASSES,
            headlines=HEADLINES,
            intervals=bootstrap_intervals(rows.probs, rows.label),
            pictures=_pictures(result),
            confusions=worst_confusions(result),
            per_class=per_class,
            charts=_calibration_charts(result, details),
            temperature=_say_temperature(details),
            abstention=_say_abstention(result, details),
            sets=_conformal(result, details.thresholds),
            galleries=galleries,
            has_heat=bool(details.heat_maps),
            training=_training(details.history),
            tradeoffs=_tradeoffs(details.history),
            about={**about, **_environment(details.history.record)},
            changed=details.history.changed,
        )
    )


def worst_confusions(result: EvalResult) -> list[dict[str, Any]]:
    """Return the pairs of actions that are confused most often, with their share of the true action's images."""
    counts = result.confusion.copy()
    np.fill_diagonal(counts, 0)
    pairs = np.argsort(-counts, axis=None, kind="stable")[:NUM_CONFUSIONS]
    rows = [divmod(int(pair), len(result.labels)) for pair in pairs]
    return [
        {
            "label": result.labels[true],
            "predicted": result.labels[predicted],
            "count": int(counts[true, predicted]),
            "share": counts[true, predicted] / result.confusion[true].sum(),
        }
        for true, predicted in rows
        if counts[true, predicted]
    ]


def _pictures(result: EvalResult) -> list[dict[str, str]]:
    worst = worst_confusions(result)
    most = f"most often {worst[0]['label']} is taken for {worst[0]['predicted']}" if worst else "none is confused"
    alt = f"Confusion matrix of {len(result.labels)} actions; {most}"
    return [
        {"kind": kind, "alt": alt}
        | {
            name: data_uri(draw_confusion(result.confusion, result.labels, name == "dark", kind == "shares"), "png")
            for name in ("light", "dark")
        }
        for kind in ("counts", "shares")
    ]


def _calibration_charts(result: EvalResult, details: Details) -> dict[str, Markup]:
    rows = result.predictions
    right, temperature = rows.predicted == rows.label, details.temperature
    before = None if temperature in (None, 1.0) else softmax(rows.logits * temperature)
    return {
        "reliability": charts.draw_reliability(before, softmax(rows.logits), right),
        "coverage": charts.draw_coverage(rows.score, right, details.thresholds.get("abstain")),
    }


def _say_temperature(details: Details) -> str:
    if details.temperature is None:
        return ""
    if details.temperature == 1.0:
        return "The model's temperature is 1: its probabilities are as they came out of training."
    way = "less" if details.temperature > 1 else "more"
    return f"The temperature of {details.temperature:.3f}, fitted on validation images, makes it {way} sure of itself."


def _say_abstention(result: EvalResult, details: Details) -> str:
    told, rows = "From right to left: only the surest part of the answers is given.", result.predictions
    if (threshold := details.thresholds.get("abstain")) is None:
        return told
    answered, right = rows.score >= threshold, rows.predicted == rows.label
    if not answered.any():
        return f"{told} Below {threshold:.2f} the model says that it isn't sure, which here is always."
    return (
        f"{told} Below {threshold:.2f} the model says that it isn't sure: here on {(~answered).sum()} of "
        f"{len(rows.label)} images, {(~answered & ~right).sum()} of them mistakes. Of what it answers, "
        f"{right[answered].mean():.1%} is right, where without abstaining it would be {right.mean():.1%}."
    )


def _conformal(result: EvalResult, thresholds: Mapping[str, float]) -> dict[str, Any] | None:
    if not {"coverage", "split_conformal", "aps"} <= set(thresholds):
        return None
    rows, own = result.predictions, np.arange(len(result.predictions.label))
    table = []
    for title, sets in (
        ("all that are probable enough", split_conformal_sets(rows.probs, thresholds["split_conformal"])),
        ("the most probable until it is enough (APS)", aps_sets(rows.probs, thresholds["aps"])),
    ):
        sizes = sets.sum(axis=1)
        counts = np.bincount(np.minimum(sizes, NUM_SIZES + 1), minlength=NUM_SIZES + 2)
        covered = float(sets[own, rows.label].mean())
        table.append({"title": title, "covered": covered, "mean": sizes.mean(), "shares": counts / len(sizes)})
    sizes_shown = [*map(str, range(NUM_SIZES + 1)), f"over {NUM_SIZES}"]
    return {"coverage": thresholds["coverage"], "sizes": sizes_shown, "rows": table}


def _training(history: History) -> list[dict[str, Any]]:
    """Return the charts of the run, each with its title."""
    found = []
    for title, y, series, log_y in (
        ("Loss", "loss, nats", {"training": "train/loss", "validation": "val/nll"}, True),
        ("Accuracy", "top-1", {"training": "train/top1", "validation": "val/top1"}, False),
        ("Learning rate", "rate", {"learning rate": "train/learning_rate"}, False),
        ("Throughput", "images a second", {"images a second": "train/images_per_s"}, False),
    ):
        lines = {name: history.series(key) for name, key in series.items()}
        lines = {name: points for name, points in lines.items() if len(points[0]) > 1}
        if lines:
            ends = ", ".join(f"{name} ends at {points[1][-1]:.3g}" for name, points in lines.items())
            drawn = charts.draw_lines(lines, "step", y, f"{title} over {y}: {ends}", log_y)
            found.append({"title": title, "chart": drawn})
    seconds = {name: value for name, value in history.record.get("goodput", {}).items() if value >= 0.05}
    if seconds:
        share = seconds.get("productive", 0.0) / sum(seconds.values())
        title = f"Where the time went: {share:.0%} moved the model forward"
        named = {name.replace("_", " "): value for name, value in seconds.items()}
        drawn = charts.draw_bars(named, "seconds, over all starts", title, " s")
        found.append({"title": title, "chart": drawn})
    return found


def _tradeoffs(history: History) -> list[dict[str, Any]]:
    """What fine-tuning cost in zero-shot ability, and what averaging with the start won back."""
    found, kept, curve = [], history.retention, history.wise_ft
    if {"before", "after"} <= set(kept):
        title = "What was kept of the start"
        told = (
            f"Zero-shot accuracy on {kept.get('data')}, which wasn't trained for: {kept['before']:.3f} before, "
            f"{kept['after']:.3f} after."
        )
        bars = {"before": kept["before"], "after": kept["after"]}
        found.append({"title": title, "explained": told, "chart": charts.draw_bars(bars, "zero-shot top-1", told)})
    if points := curve.get("curve"):
        alphas = [point["alpha"] for point in points]
        named = {"on the target": "target_top1", "zero-shot, retained": "retained_top1"}
        lines = {name: (alphas, [point[key] for point in points]) for name, key in named.items() if key in points[0]}
        told = f"0 is the start, 1 the fine-tuned weights (WiSE-FT); {curve.get('chosen')} was taken."
        drawn = charts.draw_lines(lines, "share of the fine-tuned weights", "top-1", told, markers=True)
        found.append({"title": "Between the start and fine-tuning", "explained": told, "chart": drawn})
    return found


def _environment(record: Mapping[str, Any]) -> dict[str, str]:
    """What run.json tells of the training, in words."""
    if not record:
        return {}
    data = record.get("data", {})
    told = {
        "trained by": " ".join(["python", *record.get("command", [])]),
        "run": f"{record.get('run_id')}, started {record.get('started')}",
        "code": f"{record.get('git_sha')}{' with uncommitted changes' if record.get('git_dirty') else ''}",
        "config checksum": record.get("config_hash"),
        "machine": f"{record.get('num_devices')} x {record.get('device')}, {record.get('num_processes')} process(es)",
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
        "environment checksum": record.get("lock_hash"),
        **{
            f"{name} split": "{spec}: {num_examples} images, checksum {fingerprint}".format(**part)
            for name, part in data.items()
        },
    }
    return {name: str(value) for name, value in told.items() if value}


def _describe(shown: Shown, result: EvalResult, names: Mapping[int, str], details: Details) -> dict[str, Any]:
    labels, right = result.labels, shown.label == shown.predicted
    heat = details.heat_maps.get(shown.index)
    return {
        "label": labels[shown.label],
        "predicted": labels[shown.predicted],
        "right": right,
        "said": "recognised" if right else f"taken for {labels[shown.predicted]}",
        "score": shown.score,
        "name": names[shown.index],
        "image": _thumbnail(shown.image),
        "heat": None if heat is None else _thumbnail(overlay(shown.image, heat)),
    }


def overlay(image: UInt8[np.ndarray, "h w 3"], heat: Float[np.ndarray, "g g"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image in grey with the heat laid over it; the heat is 0 to 1."""
    from matplotlib import colormaps

    height, width = image.shape[:2]
    small = Image.fromarray((255 * np.clip(heat, 0, 1)).astype(np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    grey = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    color = 255 * colormaps["inferno"](smooth[..., 0])[..., :3]
    weight = 0.15 + 0.6 * smooth
    return ((1 - weight) * grey + weight * color).clip(0, 255).astype(np.uint8)


def _thumbnail(image: UInt8[np.ndarray, "h w 3"]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """Return an image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
