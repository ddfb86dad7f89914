"""The output files of a training: model folder, LoRA's adapter, report for trackers, examples of failed updates."""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clip_har_jax import bundle
from clip_har_jax.data.sources import Source
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.calibration import calibrate
from clip_har_jax.evaluation.history import read_history
from clip_har_jax.evaluation.multi_label import MultiLabelResult, calibrate_labels
from clip_har_jax.evaluation.output import write_result
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.files import is_local, write_json
from clip_har_jax.folders import replace_folder
from clip_har_jax.models.head_file import write_head
from clip_har_jax.models.hf_layout import TABLES
from clip_har_jax.models.open_clip import is_open_clip
from clip_har_jax.models.params import Params
from clip_har_jax.models.peft_adapters import is_adapter, write_adapter
from clip_har_jax.models.pretrained import write_params
from clip_har_jax.parallel import distributed
from clip_har_jax.trainer.run import Run
from clip_har_jax.trainer.validation import Validation

ADAPTER = "adapter"  # folder of LoRA's updates in PEFT's layout, in the work folder


def write_examples(
    run: Run, examples: Mapping[int, Sequence[int]], names: Callable[[int, Sequence[int]], Sequence[str]]
) -> str:
    """Write the names of the examples whose batches gave non-finite updates; return the advice for the person.

    Args:
      run: the run.
      examples: the indices of each step.
      names: as of `batches.TrainBatches`.
    """
    process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run.workdir / f"nonfinite_examples{process}.json"
    write_json(
        path,
        [
            {
                "step": step,
                "examples": [
                    {"index": index, "input": name} for index, name in zip(indices, names(step, indices), strict=True)
                ],
            }
            for step, indices in sorted(examples.items())
        ],
    )
    return f"the examples stand in {path}. Lower config.optim.learning_rate, or look at them"


def write_report(validation: Validation, step: int, result: EvalResult | MultiLabelResult) -> epath.Path:
    """Write the report of an evaluation to eval/<step>/, for the trackers; without images, which the devices held."""
    run = validation.run
    folder = run.workdir / "eval" / str(step)
    if distributed.is_main():
        about = {"run": str(run.workdir), "step": str(step), "data": validation.data_name}
        index = result.index if isinstance(result, MultiLabelResult) else result.scores.index
        names = [find_name(run.data.val, int(i)) for i in index]
        if isinstance(result, MultiLabelResult):
            from clip_har_jax.evaluation.multi_label_report import write_multi_label_pages  # draws, as below

            with tempfile.TemporaryDirectory() as scratch:
                write_multi_label_pages(result, Path(scratch), names, about)
                _copy_files(Path(scratch), folder)
        elif is_local(folder):
            from clip_har_jax.evaluation.report import Details  # draws: its imports take a second on the way to a step

            details = Details(history=read_history(Path(run.workdir / "model")))
            write_result(result, Path(folder), names, about, details)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                write_result(result, scratch, names, about)
                _copy_files(Path(scratch), folder)
    return folder


def _copy_files(source: Path, folder: epath.Path) -> None:
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def write_model(validation: Validation, weights: Params, result: EvalResult | MultiLabelResult) -> epath.Path:
    """Calibrate the model, write its folder and seal it; the old one stays until the new one is complete.

    Args:
      validation: the run's, with its frozen parameters.
      weights: the trained parameters, on the mesh.
      result: of the validation examples, for the calibration.
    """
    run = validation.run
    embeddings = np.asarray(jax.device_get(validation.classes(weights).embeddings))
    params = distributed.fetch({**weights, **validation.frozen})
    target = run.workdir / "model"
    if not distributed.is_main():
        return target
    clip, head, head_params = run.program.method.export_params(params, embeddings)
    bias = float(clip["logit_bias"]) if head == "cosine" and "logit_bias" in clip else None
    if isinstance(result, MultiLabelResult):
        calibration = calibrate_labels(result.labels, result.logits, result.target)
    else:
        calibration = calibrate(result.predictions.logits, result.predictions.label, bias)

    def fill(folder: Path) -> None:
        write_params(folder, run.base.config, clip)
        if head_params:
            write_head(folder, head_params)
        run.base.tokenizer.save(folder)
        run.base.preprocess.save(folder)
        temperature, thresholds = calibration.temperature, calibration.thresholds
        actions = bundle.Actions(
            run.data.labels,
            run.data.prompts,
            temperature,
            head,
            thresholds,
            sigmoid=calibration.sigmoid,
            label_thresholds=calibration.label_thresholds,
        )
        if run.data.train.clips:
            actions = replace(actions, video=asdict(run.config.data.video))
        bundle.write_actions(folder, actions)
        write_json(folder / "calibration.json", calibration.report)
        (folder / "run.json").write_text((run.workdir / "run.json").read_text())
        bundle.seal(folder)

    if run.config.method.name == "lora":
        _write_adapter(run, params)
    _replace(fill, target)
    return target


def _write_adapter(run: Run, params: Params) -> None:
    """Write the updates of LoRA as an adapter of PEFT beside the model, or say why they can't be."""
    method, base = run.config.method, Path(run.config.model.name).expanduser()
    name = str(base.resolve()) if base.is_dir() else run.config.model.name
    if run.base.params is None:
        reason = "the base model has random weights"
    elif base.is_dir() and (is_open_clip(base) or is_adapter(base)):
        reason = "PEFT needs a base model in the Hugging Face layout"
    elif run.base.config.temporal != "mean":
        reason = "PEFT has no parts over time"
    else:
        table, rank, alpha = TABLES[run.base.config.family], method.lora_rank, method.lora_alpha
        try:
            _replace(lambda folder: write_adapter(folder, params, table, name, rank, alpha), run.workdir / ADAPTER)
            return
        except UserError as error:
            reason = str(error)
    print(f"no {ADAPTER}/ of PEFT is written: {reason}", file=sys.stderr)


def _replace(fill: Callable[[Path], None], target: epath.Path) -> None:
    if is_local(target):
        replace_folder(Path(target), fill)
    else:
        _upload_folder(fill, target)


def _upload_folder(fill: Callable[[Path], None], target: epath.Path) -> None:
    """Upload a folder that `fill` writes to an object store, the manifest last: a partial folder is never sealed."""
    with tempfile.TemporaryDirectory() as scratch:
        fill(Path(scratch))
        if target.exists():
            target.rmtree()
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == bundle.MANIFEST):
            (target / path.name).write_bytes(path.read_bytes())


def find_name(source: Source, index: int) -> str:
    """Return the name of an example by reading it."""
    try:
        return source[index].name.encode(errors="backslashreplace").decode()  # names may not be UTF-8
    except Exception:  # this example may be the faulty one
        return f"example {index}"
