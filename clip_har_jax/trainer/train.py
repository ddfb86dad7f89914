"""Data in, a fine-tuned model folder out."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
from etils import epath

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig
from clip_har_jax.data.pipeline import prefetch_to_mesh
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.multi_label import MultiLabelResult
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.evaluation.significance import RESAMPLES
from clip_har_jax.files import is_local
from clip_har_jax.mlops.tracking import FINISHED, STOPPED, hand_over
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.parallel.topology import find_chip
from clip_har_jax.trainer import screen
from clip_har_jax.trainer.artifacts import ADAPTER, write_examples, write_model, write_report
from clip_har_jax.trainer.batches import open_batches
from clip_har_jax.trainer.initial_state import initial_state, place_start
from clip_har_jax.trainer.pairs import measure_recall
from clip_har_jax.trainer.prepare import Job, TrainOptions, prepare
from clip_har_jax.trainer.record import update_record
from clip_har_jax.trainer.result import EXIT_RETENTION, USES, Result
from clip_har_jax.trainer.retention import choose_wise_ft
from clip_har_jax.trainer.run_data import unseen_spec, zero_shot_prompts
from clip_har_jax.trainer.validation import Validation
from clip_har_jax.trainer.zero_shot import ZeroShot
from clip_har_jax.training.guards import SkipGuard, TooManySkippedError
from clip_har_jax.training.loop import Loop, train_loop
from clip_har_jax.training.meter import Meter
from clip_har_jax.training.profiler import Profiler
from clip_har_jax.training.sinks import Sink, write_curves
from clip_har_jax.training.state import TrainState


@dataclass(frozen=True)
class Learned:
    """The result of the training steps."""

    validation: Validation
    weights: Params  # trainable parameters of the best checkpoint, on the mesh
    step: int  # of that checkpoint
    last_step: int
    stopped: bool  # by a signal; then there are no weights
    retained_before: float  # zero-shot accuracy on the retention data; 0 without a gate


@dataclass(frozen=True)
class Chosen:
    """The chosen weights and their accuracy."""

    weights: Params
    result: EvalResult | MultiLabelResult
    zero_shot: float | None  # accuracy of the base model on the same images; None: random weights, or itself
    passed: bool  # whether the retention gate passed


def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    sinks: Sequence[Sink] = (),
    quiet: bool = False,
    profile_steps: tuple[int, int] | None = None,
    restart: bool = False,
) -> Result:
    """Train a model, or continue the run in `workdir`.

    With several processes, all of them call this; process 0 writes the files and prints.

    >>> from clip_har_jax import make_config
    >>> config = make_config(
    ...     {
    ...         "data": {"train": "folder:images", "val": "folder:images", "num_workers": 0},
    ...         "model": {"name": "model"},
    ...         "train": {"num_steps": 2, "global_batch_size": 8},
    ...         "eval": {"batch_size": 8},
    ...     }
    ... )
    >>> result = train(config, "runs/mine", quiet=True)
    >>> result.model.name, result.exit_code
    ('model', 0)

    Args:
      config: the run.
      workdir: receives config.json, run.json, metrics.jsonl, checkpoints/, eval/ and model/. A folder, or the address
        of an object store such as gs://bucket/run.
      sinks: further receivers of the metrics.
      quiet: print nothing.
      profile_steps: first and last step of a trace, written to profile/.
      restart: start anew unless the folder holds an unfinished run of the same config and data; for pipelines.

    Raises:
      UserError: a mistake in the config or the data, found before any compute if possible; or the run can't continue.
    """
    options = TrainOptions(sinks, quiet or not distributed.is_main(), profile_steps, restart, time.monotonic())
    with ExitStack() as stack:
        job = prepare(stack, config, workdir, options)
        learned = learn(job)
        if learned.stopped:
            return job.end(learned.last_step, last_step=learned.last_step, exit_code=job.stop.exit_code)
        chosen = choose(job, learned)
        if not chosen.passed:
            return refuse(job, learned, chosen)
        return seal(job, learned, chosen)


def learn(job: Job) -> Learned:
    """Run the steps and return the weights of the best checkpoint, or the initial ones for a method without steps."""
    run, times = job.run, job.times
    state, frozen, probe = initial_state(run, job.checkpointer)
    if probe:
        update_record(run, times, fit=probe)
        if not job.options.quiet:
            screen.print_probe(probe)
    validation = Validation(run, frozen)
    times.count_rest("start")
    retained = 0.0
    if job.retention:
        with times.measure("evaluation"):
            retained = job.retention.measure_start(None if run.first_step else {**state.params, **frozen})
    if run.program.method.recipe.learns_from != "steps":
        with times.measure("evaluation"):
            values = validation.validate(state)
        for sink in job.sinks:
            sink.write(0, values)
        return Learned(validation, state.weights, 0, 0, False, retained)
    state, stopped = _make_steps(job, validation, state)
    last_step = int(jax.device_get(state.step))
    if stopped:
        if job.trackers:
            job.trackers.status = STOPPED
        return Learned(validation, {}, last_step, last_step, True, retained)
    del state  # before the best one is restored: never two on the devices
    if last_step < run.num_steps and not job.options.quiet:
        patience = run.timetable.patience
        metric = "mAP" if run.config.data.multi_label else "top-1"
        print(f"ended   at step {last_step}: no better {metric} in {patience} evaluations (train.patience)")
    with times.measure("checkpoint"):
        best = job.checkpointer.best_whole()
        weights = job.checkpointer.restore(run.program.abstract_state(), best).weights
    return Learned(validation, weights, best, last_step, False, retained)


def choose(job: Job, learned: Learned) -> Chosen:
    """Return the chosen weights, between the initial and the best ones, evaluated and compared with the baselines."""
    run, validation = job.run, learned.validation
    with job.times.measure("evaluation"):
        result: EvalResult | MultiLabelResult
        if run.config.data.multi_label:
            weights, result = learned.weights, validation.evaluate_multi_label(learned.weights, RESAMPLES)
        else:
            weights, result = choose_wise_ft(validation, learned.weights, job.retention, job.options.quiet)
        passed = True
        if job.retention:
            after = job.retention.top1({**weights, **validation.frozen})
            passed = job.retention.check(learned.retained_before, after)
        zero_shot = None
        compares = run.base.params is not None and run.base.config.has_texts and not run.config.data.multi_label
        if compares and run.config.method.name != "zero_shot":
            classifier = ZeroShot(run, run.data.labels, zero_shot_prompts(run.config, run.data.labels))
            zero_shot = float(classifier.right(place_start(run), run.data.val, run.bad_inputs["val"]).mean())
        if recall := measure_recall(run, {**weights, **validation.frozen}):
            result.metrics["retrieval"] = recall
    # With the name of the data: a report on other data must not show this zero-shot accuracy beside its result.
    baselines = {**result.metrics["baselines"], "zero_shot": zero_shot, "data": validation.data_name}
    headline = "map" if run.config.data.multi_label else "top1"
    facts = {name: result.metrics[name] for name in (headline, f"{headline}_interval")} | {"baselines": baselines}
    facts |= {"retrieval": recall} if recall else {}
    update_record(run, job.times, **facts)
    return Chosen(weights, result, zero_shot, passed or not run.config.retention.fail)


def refuse(job: Job, learned: Learned, chosen: Chosen) -> Result:
    """End a run whose weights the retention gate refuses: no model folder remains, not even an older one."""
    for folder in (job.run.workdir / "model", job.run.workdir / ADAPTER):
        if distributed.is_main() and folder.exists():
            folder.rmtree()
    end = {"last_step": learned.last_step, "metrics": chosen.result.metrics, "zero_shot": chosen.zero_shot}
    return job.end(learned.step, exit_code=EXIT_RETENTION, **end)


def seal(job: Job, learned: Learned, chosen: Chosen) -> Result:
    """Write the model folder, upload it to the trackers, and end the run."""
    run = job.run
    model = run.workdir / "model"
    with job.times.measure("checkpoint"):
        if not distributed.on_main(lambda: job.is_repeated and _is_whole(model)):
            write_model(learned.validation, chosen.weights, chosen.result)
    if distributed.is_main():
        write_curves(run.workdir / "metrics.jsonl", run.workdir / "curves.csv")
    if run.config.trackers:
        report = write_report(learned.validation, learned.step, chosen.result)
        if job.trackers:
            hand_over(job.trackers, model, report)
            job.trackers.status = FINISHED
    facts = {"metrics": chosen.result.metrics, "zero_shot": chosen.zero_shot, "unseen": unseen_spec(run.config)}
    uses = ("evaluate", "predict") if run.base.config.no_export else USES
    return job.end(learned.step, last_step=learned.last_step, model=model, uses=uses, **facts)


def _make_steps(job: Job, validation: Validation, state: TrainState) -> tuple[TrainState, bool]:
    """Return the last state and whether a signal stopped the run."""
    run, config, program, table = job.run, job.run.config, job.run.program, job.run.timetable
    rows = sharding.batch_sharding(run.mesh)
    frozen = validation.frozen
    classes = validation.prompts if program.trains_text else validation.classes(state.params)
    chip = find_chip(jax.devices()[0])
    peak = chip.peak_flops * jax.device_count() if chip else None
    with open_batches(run) as (batches, position, names):
        loop = Loop(
            table,
            lambda state, batch: program.train_step(state, frozen, classes, batch),
            prefetch_to_mesh(batches, lambda batch: sharding.put_local_rows(batch, rows)),
            validation.validate,
            job.checkpointer,
            job.sinks,
            Meter(program.flops_per_step(len(run.data.texts)), peak, table.global_batch_size),
            job.times,
            SkipGuard(config.train.max_skipped_steps),
            job.stop,
            Profiler(run.profile_steps if distributed.is_main() else None, os.fspath(run.workdir / "profile")),
            position,
        )
        try:
            return train_loop(loop, state)
        except TooManySkippedError as error:
            raise UserError(f"{error}; {write_examples(run, error.examples, names)}") from error


def _is_whole(model: epath.Path) -> bool:
    """Return whether a model folder is complete and sealed; on an object store, whether its last file exists."""
    if not is_local(model):
        return (model / bundle.MANIFEST).exists()
    try:
        return bundle.verify(Path(model)) is not None
    except UserError:  # damaged: write it again
        return False
