"""The training loop, which reads as the order of events: step, log, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import numpy as np

from clip_har_jax.batch import Batch
from clip_har_jax.parallel import distributed
from clip_har_jax.training.checkpoint import BEST_BY, Checkpointer
from clip_har_jax.training.goodput import Goodput
from clip_har_jax.training.guards import SkipGuard, StopSignal
from clip_har_jax.training.sinks import Sink, to_jsonable
from clip_har_jax.training.state import TrainState
from clip_har_jax.training.steps import TrainMetrics
from clip_har_jax.training.system import system_metrics


@dataclass(frozen=True)
class Schedule:
    """When a run does what, in steps."""

    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    global_batch_size: int
    first_example: int = 0  # examples seen before step 0 of this batch size; not 0 after the batch size was changed
    profile: tuple[int, int] | None = None  # first and last step of a trace
    patience: int = 0  # evaluations without a better one after which the run is done; 0: never

    def is_over(self, step: int, best_step: int | None) -> bool:
        """Return whether no more steps are to be made: all were, or the last ones brought nothing."""
        patience = self.patience * self.eval_every
        return step >= self.num_steps or (patience > 0 and best_step is not None and step - best_step >= patience)

    def examples_seen(self, step: int) -> int:
        return self.first_example + step * self.global_batch_size


@dataclass
class Meter:
    """The device metrics of the steps since the last log, and where their time went.

    Reading a metric waits for its step; `take` is therefore called one step late, when the device has the next one.
    """

    flops_per_step: int
    peak_flops: float | None  # of all devices together
    metrics: list[TrainMetrics] = field(default_factory=list)
    data_wait_s: float = 0.0
    begin: float = field(default_factory=time.monotonic)

    def take(self, batch_size: int) -> dict[str, float | None]:
        """Return the averages since the last `take`, which starts the next interval."""
        total = reduce(lambda a, b: a.merge(b), jax.device_get(self.metrics))
        now = time.monotonic()
        elapsed, steps = now - self.begin, len(self.metrics)
        with np.errstate(invalid="ignore"):  # the mean over no example, where all updates were left out
            computed = total.compute()
        values: dict[str, float | None] = {f"train/{name}": to_jsonable(value) for name, value in computed.items()}
        values["train/images_per_s"] = steps * batch_size / elapsed
        values["train/data_wait_fraction"] = self.data_wait_s / elapsed
        values["train/mfu"] = None
        if self.peak_flops is not None:
            values["train/mfu"] = steps * self.flops_per_step / elapsed / self.peak_flops
        self.metrics, self.data_wait_s, self.begin = [], 0.0, now
        return values | system_metrics()


@dataclass
class Outcome:
    """How the loop ended."""

    state: TrainState
    stopped: bool  # by a signal, before the last step


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics, jax.Array]],
    batches: Iterator[Batch],
    evaluate: Callable[[TrainState], Mapping[str, float]],
    schedule: Schedule,
    checkpointer: Checkpointer,
    sinks: Sequence[Sink],
    meter: Meter,
    goodput: Goodput,
    skips: SkipGuard,
    stop: StopSignal,
    profile_dir: str,
) -> Outcome:
    """Trains from `state` to the last step, to one after which nothing gets better, or to a signal.

    Args:
      train_step: donates the state that it is given.
      batches: endless, placed on the mesh, beginning at the state's step.
      evaluate: validation metrics of a state.
      stop: read between steps; a stopped run has saved its last step, the same one on all processes.
      profile_dir: where the trace of `schedule.profile` is written.

    Raises:
      TooManySkippedError: updates aren't finite any more.
    """

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        for sink in sinks:
            sink.write(step, metrics)

    def position(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "examples_seen": schedule.examples_seen(step),
            "global_batch_size": schedule.global_batch_size,
            "goodput": goodput.seconds(),
            "best_step": best_step,
        }

    best, stopped = checkpointer.best_metric(), False
    start = saved = int(state.step)
    best_step = checkpointer.position(start).get("best_step") if start else None
    values: Mapping[str, float] = {}
    trace_begin, trace_end = schedule.profile or (0, 0)
    tracing = False
    meter.begin = time.monotonic()
    steps = range(start + 1, schedule.num_steps + 1)
    for step in () if schedule.is_over(start, best_step) else steps:
        if step == trace_begin:
            jax.profiler.start_trace(profile_dir, create_perfetto_trace=True)
            tracing = True
        wait_begin = time.monotonic()
        with goodput.measure("data_wait"):
            batch = next(batches)
        meter.data_wait_s += time.monotonic() - wait_begin
        # The steps up to here are read only now that the next one's batch is at hand and the device has work queued.
        late = (step - 1) % schedule.log_every == 0 and meter.metrics
        state, metrics, skipped = train_step(state, batch)
        if late:
            write(step - 1, meter.take(schedule.global_batch_size))
        meter.metrics.append(metrics)
        skips.watch(step, skipped, batch.index)

        stopped = distributed.agree_to_stop(step, stop.received is not None) and step < schedule.num_steps
        last = stopped or step == schedule.num_steps
        if tracing and (step == trace_end or last):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False
        values = {}
        if step % schedule.eval_every == 0 or step == schedule.num_steps:
            write(step, meter.take(schedule.global_batch_size))
            with goodput.measure("evaluation"):
                values = evaluate(state)
            write(step, values)
            meter.begin = time.monotonic()
        improved = bool(values) and (best is None or values[BEST_BY] > best)
        if improved:
            best, best_step = values[BEST_BY], step
        last = last or (bool(values) and schedule.is_over(step, best_step))
        if step % schedule.checkpoint_every == 0 or improved or last:
            if step % schedule.log_every == 0 and meter.metrics:  # a start that continues here won't write them
                write(step, meter.take(schedule.global_batch_size))
            with goodput.measure("checkpoint"):
                checkpointer.save(state, position(step), values)
            saved = step
        if last:
            break
    if tracing:  # the run was over before the trace was
        jax.profiler.stop_trace()
    if meter.metrics:
        write(saved, meter.take(schedule.global_batch_size))
    skips.finish()
    with goodput.measure("checkpoint"):
        checkpointer.finish(state, position(saved), values)
    return Outcome(state, stopped)
