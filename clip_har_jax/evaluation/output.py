"""The files that the result of an evaluation is written to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.files import atomic, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from clip_har_jax.evaluation.report import Details


def write_result(
    result: EvalResult,
    output: str | Path,
    names: Sequence[str],
    about: Mapping[str, str],
    details: "Details | None" = None,
) -> None:
    """Write predictions.parquet, confusion_matrix.png, report.html and, last, metrics.json.

    Args:
      output: the folder; made if need be.
      names: by which a person finds each example, in the order of `result.predictions`.
      about: what was evaluated (model, digest, data, command ...), shown in the report as it stands.
      details: what else the report can tell of the model.
    """
    from clip_har_jax.evaluation.plots import draw_confusion
    from clip_har_jax.evaluation.report import make_report

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.parquet", result, names)
    write_bytes(output / "confusion_matrix.png", draw_confusion(result.confusion, result.labels))
    write_text(output / "report.html", make_report(result, names, about, details))
    write_json(output / "metrics.json", result.metrics)


def write_predictions(path: Path, result: EvalResult, names: Sequence[str]) -> None:
    """Columns input, label, predicted, score, probs; the order of probs stands in the schema's metadata, `labels`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, classes = result.predictions, pa.array(result.labels, pa.string())
    columns = {
        "input": pa.array(names, pa.string()),
        "label": classes.take(pa.array(rows.label)),
        "predicted": classes.take(pa.array(rows.predicted)),
        "score": pa.array(rows.score),
        "probs": pa.ListArray.from_arrays(
            pa.array(np.arange(len(rows.probs) + 1, dtype=np.int32) * len(classes)), pa.array(rows.probs.reshape(-1))
        ),
    }
    table = pa.table(columns).replace_schema_metadata({"labels": json.dumps(result.labels)})
    with atomic(path) as partial:
        pq.write_table(table, partial)
