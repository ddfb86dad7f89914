"""Evaluation of a model folder on a data set: metrics and a report."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, UInt8

from clip_har_jax import bundle, cli
from clip_har_jax.batch import Batch
from clip_har_jax.config import DataConfig, EvalConfig, make_config
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.multi_label import make_multi_label_source
from clip_har_jax.data.pipeline import eval_batches
from clip_har_jax.data.sources import make_source
from clip_har_jax.evaluation.baselines import verdict
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.evaluation.history import read_history
from clip_har_jax.evaluation.multi_label import MultiLabelResult, evaluate_multi_label
from clip_har_jax.evaluation.multi_label_report import MULTI_LABEL_HEADLINES, write_multi_label_pages
from clip_har_jax.evaluation.output import predictions_file, write_pages
from clip_har_jax.evaluation.report import HEADLINE_METRICS, Details
from clip_har_jax.evaluation.report_sums import ReportSums
from clip_har_jax.evaluation.result import EvalResult, Predictions, Shown
from clip_har_jax.evaluation.significance import RESAMPLES
from clip_har_jax.folders import output_folder
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.models.resolve import resolve_folder
from clip_har_jax.patches import unpack_patches
from clip_har_jax.pipelines.classed import ClassedSource

T = TypeVar("T")
NUM_SHOWN = 8  # examples of each kind in the report


def evaluate_model(
    model: str,
    data: str,
    output: str | Path,
    classes: Sequence[str] = (),
    batch_size: int = EvalConfig.batch_size,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    num_views: int | None = None,
) -> EvalResult | MultiLabelResult:
    """Evaluate a model folder, or any CLIP in the Hugging Face layout, and write metrics, predictions and report.

    >>> result = evaluate_model("model", "folder:images", "evaluation")
    >>> result.metrics["num_examples"]
    6

    Args:
      model: a folder or a Hub name.
      data: the SPEC of the data.
      output: the folder to write to.
      classes: the actions to tell apart; empty: the folder's own, else the data's own labels.
      batch_size: images in one forward pass.
      max_bad_fraction: accepted share of unreadable images, which are listed in bad_inputs.jsonl.
      num_views: how often a clip is sampled; None: the model folder's setting.

    Raises:
      UserError: a mistake in the arguments, the model or the data.
    """
    config = make_config({"data": {"max_bad_fraction": max_bad_fraction}, "eval": {"batch_size": batch_size}})
    model_folder = resolve_folder(model)
    multi_label = bundle.has_actions(model_folder) and bundle.read_actions(model_folder).multi_label
    data_source = (make_multi_label_source if multi_label else make_source)(data, "test")
    cli.print_tally("--data", data_source.tally)
    backend = JaxBackend(model_folder, classes, data_source.labels, batch_size, multi_label)
    source = ClassedSource(data_source, backend.labels, data)
    about = {
        "model": str(backend.path),
        "model digest": backend.digest or "none: the folder is not sealed",
        "data": data,
        "data fingerprint": source.fingerprint,
        "manifest SHA-256": data_source.manifest_sha256 or "none: the data is no manifest",
        "command": _command(model, data, Path(output), classes, batch_size, max_bad_fraction, num_views),
    }
    if multi_label:
        return _evaluate_multi_label(backend, source, config.data, Path(output), about, num_views)
    sums = ReportSums(backend.actions.temperature, backend.actions.thresholds)
    with output_folder(output) as folder:
        log = folder / "bad_inputs.jsonl"
        with predictions_file(folder / "predictions.parquet", backend.labels, source.take_name) as file:
            result = run_backend(backend, source, config.data, log, NUM_SHOWN, num_views, (file, sums))
        result.metrics.update(model_digest=backend.digest, data=data, data_fingerprint=source.fingerprint)
        result.metrics["listing"] = source.tally.to_json()
        shown = {one.index: one for one in (*result.mistakes, *result.unsure, *result.sample)}
        details = Details(sums, *_explain(backend, list(shown.values())), read_history(backend.path))
        if backend.preprocess.max_num_patches:
            result = _unpacked(result)
        write_pages(result, folder, source.find_name, about, details)
    return result


def _evaluate_multi_label(
    backend: JaxBackend,
    source: ClassedSource,
    config: DataConfig,
    output: Path,
    about: Mapping[str, str],
    num_views: int | None,
) -> MultiLabelResult:
    """Evaluate a multi-label model with the thresholds of its folder, and write metrics, predictions and report."""
    with output_folder(output) as folder:
        with open_batches(backend, source, config, folder / "bad_inputs.jsonl", num_views) as batches:
            thresholds = backend.actions.label_thresholds
            result = evaluate_multi_label(
                lambda batch: _logits(backend, batch.image), batches, backend.labels, thresholds, RESAMPLES
            )
        result.metrics.update(model_digest=backend.digest, data=about["data"], data_fingerprint=source.fingerprint)
        result.metrics["listing"] = source.tally.to_json()
        names = [source.take_name(i) for i in result.index.tolist()]
        write_multi_label_pages(result, folder, names, about, read_history(backend.path))
    return result


def _unpacked(result: EvalResult) -> EvalResult:
    """Return a result whose shown images are pictures again, not packed patches."""

    def unpack(packed: np.ndarray) -> np.ndarray:
        return unpack_patches(packed) if packed.ndim == 3 else np.stack([unpack_patches(frame) for frame in packed])

    def pictures(gallery: Sequence[Shown]) -> tuple[Shown, ...]:
        return tuple(replace(one, image=unpack(one.image)) for one in gallery)

    mistakes, unsure, sample = map(pictures, (result.mistakes, result.unsure, result.sample))
    return replace(result, mistakes=mistakes, unsure=unsure, sample=sample)


def _explain(backend: JaxBackend, shown: Sequence[Shown]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return a heat map for each image that is shown, and for each clip what its frames add, by their index."""
    if not shown or (backend.preprocess.max_num_patches and shown[0].image.ndim == 3):
        return {}, {}  # heat maps need a fixed grid of patches
    indices, classes = [one.index for one in shown], [one.predicted for one in shown]
    pixels = np.stack([one.image for one in shown])
    if pixels.ndim == 4:
        return dict(zip(indices, backend.explain(pixels, classes), strict=True)), {}
    return {}, dict(zip(indices, frames_add(backend.logits, pixels, classes), strict=True))


def frames_add(
    model: Callable[[np.ndarray], np.ndarray], clips: UInt8[np.ndarray, "b t h w 3"], classes: Sequence[int]
) -> Float32[np.ndarray, "b t"]:
    """Return what each frame adds to the log-odds of a class of its clip: by how much they fall without the frame.

    Log-odds instead of probabilities, which hardly change where the model is sure.

    Args:
      model: gives class logits [b, c] of clips with any number of frames.
      clips: the clips.
      classes: for each clip, the position of its class.
    """
    if (length := clips.shape[1]) == 1:
        return np.zeros((len(clips), 1), np.float32)
    without = [log_odds(model(np.delete(clips, i, axis=1)), classes) for i in range(length)]
    return log_odds(model(clips), classes)[:, None] - np.stack(without, axis=1)


def log_odds(logits: Float32[np.ndarray, "b c"], classes: Sequence[int]) -> Float32[np.ndarray, " b"]:
    """Return the log of a class's probability divided by that of all others, for each row."""
    of_class = np.arange(logits.shape[1])[None] == np.asarray(classes)[:, None]
    others = np.where(of_class, -np.inf, logits)
    return logits[of_class] - np.logaddexp.reduce(others, axis=1)


def run_backend(
    backend: JaxBackend,
    source: ClassedSource,
    config: DataConfig,
    log: Path,
    num_shown: int = 0,
    num_views: int | None = None,
    sinks: Sequence[Callable[[Predictions], None]] = (),
) -> EvalResult:
    """Evaluate a model on labelled images, with progress on the terminal.

    Args:
      backend: the model.
      source: the images, under the model's classes.
      config: sets how many images may be unreadable.
      log: the file that lists them.
      num_shown: examples of each kind to keep with their images.
      num_views: how often a clip is sampled; None: the model folder's setting.
      sinks: receive the predictions of each batch; without any, the result keeps them.

    Raises:
      UserError: too many unreadable images.
    """
    with open_batches(backend, source, config, log, num_views) as batches:
        return evaluate(lambda batch: _logits(backend, batch.image), batches, backend.labels, num_shown, sinks)


@contextmanager
def open_batches(
    backend: JaxBackend, source: ClassedSource, config: DataConfig, log: Path, num_views: int | None
) -> Iterator[Iterator[Batch]]:
    """Open the batches of an evaluation, with progress on the terminal; see `run_backend` for the arguments."""
    size = backend.batch_size
    views = {} if num_views is None else {"num_views": num_views}
    config = replace(config, video=replace(config.video, **(backend.actions.video | views)))
    log.unlink(missing_ok=True)  # of an earlier evaluation
    bad_inputs = BadInputs(source, config.max_bad_fraction, log, "--max_bad_fraction")
    with eval_batches(source, config, backend.preprocess, batch_size=size, bad_inputs=bad_inputs) as batches:
        yield with_progress(batches, -(-len(source) // size))


def _logits(backend: JaxBackend, images: np.ndarray) -> np.ndarray:
    """Return class logits; for clips, [b, views, frames, ...], the log of the mean probabilities over views."""
    if images.ndim < 6:
        return backend.logits(images)
    probs = [backend.predict(images[:, view]) for view in range(images.shape[1])]
    return np.log(np.maximum(np.mean(probs, axis=0), np.finfo(np.float32).tiny))


def _command(
    model: str,
    data: str,
    output: Path,
    classes: Sequence[str],
    batch_size: int,
    max_bad_fraction: float,
    num_views: int | None,
) -> str:
    """Return the command line that reproduces the result."""
    flags = [f"--model={model}", f"--data={data}", f"--output={output}"]
    flags += [f"--classes={','.join(classes)}"] if classes else []
    flags += [f"--batch_size={batch_size}", f"--max_bad_fraction={max_bad_fraction:g}"]
    flags += [f"--num_views={num_views}"] if num_views is not None else []
    return shlex.join(["python", "scripts/evaluate.py", *flags])


def with_progress(batches: Iterable[T], total: int | None) -> Iterator[T]:
    """Yield the batches, with a progress bar on a terminal; `total` None: their number isn't known."""
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    yield from track(batches, "evaluating", total, console=console, transient=True, disable=not console.is_terminal)


def print_result(result: EvalResult | MultiLabelResult, output: str | Path) -> None:
    """Print the result and the paths of the files."""
    metrics, output = result.metrics, Path(output)
    rows = [("images", str(metrics["num_examples"]))]
    if metrics["num_unreadable"]:
        rows.append(("unreadable", f"{metrics['num_unreadable']}, listed in {output / 'bad_inputs.jsonl'}"))
    headlines = HEADLINE_METRICS if isinstance(result, EvalResult) else MULTI_LABEL_HEADLINES
    rows += [(title, f"{metrics[name]:.3f}") for name, title, _ in headlines]
    cli.print_rows([*rows, ("report", str(output / "report.html"))])
    print(verdict(metrics))
