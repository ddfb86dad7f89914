"""The training batches of a run, and the position in the data that its checkpoints hold."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from clip_har_jax.data.bad_inputs import BadPairs
from clip_har_jax.data.pair_batches import PairBatches
from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.data.pair_streams import StreamPlan, choose_num_streams
from clip_har_jax.data.pipeline import ProcessShare, ResumePoint, train_batches
from clip_har_jax.errors import UserError
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.trainer.artifacts import find_name
from clip_har_jax.trainer.pairs import pair_transform
from clip_har_jax.trainer.run import Run


class TrainBatches(NamedTuple):
    """The open batches of a run.

    Attributes:
      batches: of this process, on the host, from the run's position on.
      position: returns the position of the data after a step, one of the last few; empty if it is the step's number.
        All processes call it.
      names: returns the names of examples in the batch of a step, one of the last few, by their numbers in its `index`.
    """

    batches: Iterator[Any]
    position: Callable[[int], Mapping[str, Any]]
    names: Callable[[int, Sequence[int]], Sequence[str]]


@contextmanager
def open_batches(run: Run) -> Iterator[TrainBatches]:
    """Open the batches of a run, and close them at the end.

    Raises:
      UserError: other shards than those of the checkpoint, or streams of pairs that don't divide over the processes.
    """
    batch_size = run.timetable.global_batch_size
    share = ProcessShare(*sharding.process_shard(run.mesh, batch_size))
    source = run.data.train
    if isinstance(source, PairSources):
        with _open_pairs(run, source, share) as found:
            yield found
        return
    with train_batches(
        source,
        run.config.data,
        run.base.preprocess,
        seed=run.config.seed,
        global_batch_size=batch_size,
        bad_inputs=run.bad_inputs["train"],
        resume=ResumePoint(run.first_step, run.timetable.first_example),
        share=share,
    ) as batches:
        yield TrainBatches(batches, lambda step: {}, lambda step, indices: [find_name(source, i) for i in indices])


@contextmanager
def _open_pairs(run: Run, sources: PairSources, share: ProcessShare) -> Iterator[TrainBatches]:
    config, batch_size, saved = run.config, run.timetable.global_batch_size, run.position.get("pairs", {})
    if saved and saved["order"] != sources.order_digest:
        raise UserError(
            f"config.data.train: the shards aren't those of step {run.first_step}, so the position in them is void; put"
            " the same shards back, or start from the model in another --workdir"
        )
    count = saved.get("num_streams") or choose_num_streams(sources, share.count, batch_size, config.data.num_streams)
    if count % share.count or batch_size % count:
        raise UserError(
            f"the run reads {count} streams of pairs, which {share.count} processes and batches of {batch_size} don't "
            "share evenly; use as many processes as before"
        )
    plan = StreamPlan(sources, config.seed, count, config.data.shuffle_buffer)
    bad_pairs = BadPairs(config.data.max_bad_fraction, run.bad_inputs_log)
    batches = PairBatches(
        plan, pair_transform(run), batch_size, bad_pairs, saved.get("positions", ()), run.first_step, share
    )

    def position(step: int) -> Mapping[str, Any]:
        parts = distributed.gather(batches.positions(step))
        found = {int(number): at for part in parts for number, at in part.items()}
        positions = [found[number] for number in sorted(found)]
        return {"pairs": {"order": sources.order_digest, "num_streams": count, "positions": positions}}

    def names(step: int, rows: Sequence[int]) -> Sequence[str]:
        found = batches.names(step)
        return [found.get(row, f"row {row} of the batch") for row in rows]

    with batches:
        yield TrainBatches(batches, position, names)
