"""Sampling: which example comes at which position."""

import numpy as np
import pytest

from clip_har_jax.data.sampling import Order
from clip_har_jax.errors import UserError
from tests.support.batches import ArraySource


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
    weights = Skewed().weights
    assert weights is not None
    np.testing.assert_allclose(counts, weights, atol=0.15)
    assert counts[0] == 0
    with pytest.raises(UserError, match="no manifest"):
        Order(ArraySource(5), "weights", 0)


def test_an_example_drawn_twice_is_augmented_twice() -> None:
    draws = [Order(Skewed(), "class_balanced", 3)[position] for position in range(69)]
    assert len({draw.key for draw in draws}) == 69 > len({draw.example for draw in draws})
    assert Order(Skewed(), "class_balanced", 3)[10**12] == Order(Skewed(), "class_balanced", 3)[10**12]
