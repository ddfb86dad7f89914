"""Contrastive losses: the dense form against formulas in numpy, the mesh's against the dense one, and its memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.config import MeshConfig
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import batch_sharding, put_global, replicated
from clip_har_jax.training import contrastive
from clip_har_jax.training.contrastive import contrastive_loss
from clip_har_jax.training.losses import masked_mean
from tests.support.dense_contrastive import dense_contrastive_loss

BATCH, DIM = 56, 16  # 7 rows on each of 8 devices: no multiple of the chunks
SHAPES = [(8, 1, 1), (2, 4, 1), (1, 4, 2), (1, 1, 1)]
KINDS = ["softmax", "sigmoid"]
GRADIENTS = (0, 1, 2, 3)  # image, text, scale, bias


@pytest.fixture(autouse=True)
def several_chunks_on_each_device(monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_SIZE", 4)


def make_inputs(seed=0, scale=10.0, masked=9):
    """Return (image, text, scale, bias, label, mask) with labels that repeat; masked rows hold NaN."""
    rng = np.random.default_rng(seed)
    sides = rng.standard_normal((2, BATCH, DIM)).astype(np.float32)
    sides /= np.linalg.norm(sides, axis=-1, keepdims=True)
    mask = np.ones(BATCH, np.float32)
    mask[rng.permutation(BATCH)[:masked]] = 0
    sides[:, mask == 0] = np.nan
    label = rng.integers(0, 15, BATCH).astype(np.int32)
    return *sides, np.float32(scale), np.float32(-2.0), label, mask


def make_mesh_of(shape):
    data, fsdp, tensor = shape
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: math.prod(shape)])


def mean_and_rows(loss):
    def call(image, text, scale, bias, label, mask):
        losses = loss(image, text, scale, mask, label=label, logit_bias=bias)
        return masked_mean(losses, mask), losses

    return jax.value_and_grad(call, GRADIENTS, has_aux=True)


@functools.cache
def dense(kind):
    return jax.jit(mean_and_rows(functools.partial(dense_contrastive_loss, kind=kind)))


@functools.cache
def over_mesh(shape, kind):
    """Return the mesh form as a training step has it: jitted, with sharded rows."""
    mesh = make_mesh_of(shape)
    step = jax.jit(mean_and_rows(functools.partial(contrastive_loss, mesh=mesh, kind=kind)))
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return lambda *inputs: step(*put_global(inputs, (rows, rows, whole, whole, rows, rows)))


def assert_equal(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Formulas, in float64 and pair by pair


def log_sum_exp(values):
    return max(values) + math.log(sum(math.exp(value - max(values)) for value in values))


def cross_entropy_of(logits, positives):
    """Khosla et al. 2020, equation 2, of one anchor."""
    return sum(log_sum_exp(logits) - logits[p] for p in positives) / len(positives)


def formula(kind, image, text, scale, bias, label, mask):
    kept = np.flatnonzero(mask)
    logits = float(scale) * image[kept].astype(np.float64) @ text[kept].astype(np.float64).T + float(bias)
    label, total = label[kept], 0.0
    for i in range(len(kept)):
        positives = [j for j in range(len(kept)) if label[i] == label[j]]
        if kind == "softmax":
            total += (cross_entropy_of(logits[i], positives) + cross_entropy_of(logits[:, i], positives)) / 2
        else:
            signs = [1 if j in positives else -1 for j in range(len(kept))]
            total -= sum(math.log(1 / (1 + math.exp(-z * logit))) for z, logit in zip(signs, logits[i], strict=True))
    return total / len(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_labels", [True, False], ids=["pairs", "classes"])
def test_the_dense_form_is_the_papers_formula(kind, own_labels):
    inputs = list(make_inputs())
    if own_labels:
        inputs[4] = np.arange(BATCH, dtype=np.int32)
    (loss, _), grads = dense(kind)(*inputs)
    np.testing.assert_allclose(loss, formula(kind, *inputs), rtol=1e-6)
    rng, step = np.random.default_rng(1), 1e-5
    for which in GRADIENTS:
        direction = rng.standard_normal(np.shape(inputs[which]))
        ends = []
        for sign in (1, -1):
            moved = [value.astype(np.float64) for value in inputs[:4]] + inputs[4:]
            moved[which] = moved[which] + sign * step * direction
            ends.append(formula(kind, *moved))
        np.testing.assert_allclose(
            np.sum(np.asarray(grads[which]) * direction), (ends[0] - ends[1]) / (2 * step), rtol=2e-5, atol=1e-6
        )


def test_without_labels_each_pair_is_an_action_of_its_own():
    image, text, scale, bias, _, mask = map(jnp.asarray, make_inputs())
    labelled = dense("sigmoid")(image, text, scale, bias, jnp.arange(BATCH), mask)[0][1]
    over_8 = functools.partial(contrastive_loss, mesh=make_mesh_of((8, 1, 1)))
    for form in (dense_contrastive_loss, over_8):
        losses = jax.jit(functools.partial(form, kind="sigmoid", logit_bias=-2.0))(image, text, scale, mask)
        np.testing.assert_allclose(losses, labelled, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mesh_form_equals_the_dense_one(shape, kind):
    loss = over_mesh(shape, kind)
    inputs = make_inputs()
    ours = loss(*inputs)
    assert_equal(ours, dense(kind)(*inputs))
    rows = batch_sharding(make_mesh_of(shape))
    assert all(side.sharding.is_equivalent_to(rows, 2) for side in ours[1][:2])
    pairs = (*inputs[:4], np.arange(BATCH, dtype=np.int32), np.ones(BATCH, np.float32))
    pairs = tuple(np.nan_to_num(value, nan=0.1) if value.dtype == np.float32 else value for value in pairs)
    assert_equal(loss(*pairs), dense(kind)(*pairs))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_count_nowhere(kind):
    loss = over_mesh((2, 4, 1), kind)
    *inputs, mask = make_inputs()
    (_, losses), grads = loss(*inputs, mask)
    for rows in (losses, *grads[:2]):
        assert not np.any(np.asarray(rows)[mask == 0])
        assert np.any(np.asarray(rows)[mask == 1])
    for form in (loss, dense(kind)):
        nothing = form(*inputs, np.zeros(BATCH, np.float32))
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind):
    inputs = make_inputs(scale=1000.0)
    ours = over_mesh((8, 1, 1), kind)(*inputs)
    for a, b in zip(*map(jax.tree.leaves, (ours, dense(kind)(*inputs))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_bfloat16_embeddings_are_accumulated_in_float32():
    image, text, *rest = make_inputs()
    halves = [np.asarray(side, jnp.bfloat16) for side in (image, text)]
    (loss, losses), grads = over_mesh((2, 4, 1), "softmax")(*halves, *rest)
    exact = dense("softmax")(*[half.astype(np.float32) for half in halves], *rest)
    assert_equal(((loss, losses), grads[2:]), (exact[0], exact[1][2:]))
    for ours, theirs in zip(grads[:2], exact[1][:2], strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=2**-8, atol=1e-6)  # rounded once, at the end


# Memory


@functools.cache
def compiled(form, kind, batch_size):
    """Return the program for a global batch on 2 x 4 devices."""
    mesh = make_mesh_of((2, 4, 1))
    rows, whole = batch_sharding(mesh), replicated(mesh)
    loss = functools.partial(dense_contrastive_loss, kind=kind)
    if form != "dense":
        loss = functools.partial(contrastive_loss, mesh=mesh, kind=kind)
    side = jax.ShapeDtypeStruct((batch_size, 512), jnp.float32, sharding=rows)
    label, mask = (jax.ShapeDtypeStruct((batch_size,), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return jax.jit(mean_and_rows(loss)).lower(side, side, scalar, scalar, label, mask).compile()


def temp_bytes(form, kind, sizes):
    """What one device needs beside arguments and results, for each global batch."""
    return np.array([compiled(form, kind, size).memory_analysis().temp_size_in_bytes for size in sizes])


@pytest.mark.parametrize(("kind", "sizes"), [("softmax", [4096, 8192, 32768]), ("sigmoid", [4096, 32768])])
def test_memory_per_device_grows_linearly(kind, sizes, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_SIZE", 256)
    used = temp_bytes("ring", kind, sizes)
    np.testing.assert_allclose(used / used[0], np.divide(sizes, sizes[0]), rtol=0.1)
    similarity = 4 * np.square(sizes)
    assert used[-1] < similarity[-1] / 40
    assert all(used < similarity)


def test_the_dense_forms_memory_grows_quadratically(monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_SIZE", 256)
    used = temp_bytes("dense", "softmax", [8192, 32768])
    assert used[1] > 14 * used[0]
    assert used[1] > 30 * temp_bytes("ring", "softmax", [32768])[0]


def test_the_columns_go_round_a_ring_and_are_never_gathered():
    text = compiled("ring", "softmax", 4096).as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text
