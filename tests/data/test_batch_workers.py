"""Worker processes and threads: they change no batch, tell what goes wrong, and end with the trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from clip_har_jax.config import DataConfig
from clip_har_jax.data.pipeline import ResumePoint, default_workers, train_batches
from clip_har_jax.errors import UserError
from tests.support.batches import (
    EVERYTHING,
    PREPROCESS,
    ArraySource,
    PhotoSource,
    assert_equal,
    checksum,
    counting_only,
    digest,
    evaluation,
    train,
    wait_until,
)


def test_workers_change_nothing() -> None:
    source, config = ArraySource(10, damaged=[3], missing=[7]), DataConfig(num_workers=2)
    bad_inputs = counting_only(source)
    assert_equal(
        train(source, 7, config, resume=ResumePoint(2), bad_inputs=bad_inputs), train(source, 7, resume=ResumePoint(2))
    )
    assert len(bad_inputs) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_surfaces_with_the_name_of_its_example(num_workers: int) -> None:
    with pytest.raises(RuntimeError, match="example 5: ZeroDivisionError: made by the test"):
        evaluation(ArraySource(8, bug=5), 2, DataConfig(num_workers=num_workers))
    assert multiprocessing.active_children() == []


# A trainer that reports its worker, and after a Ctrl-C what it still gets from it; then it waits to be killed.
TRAINER = """
import multiprocessing, signal, time
from tests.support.batches import ArraySource, PREPROCESS, checksum, counting_only
from itertools import islice
from clip_har_jax.config import DataConfig
from clip_har_jax.data.pipeline import train_batches

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    source = ArraySource(8)
    options = dict(seed=0, global_batch_size=4, bad_inputs=counting_only(source))
    batches = train_batches(source, DataConfig(num_workers=1), PREPROCESS, **options)
    next(batches)
    try:
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print(checksum(islice(batches, 20)), flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.timeout(90)
def test_a_worker_lives_exactly_as_long_as_the_trainer(tmp_path: Path) -> None:
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        os.killpg(trainer.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert int(trainer.stdout.readline()) == checksum(train(ArraySource(8), 21)[1:])
        assert is_running(worker)
    finally:
        trainer.kill()
        complaints = trainer.communicate(timeout=30)[1]
    assert wait_until(lambda: not is_running(worker))
    assert "Traceback" not in complaints


@pytest.mark.parametrize("workers", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_are_equal_for_every_number_of_workers(workers: int) -> None:
    one, expected = six_batches()
    assert len(set(expected)) == 6
    config = replace(one, num_workers=workers, num_threads=workers)
    assert digest(train(PhotoSource(12, damaged=[5]), 6, config)) == expected


def test_batches_are_equal_across_a_resume() -> None:
    one, expected = six_batches()
    source = PhotoSource(12, damaged=[5])
    resumed = train(source, 3, replace(one, num_workers=2), resume=ResumePoint(3))
    assert digest(train(source, 3, one)) + digest(resumed) == expected


def six_batches() -> tuple[DataConfig, list[int]]:
    """Return a configuration without workers, and the digests of its first batches."""
    one = DataConfig(augment=EVERYTHING, num_workers=0, num_threads=1, sampling="class_balanced")
    return one, digest(train(PhotoSource(12, damaged=[5]), 6, one))


def test_default_workers_follow_the_cores() -> None:
    assert [default_workers(cores, 50_000) for cores in (1, 2, 4, 8, 16, 96)] == [0, 2, 4, 4, 8, 8]
    assert default_workers(96, 9_999) == 0


def test_a_worker_imports_nothing_that_takes_long() -> None:
    program = "import sys, clip_har_jax.data.batch_workers; print({'jax', 'grain', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_worker_that_is_killed_is_told() -> None:
    source = PhotoSource(500)
    config = DataConfig(num_workers=2, prefetch_batches=1)
    bad = counting_only(source)
    with train_batches(source, config, PREPROCESS, seed=0, global_batch_size=8, bad_inputs=bad) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        with pytest.raises(UserError, match="decoding process was killed"):
            deque(batches, maxlen=0)
    assert multiprocessing.active_children() == []
