"""Name or path -> model, tokenizer, preprocessing."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import NamedSharding

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import FlaxCLIPModel
from clip_har_jax.models.configuration import CLIPConfig, TextConfig, VisionConfig
from clip_har_jax.models.head_file import read_head
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import Params, init_params, init_temporal, make_model
from clip_har_jax.models.pretrained import on_device, read_config, read_params, resize_positions
from clip_har_jax.models.resolve import resolve_folder
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.text import Tokenizer

_LARGE_TEXT = TextConfig(hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12)
_LARGE_VISION = VisionConfig(hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, patch_size=14)

# Sizes of Radford et al. 2021, tables 19 and 20; mini and tiny are this project's own, for the embedded set.
NAMED_SIZES = {
    "mini": CLIPConfig(
        TextConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, context_length=24),
        VisionConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, image_size=32, patch_size=8),
        projection_dim=32,
    ),
    "tiny": CLIPConfig(
        TextConfig(hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2, context_length=24),
        VisionConfig(hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, image_size=64, patch_size=16),
        projection_dim=64,
    ),
    "ViT-B/32": CLIPConfig(),
    "ViT-B/16": CLIPConfig(vision=VisionConfig(patch_size=16)),
    "ViT-L/14": CLIPConfig(_LARGE_TEXT, _LARGE_VISION, projection_dim=768),
    "ViT-L/14@336": CLIPConfig(_LARGE_TEXT, dataclasses.replace(_LARGE_VISION, image_size=336), projection_dim=768),
}
VOCABULARY_SIZE = 1024  # of a tokenizer trained on a run's own prompts
HUB_SIZES = {
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336",
}


@dataclass(frozen=True)
class BaseModel:
    """The model to fine-tune, with its tokenizer and preprocessing.

    `params` None: random weights of the sizes in `config`.
    """

    config: CLIPConfig
    params: Params | None
    tokenizer: Tokenizer
    preprocess: Preprocess
    head: "BaseHead | None" = None


@dataclass(frozen=True)
class BaseHead:
    """The trained head of a base model; a run with the same head and labels continues to train it."""

    name: str
    labels: tuple[str, ...]
    params: Params


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and preprocessing."""

    model: FlaxCLIPModel
    tokenizer: Tokenizer
    preprocess: Preprocess
    path: Path


def make_base(name: str, prompts: Sequence[str], image_size_px: int | None = None, temporal: str = "mean") -> BaseModel:
    """Return the base model of a config's `model` section.

    A named size has random weights and a tokenizer trained on `prompts`; a Hub name or folder has its own.

    Raises:
      UserError: an unknown name, or a folder that isn't a complete CLIP.
    """
    if name in NAMED_SIZES:
        tokenizer = Tokenizer.train(prompts, VOCABULARY_SIZE)
        config = dataclasses.replace(_resized(NAMED_SIZES[name], image_size_px), temporal=temporal)
        text = dataclasses.replace(
            config.text,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config = dataclasses.replace(config, text=text)
        return BaseModel(config, None, tokenizer, Preprocess(image_size_px=config.vision.image_size))
    try:
        folder = resolve_folder(name)
    except UserError as error:
        raise UserError(f"model.name: {error}; named sizes: {', '.join(NAMED_SIZES)}") from error
    old = read_config(folder)
    if old.temporal not in ("mean", temporal):
        raise UserError(
            f"model.name: {folder} is a temporal model of kind {old.temporal!r}, the config says {temporal!r}; set "
            f"config.model.temporal={old.temporal}"
        )
    config = dataclasses.replace(_resized(old, image_size_px), temporal=temporal)
    params = resize_positions(read_params(folder, old), old, config)
    preprocess = Preprocess.from_folder(folder, old.vision.image_size)
    if config.vision != old.vision:
        preprocess = dataclasses.replace(preprocess, image_size_px=config.vision.image_size)
    return BaseModel(config, params, Tokenizer.from_folder(folder), preprocess, _base_head(folder, config))


def _base_head(folder: Path, config: CLIPConfig) -> BaseHead | None:
    if not bundle.has_actions(folder) or (actions := bundle.read_actions(folder)).head == "cosine":
        return None
    params = read_head(folder, actions.head, config.projection_dim, len(actions.labels))
    return BaseHead(actions.head, actions.labels, params)


def _resized(config: CLIPConfig, image_size_px: int | None) -> CLIPConfig:
    if image_size_px is None:
        return config
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size_px))


def known_config(name: str, image_size_px: int | None = None, temporal: str = "mean") -> CLIPConfig:
    """Return the sizes of the model of a config's `model` section, without a download.

    A named size gets the largest vocabulary that a run can have.

    Raises:
      UserError: a name whose sizes aren't known here.
    """
    if name in NAMED_SIZES:
        config = NAMED_SIZES[name]
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=VOCABULARY_SIZE))
    elif name in HUB_SIZES:
        config = NAMED_SIZES[HUB_SIZES[name]]
    elif Path(name).expanduser().is_dir():
        config = read_config(Path(name).expanduser())
    else:
        known = ", ".join([*NAMED_SIZES, *HUB_SIZES])
        raise UserError(f"model.name: the sizes of {name!r} aren't known here; a model folder, or one of {known}")
    return dataclasses.replace(_resized(config, image_size_px), temporal=temporal)


def base_params(base: BaseModel, seed: int, shardings: Mapping[str, NamedSharding]) -> Params:
    """Return the base model's parameters that are listed in `shardings`.

    Those of a folder are host arrays. Random ones are made on the devices, each of which computes its own shard.
    """
    if base.params is None:
        return init_params(base.config, seed, shardings)
    added = {} if all(name in base.params for name in shardings) else init_temporal(base.config, seed)
    return {name: base.params[name] if name in base.params else added[name] for name in shardings}


def load(name_or_folder: str, runtime: Runtime = Runtime()) -> LoadedModel:
    """Return a trained model, ready to compute.

    >>> loaded = load("model")
    >>> ids, mask = loaded.tokenizer(["a person is dancing."], context_length=24)
    >>> loaded.model.encode_text(jax.numpy.asarray(ids)).shape
    (1, 16)

    Raises:
      UserError: not a complete CLIP in the Hugging Face layout.
    """
    folder = resolve_folder(name_or_folder)
    config = read_config(folder)
    return LoadedModel(
        make_model(config, on_device(read_params(folder, config)), runtime),
        Tokenizer.from_folder(folder),
        Preprocess.from_folder(folder, config.vision.image_size),
        folder,
    )
