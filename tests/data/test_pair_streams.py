"""Streams and batches of pairs: each pair once in an epoch, for any division of the work, and exactly continued."""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_har_jax.batch import PairBatch
from clip_har_jax.config import DataConfig
from clip_har_jax.data.bad_inputs import BadPairs
from clip_har_jax.data.pair_batches import PairBatches, eval_pair_batches
from clip_har_jax.data.pair_rows import PairTransform
from clip_har_jax.data.pair_sources import make_pair_sources
from clip_har_jax.data.pair_streams import Drawn, PairStream, StreamPlan, choose_num_streams
from clip_har_jax.data.pairs import Pair
from clip_har_jax.data.pipeline import ProcessShare
from clip_har_jax.errors import UserError
from clip_har_jax.text import Tokenizer
from tests.support.batches import PREPROCESS
from tests.support.pair_shards import pair_members, write_shards, write_tar

SIZES = (5, 9, 2, 7, 4)  # pairs of the shards
COUNT = sum(SIZES)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {i}" for i in range(COUNT)], 600)


def plan_of(spec: str, num_streams: int = 1, buffer_size: int = 4, seed: int = 0) -> StreamPlan:
    return StreamPlan(make_pair_sources(spec), seed, num_streams, buffer_size)


def draw(stream: PairStream, count: int) -> list[Drawn]:
    return [next(stream) for _ in range(count)]


def caption(drawn: Drawn) -> str:
    assert isinstance(drawn.found, Pair)
    return drawn.found.caption


@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_an_epoch_gives_each_pair_once_whatever_the_number_of_streams(spec: str, num_streams: int) -> None:
    plan = plan_of(spec, num_streams, buffer_size=1)
    reader = plan.sources.readers[0]
    seen: Counter[str] = Counter()
    for stream in range(num_streams):
        pairs = PairStream(plan, stream)
        for turn in range(stream, 2 * len(SIZES), num_streams):  # the shards of two epochs that are this stream's
            shard = int(np.random.default_rng((0, 0, 0, turn // len(SIZES))).permutation(len(SIZES))[turn % len(SIZES)])
            got = [caption(drawn) for drawn in draw(pairs, SIZES[shard])]
            assert got == [found.caption for found, _ in reader.read(shard, 0) if isinstance(found, Pair)]
            seen.update(got)
    assert seen == {f"picture {i}": 2 for i in range(COUNT)}


def test_the_buffer_shuffles_and_loses_nothing(spec: str) -> None:
    in_order = [caption(drawn) for drawn in draw(PairStream(plan_of(spec, buffer_size=1), 0), 5 * COUNT)]
    shuffled = [caption(drawn) for drawn in draw(PairStream(plan_of(spec, buffer_size=9), 0), 5 * COUNT)]
    assert shuffled != in_order
    for first in range(0, 5 * COUNT - 9, 9):  # the same pairs in each buffer
        assert sorted(shuffled[first : first + 9]) == sorted(in_order[first : first + 9])
    assert [caption(drawn) for drawn in draw(PairStream(plan_of(spec, buffer_size=9, seed=1), 0), COUNT)] != shuffled[
        :COUNT
    ]


@pytest.mark.parametrize("buffer_size", [1, 4, 50])
def test_a_stream_continues_after_any_pair(spec: str, buffer_size: int) -> None:
    plan = plan_of(f"{spec}?weight=2::{spec}", 2, buffer_size)
    whole, positions = PairStream(plan, 1), [None]
    drawn = []
    for _ in range(2 * COUNT):
        drawn.append(next(whole))
        positions.append(json.loads(json.dumps(whole.position)))
    for step in range(0, 2 * COUNT, 1 if buffer_size < 50 else 13):
        assert draw(PairStream(plan, 1, positions[step]), 8) == drawn[step : step + 8] or step > 2 * COUNT - 8
    assert len({one.key for one in drawn}) == len(drawn)  # no two augmentations alike


def test_sources_are_mixed_by_weight(spec: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", b"x"), ("a.txt", b"other")])
    stream = PairStream(plan_of(f"{spec}?weight=3::webdataset:{tmp_path}/0.tar", buffer_size=10), 0)
    other = sum(caption(drawn) == "other" for drawn in draw(stream, 4000))
    assert abs(other / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_shards_without_pairs_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.cls", b"1")])
    with pytest.raises(UserError, match=r"0\.tar: the shards hold no pairs"):
        next(PairStream(plan_of(f"webdataset:{tmp_path}/0.tar"), 0))


def batches_of(spec: str, tokenizer: Tokenizer, steps: int, num_streams: int = 4, **options: Any) -> list[PairBatch]:
    config = options.pop("config", DataConfig(num_workers=0, prefetch_batches=2))
    transform = PairTransform(config, PREPROCESS, tokenizer, 8)
    bad = options.pop("bad_pairs", BadPairs(1.0))
    with PairBatches(plan_of(spec, num_streams), transform, 8, bad, **options) as batches:
        return list(islice(batches, steps))


def assert_same(first: list[PairBatch], second: list[PairBatch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in PairBatch._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_global_batches_are_the_same_for_any_number_of_processes_and_workers(spec: str, tokenizer: Tokenizer) -> None:
    whole = batches_of(spec, tokenizer, 5)
    parts = [batches_of(spec, tokenizer, 5, share=ProcessShare(i, 2)) for i in range(2)]
    assert_same([PairBatch(*map(np.concatenate, zip(*both, strict=True))) for both in zip(*parts, strict=True)], whole)
    assert_same(batches_of(spec, tokenizer, 5, config=DataConfig(num_workers=2, prefetch_batches=2)), whole)
    assert [batch.index.tolist() for batch in whole] == [list(range(8))] * 5
    assert whole[0].image.shape == (8, 16, 16, 3)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_continue_from_a_position(spec: str, tokenizer: Tokenizer, num_workers: int) -> None:
    config = DataConfig(num_workers=num_workers, prefetch_batches=3)
    transform, plan = PairTransform(config, PREPROCESS, tokenizer, 8), plan_of(spec, 4)
    with PairBatches(plan, transform, 8, BadPairs(1.0)) as batches:
        list(islice(batches, 4))
        position = json.loads(json.dumps(batches.positions(3)))  # read ahead by one batch, as to the devices
        names = batches.names(4)
        rest = list(islice(batches, 3))
    positions = [position[str(stream)] for stream in range(4)]
    again = batches_of(spec, tokenizer, 4, config=config, positions=positions, start_step=3)
    assert_same(again[1:], rest)
    shown = [f"{int(image[8, 8, 0]):06d}" for image in again[0].image]  # an image's pixels tell its number
    assert [names[row].split(": ")[1] for row in range(8)] == shown


def test_a_worker_imports_neither_jax_nor_grain() -> None:
    program = "import sys, clip_har_jax.data.pair_rows; print(sorted({'jax', 'grain'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_images_match_their_captions(spec: str, tokenizer: Tokenizer) -> None:
    for batch in batches_of(spec, tokenizer, 3):
        for image, ids in zip(batch.image, batch.input_ids, strict=True):
            number = int(image[8, 8, 0])
            np.testing.assert_array_equal(ids, tokenizer([f"picture {number}"], 8)[0][0])


def test_a_bad_pair_is_a_row_that_doesn_t_count_and_is_logged_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tar(
        tmp_path / "000.tar",
        [*pair_members(range(6)), ("a.png", b"no image"), ("a.txt", b"text"), ("b.png", b"x"), ("b.txt", b"")],
    )
    log = tmp_path / "bad_inputs.jsonl"
    bad = BadPairs(0.05, log)
    batches = batches_of(f"webdataset:{tmp_path}/000.tar", tokenizer, 6, num_streams=1, bad_pairs=bad)
    assert sum(8 - batch.mask.sum() for batch in batches) == 12  # both in each epoch of 8
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["input"] for line in lines} == {f"{tmp_path}/000.tar: a", f"{tmp_path}/000.tar: b"}
    assert len(lines) == len(bad) == 2
    with pytest.raises(
        UserError, match=r"of the 8 pairs read so far can't be used, first .*000\.tar: .*max_bad_fraction"
    ):
        batches_of(f"webdataset:{tmp_path}/000.tar", tokenizer, 8, num_streams=1, bad_pairs=BadPairs(0.0))


def test_an_evaluation_counts_the_rows_of_its_own_process(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = f"webdataset:{write_tar(tmp_path / '0.tar', [(f'{i}.png', b'x') for i in range(5)])}"
    transform = PairTransform(DataConfig(), PREPROCESS, tokenizer, 8)
    for index, own in enumerate((4, 1)):  # of 5 pairs and 3 rows of padding
        with pytest.raises(UserError, match=f"^{own} of the {own} pairs read so far"):
            list(eval_pair_batches(make_pair_sources(spec), transform, 8, BadPairs(0.0), ProcessShare(index, 2)))


def test_an_evaluation_gives_each_pair_once(spec: str, tokenizer: Tokenizer) -> None:
    transform = PairTransform(DataConfig(), PREPROCESS, tokenizer, 8)
    found = list(eval_pair_batches(make_pair_sources(spec), transform, 8, BadPairs(0.0)))
    batches = [batch for batch, _ in found]
    assert [int(batch.mask.sum()) for batch in batches] == [8, 8, 8, 3]
    assert np.concatenate([batch.index for batch in batches]).tolist() == [*range(COUNT), *[-1] * 5]
    pairs = [pair for _, rows in found for pair in rows if pair is not None]
    assert [pair.caption for pair in pairs if isinstance(pair, Pair)] == [f"picture {i}" for i in range(COUNT)]
    halves = [
        [
            batch
            for batch, _ in eval_pair_batches(make_pair_sources(spec), transform, 8, BadPairs(0.0), ProcessShare(i, 2))
        ]
        for i in range(2)
    ]
    assert_same(
        [PairBatch(*map(np.concatenate, zip(*both, strict=True))) for both in zip(*halves, strict=True)], batches
    )


@pytest.mark.parametrize(
    ("processes", "batch_size", "wanted", "expected"),
    [(1, 8, None, 4), (1, 6, None, 3), (2, 8, None, 4), (1, 8, 2, 2), (5, 10, None, 5), (1, 7, None, 1)],
)
def test_the_number_of_streams(spec: str, processes: int, batch_size: int, wanted: int | None, expected: int) -> None:
    assert choose_num_streams(make_pair_sources(spec), processes, batch_size, wanted) == expected


@pytest.mark.parametrize(
    ("processes", "batch_size", "wanted", "reason"),
    [
        (6, 12, None, "5 shards for 6 processes"),
        (2, 7, None, "which 2 processes don't divide"),
        (1, 8, 3, "num_streams is 3; it must divide the batch of 8"),
        (1, 8, 8, "at most 5, the number of shards"),
    ],
)
def test_streams_that_can_t_be_made(
    spec: str, processes: int, batch_size: int, wanted: int | None, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        choose_num_streams(make_pair_sources(spec), processes, batch_size, wanted)
