"""The fine-tuning methods: the trainable parameters, the losses and the heads of each. All share one training loop."""

from dataclasses import dataclass

from clip_har_jax.config import MethodConfig
from clip_har_jax.errors import UserError, nearest

CONTEXT = "prompt.context"  # name of the learned prompt vectors
ANY_HEAD = ("cosine", "linear", "mlp", "cross_attention", "frame_attention", "temporal")
CLASS_LOSSES, PAIR_LOSSES = ("cross_entropy",), ("class_aware", "softmax", "sigmoid")
ANY_LOSS = CLASS_LOSSES + PAIR_LOSSES


@dataclass(frozen=True)
class Recipe:
    """The properties of a fine-tuning method.

    Attributes:
      trains: shell patterns of the trainable parameters; parameters of a tower also need `method.towers` to name it.
      heads: the heads that it can save, the default first.
      losses: the losses that it can use, the default first.
      learns_from: steps (over images), features (computed once) or nothing.
      probes_first: fit the head to features (a linear probe) before the steps.
    """

    trains: tuple[str, ...]
    heads: tuple[str, ...] = ANY_HEAD
    losses: tuple[str, ...] = ANY_LOSS
    learns_from: str = "steps"
    probes_first: bool = False


WHOLE = ("text*", "vis*", "logit_scale", "logit_bias", "head.*")
METHODS = {
    "zero_shot": Recipe((), ("cosine",), CLASS_LOSSES, learns_from="nothing"),
    # Radford et al. 2021, section 3.2
    "linear_probe": Recipe(("head.*",), ("linear",), CLASS_LOSSES, learns_from="features"),
    "full": Recipe(WHOLE),
    # Kumar et al. 2022
    "lp_ft": Recipe(WHOLE, ("linear",), CLASS_LOSSES, probes_first=True),
    # Goyal et al. 2023. With class prompts in place of captions, other images of the class are positives too
    "flyp": Recipe(WHOLE, ("cosine",), PAIR_LOSSES),
    # Hu et al. 2021
    "lora": Recipe(("*.lora_[ab]", "head.*")),
    # CoOp, Zhou et al. 2022; saved as the class embeddings that the learned context gives
    "prompt": Recipe((CONTEXT,), ("cosine",), CLASS_LOSSES),
    # CLIP-Adapter, Gao et al. 2021
    "adapter": Recipe(("head.down.*", "head.up.*"), ("adapter",), CLASS_LOSSES),
    # Zhang et al. 2022
    "tip_adapter": Recipe(("head.*",), ("tip_adapter",), CLASS_LOSSES, learns_from="features"),
    # Ben Zaken et al. 2022
    "bitfit": Recipe(("*.bias", "head.*")),
}


def check_method(config: MethodConfig) -> tuple[Recipe, str, str]:
    """Return the recipe that `config.name` names, its head and its loss.

    Raises:
      UserError: an unknown name; a head, loss or tower that doesn't fit; names the accepted ones.
    """
    if config.name not in METHODS:
        raise UserError(f"config.method.name is {config.name!r}; {nearest(config.name, list(METHODS))}")
    recipe = METHODS[config.name]
    head, loss = config.head or recipe.heads[0], config.loss or recipe.losses[0]
    for key, value, accepted in (("head", head, recipe.heads), ("loss", loss, recipe.losses)):
        if value not in accepted:
            raise UserError(
                f"config.method.{key} is {value!r}, but method {config.name!r} takes {' or '.join(accepted)}"
            )
    if head != "cosine" and config.towers == "text":
        raise UserError(
            f"config.method.towers is 'text', but the {head!r} head takes the text tower's place; use 'image' or 'both'"
        )
    for key in ("class_balance", "drop_path"):
        if getattr(config, key) == 1:
            raise UserError(f"config.method.{key} must be below 1")
    if loss in PAIR_LOSSES:
        if head != "cosine" or config.towers == "image":
            raise UserError(
                f"config.method.loss={loss} compares images with texts: use method.head=cosine and a method.towers "
                f"with the text tower (text or both), not {head!r} and {config.towers!r}"
            )
        if wrong := [k for k in ("mixup", "cutmix", "label_smoothing", "focal_gamma") if getattr(config, k)]:
            raise UserError(f"config.method.{wrong[0]} needs class logits; with the loss {loss!r} set it to 0")
    return recipe, head, loss
