"""The input pipeline: a batch is a function of seed and step alone, each example counts once, nothing is lost."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_har_jax.batch import Batch
from clip_har_jax.config import AugmentConfig, DataConfig, make_config
from clip_har_jax.data.augment import augment
from clip_har_jax.data.pipeline import BadInputs, default_workers, eval_batches, prefetch_to_mesh, train_batches
from clip_har_jax.data.randaugment import OPERATIONS
from clip_har_jax.data.sampling import Order
from clip_har_jax.data.sources import Example, Source, make_source
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import BadImage, Preprocess, decode, evaluation_transform
from clip_har_jax.trainer.run_data import load_data

SIZE_PX = 16
PREPROCESS = Preprocess(SIZE_PX)


class ArraySource:
    """Images of 12 x 20 px made from their numbers; some are damaged, missing, or a bug."""

    labels = ("run", "sit", "walk")

    def __init__(self, count: int, damaged: Iterable[int] = (), missing: Iterable[int] = (), bug: int | None = None):
        self.label_ids = np.arange(count, dtype=np.int32) % len(self.labels)
        self.fingerprint = "0" * 64
        self.damaged, self.missing, self.bug = set(damaged), set(missing), bug

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, i: int) -> Example:
        name = f"image-{i}"
        if i in self.missing:
            raise FileNotFoundError(2, "No such file or directory", name)
        if i == self.bug:
            raise ZeroDivisionError("made by the test")
        image = np.random.default_rng(i).integers(0, 256, (12, 20, 3), np.uint8)
        return Example(b"no image" if i in self.damaged else image, int(self.label_ids[i]), name)


def counting_only(source: Source) -> BadInputs:
    return BadInputs(source, 1.0)


def train(source: Source, steps: int, config: DataConfig = DataConfig(), **options: Any) -> list[Batch]:  # noqa: B008
    options = {"seed": 0, "global_batch_size": 4, "bad_inputs": counting_only(source)} | options
    with train_batches(source, config, PREPROCESS, **options) as batches:
        return list(islice(batches, steps))


def evaluation(source: Source, batch_size: int, config: DataConfig = DataConfig(), **options: Any) -> list[Batch]:  # noqa: B008
    options = {"bad_inputs": counting_only(source)} | options
    with eval_batches(source, config, PREPROCESS, batch_size=batch_size, **options) as batches:
        return list(batches)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_differ(first: list[Batch], second: list[Batch]) -> None:
    assert any((one.image != other.image).any() for one, other in zip(first, second, strict=True))


def joined(parts: Iterable[list[Batch]]) -> list[Batch]:
    """Return the global batches of which each process has a part."""
    return [Batch(*map(np.concatenate, zip(*shares, strict=True))) for shares in zip(*parts, strict=True)]


def test_batch_keeps_the_contract() -> None:
    source = ArraySource(10)
    (batch,) = train(source, 1)
    assert (batch.image.dtype, batch.image.shape) == (np.uint8, (4, SIZE_PX, SIZE_PX, 3))
    assert [values.dtype for values in batch[1:]] == [np.int32, np.float32, np.int32]
    assert batch.mask.tolist() == [1.0] * 4
    assert batch.label.tolist() == source.label_ids[batch.index].tolist()


def test_epochs_hold_each_example_once_in_another_order() -> None:
    order = np.concatenate([batch.index for batch in train(ArraySource(10), 15, global_batch_size=4)])
    epochs = order.reshape(6, 10)  # batches run on over the ends of epochs
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6


def test_order_and_augmentation_are_functions_of_the_seed() -> None:
    source = ArraySource(10)
    assert_equal(train(source, 8), train(source, 8, DataConfig(num_threads=1, prefetch_batches=1)))
    assert_equal(train(source, 8, seed=2**40), train(source, 8, seed=2**40))
    first, other = train(source, 8), train(source, 8, seed=1)
    assert [b.index.tolist() for b in first] != [b.index.tolist() for b in other]


def test_augmentation_is_drawn_from_seed_epoch_and_index() -> None:
    source, config = ArraySource(5), DataConfig()
    for step, batch in enumerate(train(source, 4, config, seed=7, global_batch_size=5)):  # a batch is an epoch
        for image, index in zip(batch.image, batch.index.tolist(), strict=True):
            rng = np.random.default_rng((7, step, index))
            np.testing.assert_array_equal(image, augment(source[index].data, SIZE_PX, config.augment, rng))


def test_an_example_is_augmented_anew_each_epoch() -> None:
    first, second = train(ArraySource(1), 2, global_batch_size=1)
    assert_differ([first], [second])
    plain = DataConfig(augment=AugmentConfig(crop_scale_min=1.0, flip=False))
    first, second = train(ArraySource(1), 2, plain, global_batch_size=1)
    assert_equal([first], [second])


def test_image_does_not_depend_on_the_batch_it_is_in() -> None:
    source = ArraySource(12)
    small, large = train(source, 6, global_batch_size=2), train(source, 2, global_batch_size=6)
    assert_equal(joined([small[:1], small[1:2], small[2:3]]), large[:1])


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 23), st.sampled_from([1, 2, 3, 6]), st.integers(0, 9))
def test_processes_share_the_batches_of_one(count: int, processes: int, start_step: int) -> None:
    source = ArraySource(count)
    whole = train(source, 3, global_batch_size=6, start_step=start_step)
    parts = [
        train(source, 3, global_batch_size=6, start_step=start_step, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    assert_equal(joined(parts), whole)
    parts = [evaluation(source, 6, process_index=p, process_count=processes) for p in range(processes)]
    assert_equal(joined(parts), evaluation(source, 6))


def test_continued_run_sees_the_rest_of_the_unbroken_one() -> None:
    source = ArraySource(10, damaged=[3])
    assert_equal(train(source, 9)[5:], train(source, 4, start_step=5))
    far = train(source, 1, start_step=10**9)
    assert far[0].mask.shape == (4,)


def test_workers_change_nothing() -> None:
    source, config = ArraySource(10, damaged=[3], missing=[7]), DataConfig(num_workers=2)
    bad_inputs = counting_only(source)
    assert_equal(train(source, 7, config, start_step=2, bad_inputs=bad_inputs), train(source, 7, start_step=2))
    assert len(bad_inputs) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (1, 4), (9, 1)])
def test_evaluation_counts_each_example_once(count: int, batch_size: int) -> None:
    source = ArraySource(count)
    batches = evaluation(source, batch_size)
    assert len(batches) == -(-count // batch_size)
    assert {batch.image.shape[0] for batch in batches} == {batch_size}
    index, mask, label = (np.concatenate([getattr(b, name) for b in batches]) for name in ("index", "mask", "label"))
    padding = len(index) - count
    assert index.tolist() == [*range(count), *[-1] * padding]
    assert mask.tolist() == [1.0] * count + [0.0] * padding
    assert label[:count].tolist() == source.label_ids.tolist()
    for i in range(count):
        expected = evaluation_transform(source[i].data, PREPROCESS)
        np.testing.assert_array_equal(batches[i // batch_size].image[i % batch_size], expected)


def test_encoded_images_are_decoded() -> None:
    class Encoded(ArraySource):
        def __getitem__(self, i: int) -> Example:
            buffer = io.BytesIO()
            Image.fromarray(super().__getitem__(i).data).save(buffer, "JPEG")
            return Example(buffer.getvalue(), 0, f"{i}.jpg")

    source = Encoded(2)
    (batch,) = evaluation(source, 2)
    np.testing.assert_array_equal(batch.image[1], evaluation_transform(decode(source[1].data), PREPROCESS))
    bad_inputs = counting_only(source)
    evaluation(source, 2, DataConfig(max_megapixels=1e-4), bad_inputs=bad_inputs)
    assert len(bad_inputs) == 2


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="batch of 4 images doesn't divide over 3 processes"):
        train(ArraySource(4), 1, process_count=3)


def test_bad_images_are_rows_without_weight_logged_once(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[2], missing=[5]), tmp_path / "bad_inputs.jsonl"
    bad_inputs = BadInputs(source, 0.25, log)
    for batch in train(source, 8, bad_inputs=bad_inputs):
        bad = np.isin(batch.index, [2, 5])
        np.testing.assert_array_equal(batch.mask, 1.0 - bad)
        np.testing.assert_array_equal(batch.label, source.label_ids[batch.index])
        assert not batch.image[bad].any()
        assert batch.image[~bad].any(axis=(1, 2, 3)).all()
    assert len(bad_inputs) == 2
    lines = {line["input"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert sorted(lines) == ["image-2", "image-5"]
    assert lines["image-5"] == {"input": "image-5", "index": 5, "error": "can't be read (No such file or directory)"}
    assert lines["image-2"]["error"].startswith("not an image")


def test_too_many_bad_images_end_the_run(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[1, 4, 6]), tmp_path / "bad_inputs.jsonl"
    assert len(evaluation(source, 2, bad_inputs=BadInputs(source, 3 / 8))) == 4
    with pytest.raises(UserError) as info:
        evaluation(source, 2, bad_inputs=BadInputs(source, 2 / 8, log))
    message = str(info.value)
    assert message.startswith("3 of 8 images can't be read, the first is image-1: not an image")
    assert f"all so far in {log}" in message
    assert "config.data.max_bad_fraction" in message
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="1 of 8 images"):
        evaluation(source, 2, bad_inputs=BadInputs(source, 0.0))


def test_continued_run_logs_no_input_again(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[1, 4]), tmp_path / "bad_inputs.jsonl"
    first = BadInputs(source, 1.0, log)
    first.record([(1, "image-1", "damaged"), (1, "image-1", "damaged")])
    with log.open("a") as file:
        file.write('{"input": "image-4", "ind')  # what a killed run leaves
    second = BadInputs(source, 1.0, log)
    evaluation(source, 4, bad_inputs=second)
    assert len(second) == 2, "what was logged before counts nevertheless"
    assert [json.loads(line)["input"] for line in log.read_text().splitlines()] == ["image-1", "image-4"]


def test_sources_of_a_run_share_a_log(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[1, 4]), tmp_path / "bad_inputs.jsonl"
    both = [BadInputs(source, 1.0, log), BadInputs(source, 1.0, log)]
    for bad_inputs in both:
        evaluation(source, 4, bad_inputs=bad_inputs)
        assert len(bad_inputs) == 2
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_surfaces_with_the_name_of_its_example(num_workers: int) -> None:
    with pytest.raises(RuntimeError, match="example 5: ZeroDivisionError: made by the test"):
        evaluation(ArraySource(8, bug=5), 2, DataConfig(num_workers=num_workers))
    assert multiprocessing.active_children() == []


def grain_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def wait_until(done: Any, limit_s: float = 20.0) -> bool:
    end = time.monotonic() + limit_s
    while not (result := done()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(result)


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


# A trainer that reports its worker, and after a Ctrl-C what it still gets from it; then it waits to be killed.
TRAINER = """
import multiprocessing, signal, time
from test_pipeline import ArraySource, PREPROCESS, checksum, counting_only
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


def checksum(batches: Iterable[Batch]) -> int:
    return zlib.crc32(b"".join(np.asarray(values).tobytes() for batch in batches for values in batch))


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


def jpeg(image: np.ndarray, quality: int = 95, **options: Any) -> bytes:
    Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=quality, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))


EVERYTHING = AugmentConfig(
    randaugment_operations=2, color_jitter=0.4, erase_probability=0.5, no_flip_labels=("run",), crop_scale_min=0.3
)


class PhotoSource(ArraySource):
    """JPEGs, larger than what is made of them."""

    def __getitem__(self, i: int) -> Example:
        example = super().__getitem__(i)
        if isinstance(example.data, bytes):
            return example
        return example._replace(data=jpeg(np.kron(example.data, np.ones((8, 8, 1), np.uint8))))


def digest(batches: list[Batch]) -> list[int]:
    return [zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in batch)) for batch in batches]


def test_batches_are_equal_for_every_number_of_workers_and_across_a_resume() -> None:
    source = PhotoSource(12, damaged=[5])
    one = DataConfig(augment=EVERYTHING, num_workers=0, num_threads=1, sampling="class_balanced")
    expected = digest(train(source, 6, one))
    assert len(set(expected)) == 6
    for workers in (1, 2, 4):
        config = replace(one, num_workers=workers, num_threads=workers)
        assert digest(train(source, 6, config)) == expected
    resumed = train(source, 3, replace(one, num_workers=2), start_step=3)
    assert digest(train(source, 3, one)) + digest(resumed) == expected


@pytest.mark.parametrize("size", [(40, 60), (300, 500), (97, 203)])
def test_training_crop_of_a_jpeg_is_that_of_its_pixels(size: tuple[int, int]) -> None:
    """Decoded at a reduced scale, or whole: what is seen is the same, but for half a pixel and the colours' blur."""
    data = jpeg(smooth(*size))
    config = AugmentConfig(crop_scale_min=0.3)
    for seed in range(8):
        of_bytes = augment(data, 32, config, np.random.default_rng(seed))
        of_pixels = augment(decode(data), 32, config, np.random.default_rng(seed))
        assert of_bytes.shape == (32, 32, 3)
        assert np.abs(of_bytes.astype(int) - of_pixels.astype(int)).mean() < 8  # two random pictures: 70


def test_jpegs_that_must_be_turned_or_converted_are() -> None:
    config, image = AugmentConfig(crop_scale_min=1.0, flip=False), smooth(60, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    turned = augment(jpeg(image, exif=exif), 60, config, np.random.default_rng(0))
    assert np.abs(turned.astype(int) - np.rot90(image, -1)).mean() < 6
    Image.fromarray(image).convert("CMYK").save(buffer := io.BytesIO(), "JPEG", quality=95)
    assert np.abs(augment(buffer.getvalue(), 60, config, np.random.default_rng(0)).astype(int) - image).mean() < 12
    grey = jpeg(image[..., 0])
    assert augment(grey, 60, config, np.random.default_rng(0)).shape == (60, 60, 3)


def test_training_refuses_what_evaluation_refuses() -> None:
    whole = jpeg(smooth(100, 160))
    for data in (b"", b"\xff\xd8", whole[:300], whole[:-400], b"GIF89a" + whole, jpeg(smooth(2, 500))[:-1] + b""):
        reasons = []
        for read in (
            lambda data: decode(data),
            lambda data: augment(data, 8, AugmentConfig(), np.random.default_rng(0)),
        ):
            try:
                reasons.append(read(data) is None)
            except BadImage as error:
                reasons.append(str(error))
        assert reasons[0] == reasons[1]
    with pytest.raises(BadImage, match="megapixels"):
        augment(whole, 8, AugmentConfig(), np.random.default_rng(0), max_megapixels=0.01)


def test_flips_are_off_for_classes_where_left_and_right_matter() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    config = AugmentConfig(crop_scale_min=1.0, no_flip_labels=("turn left",))

    def mirrored(label: str) -> int:
        return sum(augment(image, 16, config, np.random.default_rng(i), label)[0, 0, 0] == 0 for i in range(40))

    assert mirrored("turn left") == 0
    assert 8 < mirrored("walk") < 32


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_randaugment_operations_keep_the_picture_a_picture(name: str) -> None:
    image = Image.fromarray(smooth(24, 32))
    for strength in (0.0, 0.3, 1.0):
        for sign in (-1, 1):
            changed = np.asarray(OPERATIONS[name](image, strength, sign))
            assert (changed.dtype, changed.shape) == (np.uint8, (24, 32, 3))
    still = np.asarray(OPERATIONS[name](image, 0.0, 1))
    if name not in ("autocontrast", "equalize", "solarize"):
        assert np.abs(still.astype(int) - np.asarray(image)).max() <= 1
    if name != "identity":
        assert (np.asarray(OPERATIONS[name](image, 1.0, 1)) != np.asarray(image)).any()


def test_jitter_and_erasing_change_what_they_say() -> None:
    image, plain = smooth(32, 32), AugmentConfig(crop_scale_min=1.0, flip=False)
    unchanged = augment(image, 32, plain, np.random.default_rng(0))
    np.testing.assert_array_equal(unchanged, image)
    erased = augment(image, 32, replace(plain, erase_probability=1.0), np.random.default_rng(0))
    share = (erased != image).any(axis=2).mean()
    assert 0.01 < share < 0.4
    jittered = augment(image, 32, replace(plain, color_jitter=0.4), np.random.default_rng(3))
    assert 2 < np.abs(jittered.astype(int) - image).mean() < 90


class Skewed(ArraySource):
    """60 of run, 6 of sit, 3 of walk."""

    def __init__(self) -> None:
        super().__init__(69)
        self.label_ids = np.repeat(np.arange(3, dtype=np.int32), (60, 6, 3))
        self.weights = np.linspace(0, 2, 69)


def drawn(sampling: str, epochs: int) -> np.ndarray:
    order = Order(Skewed(), sampling, 3)
    return np.array([order[position].example for position in range(epochs * 69)]).reshape(epochs, 69)


def test_class_balanced_sampling_draws_each_class_alike() -> None:
    for epoch in drawn("class_balanced", 4):
        counts = np.bincount(Skewed().label_ids[epoch], minlength=3)
        assert np.abs(counts - 23).max() <= 1
        assert (
            np.bincount(epoch, minlength=69)[60:66].tolist()
            in np.stack(np.meshgrid(*[[3, 4]] * 6), -1).reshape(-1, 6).tolist()
        )


def test_repeat_factor_sampling_favours_rare_classes_by_the_root() -> None:
    share = np.array([60, 6, 3]) / 69
    factor = np.maximum(1, np.sqrt(1 / 3 / share)) * share
    counts = np.bincount(Skewed().label_ids[drawn("repeat_factor", 20).ravel()], minlength=3)
    np.testing.assert_allclose(counts / counts.sum(), factor / factor.sum(), atol=0.01)


def test_sampling_by_the_weights_of_a_manifest() -> None:
    counts = np.bincount(drawn("weights", 60).ravel(), minlength=69) / 60
    np.testing.assert_allclose(counts, Skewed().weights, atol=0.15)
    assert counts[0] == 0
    with pytest.raises(UserError, match="no manifest"):
        Order(ArraySource(5), "weights", 0)


def test_an_example_drawn_twice_is_augmented_twice() -> None:
    draws = [Order(Skewed(), "class_balanced", 3)[position] for position in range(69)]
    assert len({draw.key for draw in draws}) == 69 > len({draw.example for draw in draws})
    assert Order(Skewed(), "class_balanced", 3)[10**12] == Order(Skewed(), "class_balanced", 3)[10**12]


def test_default_workers_follow_the_cores() -> None:
    assert [default_workers(cores, 50_000) for cores in (1, 2, 4, 8, 16, 96)] == [0, 2, 4, 4, 8, 8]
    assert default_workers(96, 9_999) == 0


def test_ten_thousand_images_of_which_one_in_a_hundred_is_damaged(tmp_path: Path) -> None:
    source = ArraySource(10_000, damaged=range(0, 10_000, 100))
    for limit, ends in ((0.01, False), (0.0099, True)):
        log = tmp_path / f"bad-{limit}.jsonl"
        bad_inputs = BadInputs(source, limit, log)
        if ends:
            with pytest.raises(UserError, match="100 of 10000 images can't be read"):
                evaluation(source, 500, DataConfig(num_workers=2), bad_inputs=bad_inputs)
        else:
            batches = evaluation(source, 500, DataConfig(num_workers=0), bad_inputs=bad_inputs)
            assert sum(float(batch.mask.sum()) for batch in batches) == 9900
        assert len(log.read_text().splitlines()) == 100
    assert multiprocessing.active_children() == []


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


def test_what_a_file_holds_counts_not_its_name(tmp_path: Path) -> None:
    for label in ("run", "sit"):
        (tmp_path / label).mkdir()
    Image.fromarray(smooth(20, 30)).save(buffer := io.BytesIO(), "PNG")
    (tmp_path / "run" / "a-png.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "run" / "text.png").write_text("not an image")
    (tmp_path / "sit" / "empty.jpg").write_bytes(b"")
    (tmp_path / "sit" / "jpeg.png").write_bytes(jpeg(smooth(20, 30)))
    source = make_source(f"folder:{tmp_path}", "train")
    for batches in (train(source, 1, seed=0), evaluation(source, 4)):
        found = {
            Path(source[int(i)].name).name: mask for i, mask in zip(batches[0].index, batches[0].mask, strict=True)
        }
        assert found == {"a-png.jpg": 1.0, "text.png": 0.0, "empty.jpg": 0.0, "jpeg.png": 1.0}


def test_augmentation_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="at most 30"):
        make_config({"data": {"augment": {"randaugment_magnitude": 31.0}}})
    with pytest.raises(UserError, match="did you mean 'running'"):
        load_data(make_config({"data": {"train": "synthetic?split=test", "augment": {"no_flip_labels": ("runing",)}}}))
