"""Classification metrics: equal to scikit-learn's, whatever the padding, the batches and the order of merging."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.metrics import ClassificationState, log_softmax

Examples = tuple[np.ndarray, np.ndarray]


def make_examples(seed: int, count: int, num_classes: int, skill: float = 2.0) -> Examples:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, count).astype(np.int32)
    logits = rng.normal(size=(count, num_classes)).astype(np.float32)
    logits[np.arange(count), label] += skill
    return logits, label


def state_of(logits: np.ndarray, label: np.ndarray) -> ClassificationState:
    mask = np.ones(len(label), np.float32)
    return ClassificationState.empty(logits.shape[1]).update(logits, label, mask)


def names(num_classes: int) -> list[str]:
    return [f"class {i}" for i in range(num_classes)]


def flat(values: dict[str, Any]) -> dict[str, float]:
    scalars = {key: value for key, value in values.items() if key != "per_class"}
    return scalars | {f"{a}.{b}": v for a, row in values["per_class"].items() for b, v in row.items()}


def slow_ece(probs: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == label
    total = 0.0
    for i in range(bins):
        inside = [j for j in range(len(label)) if i / bins < confidence[j] <= (i + 1) / bins]
        if inside:
            total += len(inside) / len(label) * abs(np.mean(correct[inside]) - np.mean(confidence[inside]))
    return total


@pytest.mark.parametrize(("num_classes", "count"), [(2, 40), (3, 1), (5, 200), (15, 500), (15, 7), (100, 300)])
def test_equal_to_scikit_learn(num_classes: int, count: int) -> None:
    logits, label = make_examples(num_classes, count, num_classes)
    state, all_classes = state_of(logits, label), np.arange(num_classes)
    ours = state.compute(names(num_classes))
    predicted, probs = logits.argmax(axis=1), np.exp(log_softmax(logits))
    assert ours["num_examples"] == count
    assert ours["top1"] == pytest.approx(sk.accuracy_score(label, predicted), abs=1e-12)
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(label, predicted, average="macro"), abs=1e-12)
    assert ours["nll"] == pytest.approx(sk.log_loss(label, probs, labels=all_classes), rel=1e-9)
    assert ours["ece"] == pytest.approx(slow_ece(probs, label), abs=1e-12)
    if num_classes > 5:
        top5 = sk.top_k_accuracy_score(label, logits, k=5, labels=all_classes)
        assert ours["top5"] == pytest.approx(top5, abs=1e-12)
    else:
        assert ours["top5"] == 1.0
    np.testing.assert_array_equal(state.confusion.toarray(), sk.confusion_matrix(label, predicted, labels=all_classes))
    columns = sk.precision_recall_fscore_support(label, predicted, labels=all_classes, zero_division=0)
    for i, name in enumerate(names(num_classes)):
        wanted = dict(zip(("precision", "recall", "f1", "support"), (column[i] for column in columns), strict=True))
        assert ours["per_class"][name] == pytest.approx(wanted, abs=1e-12)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 40), batch_size=st.integers(1, 17), data=st.data())
def test_padding_batches_and_merge_order_change_nothing(seed: int, count: int, batch_size: int, data: Any) -> None:
    logits, label = make_examples(seed, count, 6)
    whole = flat(state_of(logits, label).compute(names(6)))
    states = []
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        padding = data.draw(st.integers(0, 5), "padding")
        filler = np.full((padding, 6), data.draw(st.sampled_from([0.0, 1e30, np.nan]), "filler"), np.float32)
        part = np.concatenate([logits[rows], filler])
        labels = np.concatenate([label[rows], np.zeros(padding, np.int32)])
        mask = np.concatenate([np.ones(len(label[rows])), np.zeros(padding)]).astype(np.float32)
        order = np.random.default_rng(seed).permutation(len(mask))
        states.append(ClassificationState.empty(6).update(part[order], labels[order], mask[order]))
    merged = ClassificationState.empty(6)
    for i in data.draw(st.permutations(range(len(states))), "order"):
        merged = merged.merge(states[i])
    assert flat(merged.compute(names(6))) == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_merging_is_associative_and_empty_is_neutral() -> None:
    a, b, c = (state_of(*make_examples(seed, 9, 4)) for seed in range(3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert flat(left.compute(names(4))) == pytest.approx(flat(right.compute(names(4))), rel=1e-14)
    assert flat(a.merge(ClassificationState.empty(4)).compute(names(4))) == flat(a.compute(names(4)))


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    logits, label = make_examples(0, 8, 4)
    state = state_of(logits, label)
    padded = state.update(np.full_like(logits, np.nan), label, np.zeros(8, np.float32))
    assert flat(padded.compute(names(4))) == flat(state.compute(names(4)))


def test_ties_go_to_the_first_class_in_top1_and_top5() -> None:
    label = np.arange(7, dtype=np.int32)
    values = state_of(np.zeros((7, 7), np.float32), label).compute(names(7))
    assert (values["top1"], values["top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    logits = 5 * np.eye(4, dtype=np.float32)[[0, 0, 1]]
    values = state_of(logits, np.asarray([0, 0, 0], np.int32)).compute(names(4))
    assert values["macro_f1"] == pytest.approx((0.8 + 0.0) / 2)
    assert values["per_class"]["class 3"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_huge_logits_stay_finite() -> None:
    logits = np.asarray([[3e38, -3e38], [0.0, 100.0]], np.float32)
    values = state_of(logits, np.asarray([0, 0], np.int32)).compute(["a", "b"])
    assert values["nll"] == pytest.approx(50.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits, label = make_examples(0, 4, 3)
    logits[2, 1] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        state_of(logits, label)


def test_no_examples_are_refused() -> None:
    with pytest.raises(UserError, match="no examples"):
        ClassificationState.empty(3).compute(names(3))
