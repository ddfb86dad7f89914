"""Which items share a batch, and which batches run side by side."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from serving.batcher import Batcher, Costs, Lane
from serving.telemetry import Metrics

BEST = 4


class Runs:
    """A lane that says which batches ran how; side by side they wait for one another, so that they must overlap."""

    def __init__(self, single: bool = True, meet: int = 2):
        self.wide: list[list[int]] = []
        self.narrow: list[list[int]] = []
        self._at_once, self._barrier = 0, threading.Barrier(meet, timeout=10)
        self.lane = Lane("test", self._run, Costs({1: 0.01, BEST: 0.02}), self._run_in_one_thread if single else None)

    def _run(self, items: list[int]) -> list[int]:
        self._at_once += 1
        assert self._at_once == 1, "a batch in all threads has them for itself"
        self.wide.append(items)
        threading.Event().wait(0.02)
        self._at_once -= 1
        return [10 * item for item in items]

    def _run_in_one_thread(self, items: list[int]) -> list[int]:
        self.narrow.append(items)
        self._barrier.wait()
        return [10 * item for item in items]


def answers(runs: Sequence[tuple[Runs, int]], threads: int = 2) -> list[list[Any]]:
    """What a batcher gives for as many items of each lane, all waiting at once."""

    async def ask() -> list[list[Any]]:
        batcher = Batcher(60.0, threads, Metrics())
        deadline = asyncio.get_running_loop().time() + 20
        try:
            asked = [[batcher.run(run.lane, i, deadline) for i in range(count)] for run, count in runs]
            return await asyncio.gather(*(asyncio.gather(*items) for items in asked))
        finally:
            await batcher.close()

    return asyncio.run(ask())


def test_enough_for_each_thread_runs_side_by_side() -> None:
    runs = Runs()
    assert answers([(runs, 2 * BEST)]) == [[10 * i for i in range(2 * BEST)]]
    assert sorted(runs.narrow) == [[0, 1, 2, 3], [4, 5, 6, 7]] and not runs.wide


@pytest.mark.parametrize("count", [1, BEST, 2 * BEST - 1])
def test_fewer_run_in_all_threads(count: int) -> None:
    runs = Runs()
    assert answers([(runs, count)]) == [[10 * i for i in range(count)]]
    assert [len(batch) for batch in runs.wide] == [min(count, BEST)] + [count - BEST] * (count > BEST)
    assert not runs.narrow


def test_what_is_left_waits_for_those_side_by_side() -> None:
    runs = Runs()
    assert answers([(runs, 2 * BEST + 1)]) == [[10 * i for i in range(2 * BEST + 1)]]
    assert len(runs.narrow) == 2 and runs.wide == [[8]]


def test_one_thread_and_lanes_that_cannot() -> None:
    for runs, threads in ((Runs(single=False), 2), (Runs(single=False), 1)):
        answers([(runs, 2 * BEST)], threads)
        assert [len(batch) for batch in runs.wide] == [BEST, BEST]


def test_lanes_take_turns_by_age() -> None:
    """Each batch is of one lane, and the oldest item's comes first, whatever the other lane could fill."""
    one, other = Runs(), Runs()
    assert answers([(one, 1), (other, 2 * BEST)]) == [[0], [10 * i for i in range(2 * BEST)]]
    assert one.wide == [[0]] and len(other.narrow) == 2


def test_what_fails_side_by_side_is_tried_alone() -> None:
    def fails(items: list[int]) -> list[int]:
        if 3 in items:
            raise RuntimeError("three")
        return items

    async def ask() -> list[Any]:
        batcher = Batcher(60.0, 2, Metrics())
        lane = Lane("test", fails, Costs({1: 0.01, BEST: 0.02}), fails)
        deadline = asyncio.get_running_loop().time() + 20
        try:
            asked = (batcher.run(lane, i, deadline) for i in range(2 * BEST))
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await batcher.close()

    got = asyncio.run(ask())
    assert isinstance(got[3], RuntimeError) and got[:3] + got[4:] == [0, 1, 2, 4, 5, 6, 7]
