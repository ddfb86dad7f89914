"""A second prediction starts from what the first one kept: same answer, less loaded, never stale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clip_har_jax import bundle
from clip_har_jax.inference import program_cache
from clip_har_jax.inference.jax_backend import JaxBackend
from tests.support.export_folders import LABELS, lively, write_heads
from tests.support.model_folders import write_image, write_model

PREDICT = """
import json, sys
from clip_har_jax import Predictor
tops = [Predictor(sys.argv[1], classes).predict([sys.argv[2]])[0].top for classes in json.loads(sys.argv[3])]
print(json.dumps({"tops": tops, "flax": "flax" in sys.modules}))
"""
IMAGES = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/clip_har_jax/programs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lively(write_model(tmp_path / "model", LABELS, temperature=1.7))


def predict(folder: Path) -> tuple[list[float], bool]:
    """Return the answer of a newly opened model, and whether the whole of it was loaded."""
    backend = JaxBackend(folder)
    return backend.predict(IMAGES)[0].tolist(), "_loaded" in vars(backend)


def test_a_second_process_gives_the_same_answer_without_the_whole_model(folder: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", seed=5)
    command = [sys.executable, "-c", PREDICT, str(folder), str(image), '[[], ["juggling", "climbing a wall"]]']
    first, second = (
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)
    )
    assert first["flax"] and not second["flax"]
    assert first["tops"] == second["tops"] and first["tops"][0] != first["tops"][1]


@pytest.mark.parametrize("name", ["forward-1x32x32x3.jax_export", "classes.safetensors"])
def test_a_damaged_file_is_made_anew(folder: Path, cache: Path, name: str) -> None:
    first, loaded = predict(folder)
    assert loaded
    (entry,) = cache.iterdir()
    assert entry.stat().st_mode & 0o077 == 0, "others could write programs there"
    data = (entry / name).read_bytes()
    middle = len(data) // 2
    for damaged in (data[:middle], data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :], b""):
        (entry / name).write_bytes(damaged)
        assert predict(folder) == (first, True)
        assert predict(folder) == (first, False)


@pytest.mark.parametrize("sealed", [True, False])
def test_other_weights_are_another_entry(folder: Path, sealed: bool) -> None:
    def change(factor: float) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["visual_projection.weight"] = factor * tensors["visual_projection.weight"][::-1].copy()
        save_file(tensors, folder / "model.safetensors")
        (folder / bundle.MANIFEST).unlink(missing_ok=True)
        if sealed:
            bundle.seal(folder)

    change(1.0)
    first, _ = predict(folder)
    assert predict(folder) == (first, False)
    change(2.0)
    second, loaded = predict(folder)
    assert loaded and second != first


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "spiece.model"])
def test_other_pickles_and_pieces_are_another_entry(name: str, tmp_path: Path) -> None:
    digests = []
    for content in (b"first", b"second"):
        (tmp_path / name).write_bytes(content)
        digests.append(program_cache.model_folder_digest(tmp_path, None))
    assert digests[0] != digests[1]


@pytest.mark.parametrize("head", ["mlp", "cross_attention"])
def test_heads_are_kept_too(folder: Path, tmp_path: Path, head: str) -> None:
    model = write_heads(folder, tmp_path / "heads")[head]
    first, _ = predict(model)
    assert predict(model) == (first, False)


def test_what_needs_the_whole_model_loads_it(folder: Path) -> None:
    predict(folder)
    backend = JaxBackend(folder)
    heat = backend.explain(IMAGES, [1])
    assert "_loaded" in vars(backend)
    probs = backend.predict(IMAGES)  # with the kept program, and the weights that explaining has loaded
    np.testing.assert_array_equal(heat, JaxBackend(folder).explain(IMAGES, [1]))
    assert probs[0].tolist() == predict(folder)[0]


def test_weights_in_bfloat16_are_read_whole(folder: Path) -> None:
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / bundle.MANIFEST).unlink()
    assert predict(folder)[0] == predict(folder)[0]


def test_the_oldest_entries_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_cache, "MAX_ENTRIES", 2)
    for i in range(4):
        entry = program_cache.KeptEntry(f"model {i}", bundle.Actions((), {}), ())
        entry.write_tensors({"x": np.zeros(2)})
        os.utime(entry.folder, (i, i))
    assert entry.tensors() is not None
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    first, loaded = predict(folder)
    assert loaded and predict(folder) == (first, True)
