"""Opening a run: from a config to a locked work folder with checkpoints, sinks and trackers."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from etils import epath

from clip_har_jax import cli, remote
from clip_har_jax.config import RunConfig
from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.files import read_json
from clip_har_jax.lock import FolderLock
from clip_har_jax.mlops.tracking import Trackers, check_trackers, read_run_info
from clip_har_jax.models.factory import make_base
from clip_har_jax.parallel import distributed
from clip_har_jax.parallel.compile_cache import keep_compiled
from clip_har_jax.settings import WARNED
from clip_har_jax.trainer import screen
from clip_har_jax.trainer.pairs import tokenizer_texts
from clip_har_jax.trainer.record import RecordSink, continue_account, data_record, update_record, write_record
from clip_har_jax.trainer.result import Result
from clip_har_jax.trainer.retention import Retention
from clip_har_jax.trainer.run import Run, setup
from clip_har_jax.trainer.run_data import load_data, load_retention, validates_on_test
from clip_har_jax.trainer.workdir import claim_config, clear_other_run, disk_faults, make_workdir
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.guards import StopSignal
from clip_har_jax.training.recipes import check_method
from clip_har_jax.training.sinks import ConsoleSink, JsonlSink, Sink
from clip_har_jax.training.time_account import TimeAccount


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of `train` beside the config."""

    sinks: Sequence[Sink]
    quiet: bool
    profile_steps: tuple[int, int] | None
    restart: bool
    begin: float  # `time.monotonic()`


@dataclass
class Job:
    """A run and everything that is open during it; its arrays aren't made yet."""

    run: Run
    options: TrainOptions
    checkpointer: Checkpointer
    times: TimeAccount
    sinks: list[Sink]
    trackers: Trackers | None
    stop: StopSignal
    retention: Retention | None
    is_repeated: bool  # a finished run, started again unchanged

    def end(self, steps: int, **facts: Any) -> Result:
        """Return the result, with the time spent until now, which is also written to run.json."""
        finished = facts.get("model") is not None
        spent = update_record(self.run, self.times, last_step=facts.pop("last_step"), finished=finished)
        seconds = time.monotonic() - self.options.begin
        given = {"model": None, "metrics": {}, "exit_code": 0, **facts}
        return Result(self.run.workdir, steps=steps, time_spent=spent, seconds=seconds, **given)


def prepare(stack: ExitStack, config: RunConfig, workdir: str | os.PathLike[str], options: TrainOptions) -> Job:
    """Return the run with its work folder locked and everything open; closing `stack` closes it."""
    keep_compiled()
    check_trackers(config.trackers, workdir)
    check_method(config.method, config.data.multi_label)
    data, retention_data = load_data(config), load_retention(config)
    if not options.quiet and validates_on_test(config):
        screen.warn(
            f"config.data.val={config.data.val} has no validation images, so its test images choose what is kept, and "
            "a figure on them is no test; leave config.data.val empty to hold out a part of data.train"
        )
    texts = [*data.texts, *(tokenizer_texts(config, data.train) if isinstance(data.train, PairSources) else ())]
    base = make_base(config.model.name, texts, config.model.image_size_px, config.model.temporal)
    folder = make_workdir(workdir)
    stack.enter_context(disk_faults(folder))
    lock = FolderLock(folder)
    fingerprints = {"train": data.train.fingerprint, "val": data.val.fingerprint} if options.restart else None
    changes = distributed.on_main(lambda: _claim(stack, lock, config, folder, fingerprints))
    checkpointer = stack.enter_context(Checkpointer(folder / "checkpoints", config.checkpoint))
    step = checkpointer.newest_whole() or 0
    position = checkpointer.position(step) if step else {}
    run = setup(config, folder, data, base, position, options.profile_steps)
    record = read_json(folder / "run.json") or {}
    times = stack.enter_context(continue_account(record, position, options.begin))
    changes += _data_changes(run, record)
    write_record(run, times, changes)
    trackers = Trackers(config.trackers, read_run_info(folder)) if distributed.is_main() else None
    sinks = _open_sinks(stack, run, RecordSink(run, times, lock), trackers, options)
    stop = stack.enter_context(StopSignal())
    retention = Retention(run, retention_data) if retention_data else None
    # By the hash: `changes` concern checkpoints, which zero_shot and the fitted heads don't write.
    same_config = record.get("config_hash") == config.digest
    is_repeated = bool(record.get("finished")) and same_config and not changes
    return Job(run, options, checkpointer, times, sinks, trackers, stop, retention, is_repeated)


def _claim(
    stack: ExitStack, lock: FolderLock, config: RunConfig, workdir: epath.Path, fingerprints: dict[str, str] | None
) -> list[dict[str, Any]]:
    """Lock the work folder and write its config; return the settings that changed since the run began.

    Args:
      fingerprints: of the data; the files of another run are removed. None: they stay.
    """
    with disk_faults(workdir):
        stack.enter_context(lock)
        if fingerprints is not None:
            clear_other_run(workdir, config, fingerprints)
        changes = claim_config(workdir, config)
    for change in changes:
        if change.policy == WARNED:
            screen.warn(f"config.{change.key} was {change.old!r}, is now {change.new!r}")
    return [dataclasses.asdict(change) for change in changes]


def _data_changes(run: Run, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the data whose contents changed since the last start under the same config key; warn of them."""
    changes = []
    for name, now in data_record(run).items():
        before = record.get("data", {}).get(name, now)
        if before["fingerprint"] == now["fingerprint"]:
            continue
        old, new = (f"{data['num_examples'] or 'unknown'} examples" for data in (before, now))
        changes.append({"key": f"data.{name}", "old": old, "new": new, "policy": WARNED})
        if distributed.is_main():
            screen.warn(
                f"the files of config.data.{name} aren't those of the last start ({old}, now {new}); from here on, the "
                "run reads other data than an uninterrupted run would"
            )
    return changes


def _open_sinks(
    stack: ExitStack, run: Run, record: RecordSink, trackers: Trackers | None, options: TrainOptions
) -> list[Sink]:
    """Return the receivers of the metrics, and print an overview of the run; only on process 0."""
    if not distributed.is_main():
        return []
    sinks: list[Sink] = [JsonlSink(run.workdir / "metrics.jsonl", run.first_step), record, *options.sinks]
    sinks += [trackers] if trackers else []
    if not options.quiet:
        if (read_json(run.workdir / "run.json") or {}).get("git_dirty"):
            screen.warn("the code has uncommitted changes; run.json records git_dirty")
        cli.print_tally("config.data.train", run.data.train.tally)
        if run.config.data.val:
            cli.print_tally("config.data.val", run.data.val.tally)
        screen.print_overview(run)
        sinks.append(ConsoleSink(run.num_steps, run.first_step))
    for sink in sinks:
        stack.push(lambda _, error, __, close=sink.close: remote.leave(run.workdir, error, close))
    return sinks
