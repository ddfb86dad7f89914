"""A fine-tuning method applied to a model: its parameters, class embeddings, logits, losses and saved head.

The file is over 300 lines, because these parts share the state of one class.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_har_jax.batch import Batch
from clip_har_jax.config import MethodConfig
from clip_har_jax.errors import UserError
from clip_har_jax.models.adapters import A, B, add_lora, init_lora, merge_lora
from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.models.heads import HEADS, HeadSize, head_shapes, image_features, init_head, make_head
from clip_har_jax.models.layers import DropPath
from clip_har_jax.models.params import Params, unflatten
from clip_har_jax.models.temporal import is_temporal
from clip_har_jax.models.two_towers import TwoTowers, mean_class_embeddings
from clip_har_jax.training.contrastive import contrastive_loss, even_bias
from clip_har_jax.training.losses import make_class_loss, make_target
from clip_har_jax.training.mixing import mix
from clip_har_jax.training.recipes import CONTEXT, PAIR_LOSSES, check_method

HEAD = "head."  # prefix of the names of a head's parameters


class ClassInputs(NamedTuple):
    """The classes as inputs of a step: their prompts, or their embeddings if the text side is frozen."""

    input_ids: Any  # int32 [prompts, tokens], or None
    class_of_prompt: Any  # int32 [prompts], or None; num_classes marks a padding prompt
    embeddings: Any  # float32 [classes, dim], or None


class Method:
    """A recipe applied to a model: the functions of which a training step is made.

    Args:
      config: the `method` section of a config.
      sizes: of the model.
      num_classes: number of actions.
      model: abstract model, into which LoRA's low-rank updates are inserted.
      mesh: the devices over which contrastive losses compare images with texts.
      class_weights: weight of each class in the loss; None: all equal.
      multi_label: an image has any number of labels.

    Raises:
      UserError: an unknown name; a head, loss, tower or setting that doesn't fit the method.
    """

    def __init__(
        self,
        config: MethodConfig,
        sizes: TwoTowerConfig,
        num_classes: int,
        model: TwoTowers,
        mesh: Mesh,
        class_weights: Float[np.ndarray, " c"] | None = None,
        multi_label: bool = False,
    ):
        self.recipe, self.head, self.loss = check_method(config, multi_label)
        if self.head != "linear" and not sizes.has_texts:
            raise UserError(
                f"config.method.head is {self.head!r}, which starts from texts, but the model has an image tower "
                "alone; use method.name=linear_probe, or full, lp_ft, lora or bitfit with method.head=linear"
            )
        if sizes.vision.any_aspect:
            _check_any_aspect(config, sizes, self.head)
        self.config, self.sizes, self.num_classes, self.mesh = config, sizes, num_classes, mesh
        self.class_weights = class_weights
        if config.name == "lora":
            names = {"image": ("vision",), "text": ("text",), "both": ("text", "vision")}[self.towers]
            add_lora(model, config.lora_targets, names, config.lora_rank, config.lora_alpha)
        self.graphdef = nnx.graphdef(model)
        self.has_head = self.head != "cosine"
        self.needs_patches = self.has_head and HEADS[self.head][0].needs_patches

    @property
    def towers(self) -> str:
        """The trainable towers; a head other than cosine replaces the text tower."""
        return "image" if self.head != "cosine" else self.config.towers

    @property
    def context_length(self) -> int:
        """Positions of a prompt that learned vectors occupy."""
        return self.config.prompt_length if self.config.name == "prompt" else 0

    def extra_parameters(self, cache_size: int = 0) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Any, ...]]]:
        """Return shapes and logical axis names of the parameters that the method adds to CLIP: a head or a context."""
        if self.context_length:
            stack = (self.num_classes,) if self.config.prompt_per_class else ()
            shape = (*stack, self.context_length, self.sizes.text.hidden_size)
            return {CONTEXT: shape}, {CONTEXT: (None,) * len(shape)}
        if not self.has_head:
            return {}, {}
        hidden = cache_size if self.head == "tip_adapter" else 0
        shapes, axes = head_shapes(self.head, HeadSize(self.sizes.projection_dim, self.num_classes, hidden))
        return {HEAD + name: shape for name, shape in shapes.items()}, {HEAD + name: axes[name] for name in axes}

    def init_extra(
        self,
        params: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        class_embeddings: np.ndarray | None,
        context_ids: Int[np.ndarray, " n"] | None,
        seed: int,
    ) -> Params:
        """Return the initial values of the parameters that the method adds to CLIP.

        Heads and LoRA start such that the model predicts as the base model does. A learned context starts from words.

        Args:
          params: the model's parameters.
          shapes: of all parameters.
          class_embeddings: of the base model; needed for a head.
          context_ids: tokens whose embeddings initialise a learned context.
          seed: of the random values.
        """
        own: Params = dict(init_lora(shapes, seed))
        if self.has_head and self.recipe.learns_from != "features":
            assert class_embeddings is not None
            scale = float(np.exp(params["logit_scale"]))
            own |= {HEAD + k: v for k, v in init_head(self.head, class_embeddings, scale, seed).items()}
        if self.context_length:
            assert context_ids is not None
            shape = shapes[CONTEXT]
            context = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
            context[..., : len(context_ids), :] = np.asarray(params["text.token_embedding"])[context_ids]
            own[CONTEXT] = context
        return own

    def is_trainable(self, name: str) -> bool:
        """Return whether the parameter of this dotted name is updated."""
        if is_temporal(name):
            return self.recipe.learns_from == "steps" and self.towers != "text"
        if self.sizes.temporal == "st_adapter" and name.startswith("vis") and not name.endswith((A, B)):
            return False  # the tower is frozen; low-rank updates of it aren't
        if not any(fnmatchcase(name, pattern) for pattern in self.recipe.trains):
            return False
        if name.startswith(HEAD) or name == CONTEXT:
            return True
        if name in ("logit_scale", "logit_bias"):
            return not self.has_head
        return self.towers in ("both", "text" if name.startswith("text") else "image")

    def model(self, params: Params) -> TwoTowers:
        """Return the model with `params`; parameters of a head or a context are ignored."""
        own = {name: value for name, value in params.items() if not name.startswith((HEAD, CONTEXT))}
        return nnx.merge(self.graphdef, unflatten(own))

    def class_embeddings(self, params: Params, classes: ClassInputs) -> Float[Array, "k d"]:
        """Return the embeddings that images are compared with: of classes, or of prompts for a contrastive loss."""
        if classes.embeddings is not None:
            return classes.embeddings
        assert classes.input_ids is not None and classes.class_of_prompt is not None
        model = self.model(params)
        if self.loss in PAIR_LOSSES:
            return model.encode_text(classes.input_ids)
        if not self.context_length:
            return model.encode_classes(classes.input_ids, classes.class_of_prompt, self.num_classes)
        context, count = params[CONTEXT], len(classes.input_ids)
        if self.config.prompt_per_class:
            context = jnp.take(context, classes.class_of_prompt, axis=0, mode="clip")
        else:
            context = jnp.broadcast_to(context, (count, *context.shape))
        embeddings = model.encode_prompts(classes.input_ids, context)
        return mean_class_embeddings(embeddings, classes.class_of_prompt, self.num_classes)

    def logits(
        self,
        params: Params,
        images: Float[Array, "b *t h w 3"],
        embeddings: Float[Array, "c d"],
        drop: DropPath | None = None,
    ) -> Float[Array, "b c"]:
        """Return the head's logits; with the cosine exp(logit_scale) * image . class."""
        features = image_features(self.model(params), images, self.needs_patches, drop)
        if self.has_head:
            return self.make_head(params)(features)
        return jnp.exp(params["logit_scale"]) * features.image @ embeddings.T

    def make_head(self, params: Params) -> Any:
        return make_head(self.head, {k.removeprefix(HEAD): v for k, v in params.items() if k.startswith(HEAD)})

    def losses(
        self,
        params: Params,
        images: Float[Array, "b *t h w 3"],
        embeddings: Float[Array, "k d"],
        classes: ClassInputs,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Float[Array, " b"], Float[Array, "b c"]]:
        """Return the loss and the class logits of each row.

        Args:
          params: all parameters.
          images: normalised images [b, h, w, 3] or clips [b, t, h, w, 3].
          embeddings: of the classes, or of the prompts for a contrastive loss, [k, d].
          classes: the classes to which the prompts belong.
          batch: labels and mask.
          key: random key of this step.
        """
        config = self.config
        drop_key, mix_key, prompt_key = jax.random.split(key, 3)
        drop = DropPath(drop_key, config.drop_path) if config.drop_path else None
        if self.loss in PAIR_LOSSES:
            image = self.model(params).encode_image(images, drop)
            text = embeddings[_choose_prompts(prompt_key, batch.label, classes.class_of_prompt)]
            scale = jnp.exp(params["logit_scale"])
            losses = contrastive_loss(
                image,
                text,
                scale,
                batch.mask,
                mesh=self.mesh,
                kind="sigmoid" if self.loss == "sigmoid" else "softmax",
                label=None if self.loss == "softmax" else batch.label,
                logit_bias=self._pair_bias(params, image, text, batch.mask),
            )
            return losses, scale * image @ mean_class_embeddings(
                embeddings, classes.class_of_prompt, self.num_classes
            ).T
        target = make_target(batch.label, self.num_classes)
        if config.mixup or config.cutmix:
            images, target = mix(images, target, batch.mask, mix_key, config.mixup, config.cutmix)
        logits = self.logits(params, images, embeddings, drop)
        return make_class_loss(self.loss, config, self.class_weights)(logits, target), logits

    def pair_losses(
        self,
        params: Params,
        images: Float[Array, "b h w 3"],
        input_ids: Int[Array, "b t"],
        mask: Float[Array, " b"],
        key: jax.Array,
    ) -> Float[Array, " b"]:
        """Return the contrastive loss of each image-text pair, in nats.

        Args:
          params: all parameters.
          images: normalised, channels last.
          input_ids: tokens of the captions.
          mask: 0 for rows that don't count.
          key: random key of this step.
        """
        drop = DropPath(key, self.config.drop_path) if self.config.drop_path else None
        model = self.model(params)
        image, text = model.encode_image(images, drop), model.encode_text(input_ids)
        return contrastive_loss(
            image,
            text,
            jnp.exp(params["logit_scale"]),
            mask,
            mesh=self.mesh,
            kind="sigmoid" if self.loss == "sigmoid" else "softmax",
            logit_bias=self._pair_bias(params, image, text, mask),
        )

    def _pair_bias(
        self, params: Params, image: Float[Array, "b d"], text: Float[Array, "b d"], mask: Float[Array, " b"]
    ) -> Float[Array, ""] | float:
        """Return the bias of the logits of pairs: the model's own where it has one."""
        if self.loss != "sigmoid":
            return 0.0
        return params.get("logit_bias", even_bias(image, text, jnp.exp(params["logit_scale"]), mask))

    def export_params(self, params: Mapping[str, Any], class_embeddings: np.ndarray) -> tuple[Params, str, Params]:
        """Return the contents of a model folder: the model's parameters, the name of the head, the head's parameters.

        Args:
          params: all parameters of the method.
          class_embeddings: [c, d], of the run's classes under these parameters; learned prompts are saved as them.
        """
        own = {name: value for name, value in params.items() if not name.startswith((HEAD, CONTEXT))}
        own = merge_lora(own, self.config.lora_alpha / self.config.lora_rank)
        if self.context_length:
            head = init_head("linear", np.asarray(class_embeddings), float(np.exp(params["logit_scale"])), 0)
            return own, "linear", dict(head)
        return own, self.head, {k.removeprefix(HEAD): v for k, v in params.items() if k.startswith(HEAD)}


def _check_any_aspect(config: MethodConfig, sizes: TwoTowerConfig, head: str) -> None:
    """Refuse what needs the patches of square images; `head` is that of the method."""
    if head != "cosine" and HEADS[head][0].needs_patches:
        raise UserError(
            f"config.method.head={head} needs a fixed grid of patches, which a NaFlex model lacks; use linear"
        )
    if key := next((key for key in ("mixup", "cutmix") if getattr(config, key)), None):
        raise UserError(f"config.method.{key} mixes images of one grid; with a NaFlex model set it to 0")
    if sizes.temporal not in ("mean", "head"):
        raise UserError(
            f"config.model.temporal={sizes.temporal} follows the patches of a fixed grid, which a NaFlex model lacks; "
            "use mean or head"
        )


def _choose_prompts(key: jax.Array, label: Int[Array, " b"], class_of_prompt: Int[Array, " p"]) -> Int[Array, " b"]:
    """Return a random prompt of each row's class; padding prompts don't change which one is drawn."""
    scores = jax.random.uniform(key, (len(class_of_prompt), len(label))).T
    return jnp.argmax(jnp.where(class_of_prompt[None] == label[:, None], scores, -1.0), axis=-1)
