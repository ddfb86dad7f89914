"""The training loop, which reads as the order of events: step, log, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax

from clip_har_jax.batch import Batch
from clip_har_jax.training.checkpoint import BEST_BY, Checkpointer
from clip_har_jax.training.guards import StopSignal
from clip_har_jax.training.sinks import Sink, to_jsonable
from clip_har_jax.training.state import TrainState
from clip_har_jax.training.steps import TrainMetrics


@dataclass(frozen=True)
class Schedule:
    """When a run does what, in steps."""

    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    global_batch_size: int


@dataclass
class Meter:
    """The device metrics of the steps since the last log, and where their time went.

    Reading a metric waits for its step; `take` is therefore called one step late, when the device has the next one.
    """

    flops_per_image: int
    peak_flops: float | None  # of all devices together
    metrics: list[TrainMetrics] = field(default_factory=list)
    data_wait_s: float = 0.0
    begin: float = field(default_factory=time.monotonic)

    def take(self, batch_size: int) -> dict[str, float | None]:
        """The averages since the last `take`, which starts the next interval."""
        total = reduce(lambda a, b: a.merge(b), jax.device_get(self.metrics))
        now = time.monotonic()
        elapsed, images = now - self.begin, len(self.metrics) * batch_size
        values: dict[str, float | None] = {f"train/{k}": to_jsonable(v) for k, v in total.compute().items()}
        values["train/images_per_s"] = images / elapsed
        values["train/data_wait_fraction"] = self.data_wait_s / elapsed
        values["train/mfu"] = None
        if self.peak_flops is not None:
            values["train/mfu"] = images / elapsed * self.flops_per_image / self.peak_flops
        self.metrics, self.data_wait_s, self.begin = [], 0.0, now
        return values


@dataclass
class Outcome:
    """How the loop ended."""

    state: TrainState
    stopped: bool  # by a signal, before the last step


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]],
    batches: Iterator[Batch],
    evaluate: Callable[[TrainState], Mapping[str, float]],
    schedule: Schedule,
    checkpointer: Checkpointer,
    sinks: Sequence[Sink],
    meter: Meter,
    stop: StopSignal,
) -> Outcome:
    """Trains from `state` to the last step, or to a signal.

    Args:
      train_step: donates the state that it is given.
      batches: endless, placed on the mesh, beginning at the state's step.
      evaluate: validation metrics of a state.
      stop: read between steps; a stopped run has saved its last step.
    """

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        for sink in sinks:
            sink.write(step, metrics)

    def save(step: int, metrics: Mapping[str, float]) -> None:
        position = {
            "step": step,
            "examples_seen": step * schedule.global_batch_size,
            "global_batch_size": schedule.global_batch_size,
        }
        checkpointer.save(state, position, metrics)

    best = checkpointer.best_metric()
    start, saved = int(state.step), int(state.step)
    meter.begin = time.monotonic()
    for step in range(start + 1, schedule.num_steps + 1):
        wait_begin = time.monotonic()
        batch = next(batches)
        meter.data_wait_s += time.monotonic() - wait_begin
        # The steps up to here are read only now that the next one's batch is at hand and the device has work queued.
        late = (step - 1) % schedule.log_every == 0 and meter.metrics
        state, metrics = train_step(state, batch)
        if late:
            write(step - 1, meter.take(schedule.global_batch_size))
        meter.metrics.append(metrics)

        last = step == schedule.num_steps or stop.received is not None
        values: Mapping[str, float] = {}
        if step % schedule.eval_every == 0 or step == schedule.num_steps:
            write(step, meter.take(schedule.global_batch_size))
            values = evaluate(state)
            write(step, values)
            meter.begin = time.monotonic()
        improved = bool(values) and (best is None or values[BEST_BY] > best)
        best = values[BEST_BY] if improved else best
        if step % schedule.checkpoint_every == 0 or improved or last:
            save(step, values)
            saved = step
        if last:
            break
    if meter.metrics:
        write(saved, meter.take(schedule.global_batch_size))
    checkpointer.wait()
    return Outcome(state, int(state.step) < schedule.num_steps)
