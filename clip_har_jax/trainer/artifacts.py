"""What a run writes into its work folder: its record, its overview, its report, its model."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from clip_har_jax import bundle
from clip_har_jax.data.sources import Source
from clip_har_jax.evaluation.calibration import Calibration
from clip_har_jax.evaluation.history import read_history
from clip_har_jax.evaluation.output import write_result
from clip_har_jax.evaluation.report import Details
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.files import is_local, read_json, write_json
from clip_har_jax.folders import replace_folder
from clip_har_jax.models.heads import write_head
from clip_har_jax.models.pretrained import write_params
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.parallel.mesh import AXES
from clip_har_jax.trainer.initial_params import describe_method
from clip_har_jax.trainer.provenance import make_record
from clip_har_jax.training.goodput import Goodput
from clip_har_jax.training.state import TrainState

if TYPE_CHECKING:
    from clip_har_jax.trainer.run import Run


def data_record(run: "Run") -> dict[str, dict[str, Any]]:
    """What identifies the training and the validation data, by name."""
    specs = {"train": run.config.data.train, "val": run.config.data.val or run.config.data.train}
    sources = {"train": run.data.train, "val": run.data.val}
    return {
        name: {
            "spec": specs[name],
            "num_examples": len(source),
            "fingerprint": source.fingerprint,
            "manifest_sha256": source.manifest_sha256,
            "listing": source.tally.to_json(),
        }
        for name, source in sources.items()
    }


def write_record(run: "Run", goodput: Goodput, changes: Sequence[Mapping[str, Any]]) -> None:
    """Write run.json."""
    if not distributed.is_main():
        return
    old = read_json(run.workdir / "run.json")
    changed = [{"step": run.first_step, **change} for change in changes]
    facts = {
        "data": data_record(run),
        "start": {"model": run.config.model.name, "weights": "random" if run.start.params is None else "pretrained"},
        "method": run.config.method.name,
        "mesh": {axis: run.mesh.shape[axis] for axis in AXES},
        "param_bytes_per_device": sharding.bytes_per_device((run.state.params, run.frozen)),
        "num_steps": run.num_steps,
        "trainable_parameters": sum(value.size for value in run.state.params.values()),
        "optimizer_bytes_per_device": sharding.bytes_per_device(run.state.opt_state),
        "fit": run.fit_report,
        "starts": (old or {}).get("starts", 0) + 1,
        "config_changes": [*(old or {}).get("config_changes", []), *changed],
        "last_step": run.first_step,
        "goodput": goodput.seconds(),
    }
    write_json(run.workdir / "run.json", make_record(run.config, facts, old))


def record_goodput(run: "Run", goodput: Goodput, step: int, finished: bool = False) -> dict[str, float]:
    """Brings the account of the time in run.json up to date, and returns it; `finished`: the model is written."""
    seconds = goodput.seconds()
    if distributed.is_main():
        record = read_json(run.workdir / "run.json") or {}
        write_json(run.workdir / "run.json", {**record, "last_step": step, "finished": finished, "goodput": seconds})
    return seconds


def print_overview(run: "Run") -> None:
    """What is about to run: data, model, mesh."""
    from clu import parameter_overview

    params = {**run.state.params, **run.frozen}
    text = parameter_overview.get_parameter_overview(params, include_stats=False)
    (run.workdir / "parameters.txt").write_text(text + "\n")
    count = sum(value.size for value in params.values())
    trainable = sum(value.size for value in run.state.params.values())
    mesh = " x ".join(f"{axis} {run.mesh.shape[axis]}" for axis in AXES if run.mesh.shape[axis] > 1) or "1 device"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"data    {len(run.data.train)} training and {len(run.data.val)} validation images, "
        f"{len(run.data.labels)} classes"
    )
    print(
        f"model   {run.config.model.name}, {count:,} parameters ({trainable:,} trainable), "
        f"listed in {run.workdir / 'parameters.txt'}"
    )
    print(f"method  {describe_method(run)}")
    if run.program.method.recipe.learns_from != "steps":
        return
    if run.first_step >= run.num_steps:
        print(f"run     all {run.num_steps} steps are done", flush=True)
        return
    print(
        f"run     {run.num_steps} steps of {run.config.train.global_batch_size} images on {mesh}{processes}"
        + (f", continuing at step {run.first_step}" if run.first_step else ""),
        flush=True,
    )


def write_examples(run: "Run", examples: Mapping[int, Sequence[int]]) -> str:
    """Names the examples of the batches whose update wasn't finite; returns what to do about it."""
    process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run.workdir / f"nonfinite_examples{process}.json"
    source = run.data.train
    write_json(
        path,
        [
            {"step": step, "examples": [{"index": index, "input": _name(source, index)} for index in indices]}
            for step, indices in sorted(examples.items())
        ],
    )
    return f"the examples stand in {path}. Lower config.optim.learning_rate, or look at them"


def write_report(run: "Run", step: int, result: EvalResult) -> epath.Path:
    """Write the report of an evaluation to eval/<step>/, for the trackers; without examples, which were on devices."""
    folder = run.workdir / "eval" / str(step)
    if distributed.is_main():
        about = {"run": str(run.workdir), "step": str(step), "data": run.config.data.val or "held out"}
        names = [_name(run.data.val, int(i)) for i in result.predictions.index]
        if is_local(folder):
            details = Details(history=read_history(Path(run.workdir / "model")))
            write_result(result, Path(folder), names, about, details)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                write_result(result, scratch, names, about)
                for path in Path(scratch).iterdir():
                    (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_model(run: "Run", state: TrainState, calibration: Calibration) -> epath.Path:
    """Write the model folder and seals it; the old one stays whole until the new one is."""
    weights = run.weights(state)
    embeddings = np.asarray(run.classes(weights).embeddings)
    params = distributed.fetch({**weights, **run.frozen})
    target = run.workdir / "model"
    if not distributed.is_main():
        return target
    clip, head, head_params = run.program.method.export_params(params, embeddings)

    def fill(folder: Path) -> None:
        write_params(folder, run.start.config, clip)
        if head_params:
            write_head(folder, head_params)
        run.start.tokenizer.save(folder)
        run.start.preprocess.save(folder)
        temperature, thresholds = calibration.temperature, calibration.thresholds
        actions = bundle.Actions(run.data.labels, run.data.prompts, temperature, head, thresholds)
        if run.data.train.clips:
            actions = replace(actions, video=asdict(run.config.data.video))
        bundle.write_actions(folder, actions)
        write_json(folder / "calibration.json", calibration.report)
        (folder / "run.json").write_text((run.workdir / "run.json").read_text())
        bundle.seal(folder)

    if is_local(target):
        replace_folder(Path(target), fill)
    else:
        _upload_folder(fill, target)
    return target


def _upload_folder(fill: Callable[[Path], None], target: epath.Path) -> None:
    """Put a folder written by `fill` on an object store; its manifest goes last, so that a part isn't sealed."""
    with tempfile.TemporaryDirectory() as scratch:
        fill(Path(scratch))
        if target.exists():
            target.rmtree()
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == bundle.MANIFEST):
            (target / path.name).write_bytes(path.read_bytes())


def _name(source: Source, index: int) -> str:
    try:
        return source[index].name.encode(errors="backslashreplace").decode()  # file names needn't be UTF-8
    except Exception:  # the very example may be what is wrong
        return f"example {index}"
