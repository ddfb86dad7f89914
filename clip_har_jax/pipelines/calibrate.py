"""Calibration of a model folder on held-out images, written as a new model folder."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from clip_har_jax import bundle, cli
from clip_har_jax.config import DataConfig, EvalConfig, make_config
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.calibration import CalibrationResult, calibrate
from clip_har_jax.files import write_json
from clip_har_jax.folders import replace_folder
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.pipelines.classed import ClassedSource
from clip_har_jax.pipelines.evaluate import run_backend

REWRITTEN = (bundle.MANIFEST, "actions.json", "calibration.json")


def calibrate_model(
    model: str,
    data: str,
    output: str | Path,
    batch_size: int = EvalConfig.batch_size,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
) -> CalibrationResult:
    """Calibrate a model folder, or any CLIP on the labels of the data, and write the result as a new folder.

    Args:
      model: a folder or a Hub name; it isn't changed.
      data: the SPEC of images that are neither training nor test data.
      output: the folder to write; it must not exist.
      batch_size: images in one forward pass.
      max_bad_fraction: accepted share of unreadable images.

    Raises:
      UserError: a mistake in the arguments, the model or the data.
    """
    output = Path(output)
    _check_output(output)
    config = make_config({"data": {"max_bad_fraction": max_bad_fraction}, "eval": {"batch_size": batch_size}})
    source = make_source(data, "val")
    backend = JaxBackend(model, (), source.labels, batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "bad_inputs.jsonl"
        predictions = run_backend(backend, ClassedSource(source, backend.labels, data), config.data, log).predictions
    bias = backend.logit_bias if backend.actions.head == "cosine" else None
    found = calibrate(predictions.logits * backend.actions.temperature, predictions.label, bias)
    actions = replace(
        backend.actions, temperature=found.temperature, thresholds=found.thresholds, sigmoid=found.sigmoid
    )

    def fill(folder: Path) -> None:
        _check_output(output)  # again, since another process may have written it
        for path in backend.path.rglob("*"):
            name = path.relative_to(backend.path)
            if path.is_file() and str(name) not in REWRITTEN and not any(part.startswith(".") for part in name.parts):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
        bundle.write_actions(folder, actions)
        about = {"data": data, "fingerprint": source.fingerprint, "calibrated_from": backend.digest}
        write_json(folder / "calibration.json", found.report | about)
        bundle.seal(folder, backend.digest)

    try:
        replace_folder(output, fill)
    except OSError as error:
        raise UserError(f"--output={output}: can't be written ({error.strerror}); nothing was left there") from error
    return found


def _check_output(output: Path) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output={output}: something is there; name a new folder, a sealed model is never changed")


def print_result(found: CalibrationResult, output: str | Path) -> None:
    """Print the temperature, the scores before and after, the abstention and the folder."""
    report = found.report
    before, after, told = report["before"], report["after"], report["abstention"]
    scores = (("nll", "NLL"), ("ece", "ECE"), ("ece_adaptive", "adaptive ECE"), ("brier", "Brier"))
    alone = report.get("sigmoid")
    cli.print_rows(
        [
            ("images", str(report["num_examples"])),
            ("temperature", f"{found.temperature:.3f}"),
            *((title, f"{before[name]:.3f} -> {after[name]:.3f}") for name, title in scores),
            *(
                (f"sigmoid's {title}", f"{alone['before'][name]:.3f} -> {alone['after'][name]:.3f}")
                for name, title in scores[:2]
                if alone
            ),
            ("abstains", f"below {found.thresholds['abstain']:.3f}: on {1 - told['answered']:.1%} of the images"),
            ("", f"which holds {told['mistakes_withheld']} of {told['mistakes']} mistakes"),
            ("model", str(output)),
        ]
    )
