"""The functions that JAX compiles for a model folder: from images, frames of clips and texts to the model's outputs.

Each is made from `restore`, the function from flat parameters to the model, and takes the parameters as its first
argument. JAX is imported when one is made.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_har_jax.bundle import Actions
from clip_har_jax.preprocess import Preprocess

if TYPE_CHECKING:
    import jax

    from clip_har_jax.models.heads import Features
    from clip_har_jax.models.two_towers import TwoTowers

Restore = Callable[[Mapping[str, Any]], Any]


def make_restore(model: "TwoTowers") -> Restore:
    """Return the function from flat parameters to a model like this one; missing parameters must not be used."""
    from flax import nnx

    from clip_har_jax.models.params import flat_params, unflatten

    graphdef, names = nnx.graphdef(model), tuple(flat_params(model))
    return lambda given: nnx.merge(graphdef, unflatten({name: given.get(name, np.float32(0)) for name in names}))


def needs_patches(head: str) -> bool:
    """Return whether the head of this name works on the patches, and not on the features of the whole image."""
    from clip_har_jax.models.heads import HEADS

    return head in HEADS and HEADS[head][0].needs_patches


def make_forward(restore: Restore, actions: Actions, preprocess: Preprocess) -> Any:
    """Return the jitted function from images or clips, uint8 [b, (t,) h, w, 3], to logits, probabilities, embeddings.

    Its second argument is the head's parameters, or class embeddings and their scale for the cosine.
    """
    import jax

    from clip_har_jax.models.heads import image_features
    from clip_har_jax.models.two_towers import normalize_images

    patches, mean, std = needs_patches(actions.head), preprocess.mean, preprocess.std

    def forward(params: Mapping[str, Any], classes: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        pixels = normalize_images(images, mean, std)
        return _outputs(actions, image_features(restore(params), pixels, patches), classes)

    return jax.jit(forward)


def make_pool(restore: Restore, actions: Actions) -> Callable[..., Any]:
    """Return the function from the features of the frames of clips, [b, t, d], to the outputs of `make_forward`'s."""
    import jax

    from clip_har_jax.models.heads import Features

    def pool(params: Mapping[str, Any], classes: Any, frames: jax.Array) -> tuple[jax.Array, ...]:
        return _outputs(actions, Features(restore(params).pool_frames(frames), None, frames), classes)

    return jax.jit(pool)


def _outputs(actions: Actions, features: "Features", classes: Any) -> tuple["jax.Array", ...]:
    """Return logits [b, c], divided by the temperature, probabilities [b, c] and embeddings [b, d]."""
    import jax

    from clip_har_jax.models.heads import make_head

    if actions.head == "cosine":
        embeddings, scale = classes  # the temperature is part of the scale
        logits = scale * features.image @ embeddings.T
    else:
        logits = make_head(actions.head, classes)(features) / actions.temperature
    probs = jax.nn.sigmoid(logits) if actions.multi_label else jax.nn.softmax(logits)
    return logits, probs, features.image


def make_explain(restore: Restore, preprocess: Preprocess) -> Callable[..., Any]:
    """Return the function from class embeddings [b, d] and images [b, h, w, 3] to heat maps [b, g, g]."""
    import jax

    from clip_har_jax.models.explain import heat_map, patch_embeds
    from clip_har_jax.models.two_towers import normalize_images

    def explain(params: Mapping[str, Any], classes: jax.Array, images: jax.Array) -> jax.Array:
        pixels = normalize_images(images, preprocess.mean, preprocess.std)
        return heat_map(patch_embeds(restore(params), pixels), classes)

    return jax.jit(explain)


def make_encode_text(restore: Restore) -> Callable[..., Any]:
    """Return the function from token ids [p, t] to L2-normalised embeddings [p, d]."""
    import jax

    return jax.jit(lambda params, ids: restore(params).encode_text(ids))
