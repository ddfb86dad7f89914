"""run.json: the identity of a run and its time by category, kept up to date while it runs."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from clip_har_jax.files import read_json, write_json
from clip_har_jax.lock import FolderLock
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.parallel.mesh import AXES
from clip_har_jax.trainer.provenance import make_record
from clip_har_jax.trainer.run import Run
from clip_har_jax.training.sinks import Metrics
from clip_har_jax.training.time_account import TimeAccount


def data_record(run: Run) -> dict[str, dict[str, Any]]:
    """Return the identity of the training and validation data, by name."""
    specs = {"train": run.config.data.train, "val": run.config.data.val or run.config.data.train}
    sources = {"train": run.data.train, "val": run.data.val}
    return {
        name: {
            "spec": specs[name],
            "num_examples": source.num_examples,
            "fingerprint": source.fingerprint,
            "manifest_sha256": source.manifest_sha256,
            "listing": source.tally.to_json(),
        }
        for name, source in sources.items()
    }


def write_record(run: Run, times: TimeAccount, changes: Sequence[Mapping[str, Any]]) -> None:
    """Write run.json at a start.

    Args:
      changes: the settings that differ from the last start.
    """
    if not distributed.is_main():
        return
    old = read_json(run.workdir / "run.json")
    state, frozen = run.program.abstract_state(), run.program.abstract_frozen()
    facts = {
        "data": data_record(run),
        "start": {"model": run.config.model.name, "weights": "random" if run.base.params is None else "pretrained"},
        "method": run.config.method.name,
        "mesh": {axis: run.mesh.shape[axis] for axis in AXES},
        "param_bytes_per_device": sharding.bytes_per_device((state.params, frozen)),
        "num_steps": run.num_steps,
        "trainable_parameters": sum(value.size for value in state.params.values()),
        "optimizer_bytes_per_device": sharding.bytes_per_device(state.opt_state),
        "fit": (old or {}).get("fit", {}),
        "starts": (old or {}).get("starts", 0) + 1,
        "config_changes": [
            *(old or {}).get("config_changes", []),
            *({"step": run.first_step, **change} for change in changes),
        ],
        "last_step": run.first_step,
        "goodput": times.seconds(),
    }
    write_json(run.workdir / "run.json", make_record(run.config, facts, old))


def update_record(run: Run, times: TimeAccount, **facts: Any) -> dict[str, float]:
    """Write facts and the time until now to run.json; return the seconds by category."""
    seconds = times.seconds()
    if distributed.is_main():
        record = read_json(run.workdir / "run.json") or {}
        write_json(run.workdir / "run.json", {**record, **facts, "goodput": seconds})
    return seconds


def continue_account(record: Mapping[str, Any], position: Mapping[str, Any], begin: float) -> TimeAccount:
    """Return the time account of all starts. Time that they spent after the checkpoint to resume from is lost.

    Args:
      record: run.json of the last start; empty: there was none.
      position: of the checkpoint; empty: none.
      begin: `time.monotonic()` when this start began.
    """
    last, saved = record.get("goodput"), position.get("goodput")
    if not last or not saved:
        return TimeAccount(lost_s=sum(last.values()) if last else 0.0, begin=begin)
    if record.get("last_step", 0) <= position["step"]:
        return TimeAccount(last, begin=begin)
    return TimeAccount(saved, max(0.0, sum(last.values()) - sum(saved.values())), begin)


class RecordSink:
    """A sink that keeps the time in run.json up to date, in case of a kill, and ends a run that lost its folder."""

    EVERY_S = 10.0

    def __init__(self, run: Run, times: TimeAccount, lock: FolderLock):
        self._run, self._times, self._lock, self._written = run, times, lock, time.monotonic()

    def write(self, step: int, metrics: Metrics) -> None:
        self._lock.check()
        if time.monotonic() - self._written > self.EVERY_S:
            update_record(self._run, self._times, last_step=step, finished=False)
            self._written = time.monotonic()

    def close(self) -> None:
        """Do nothing: there is no buffer."""
