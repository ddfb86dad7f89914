"""The iterators: batches read ahead and placed, threads that end with them."""

import threading
from collections.abc import Iterable
from dataclasses import replace

import pytest

from clip_har_jax.batch import Batch
from clip_har_jax.config import DataConfig
from clip_har_jax.data.pipeline import eval_batches, prefetch_to_mesh, train_batches
from clip_har_jax.data.sources import make_source
from tests.support.batches import PREPROCESS, ArraySource, counting_only, train, wait_until


def grain_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def test_closing_ends_the_threads() -> None:
    assert wait_until(lambda: not grain_threads())
    source = ArraySource(8)
    batches = train_batches(
        source, DataConfig(), PREPROCESS, seed=0, global_batch_size=4, bad_inputs=counting_only(source)
    )
    next(batches)
    assert grain_threads()
    batches.close()
    batches.close()
    assert wait_until(lambda: not grain_threads())
    with pytest.raises(StopIteration):
        next(batches)
    finished = eval_batches(source, DataConfig(), PREPROCESS, batch_size=4, bad_inputs=counting_only(source))
    assert len(list(finished)) == 2
    assert wait_until(lambda: not grain_threads()), "the end of the data closes too"


def test_prefetch_keeps_batches_ahead() -> None:
    taken: list[int] = []

    def numbers() -> Iterable[Batch]:
        for i in range(5):
            taken.append(i)
            yield Batch(i, i, i, i)

    placed = prefetch_to_mesh(iter(numbers()), lambda batch: -batch.image, size=2)
    assert taken == []
    assert next(placed) == 0
    assert taken == [0, 1, 2]
    assert list(placed) == [-1, -2, -3, -4]


def test_synthetic_set_runs_through() -> None:
    source = make_source("synthetic", "val")
    config = replace(DataConfig(), prefetch_batches=2)
    (batch,) = train(source, 1, config)
    assert batch.image.std() > 0
    assert source.labels[int(batch.label[0])] == source.labels[int(source.label_ids[batch.index[0]])]
