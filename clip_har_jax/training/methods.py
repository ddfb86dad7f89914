"""How a model is fine-tuned: what is trainable, and the class logits that the loss compares with the labels."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_har_jax.config import MethodConfig
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.models.clip import FlaxCLIPModel

METHODS = ("full",)


class Classes(NamedTuple):
    """The classes as the model sees them: their prompts, or their embeddings where the text tower is frozen."""

    input_ids: Any  # int32 [prompts, tokens], or None
    class_of_prompt: Any  # int32 [prompts], or None; the number of classes for a prompt that only fills up the mesh
    embeddings: Any  # float32 [classes, dim], or None


@dataclass(frozen=True)
class Full:
    """Fine-tunes whole towers against the text tower's class embeddings (zero-shot style cross-entropy)."""

    towers: str  # image, text or both
    num_classes: int

    @property
    def trains_text(self) -> bool:
        return self.towers in ("text", "both")

    def is_trainable(self, name: str) -> bool:
        """Whether the parameter of this dotted name is updated; the logit scale always is."""
        if name == "logit_scale":
            return True
        return self.trains_text if name.startswith("text") else self.towers in ("image", "both")

    def class_embeddings(self, model: FlaxCLIPModel, classes: Classes) -> Float[Array, "c d"]:
        """The classes' embeddings, computed from their prompts unless they are known."""
        if classes.embeddings is not None:
            return classes.embeddings
        assert classes.input_ids is not None and classes.class_of_prompt is not None
        return model.encode_classes(classes.input_ids, classes.class_of_prompt, self.num_classes)

    def logits(
        self, model: FlaxCLIPModel, images: Float[Array, "b *t h w 3"], embeddings: Float[Array, "c d"]
    ) -> Float[Array, "b c"]:
        """exp(logit_scale) * image . class."""
        return jnp.exp(model.logit_scale[...]) * model.encode_image(images) @ embeddings.T


def make_method(config: MethodConfig, num_classes: int) -> Full:
    """The method that `config.name` names.

    Raises:
      UserError: an unknown name.
    """
    if config.name not in METHODS:
        raise UserError(f"config.method.name is {config.name!r}; {nearest(config.name, list(METHODS))}")
    return Full(config.towers, num_classes)
