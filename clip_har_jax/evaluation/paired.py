"""Comparison of several evaluations on the same images, with paired significance tests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.output import GROUP_VALUES
from clip_har_jax.evaluation.pages import templates
from clip_har_jax.evaluation.report import HEADLINE_METRICS
from clip_har_jax.evaluation.result import Scores
from clip_har_jax.evaluation.significance import (
    bootstrap_intervals,
    headline_metrics,
    holm,
    mcnemar,
    paired_differences,
)
from clip_har_jax.files import write_json, write_text

ALPHA = 0.05


@dataclass(frozen=True)
class Evaluation:
    """The contents of a predictions.parquet, in the order of the inputs' names."""

    name: str
    labels: tuple[str, ...]
    inputs: tuple[str, ...]
    scores: Scores


def read_predictions(folder: str) -> Evaluation:
    """Read the predictions of an evaluation.

    Raises:
      UserError: they are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / "predictions.parquet"
    try:
        file = pq.ParquetFile(path)
        if "predicted" in file.schema_arrow.names and "label" not in file.schema_arrow.names:
            raise UserError(f"--compare: {path}: of images with several labels each; only top-1 answers are compared")
        labels = tuple(json.loads(file.schema_arrow.metadata[b"labels"]))
        index = {label: i for i, label in enumerate(labels)}
        inputs: list[str] = []
        parts: list[Scores] = []
        for rows in file.iter_batches(max(1, GROUP_VALUES // len(labels))):
            label = np.asarray([index[name] for name in rows["label"].to_pylist()], np.int64)
            probs = np.asarray(rows["probs"].flatten(), np.float32).reshape(len(label), len(labels))
            parts.append(Scores.of_probs(label, probs))
            inputs += rows["input"].to_pylist()
    except UserError:  # a ValueError
        raise
    except FileNotFoundError as error:
        raise UserError(f"--compare: {path}: no such file; write it with --model, --data and --output") from error
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise UserError(f"--compare: {path}: not the predictions of an evaluation; write them again") from error
    order = np.asarray(sorted(range(len(inputs)), key=inputs.__getitem__))
    columns = (np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(Scores))
    return Evaluation(folder, labels, tuple(inputs[i] for i in order), Scores(*columns))


def check_pair(first: Evaluation, other: Evaluation) -> None:
    """Refuse evaluations that can't be compared image by image.

    Raises:
      UserError: other classes, other images, or other true labels.
    """
    for what, a, b in (
        ("actions", first.labels, other.labels),
        ("images", first.inputs, other.inputs),
        ("true actions", tuple(first.scores.label), tuple(other.scores.label)),
    ):
        if a != b:
            raise UserError(
                f"--compare: {first.name} and {other.name} were not evaluated on the same {what}; "
                "evaluate both with the same --data and --classes"
            )


def compare_evaluations(folders: Sequence[str], output: str | Path) -> dict[str, Any]:
    """Compare evaluations with the first of them, and write comparison.json and comparison.html.

    Args:
      folders: outputs of `evaluate.py`.
      output: the folder to write to.

    Raises:
      UserError: fewer than two, or they can't be compared.
    """
    if len(folders) < 2 or not all(folders):
        raise UserError(
            "--compare: name two folders or more, divided by commas, e.g. --compare=runs/a/test,runs/b/test"
        )
    evaluations = [read_predictions(folder) for folder in folders]
    first, count = evaluations[0], len(evaluations[0].labels)
    everything = np.arange(len(first.inputs))
    runs: list[dict[str, Any]] = []
    for one in evaluations:
        check_pair(first, one)
        found: dict[str, Any] = {
            "name": one.name,
            "metrics": {
                name: float(value)
                for (name, _, _), value in zip(
                    HEADLINE_METRICS, headline_metrics(one.scores, count)(everything), strict=True
                )
            },
            "intervals": bootstrap_intervals(one.scores, count),
        }
        if one is not first:
            right = [part.scores.rank == 0 for part in (first, one)]
            found["only_first"], found["only_this"], found["p_value"] = mcnemar(*right)
            found["differences"] = paired_differences(first.scores, one.scores, count)
        runs.append(found)
    corrected = holm({str(i): run["p_value"] for i, run in enumerate(runs[1:], 1)})
    for i, run in enumerate(runs[1:], 1):
        run["p_corrected"] = corrected[str(i)]
        run["verdict"] = _verdict(run, runs[0])
    result = {"num_examples": len(first.inputs), "runs": runs}
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        page = templates().get_template("compare.html").render(headlines=HEADLINE_METRICS, **result)
        write_text(Path(output) / "comparison.html", page)
        write_json(Path(output) / "comparison.json", result)
    except OSError as error:
        raise UserError(f"--output={output}: can't be written ({error.strerror})") from error
    return result


def _verdict(run: dict[str, Any], first: dict[str, Any]) -> str:
    """Return the result of the test in words."""
    difference = run["differences"]["top1"][0]
    if run["p_corrected"] >= ALPHA:
        return (
            f"These images don't tell the two apart: a difference of {100 * difference:+.1f} points in top-1 accuracy "
            "could be chance."
        )
    better, worse = (run, first) if difference > 0 else (first, run)
    return f"{better['name']} is better than {worse['name']}, by {100 * abs(difference):.1f} points of top-1 accuracy."


def print_result(result: dict[str, Any], output: str | Path) -> None:
    """Print a short table of all evaluations, and the results of the tests."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    for title in ("evaluation", *(title for _, title, _ in HEADLINE_METRICS), "p"):
        table.add_column(title)
    for run in result["runs"]:
        p = f"{run['p_corrected']:.3g}" if "p_corrected" in run else ""
        table.add_row(escape(run["name"]), *(f"{run['metrics'][name]:.3f}" for name, _, _ in HEADLINE_METRICS), p)
    Console(highlight=False, soft_wrap=True).print(table)
    for run in result["runs"][1:]:
        print(run["verdict"])
    print(f"comparison: {Path(output) / 'comparison.html'}")
