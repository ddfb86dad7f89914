"""The training loop, in the order of events: step, log, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from clip_har_jax.parallel import distributed
from clip_har_jax.training.checkpoint import Checkpointer, best_by
from clip_har_jax.training.guards import SkipGuard, StopSignal
from clip_har_jax.training.meter import Meter
from clip_har_jax.training.profiler import Profiler
from clip_har_jax.training.sinks import Metrics, Sink
from clip_har_jax.training.state import TrainState
from clip_har_jax.training.steps import PairMetrics, TrainMetrics
from clip_har_jax.training.time_account import TimeAccount


@dataclass(frozen=True)
class Timetable:
    """The steps at which a run logs, evaluates, saves and ends."""

    num_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    global_batch_size: int
    first_example: int = 0  # examples seen before step 0 of this batch size; not 0 after the batch size was changed
    patience: int = 0  # evaluations without improvement that end the run; 0: never

    def is_over(self, step: int, best_step: int | None) -> bool:
        """Return whether all steps are done, or the validation metric hasn't improved for `patience` evaluations."""
        patience = self.patience * self.eval_every
        return step >= self.num_steps or (patience > 0 and best_step is not None and step - best_step >= patience)

    def evaluates_at(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.num_steps

    def examples_seen(self, step: int) -> int:
        return self.first_example + step * self.global_batch_size


@dataclass
class Best:
    """The highest validation accuracy so far, and its step."""

    value: float | None
    step: int | None

    def improve(self, step: int, values: Mapping[str, float]) -> bool:
        """Return whether these validation metrics are the best so far, and store them if so."""
        if not values or (self.value is not None and best_by(values) <= self.value):
            return False
        self.value, self.step = best_by(values), step
        return True


@dataclass
class Loop:
    """The parts that the training loop works with.

    Attributes:
      train_step: donates its state argument.
      batches: endless, placed on the mesh, starting at the state's step.
      evaluate: returns the validation metrics of a state.
      data_position: returns the position of the data after a step, if the step's number doesn't tell it; all processes
        call it.
      stop: read between steps.
    """

    timetable: Timetable
    train_step: Callable[[TrainState, Any], tuple[TrainState, TrainMetrics | PairMetrics, jax.Array]]
    batches: Iterator[Any]
    evaluate: Callable[[TrainState], Mapping[str, float]]
    checkpointer: Checkpointer
    sinks: Sequence[Sink]
    meter: Meter
    times: TimeAccount
    skips: SkipGuard
    stop: StopSignal
    profiler: Profiler
    data_position: Callable[[int], Mapping[str, Any]] = lambda step: {}

    def next_batch(self) -> Any:
        """Return the next batch and measure the wait for it."""
        begin = time.monotonic()
        with self.times.measure("data_wait"):
            batch = next(self.batches)
        self.meter.data_wait_s += time.monotonic() - begin
        return batch

    def log(self, step: int) -> None:
        """Write the metrics of the steps since the last log, if there are any."""
        if self.meter.metrics:
            self.write(step, self.meter.read())

    def write(self, step: int, metrics: Metrics) -> None:
        for sink in self.sinks:
            sink.write(step, metrics)

    def validate(self, step: int, state: TrainState) -> Mapping[str, float]:
        """Write and return the validation metrics of a state."""
        self.log(step)
        with self.times.measure("evaluation"):
            values = self.evaluate(state)
        self.write(step, values)
        self.meter.restart()
        return values

    def save(self, step: int, state: TrainState, best: Best, values: Mapping[str, float]) -> None:
        """Start saving a state; `values` are its validation metrics, if it was evaluated."""
        if step % self.timetable.log_every == 0:  # a run that resumes here won't log this step again
            self.log(step)
        # Orbax moves arrays to the host implicitly.
        with self.times.measure("checkpoint"), jax.transfer_guard("allow"):
            self.checkpointer.save(state, self.position(step, best), values)

    def position(self, step: int, best: Best) -> dict[str, Any]:
        """Return the contents of a checkpoint beside the state."""
        return {
            "step": step,
            "examples_seen": self.timetable.examples_seen(step),
            "global_batch_size": self.timetable.global_batch_size,
            "goodput": self.times.seconds(),
            "best_step": best.step,
            **self.data_position(step),
        }


def train_loop(loop: Loop, state: TrainState) -> tuple[TrainState, bool]:
    """Train from `state` (donated) to the last step, the end of `patience` or a signal.

    Only explicit transfers between host and device are allowed.

    Returns:
      The last state, which is saved, and whether a signal stopped the run; if so, at the same step on all processes.

    Raises:
      TooManySkippedError: too many updates in a row weren't finite.
    """
    table = loop.timetable
    first = saved = int(jax.device_get(state.step))
    best = Best(loop.checkpointer.best_metric(), loop.checkpointer.position(first).get("best_step") if first else None)
    stopped = False
    values: Mapping[str, float] = {}
    steps = range(first + 1, table.num_steps + 1)
    loop.meter.restart()
    with jax.transfer_guard("disallow"), loop.profiler:
        for step in () if table.is_over(first, best.step) else steps:
            loop.profiler.before(step)
            batch = loop.next_batch()
            log_last_step = (step - 1) % table.log_every == 0
            state, metrics, skipped = loop.train_step(state, batch)
            if log_last_step:  # now the device has the next step to work on
                loop.log(step - 1)
            loop.meter.metrics.append(metrics)
            loop.skips.watch(step, skipped, batch.index)
            loop.profiler.after(step, state)

            stopped = distributed.agree_to_stop(step, loop.stop.received is not None) and step < table.num_steps
            values = loop.validate(step, state) if table.evaluates_at(step) else {}
            improved = best.improve(step, values)
            is_last = stopped or step == table.num_steps or (bool(values) and table.is_over(step, best.step))
            if step % table.checkpoint_every == 0 or improved or is_last:
                loop.save(step, state, best, values)
                saved = step
            if is_last:
                break
    loop.log(saved)
    loop.skips.finish()
    with loop.times.measure("checkpoint"):
        loop.checkpointer.finish(state, loop.position(saved, best), values)
    return state, stopped
