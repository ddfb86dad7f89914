"""The evaluation parts of benchmarks.growth: rows, classes and texts, with generated logits and a small model."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 15
BATCH = 1000


def _batches(rows: int, classes: int) -> Iterator[Any]:
    from clip_har_jax.batch import Batch

    for start in range(0, rows, BATCH):
        index = np.arange(start, min(rows, start + BATCH), dtype=np.int32)
        image = np.zeros((len(index), 1, 1, 3), np.uint8)
        yield Batch(image, (index * 7 % classes).astype(np.int32), np.ones(len(index), np.float32), index)


def _evaluate(rows: int, classes: int, output: Path, with_pages: bool) -> None:
    from clip_har_jax.evaluation.evaluator import evaluate
    from clip_har_jax.evaluation.output import predictions_file, write_pages
    from clip_har_jax.evaluation.report import Details
    from clip_har_jax.evaluation.report_sums import ReportSums

    labels = [f"action_{i}" for i in range(classes)]
    thresholds = {"abstain": 0.3, "coverage": 0.9, "split_conformal": 0.05, "aps": 0.95}
    rng, sums = np.random.default_rng(0), ReportSums(1.5, thresholds)

    def logits(batch: Any) -> np.ndarray:
        values = rng.standard_normal((len(batch.label), classes), np.float32)
        values[np.arange(len(batch.label)), batch.label] += 2
        return values

    with predictions_file(output / "predictions.parquet", labels, "images/{:08d}.jpg".format) as file:
        result = evaluate(logits, _batches(rows, classes), labels, 8, (file, sums))
    if with_pages:
        write_pages(result, output, "images/{:08d}.jpg".format, {"model": "m", "data": "d"}, Details(sums))


def evaluation(count: int) -> Callable[[], object]:
    """Feed `count` rows of random logits of 15 classes to the metrics and to predictions.parquet."""
    return lambda: _evaluate(count, CLASSES, Path(tempfile.mkdtemp()), with_pages=False)


def report(count: int) -> Callable[[], object]:
    """Do the same, and write the report of `count` rows."""
    return lambda: _evaluate(count, CLASSES, Path(tempfile.mkdtemp()), with_pages=True)


def classes(count: int) -> Callable[[], object]:
    """Do the same with 1,000 rows of `count` classes."""
    return lambda: _evaluate(1000, count, Path(tempfile.mkdtemp()), with_pages=True)


def texts(count: int, warm: bool = False) -> Callable[[], object]:
    """Predict one image with a small CLIP and `count` classes; `warm`: with its results in the cache."""
    from clip_har_jax.inference.jax_backend import JaxBackend
    from clip_har_jax.models.factory import make_base
    from clip_har_jax.models.params import init_params
    from clip_har_jax.models.pretrained import write_params

    folder = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    start = make_base("tiny", ("a photo of a person riding a bike.",))
    write_params(folder, start.config, init_params(start.config, seed=0))
    start.tokenizer.save(folder)
    start.preprocess.save(folder)
    labels = [f"action number {i}" for i in range(count)]

    def run() -> object:
        backend = JaxBackend(folder, labels)
        size = backend.preprocess.image_size_px
        return backend.predict(np.zeros((1, size, size, 3), np.uint8))

    if warm:
        run()
    return run


def cached_texts(count: int) -> Callable[[], object]:
    """Predict with the same model again, with its class embeddings cached on disk."""
    return texts(count, warm=True)
