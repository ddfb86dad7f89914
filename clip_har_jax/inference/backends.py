"""One protocol over what can run a model; JAX is imported only by the backend that needs it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256
from clip_har_jax.inference import text_cache
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.text import make_prompts, phrase

PROMPTS_AT_ONCE = 64  # bounds the text tower's memory for long lists of classes


@runtime_checkable
class Backend(Protocol):
    """A loaded model with its classes; images come as `preprocess` leaves them, in any number."""

    path: Path
    digest: str | None  # of the sealed model folder; None: not sealed
    actions: bundle.Actions
    labels: tuple[str, ...]
    preprocess: Preprocess

    def logits(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Class logits, temperature included."""

    def predict(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Class probabilities."""

    def embed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
        """L2-normalised image embeddings."""

    def explain(
        self, images: UInt8[np.ndarray, "b h w 3"], class_indices: Sequence[int]
    ) -> Float32[np.ndarray, "b g g"]:
        """Where the model sees a class in each image: a value from 0 to 1 for each patch, 1 the largest of the image.

        `class_indices` says which of `labels`, one for each image.
        """


def split_classes(text: str | None) -> tuple[str, ...]:
    """Return the names in the value of --classes, divided by commas; None: no names.

    Raises:
      UserError: an empty name.
    """
    names = tuple(name.strip() for name in text.split(",")) if text is not None else ()
    if not all(names):
        raise UserError(f'--classes={text!r}: a name is empty; write e.g. --classes="riding a bike,sleeping"')
    return names


def check_classes(classes: Sequence[str]) -> None:
    """Refuses classes that no model could tell apart.

    Raises:
      UserError: fewer than two, or two that are said alike.
    """
    if len(classes) < 2:
        raise UserError(f"--classes: two or more are needed, not {', '.join(map(repr, classes)) or 'none'}")
    seen: dict[str, str] = {}
    for label in classes:
        if phrase(label) in seen:
            raise UserError(f"--classes: {seen[phrase(label)]!r} and {label!r} mean the same; leave one out")
        seen[phrase(label)] = label


def choose_actions(folder: Path, classes: Sequence[str], default_classes: Sequence[str] = ()) -> bundle.Actions:
    """Return the classes to tell apart: `classes` if given, else the folder's own, else `default_classes`.

    Raises:
      UserError: there are none, they can't be told apart, or the folder's head knows only its own.
    """
    if bundle.has_actions(folder):
        actions = bundle.read_actions(folder)
        if not classes:
            return actions
        if actions.head != "cosine":
            raise UserError(
                f"--classes: the {actions.head!r} head of {folder} knows only its own {len(actions.labels)} actions; "
                "leave --classes out, or use a model with the cosine head"
            )
    labels = tuple(classes or default_classes)
    if not labels:
        raise UserError(f'{folder}: names no actions (actions.json); say e.g. --classes="riding a bike,sleeping"')
    check_classes(labels)
    return bundle.Actions(labels, make_prompts(labels))


class JaxBackend:
    """A model folder, or any CLIP in the Hugging Face layout, run by JAX.

    Args:
      name_or_folder: a model folder or a Hub name.
      classes: the actions to tell apart; empty: the folder's own.
      default_classes: the actions where neither is given.
      batch_size: images that are computed at once; fewer are padded, so that nothing is compiled again.

    Raises:
      UserError: not a whole model, a sealed one with a changed file, or no classes.
    """

    takes_clips = True  # [b, frames, h, w, 3] where images are [b, h, w, 3]

    def __init__(
        self,
        name_or_folder: str | os.PathLike[str],
        classes: Sequence[str] = (),
        default_classes: Sequence[str] = (),
        batch_size: int = 32,
    ):
        import jax
        from flax import nnx

        from clip_har_jax.models.clip import normalize_images
        from clip_har_jax.models.explain import heat_map, patch_embeds
        from clip_har_jax.models.factory import load
        from clip_har_jax.models.heads import image_features, make_head, read_head
        from clip_har_jax.models.pretrained import resolve_folder

        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size}; 1 or more is needed")
        self.path, self.batch_size = resolve_folder(os.fspath(name_or_folder)), batch_size
        self.digest = bundle.verify(self.path)
        actions = choose_actions(self.path, classes, default_classes)
        loaded = load(str(self.path))
        self.actions, self.labels, self.preprocess = actions, actions.labels, loaded.preprocess
        graphdef, self._state = nnx.split(loaded.model)
        mean, std, name, temperature = self.preprocess.mean, self.preprocess.std, actions.head, actions.temperature
        dim = loaded.model.config.projection_dim
        # Of any head but the cosine; a model with the cosine head is its class embeddings and their scale.
        self.head_params = {} if name == "cosine" else read_head(self.path, name, dim, len(actions.labels))

        def forward(state: Any, classes: Any, images: jax.Array) -> tuple[jax.Array, ...]:
            model, pixels = nnx.merge(graphdef, state), normalize_images(images, mean, std)
            if name == "cosine":
                embeddings, scale = classes
                features = image_features(model, pixels, with_patches=False)
                logits = scale * features.image @ embeddings.T
            else:
                head = make_head(name, classes)
                features = image_features(model, pixels, head.needs_patches)
                logits = head(features) / temperature
            return logits, jax.nn.softmax(logits), features.image

        def explain(state: Any, classes: jax.Array, images: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, state)
            patches = patch_embeds(
                model.vision, model.visual_projection.kernel[...], normalize_images(images, mean, std)
            )
            return heat_map(patches, classes)

        self._forward, self._explain = jax.jit(forward), jax.jit(explain)
        self._encode_text = jax.jit(lambda state, ids: nnx.merge(graphdef, state).encode_text(ids))
        self._tokenizer, self._context_length = loaded.tokenizer, loaded.model.config.text.context_length
        self.scale = float(np.exp(loaded.model.logit_scale[...])) / temperature
        self.class_embeddings = self._embed_classes(actions)
        classes_of_text = (self.class_embeddings, np.float32(self.scale))
        self._classes = jax.tree.map(jax.numpy.asarray, self.head_params or classes_of_text)

    def _embed_classes(self, actions: bundle.Actions) -> Float32[np.ndarray, "c d"]:
        """Return the directions that stand for the classes: those of their texts, or those that the head has
        learned.
        """
        if self.head_params:
            directions = self.head_params["classes.kernel"].T
            return directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        prompts = [actions.prompts[label] for label in actions.labels]
        ids = self.tokenize([text for group in prompts for text in group])
        counts = [len(group) for group in prompts]
        if len(ids) < text_cache.CACHED_FROM:
            return mean_by_class(self.embed_texts(ids), counts)
        import jax

        program = f"{jax.__version__} {jax.default_backend()} {ids.shape} {counts}"
        key = sha256([text_cache.weights_digest(self.path), ids.tobytes(), program])
        return text_cache.cached(key, lambda: mean_by_class(self.embed_texts(ids), counts))

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "p t"]:
        """Token ids, padded to the model's context length."""
        return self._tokenizer(texts, self._context_length)[0]

    def embed_texts(self, ids: Int32[np.ndarray, "p t"]) -> Float32[np.ndarray, "p d"]:
        """L2-normalised text embeddings of token ids."""
        size, parts = min(PROMPTS_AT_ONCE, len(ids)), []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            parts.append(np.asarray(self._encode_text(self._state, pad(part, size)))[: len(part)])
        return np.concatenate(parts)

    def outputs(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> tuple[np.ndarray, ...]:
        """Logits, probabilities and embeddings; compiled for one image and for `batch_size` images, nothing else."""
        size, parts = 1 if len(images) == 1 else self.batch_size, []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            outputs = self._forward(self._state, self._classes, pad(part, size))
            parts.append([np.asarray(output)[: len(part)] for output in outputs])
        logits, probs, embeddings = (np.concatenate(output) for output in zip(*parts, strict=True))
        check_finite(logits, self.path)
        return logits, probs, embeddings

    def logits(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Class logits, temperature included."""
        return self.outputs(images)[0]

    def predict(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Class probabilities."""
        return self.outputs(images)[1]

    def embed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
        """L2-normalised image embeddings."""
        return self.outputs(images)[2]

    def explain(
        self, images: UInt8[np.ndarray, "b h w 3"], class_indices: Sequence[int]
    ) -> Float32[np.ndarray, "b g g"]:
        """Where the model sees a class in each image, by `models.explain`."""
        size, parts = 1 if len(images) == 1 else self.batch_size, []
        classes = self.class_embeddings[check_indices(class_indices, len(images), len(self.labels))]
        for start in range(0, len(images), size):
            part, rows = images[start : start + size], classes[start : start + size]
            parts.append(np.asarray(self._explain(self._state, pad(rows, size), pad(part, size)))[: len(part)])
        return np.concatenate(parts)


def mean_by_class(embeddings: Float32[np.ndarray, "p d"], counts: Sequence[int]) -> Float32[np.ndarray, "c d"]:
    """Class embeddings: the mean of each class's normalised text embeddings, normalised again.

    Args:
      embeddings: of all prompts, class after class.
      counts: the number of prompts of each class.
    """
    means = np.stack([group.mean(axis=0) for group in np.split(embeddings, np.cumsum(counts)[:-1])])
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def check_indices(indices: Sequence[int], num_images: int, num_classes: int) -> Int64[np.ndarray, " b"]:
    """Classes to explain, as an array.

    Raises:
      UserError: not one for each image, or one that isn't there.
    """
    array = np.asarray(indices, np.int64).reshape(-1)
    if len(array) != num_images:
        raise UserError(f"{len(array)} classes to explain for {num_images} images; give one for each image")
    if outside := [int(i) for i in array if not 0 <= i < num_classes]:
        raise UserError(f"class {outside[0]} isn't there; 0 to {num_classes - 1} are")
    return array


def check_finite(logits: np.ndarray, path: Path) -> None:
    """Refuses what damaged weights give.

    Raises:
      UserError: NaN or infinity.
    """
    if not np.isfinite(logits).all():
        raise UserError(f"{path}: the model gives NaN or infinity; its weights are damaged")


def pad(rows: np.ndarray, size: int) -> np.ndarray:
    """`size` rows, the missing ones zero."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
