"""Name or path -> model, tokenizer, preprocessing."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from clip_har_jax import bundle
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.models.families import HUB_SIZES, NAMED_SIZES, family_of
from clip_har_jax.models.head_file import read_head
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import Params, init_params, init_temporal, make_model
from clip_har_jax.models.pretrained import (
    on_device,
    read_config,
    read_folder_tokenizer,
    read_params,
    read_preprocess,
    resize_positions,
)
from clip_har_jax.models.resolve import is_hub_name, resolve_folder
from clip_har_jax.models.two_towers import TwoTowers, TwoTowersOutput
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.text import Tokenizer
from clip_har_jax.tokenization import TextTokenizer

SHOWN_SIZES = ("tiny", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336")  # in error messages, as in the README
VOCABULARY_SIZE = 1024  # of a tokenizer trained on a run's own prompts


@dataclass(frozen=True)
class BaseModel:
    """The model to fine-tune, with its tokenizer and preprocessing.

    `params` None: random weights of the sizes in `config`.
    """

    config: TwoTowerConfig
    params: Params | None
    tokenizer: TextTokenizer
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
    """A model with its preprocessing and its tokenizer, which is read at its first use.

    Called as transformers' models are, with arrays of any library:

    >>> import numpy as np
    >>> loaded = load("model")
    >>> ids, mask = loaded.tokenizer(["a person is dancing.", "a person is running."], context_length=24)
    >>> images = np.zeros((3, 3, 32, 32), np.float32)
    >>> loaded(input_ids=ids, pixel_values=images, attention_mask=mask).logits_per_image.shape
    (3, 2)
    """

    model: TwoTowers
    preprocess: Preprocess
    path: Path

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Return the folder's tokenizer.

        Raises:
          UserError: there is none, or it can't be read.
        """
        return read_folder_tokenizer(self.path)

    def __call__(
        self, input_ids: ArrayLike, pixel_values: ArrayLike, attention_mask: ArrayLike | None = None, **more: ArrayLike
    ) -> TwoTowersOutput:
        """Return the similarity of each image to each text, and their embeddings; see `TwoTowers.__call__`.

        Args:
          input_ids: token ids, [t, n].
          pixel_values: normalised images, [i, 3, h, w].
          attention_mask: [t, n], 1 for tokens; None: no padding is masked.
          more: of a NaFlex model, `pixel_attention_mask` and `spatial_shapes`.
        """
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask, **more}
        return self.model(**{name: jnp.asarray(value) for name, value in inputs.items() if value is not None})


def make_base(name: str, prompts: Sequence[str], image_size_px: int | None = None, temporal: str = "mean") -> BaseModel:
    """Return the base model of a config's `model` section.

    A named size has random weights and a tokenizer trained on `prompts`; a Hub name or folder has its own.

    Raises:
      UserError: an unknown name, or a folder that isn't a complete model.
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
        return BaseModel(config, None, tokenizer, family_of(config).preprocess(config.vision.image_size))
    if not is_hub_name(name) and not Path(name).expanduser().is_dir():
        hint = nearest(name, [*NAMED_SIZES], "no such folder or size")
        raise UserError(
            f"config.model.name={name}: {hint}; name a folder, a model of the Hub (OWNER/NAME), or a size with random "
            f"weights, such as {', '.join(SHOWN_SIZES)}"
        )
    try:
        folder = resolve_folder(name)
    except UserError as error:
        # ViT-B/33, a mistyped size, has the form of a name on the Hub.
        hint = nearest(name, [size for size in NAMED_SIZES if "/" in size], "")
        raise UserError(f"config.model.name: {f'{hint} ' if hint else ''}{error}") from error
    old = read_config(folder)
    if old.temporal not in ("mean", temporal):
        raise UserError(
            f"model.name: {folder} is a temporal model of kind {old.temporal!r}, the config says {temporal!r}; set "
            f"config.model.temporal={old.temporal}"
        )
    config = dataclasses.replace(_resized(old, image_size_px), temporal=temporal)
    params = resize_positions(read_params(folder, old), old, config)
    preprocess = read_preprocess(folder, old.vision.image_size)
    if config.vision != old.vision:
        preprocess = dataclasses.replace(preprocess, image_size_px=config.vision.image_size)
    return BaseModel(config, params, read_folder_tokenizer(folder), preprocess, _base_head(folder, config))


def _base_head(folder: Path, config: TwoTowerConfig) -> BaseHead | None:
    if not bundle.has_actions(folder) or (actions := bundle.read_actions(folder)).head == "cosine":
        return None
    params = read_head(folder, actions.head, config.projection_dim, len(actions.labels))
    return BaseHead(actions.head, actions.labels, params)


def _resized(config: TwoTowerConfig, image_size_px: int | None) -> TwoTowerConfig:
    if image_size_px is None:
        return config
    if config.vision.any_aspect:
        raise UserError(
            "config.model.image_size_px: a NaFlex model takes images of any size; set max_num_patches in the model's "
            "preprocessor_config.json"
        )
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size_px))


def known_config(name: str, image_size_px: int | None = None, temporal: str = "mean") -> TwoTowerConfig:
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
        hint = nearest(name, [*NAMED_SIZES, *HUB_SIZES], "its sizes aren't known without a download")
        raise UserError(
            f"config.model.name={name}: {hint}; name a model folder, or a known size such as {', '.join(SHOWN_SIZES)}"
        )
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

    >>> import jax
    >>> loaded = load("model")
    >>> ids, mask = loaded.tokenizer(["a person is dancing."], context_length=24)
    >>> loaded.model.encode_text(jax.numpy.asarray(ids)).shape
    (1, 16)

    Raises:
      UserError: not a complete model of a known family.
    """
    folder = resolve_folder(name_or_folder)
    config = read_config(folder)
    return LoadedModel(
        make_model(config, on_device(read_params(folder, config)), runtime),
        read_preprocess(folder, config.vision.image_size),
        folder,
    )
