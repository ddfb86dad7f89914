"""The gates: conditions that a model must meet before it replaces the served one."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.significance import mean_interval
from clip_har_jax.files import read_object

RETENTION = "retention.json"  # written by a training beside its model/
TIMED = 20  # number of predictions; their median is the latency


@dataclass(frozen=True)
class Gates:
    """The bounds of the gates; None: no such gate.

    Attributes:
      min_gain: lower bound of the 95% interval of the gain in top-1 over the champion, on the same examples.
      min_retention: least share of the zero-shot accuracy on other classes that the model keeps.
      max_latency_ms: of one image on this machine, in the exported format.
    """

    min_gain: float = 0.0
    min_retention: float | None = None
    max_latency_ms: float | None = None


@dataclass(frozen=True)
class Check:
    """The result of one gate."""

    name: str
    passed: bool
    detail: str


def read_metrics(folder: Path, digest: str) -> dict[str, Any]:
    """Return the metrics of an evaluation of the model with that digest.

    Raises:
      UserError: no evaluation, or one of another model.
    """
    metrics = read_object(folder / "metrics.json")
    if metrics.get("model_digest") != digest:
        raise UserError(
            f"{folder / 'metrics.json'}: of the model {str(metrics.get('model_digest'))[:12]}, not of {digest[:12]}; "
            "evaluate this one with scripts/evaluate.py"
        )
    return metrics


def check_gates(gates: Gates, candidate: Path, champion: Path | None) -> list[Check]:
    """Check a version's folders against the bounds and, if there is one, against the champion's folders."""
    checks = [_check_parity(candidate / "export")] if (candidate / "export").is_dir() else []
    retention = candidate / RETENTION
    checks += check_evaluation(gates, candidate / "evaluation", champion and champion / "evaluation", retention)
    if gates.max_latency_ms is not None:
        checks.append(_check_latency(gates.max_latency_ms, candidate / "export"))
    return checks


def check_evaluation(gates: Gates, candidate: Path, champion: Path | None, retention: Path) -> list[Check]:
    """Check an evaluation against the champion's, if there is one, and the retained zero-shot accuracy."""
    checks = [_check_gain(gates.min_gain, candidate, champion)] if champion is not None else []
    if gates.min_retention is not None:
        checks.append(_check_retention(gates.min_retention, retention))
    return checks


def _check_parity(export: Path) -> Check:
    parity = read_object(export / "parity.json")
    failed = sorted(name for name, entry in parity.items() if not entry["passed"])
    return Check("parity", not failed, f"{', '.join(failed)} failed" if failed else f"{', '.join(parity)} passed")


def _check_gain(least: float, candidate: Path, champion: Path) -> Check:
    for folder, who in ((candidate, "the candidate"), (champion, "the champion")):
        if not (folder / "metrics.json").is_file():
            return Check("gain", False, f"{who} was registered without its evaluation")
    metrics = [read_object(folder / "metrics.json") for folder in (candidate, champion)]
    if any("map" in each for each in metrics):
        return Check("gain", False, "of images with several labels each, and only top-1 answers are compared")
    data = [each.get("data_fingerprint") for each in metrics]
    if None in data or data[0] != data[1]:
        return Check(
            "gain", False, f"evaluated on other data ({str(data[0])[:12]}) than the champion ({str(data[1])[:12]})"
        )
    ours, theirs = (_read_hits(folder) for folder in (candidate, champion))
    if ours.keys() != theirs.keys():
        return Check("gain", False, "the two evaluations don't hold the same examples")
    gains = np.array([ours[name] - theirs[name] for name in ours], float)
    low, high = mean_interval(gains)
    return Check(
        "gain",
        bool(low > least),
        f"top-1 {gains.mean():+.4f} against the champion, 95% interval {low:+.4f} to {high:+.4f}, above {least:+.4f}?",
    )


def _read_hits(folder: Path) -> dict[str, int]:
    """Return for each example whether it was classified correctly."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "predictions.parquet", columns=["input", "label", "predicted"]).to_pydict()
    return {
        name: int(label == predicted)
        for name, label, predicted in zip(table["input"], table["label"], table["predicted"], strict=True)
    }


def _check_retention(least: float, file: Path) -> Check:
    if not file.is_file():
        return Check("retention", False, "the training measured none; set config.retention.data")
    measured = read_object(file)
    before, after = float(measured["before"]), float(measured.get("after", 0.0))
    share = after / before if before else 1.0
    detail = f"zero-shot top-1 {before:.3f} before, {after:.3f} after: {share:.3f} is left, at least {least:.3f}?"
    return Check("retention", share >= least, detail)


def _check_latency(most_ms: float, export: Path) -> Check:
    if not export.is_dir():
        return Check("latency", False, "registered without its export")
    latency = measure_latency_ms(export)
    return Check("latency", latency <= most_ms, f"{latency:.1f} ms for one image, at most {most_ms:g} ms")


def measure_latency_ms(export: Path) -> float:
    """Return the median time of one prediction of an exported folder, from pixels to probabilities."""
    from clip_har_jax.inference.exported import ExportedBackend

    backend = ExportedBackend(export, batch_size=1)
    size = backend.preprocess.image_size_px
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    backend.predict(image)  # opens the graph
    times = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        backend.predict(image)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1000
