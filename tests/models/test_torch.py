"""Folders exchanged with transformers' torch CLIPModel and SiglipModel, which runs in an environment of its own."""

import site
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.models.factory import make_base
from clip_har_jax.models.families import NAMED_SIZES
from clip_har_jax.models.params import init_params
from clip_har_jax.models.pretrained import load_pretrained, write_params
from clip_har_jax.models.two_towers import TwoTowers
from clip_har_jax.preprocess import evaluation_transform
from tests.support.normalization import normalize
from tests.support.torch_environment import torch_side

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TOLERANCE = 1e-5
TEXTS = ("a photo of a person riding a bike.", "naïve 😀", "sleeping " * 100)


def make_inputs(model: TwoTowers) -> dict[str, np.ndarray]:
    """Two images and three texts of different lengths."""
    rng, text = np.random.default_rng(1), model.config.text
    size, length = model.config.vision.image_size, text.context_length
    ids = rng.integers(3, text.vocab_size - 2, (3, length), np.int32)
    mask = np.zeros_like(ids)
    for row, end in enumerate((length - 1, length // 2, 3)):
        ids[row, end:], mask[row, : end + 1] = min(text.eos_token_id, text.vocab_size - 1), 1
    pixels = rng.standard_normal((2, 3, size, size), np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def assert_same_outputs(folder: Path, model: TwoTowers, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our outputs against outputs.npz of the folder, which is returned."""
    output = model(**{name: jnp.asarray(value) for name, value in inputs.items()})
    with np.load(folder / "outputs.npz") as arrays:
        expected = dict(arrays)
    errors = {
        name: float(np.abs(getattr(output, name) - expected[name]).max() / np.abs(expected[name]).max())
        for name in ("logits_per_image", "text_embeds", "image_embeds")
    }
    print(f"relative errors: {errors}")
    assert max(errors.values()) < TOLERANCE, errors
    return expected


@pytest.mark.parametrize("size", ["tiny", "ViT-B/32", "siglip-tiny", "siglip-base-patch16-224"])
def test_theirs_opens_here(torch_python: str, tmp_path: Path, size: str) -> None:
    torch_side(torch_python, "save", str(tmp_path), size)
    model = load_pretrained(str(tmp_path))
    inputs = make_inputs(model)
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, **inputs)
    torch_side(torch_python, "run", str(tmp_path))
    assert_same_outputs(tmp_path, model, inputs)


@pytest.mark.parametrize("size", ["tiny", "ViT-B/32", "siglip-tiny", "siglip-base-patch16-224"])
def test_ours_opens_there(torch_python: str, tmp_path: Path, size: str) -> None:
    """A named size with its own tokenizer and preprocessing, as training starts from and saves it."""
    base = make_base(size, TEXTS)
    write_params(tmp_path, base.config, init_params(base.config, seed=0))
    base.tokenizer.save(tmp_path)
    base.preprocess.save(tmp_path)
    model = load_pretrained(str(tmp_path))
    assert NAMED_SIZES[size].vision == model.config.vision
    inputs = make_inputs(model)
    images = np.random.default_rng(2).integers(0, 256, (2, 90, 70, 3), np.uint8)
    texts = np.array([list(text.encode().ljust(1000, b"\0")) for text in TEXTS], np.uint8)
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, images=images, texts=texts, **inputs)
    torch_side(torch_python, "run", str(tmp_path))
    expected = assert_same_outputs(tmp_path, model, inputs)
    ids, _ = base.tokenizer(TEXTS, model.config.text.context_length)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    ours = np.stack([evaluation_transform(image, base.preprocess) for image in images])
    pixels = normalize(ours, base.preprocess.mean, base.preprocess.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pixels, expected["pixel_values"], atol=1e-6)


def test_pickled_weights_are_read_by_torch_alone(torch_python: str, tmp_path: Path) -> None:
    """Weights in a pickle are read where torch is installed; a pickle that would run code is refused."""
    program = """
import os, sys
from pathlib import Path
sys.path += sys.argv[2:]
import torch
from clip_har_jax.errors import UserError
from clip_har_jax.models.pickles import has_torch, read_pickle
folder = Path(sys.argv[1])
assert has_torch()
torch.save({"state_dict": {"module.a": torch.arange(3, dtype=torch.bfloat16)}}, folder / "good.bin")
assert read_pickle(folder / "good.bin")["a"].tolist() == [0, 1, 2]
class Evil:
    def __reduce__(self):
        return os.mkdir, (str(folder / "ran"),)
torch.save({"a": Evil()}, folder / "evil.bin")
try:
    read_pickle(folder / "evil.bin")
except UserError as error:
    print(error)
"""
    paths = [str(Path(__file__).parents[2]), *site.getsitepackages()]
    command = [torch_python, "-c", program, str(tmp_path), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evil.bin: can't be read as weights alone" in done.stdout and done.stdout.count("\n") == 1
    assert not (tmp_path / "ran").exists()
