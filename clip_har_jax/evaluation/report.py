"""The report of an evaluation: one self-contained HTML file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from scipy.sparse import coo_array

from clip_har_jax.evaluation import charts
from clip_har_jax.evaluation.baselines import verdict, zero_shot_on
from clip_har_jax.evaluation.history import History
from clip_har_jax.evaluation.pages import data_uri, spoken, templates, thumbnail
from clip_har_jax.evaluation.plots import MAX_NAMED_CLASSES, draw_confusion
from clip_har_jax.evaluation.report_sums import ReliabilityBins, ReportSums
from clip_har_jax.evaluation.result import EvalResult, Shown
from clip_har_jax.evaluation.significance import bootstrap_intervals
from clip_har_jax.evaluation.training_section import describe_run, draw_tradeoffs, draw_training
from clip_har_jax.heatmap import SCALE, overlay

NUM_CONFUSIONS = 10
FRAME_PX = 112  # of a frame in a filmstrip
LEAST_LOG_ODDS = 0.5  # for a bar of full length
HEADLINE_METRICS = (
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
    """Contents of a report beyond the predictions.

    Attributes:
      sums: of the evaluation, with the model's temperature and thresholds; None: there are neither.
      heat_maps: for the predicted class of the shown images, by their index.
      added: what each frame of the shown clips adds to the log-odds of the predicted class, by their index.
      history: of the model's training run.
    """

    sums: ReportSums | None = None
    heat_maps: Mapping[int, Float[np.ndarray, "g g"]] = field(default_factory=dict)
    added: Mapping[int, Float[np.ndarray, " t"]] = field(default_factory=dict)
    history: History = field(default_factory=History)


def make_report(
    result: EvalResult, name_of: Callable[[int], str], about: Mapping[str, str], details: Details | None = None
) -> str:
    """Return the report as HTML; see `output.write_pages` for the arguments."""
    details = details or Details()
    labels = spoken(result.labels)
    per_class = [(said, result.metrics["per_class"][label]) for said, label in zip(labels, result.labels, strict=True)]
    galleries = [
        {
            "title": title,
            "explained": explained,
            "examples": [_describe(one, labels, name_of(one.index), details) for one in shown],
        }
        for name, title, explained in GALLERIES
        if (shown := getattr(result, name))
    ]
    record = details.history.record
    return (
        templates()
        .get_template("report.html")
        .render(
            metrics=result.metrics,
            subject=about.get("model") or about.get("run") or "",
            data=about.get("data", ""),
            verdict=verdict(result.metrics, zero_shot_on(record, about.get("data", ""))),
            num_classes=len(labels),
            matrix_named=len(labels) <= MAX_NAMED_CLASSES,
            headlines=HEADLINE_METRICS,
            intervals=bootstrap_intervals(result.scores, len(labels)) | {"top1": result.metrics["top1_interval"]},
            pictures=_pictures(result, labels),
            confusions=worst_confusions(result, labels),
            per_class=sorted(per_class, key=lambda item: (item[1]["support"] == 0, item[1]["f1"])),
            charts=_calibration_charts(result, details.sums),
            temperature=_say_temperature(details.sums),
            abstention=_say_abstention(result, details.sums),
            sets=details.sums and details.sums.conformal(),
            galleries=galleries,
            heat_scale=SCALE if details.heat_maps else None,
            frames_add=bool(details.added),
            training=draw_training(details.history),
            tradeoffs=draw_tradeoffs(details.history),
            about={**about, **describe_run(record)},
            changed=details.history.changed,
        )
    )


def worst_confusions(result: EvalResult, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the most frequent confusions, with their share of the true class's images."""
    cells: coo_array = result.confusion.tocoo()
    true, predicted = cells.coords
    wrong = np.flatnonzero(true != predicted)
    worst = wrong[np.lexsort((predicted[wrong], true[wrong], -cells.data[wrong]))][:NUM_CONFUSIONS]
    support = result.confusion.sum(axis=1)
    return [
        {
            "label": labels[true[i]],
            "predicted": labels[predicted[i]],
            "count": int(cells.data[i]),
            "share": cells.data[i] / support[true[i]],
        }
        for i in worst
    ]


def _pictures(result: EvalResult, labels: Sequence[str]) -> list[dict[str, str]]:
    worst = worst_confusions(result, labels)
    most = f"most often {worst[0]['label']} is taken for {worst[0]['predicted']}" if worst else "none is confused"
    alt = f"Confusion matrix of {len(labels)} actions; {most}"
    return [
        {"kind": kind, "alt": alt}
        | {
            name: data_uri(draw_confusion(result.confusion, labels, name == "dark", kind == "shares"), "png")
            for name in ("light", "dark")
        }
        for kind in ("counts", "shares")
    ]


def _calibration_charts(result: EvalResult, sums: ReportSums | None) -> dict[str, Markup]:
    score, right = result.scores.score, result.scores.rank == 0
    return {
        "reliability": charts.draw_reliability(
            None if sums is None else sums.unscaled, ReliabilityBins.of(score, right)
        ),
        "coverage": charts.draw_coverage(score, right, None if sums is None else sums.thresholds.get("abstain")),
    }


def _say_temperature(sums: ReportSums | None) -> str:
    if sums is None:
        return ""
    if sums.temperature == 1.0:
        return "The model's temperature is 1: its probabilities are as they came out of training."
    way = "less" if sums.temperature > 1 else "more"
    return f"The temperature of {sums.temperature:.3f}, fitted on validation images, makes it {way} sure of itself."


def _say_abstention(result: EvalResult, sums: ReportSums | None) -> str:
    told = "From right to left: only the surest part of the answers is given."
    if sums is None or (threshold := sums.thresholds.get("abstain")) is None:
        return told
    answered, right = result.scores.score >= threshold, result.scores.rank == 0
    if not answered.any():
        return f"{told} Below {threshold:.2f} the model says that it isn't sure, which here is always."
    return (
        f"{told} Below {threshold:.2f} the model says that it isn't sure: here on {(~answered).sum()} of "
        f"{len(right)} images, {(~answered & ~right).sum()} of them mistakes. Of what it answers, "
        f"{right[answered].mean():.1%} is right, where without abstaining it would be {right.mean():.1%}."
    )


def _describe(shown: Shown, labels: Sequence[str], name: str, details: Details) -> dict[str, Any]:
    right = shown.label == shown.predicted
    heat = details.heat_maps.get(shown.index)
    is_clip = shown.image.ndim == 4
    return {
        "label": labels[shown.label],
        "predicted": labels[shown.predicted],
        "right": right,
        "said": "recognised" if right else f"taken for {labels[shown.predicted]}",
        "score": shown.score,
        "name": name,
        "frames": _filmstrip(shown.image, details.added.get(shown.index)) if is_clip else None,
        "image": None if is_clip else thumbnail(shown.image),
        "heat": None if heat is None else thumbnail(overlay(shown.image, heat)),
    }


def _filmstrip(
    frames: UInt8[np.ndarray, "t h w 3"], added: Float[np.ndarray, " t"] | None
) -> list[dict[str, str | float | None]]:
    """Return the pictures of a clip's frames, with what each adds and its share of the most that any frame adds."""
    if added is None:
        return [{"image": thumbnail(frame, FRAME_PX), "added": None, "share": 0.0} for frame in frames]
    most = max(float(np.abs(added).max()), LEAST_LOG_ODDS)
    return [
        {"image": thumbnail(frame, FRAME_PX), "added": float(value), "share": abs(float(value)) / most}
        for frame, value in zip(frames, added, strict=True)
    ]
