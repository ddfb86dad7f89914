"""Data in, a fine-tuned model folder out."""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath

from clip_har_jax import bundle, cli
from clip_har_jax.config import RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.calibration import calibrate
from clip_har_jax.files import is_local, read_json
from clip_har_jax.lock import FolderLock
from clip_har_jax.mlops.tracking import FINISHED, STOPPED, Trackers, check_trackers, read_run_info
from clip_har_jax.models.factory import make_start
from clip_har_jax.parallel import distributed
from clip_har_jax.settings import WARNED
from clip_har_jax.trainer.artifacts import (
    data_record,
    print_overview,
    record_goodput,
    write_model,
    write_record,
    write_report,
)
from clip_har_jax.trainer.retention import Retention, choose_wise_ft
from clip_har_jax.trainer.run import Run
from clip_har_jax.trainer.run_data import load_data, load_retention, validates_on_test
from clip_har_jax.trainer.workdir import (
    claim_config,
    clear_other_run,
    disk_faults,
    make_workdir,
)
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.goodput import Goodput, productive_share
from clip_har_jax.training.guards import StopSignal
from clip_har_jax.training.recipes import check_method
from clip_har_jax.training.sinks import ConsoleSink, JsonlSink, Metrics, Sink, write_curves

EXIT_RETENTION = 3  # more zero-shot accuracy was lost than the config allows


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    workdir: epath.Path
    model: epath.Path | None  # None where a signal stopped the run first
    steps: int
    metrics: dict[str, Any]  # of the model folder, on the validation data
    goodput: dict[str, float]  # seconds by category, over all starts
    seconds: float
    exit_code: int  # 0, 128 + the signal's number, or `EXIT_RETENTION`


def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    sinks: Sequence[Sink] = (),
    quiet: bool = False,
    profile_steps: tuple[int, int] | None = None,
    restart: bool = False,
) -> Result:
    """Trains a model, or continues where the run in `workdir` stopped.

    With several processes all of them call this; the first one writes the files and speaks.

    Args:
      config: the run.
      workdir: config.json, run.json, metrics.jsonl, checkpoints/, eval/ and model/ are written there. A folder, or an
        object store's address such as gs://bucket/run.
      sinks: further receivers of the metrics.
      quiet: nothing on the screen.
      profile_steps: first and last step of a trace, written to profile/.
      restart: begin anew unless the folder holds an unfinished run of the same config and data, as pipelines want it.

    Raises:
      UserError: a mistake in the config or the data, found before any compute where it can be; a run that can't go on.
    """
    begin, quiet = time.monotonic(), quiet or not distributed.is_main()
    _keep_compiled()
    check_trackers(config.trackers, workdir)
    check_method(config.method)
    data, retention_data = load_data(config), load_retention(config)
    if not quiet and validates_on_test(config):
        print(
            f"warning: config.data.val={config.data.val} has no validation images, so its test images choose what is "
            "kept, and a figure on them is no test; leave config.data.val empty to hold out a part of data.train",
            file=sys.stderr,
        )
    start = make_start(config.model.name, data.texts, config.model.image_size_px)
    folder = make_workdir(workdir)
    with disk_faults(folder), ExitStack() as stack:
        lock = FolderLock(folder)
        fingerprints = {"train": data.train.fingerprint, "val": data.val.fingerprint} if restart else None
        changes = on_main(lambda: _claim(stack, lock, folder, config, fingerprints))
        checkpointer = stack.enter_context(Checkpointer(folder / "checkpoints", config.checkpoint))
        step = checkpointer.newest_whole() or 0
        position = checkpointer.position(step) if step else {}
        run = Run(config, folder, data, start, position, profile_steps)
        state = checkpointer.restore(run.state, step) if step else run.state
        record = read_json(folder / "run.json") or {}
        goodput = stack.enter_context(continue_goodput(record, position, begin))
        changes += _data_changes(run, record)
        write_record(run, goodput, changes)
        if not quiet:
            cli.print_tally("config.data.train", data.train.tally)
            if config.data.val:
                cli.print_tally("config.data.val", data.val.tally)
            _warn_of_dirty_code(folder)
        trackers = Trackers(config.trackers, read_run_info(folder)) if distributed.is_main() else None
        all_sinks = _make_sinks(run, goodput, lock, [*sinks, *([trackers] if trackers else [])], quiet)
        for sink in all_sinks:
            stack.callback(sink.close)
        stop = stack.enter_context(StopSignal())
        goodput.claim("start")
        retention = Retention(run, retention_data) if retention_data else None
        with goodput.measure("evaluation"):
            before = retention.before() if retention else 0.0
        last_step = best = 0
        if run.program.method.recipe.learns_from == "steps":
            outcome = run.fit(state, checkpointer, all_sinks, goodput, stop)
            last_step = int(outcome.state.step)
            if outcome.stopped:
                if trackers:
                    trackers.status = STOPPED
                seconds = record_goodput(run, goodput, last_step)
                return Result(folder, None, last_step, {}, seconds, time.monotonic() - begin, stop.exit_code)
            if last_step < run.num_steps and not quiet:
                print(
                    f"ended   at step {last_step}: no better top-1 in {config.train.patience} evaluations "
                    "(train.patience)"
                )
            with goodput.measure("checkpoint"):
                best = checkpointer.best_whole()
                state = checkpointer.restore(outcome.state, best)
        else:
            with goodput.measure("evaluation"):
                write_step(all_sinks, 0, run.validate(state))
        with goodput.measure("evaluation"):
            state = choose_wise_ft(run, state, retention, quiet)
            passed = retention.check(before, retention.of(state)) if retention else True
            result = run.evaluate(state)
        if not passed and config.retention.fail:
            seconds = record_goodput(run, goodput, last_step)
            return Result(folder, None, best, result.metrics, seconds, time.monotonic() - begin, EXIT_RETENTION)
        with goodput.measure("checkpoint"):
            model = folder / "model"
            if not on_main(lambda: _is_done(record, changes, model)):
                calibration = calibrate(result.predictions.logits, result.predictions.label)
                model = write_model(run, state, calibration)
        if distributed.is_main():
            write_curves(folder / "metrics.jsonl", folder / "curves.csv")
        if config.trackers:
            report = write_report(run, best, result)
            if trackers:
                hand_over(trackers, model, report)
        seconds = record_goodput(run, goodput, last_step, finished=True)
    return Result(folder, model, best, result.metrics, seconds, time.monotonic() - begin, 0)


def write_step(sinks: Sequence[Sink], step: int, values: Metrics) -> None:
    for sink in sinks:
        sink.write(step, values)


def hand_over(trackers: Trackers, model: epath.Path, report: epath.Path) -> None:
    """Hands the results of a finished run to its trackers."""
    trackers.tag({"model_digest": read_json(model / bundle.MANIFEST)["digest"]})  # type: ignore[index]
    for name, folder in (("evaluation", report), ("model", model)):
        trackers.log_folder(name, local_copy(folder))
    trackers.status = FINISHED


def local_copy(folder: epath.Path) -> Path:
    """Return a folder itself, or a copy of one on an object store, which the trackers' libraries don't read."""
    if is_local(folder):
        return Path(folder)
    copy = Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def _keep_compiled() -> None:
    """Keep what is compiled on disk, so that a run that starts again compiles nothing; a folder that was set stays."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "clip_har_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _warn_of_dirty_code(folder: epath.Path) -> None:
    """Says that the run can't be traced to a commit; run.json and all that is made of it say so too."""
    if (read_json(folder / "run.json") or {}).get("git_dirty"):
        print("warning: the code has changes that no commit holds; run.json records git_dirty", file=sys.stderr)


def _claim(
    stack: ExitStack, lock: FolderLock, workdir: epath.Path, config: RunConfig, fingerprints: dict[str, str] | None
) -> list[dict[str, Any]]:
    """Locks the work folder for this run and writes its config; says what changed since the run began."""
    with disk_faults(workdir):
        stack.enter_context(lock)
        if fingerprints is not None:
            clear_other_run(workdir, config, fingerprints)
        changes = claim_config(workdir, config)
    for change in changes:
        if change.policy == WARNED:
            print(f"warning: config.{change.key} was {change.old!r}, is now {change.new!r}", file=sys.stderr)
    return [dataclasses.asdict(change) for change in changes]


def _is_done(record: Mapping[str, Any], changes: Sequence[Any], model: epath.Path) -> bool:
    """Return whether a finished run is started again as it was: its model stays, with the digest that others know it
    by.
    """
    if not record.get("finished") or changes:
        return False
    if not is_local(model):
        return (model / bundle.MANIFEST).exists()
    try:
        return bundle.verify(Path(model)) is not None
    except UserError:  # damaged: written anew
        return False


def _data_changes(run: Run, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Says which data are others than at the last start, though their config key is the same."""
    changes = []
    for name, now in data_record(run).items():
        before = record.get("data", {}).get(name, now)
        if before["fingerprint"] != now["fingerprint"]:
            old, new = (f"{data['num_examples']} examples" for data in (before, now))
            changes.append({"key": f"data.{name}", "old": old, "new": new, "policy": WARNED})
            if distributed.is_main():
                print(
                    f"warning: the files of config.data.{name} aren't those of the last start ({old}, now {new}); "
                    "what is read from here on isn't what an unbroken run would read",
                    file=sys.stderr,
                )
    return changes


def on_main(function: Callable[[], Any]) -> Any:
    """What `function`, run by the first process alone, returns (JSON) or raises as a `UserError`, on all of them."""
    outcome: dict[str, Any] = {}
    if distributed.is_main():
        try:
            outcome = {"value": function()}
        except UserError as error:
            outcome = {"error": str(error)}
    outcome = distributed.broadcast(outcome)
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def continue_goodput(record: Mapping[str, Any], position: Mapping[str, Any], begin: float) -> Goodput:
    """Return the time of the starts so far; what they spent after the checkpoint that is continued from is lost."""
    last, saved = record.get("goodput"), position.get("goodput")
    if not last or not saved:
        return Goodput(lost_s=sum(last.values()) if last else 0.0, begin=begin)
    if record.get("last_step", 0) <= position["step"]:
        return Goodput(last, begin=begin)
    return Goodput(saved, max(0.0, sum(last.values()) - sum(saved.values())), begin)


class RecordSink:
    """Keeps run.json's account of the time, for the case of a kill, and notices when the folder was taken over."""

    EVERY_S = 10.0

    def __init__(self, run: Run, goodput: Goodput, lock: FolderLock):
        self._run, self._goodput, self._lock, self._written = run, goodput, lock, time.monotonic()

    def write(self, step: int, metrics: Metrics) -> None:
        self._lock.check()
        if time.monotonic() - self._written > self.EVERY_S:
            record_goodput(self._run, self._goodput, step)
            self._written = time.monotonic()

    def close(self) -> None:
        """Nothing waits."""


def _make_sinks(run: Run, goodput: Goodput, lock: FolderLock, more: Sequence[Sink], quiet: bool) -> list[Sink]:
    """Where the metrics go; nowhere on processes other than the first."""
    if not distributed.is_main():
        return []
    jsonl = JsonlSink(run.workdir / "metrics.jsonl", run.first_step)
    sinks: list[Sink] = [jsonl, RecordSink(run, goodput, lock), *more]
    if not quiet:
        print_overview(run)
        sinks.append(ConsoleSink(run.num_steps, run.first_step))
    return sinks


def print_result(result: Result) -> None:
    """Return the result, where things lie, and where the time went."""
    rows = []
    if result.exit_code == EXIT_RETENTION:
        rows += [
            ("refused", "no model is written: more zero-shot accuracy was lost than config.retention.max_drop"),
            ("", "the checkpoints are kept; with other retention or wise_ft settings the same command goes on"),
        ]
    elif result.model is None:
        rows.append(("stopped", f"at step {result.steps}, saved; the same command continues"))
    else:
        rows += [
            ("top-1", f"{result.metrics['top1']:.3f} on {result.metrics['num_examples']} validation images"),
            ("macro F1", f"{result.metrics['macro_f1']:.3f}"),
            ("model", f"{result.model} (step {result.steps}, the best)"),
        ]
    split = [f"{name.replace('_', ' ')} {value:.0f} s" for name, value in result.goodput.items() if value >= 0.5]
    rows += [
        ("metrics", str(result.workdir / "metrics.jsonl")),
        ("time", f"{result.seconds:.0f} s"),
        ("goodput", f"{productive_share(result.goodput):.0%} of all starts' time ({', '.join(split)})"),
    ]
    cli.print_rows(rows)
