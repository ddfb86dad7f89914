"""Small model folders and image folders for tests."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_har_jax import bundle
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, TwoTowerConfig, VisionConfig
from clip_har_jax.models.factory import make_base
from clip_har_jax.models.params import Params, init_params
from clip_har_jax.models.pretrained import write_params
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.text import Tokenizer, make_prompts

IMAGE_SIZE_PX = 32


@functools.cache
def _random_params(config: TwoTowerConfig, seed: int) -> Params:
    return {name: np.asarray(value) for name, value in init_params(config, seed).items()}


def random_params(config: TwoTowerConfig, seed: int = 0) -> Params:
    """Return the random weights of these sizes as host arrays; making them takes longer than most tests of them."""
    return dict(_random_params(config, seed))


@functools.cache
def small_model() -> tuple[Tokenizer, CLIPConfig, Params]:
    """Return the tokenizer, the sizes and the weights of the random model that tests share."""
    tokenizer = Tokenizer.train(["a photo of a person riding a bike."], 600)
    text = TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        context_length=24,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = VisionConfig(
        hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=IMAGE_SIZE_PX, patch_size=16
    )
    config = CLIPConfig(text, vision, projection_dim=16)
    return tokenizer, config, random_params(config)


def write_model(folder: Path, labels: Sequence[str] = (), temperature: float = 1.0) -> Path:
    """Return a random CLIP in the Hugging Face layout; with labels, a sealed model folder."""
    folder.mkdir(parents=True)
    tokenizer, config, params = small_model()
    write_params(folder, config, params)
    tokenizer.save(folder)
    Preprocess(IMAGE_SIZE_PX).save(folder)
    if labels:
        bundle.write_actions(folder, bundle.Actions(tuple(labels), make_prompts(labels), temperature))
        bundle.seal(folder)
    return folder


def write_siglip(folder: Path, labels: Sequence[str]) -> Path:
    """Return a random SigLIP in the Hugging Face layout; its tokenizer is trained on the labels."""
    base = make_base("siglip-tiny", [f"a person {label}" for label in labels])
    write_params(folder, base.config, init_params(base.config, 0))
    base.tokenizer.save(folder)
    base.preprocess.save(folder)
    return folder


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Return a picture of coloured blocks: width and height in px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size).save(path)
    return path


def write_images(root: Path, labels: Sequence[str], per_class: int = 3) -> Path:
    """One folder a class."""
    for i, label in enumerate(labels):
        for j in range(per_class):
            write_image(root / label / f"{j}.png", seed=100 * i + j)
    return root
