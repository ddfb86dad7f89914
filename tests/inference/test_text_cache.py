"""Embeddings of many classes are computed once, and anew where the cached file or the weights changed."""

import numpy as np
import pytest

from clip_har_jax.inference import text_cache
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.kept import KeptEntry
from tests.support.model_folders import write_model

CLASSES = tuple(f"action number {i}" for i in range(20))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(text_cache, "CACHED_FROM", 1)
    return tmp_path / "cache" / "clip_har_jax" / "texts"


def embeddings(model, monkeypatch, encoded):
    """Return the class embeddings of a new backend; counts the texts that it encodes."""
    embed = JaxBackend.embed_texts

    def counting(self, ids):
        encoded.append(len(ids))
        return embed(self, ids)

    monkeypatch.setattr(JaxBackend, "embed_texts", counting)
    monkeypatch.setattr(KeptEntry, "tensors", lambda self: None)  # the embeddings of this very model and classes
    return JaxBackend(model, CLASSES).class_embeddings


def test_texts_are_encoded_once_for_the_same_weights(cache, tmp_path, monkeypatch):
    model, encoded = write_model(tmp_path / "model"), []
    with monkeypatch.context() as patch:
        first = embeddings(model, patch, encoded)
    texts = len(encoded)
    assert texts == 1
    with monkeypatch.context() as patch:
        np.testing.assert_array_equal(embeddings(model, patch, encoded), first)
    assert len(encoded) == texts
    (file,) = cache.glob("*.npy")
    file.write_bytes(file.read_bytes()[:-7])  # damaged
    with monkeypatch.context() as patch:
        np.testing.assert_array_equal(embeddings(model, patch, encoded), first)
    assert len(encoded) == texts + 1
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as patch:
        embeddings(model, patch, encoded)
    assert len(encoded) == texts + 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert text_cache.cached("key", lambda: np.ones((2, 3), np.float32)).shape == (2, 3)


def test_the_cache_is_bounded(cache, monkeypatch):
    monkeypatch.setattr(text_cache, "MOST_FILES", 3)
    for i in range(6):
        text_cache.cached(str(i), lambda: np.ones((2, 3), np.float32))
    assert len(list(cache.glob("*"))) == 3
