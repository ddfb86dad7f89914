"""Batches: a function of seed and step alone, in which each example counts once."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_har_jax.config import AugmentConfig, DataConfig
from clip_har_jax.data.augment import augment
from clip_har_jax.data.pipeline import ProcessShare, ResumePoint
from clip_har_jax.data.sources import Example
from clip_har_jax.errors import UserError
from clip_har_jax.image_files import decode
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from tests.support.batches import (
    PREPROCESS,
    SIZE_PX,
    ArraySource,
    assert_differ,
    assert_equal,
    counting_only,
    evaluation,
    joined,
    read_bytes,
    read_pixels,
    train,
)


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
            np.testing.assert_array_equal(
                image, augment(read_pixels(source, index), Preprocess(SIZE_PX), config.augment, rng)
            )


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


@settings(max_examples=6)  # each reads up to 14 times
@given(st.integers(1, 23), st.sampled_from([1, 2, 3, 6]), st.integers(0, 9))
def test_processes_share_the_batches_of_one(count: int, processes: int, start_step: int) -> None:
    source = ArraySource(count)
    whole = train(source, 3, global_batch_size=6, resume=ResumePoint(start_step))
    parts = [
        train(source, 3, global_batch_size=6, resume=ResumePoint(start_step), share=ProcessShare(p, processes))
        for p in range(processes)
    ]
    assert_equal(joined(parts), whole)
    parts = [evaluation(source, 6, share=ProcessShare(p, processes)) for p in range(processes)]
    assert_equal(joined(parts), evaluation(source, 6))


def test_continued_run_sees_the_rest_of_the_unbroken_one() -> None:
    source = ArraySource(10, damaged=[3])
    assert_equal(train(source, 9)[5:], train(source, 4, resume=ResumePoint(5)))
    far = train(source, 1, resume=ResumePoint(10**9))
    assert far[0].mask.shape == (4,)


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
        expected = evaluation_transform(read_pixels(source, i), PREPROCESS)
        np.testing.assert_array_equal(batches[i // batch_size].image[i % batch_size], expected)


def test_encoded_images_are_decoded() -> None:
    class Encoded(ArraySource):
        def __getitem__(self, i: int) -> Example:
            buffer = io.BytesIO()
            Image.fromarray(read_pixels(ArraySource(2), i)).save(buffer, "JPEG")
            return Example(buffer.getvalue(), 0, f"{i}.jpg")

    source = Encoded(2)
    (batch,) = evaluation(source, 2)
    np.testing.assert_array_equal(batch.image[1], evaluation_transform(decode(read_bytes(source, 1)), PREPROCESS))
    bad_inputs = counting_only(source)
    evaluation(source, 2, DataConfig(max_megapixels=1e-4), bad_inputs=bad_inputs)
    assert len(bad_inputs) == 2


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="batch of 4 images doesn't divide over 3 processes"):
        train(ArraySource(4), 1, share=ProcessShare(0, 3))
