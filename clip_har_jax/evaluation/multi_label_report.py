"""The output files of an evaluation of multi-label data: metrics.json, predictions.parquet and report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.evaluation.baselines import verdict
from clip_har_jax.evaluation.history import History
from clip_har_jax.evaluation.multi_label import MultiLabelResult
from clip_har_jax.evaluation.pages import spoken, templates
from clip_har_jax.evaluation.training_section import describe_run, draw_training
from clip_har_jax.files import atomic, write_json, write_text

MULTI_LABEL_HEADLINES = (
    ("map", "mAP", "mean over the labels of the average precision: how well images with the label are ranked first"),
    ("map_micro", "micro mAP", "average precision of all pairs of image and label together"),
    ("macro_f1", "macro F1", "mean over the labels of the balance of precision and recall at their thresholds"),
    ("micro_f1", "micro F1", "the same balance over all answers together"),
    ("coverage_error", "coverage", "labels to read, the most probable first, until all true ones are covered"),
    ("label_ece", "label ECE", "mean over the labels of how far probability is from frequency; lower is better"),
)


def write_multi_label_pages(
    result: MultiLabelResult,
    folder: Path,
    names: Sequence[str],
    about: Mapping[str, str],
    history: History | None = None,
) -> None:
    """Write predictions.parquet, report.html and, last, metrics.json.

    The columns of predictions.parquet are input, labels, predicted (lists of labels) and probs, in the order of the
    schema's metadata `labels`.

    Args:
      result: the evaluation, with bootstrap intervals.
      folder: a folder that exists.
      names: of the examples, for people, in the order of the result.
      about: the evaluation's facts, shown unchanged in the report.
      history: of the model's training run.
    """
    _write_predictions(result, folder / "predictions.parquet", names)
    write_text(folder / "report.html", make_multi_label_report(result, names, about, history or History()))
    write_json(folder / "metrics.json", result.metrics)


def _write_predictions(result: MultiLabelResult, path: Path, names: Sequence[str]) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    def chosen(rows: np.ndarray) -> pa.Array:
        return pa.array([[result.labels[k] for k in np.flatnonzero(row)] for row in rows], pa.list_(pa.string()))

    probs = result.probs
    columns = {
        "input": pa.array(names, pa.string()),
        "labels": chosen(result.target),
        "predicted": chosen(probs >= result.thresholds),
        "probs": pa.array(list(probs.astype(np.float32)), pa.list_(pa.float32())),
    }
    table = pa.table(columns).replace_schema_metadata({"labels": json.dumps(result.labels)})
    with atomic(path) as partial:
        pq.write_table(table, partial)


def make_multi_label_report(
    result: MultiLabelResult, names: Sequence[str], about: Mapping[str, str], history: History
) -> str:
    """Return the report as HTML; see `write_multi_label_pages` for the arguments."""
    metrics = result.metrics
    per_label = [
        (said, metrics["per_class"][name]) for said, name in zip(spoken(result.labels), result.labels, strict=True)
    ]
    return (
        templates()
        .get_template("multi_label.html")
        .render(
            metrics=metrics,
            subject=about.get("model") or about.get("run") or "",
            data=about.get("data", ""),
            verdict=verdict(metrics),
            headlines=MULTI_LABEL_HEADLINES,
            intervals={name: metrics.get(f"{name}_interval") for name, _, _ in MULTI_LABEL_HEADLINES},
            per_label=sorted(per_label, key=lambda item: (item[1]["ap"] is None, item[1]["ap"] or 0.0)),
            mistakes=_worst(result, names),
            training=draw_training(history),
            about={**about, **describe_run(history.record)},
            changed=history.changed,
        )
    )


def _worst(result: MultiLabelResult, names: Sequence[str], count: int = 20) -> list[dict[str, Any]]:
    """Return the answers that are furthest on the wrong side of their threshold, as parts of the way to 0 or 1."""
    probs, limits, labels = result.probs, result.thresholds[None], spoken(result.labels)
    over, under = (probs - limits) / np.maximum(1 - limits, 1e-9), (limits - probs) / np.maximum(limits, 1e-9)
    wrong = np.where(result.target, under, over)
    rows, columns = np.nonzero((probs >= limits) != result.target)
    order = np.argsort(-wrong[rows, columns], kind="stable")[:count]
    return [
        {
            "name": names[row],
            "label": labels[k],
            "said": "missed" if result.target[row, k] else "given, but not in the image",
            "prob": float(probs[row, k]),
            "threshold": float(result.thresholds[k]),
        }
        for row, k in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]
