"""The fine-tuning methods: the trainable parameters, the losses and the heads of each. All share one training loop."""

from dataclasses import dataclass

from clip_har_jax.config import MethodConfig
from clip_har_jax.errors import UserError, nearest

CONTEXT = "prompt.context"  # name of the learned prompt vectors
ANY_HEAD = ("cosine", "linear", "mlp", "cross_attention", "frame_attention", "temporal")
CLASS_LOSSES, PAIR_LOSSES = ("cross_entropy",), ("class_aware", "softmax", "sigmoid")
LABEL_LOSSES = ("binary_cross_entropy", "asymmetric")  # of multi-label data, the default first
MULTI_LABEL_METHODS = ("full", "lora", "bitfit")
MULTI_LABEL_HEAD = "linear"
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


def check_method(config: MethodConfig, multi_label: bool = False) -> tuple[Recipe, str, str]:
    """Return the recipe that `config.name` names, its head and its loss.

    Args:
      config: the `method` section of a config.
      multi_label: whether an image has any number of labels.

    Raises:
      UserError: an unknown name; a head, loss or tower that doesn't fit; names the accepted ones.
    """
    if config.name not in METHODS:
        raise UserError(f"config.method.name is {config.name!r}; {nearest(config.name, list(METHODS))}")
    recipe = METHODS[config.name]
    if multi_label:
        return recipe, MULTI_LABEL_HEAD, _check_multi_label(config)
    if config.loss in LABEL_LOSSES:
        raise UserError(
            f"config.method.loss={config.loss} is for images with any number of labels; set data.multi_label=True, or "
            "use cross_entropy"
        )
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
    _check_below_one(config)
    if loss in PAIR_LOSSES:
        if head != "cosine" or config.towers == "image":
            raise UserError(
                f"config.method.loss={loss} compares images with texts: use method.head=cosine and a method.towers "
                f"with the text tower (text or both), not {head!r} and {config.towers!r}"
            )
        if wrong := [k for k in ("mixup", "cutmix", "label_smoothing", "focal_gamma") if getattr(config, k)]:
            raise UserError(f"config.method.{wrong[0]} needs class logits; with the loss {loss!r} set it to 0")
    return recipe, head, loss


def _check_below_one(config: MethodConfig) -> None:
    for key in ("class_balance", "drop_path"):
        if getattr(config, key) == 1:
            raise UserError(f"config.method.{key} must be below 1")


# Why a method can't give each label its own probability.
ONE_LABEL = {
    "zero_shot": "the similarity of an image and a text has no point from which on a label is present",
    "linear_probe": "its head is fitted by a softmax over the classes, of which one is right",
    "lp_ft": "its head is fitted by a softmax over the classes, of which one is right",
    "flyp": "its loss compares an image with one text, not with several labels",
    "prompt": "the similarity of an image and a text has no point from which on a label is present",
    "adapter": "its head has no bias, so there is no point from which on a label is present",
    "tip_adapter": "its cached images vote for one class each",
}


def _check_multi_label(config: MethodConfig) -> str:
    """Return the loss of a method on multi-label data.

    Raises:
      UserError: a method, head, loss or setting that needs one label for each image; says why.
    """
    accepted = f"data.multi_label=True takes method.name={' or '.join(MULTI_LABEL_METHODS)}"
    if config.name in ONE_LABEL:
        raise UserError(f"config.method.name={config.name}: {ONE_LABEL[config.name]}; {accepted}")
    if config.head not in ("", MULTI_LABEL_HEAD):
        raise UserError(
            f"config.method.head={config.head} has no bias for each label, so there is no point from which on a label "
            f"is present; data.multi_label=True takes method.head={MULTI_LABEL_HEAD}"
        )
    loss = config.loss or LABEL_LOSSES[0]
    if loss not in LABEL_LOSSES:
        why = "compares an image with one text" if loss in PAIR_LOSSES else "is over classes of which one is right"
        raise UserError(
            f"config.method.loss={loss} {why}; data.multi_label=True takes method.loss={' or '.join(LABEL_LOSSES)}"
        )
    if config.towers == "text":
        raise UserError(
            "config.method.towers is 'text', but the head takes the text tower's place; use 'image' or 'both'"
        )
    if loss == "asymmetric" and config.focal_gamma:
        raise UserError(
            "config.method.focal_gamma: the loss 'asymmetric' has exponents of its own, method.asymmetric_gamma_pos "
            "and asymmetric_gamma_neg; set focal_gamma to 0"
        )
    if loss == "asymmetric" and config.asymmetric_margin == 1:
        raise UserError("config.method.asymmetric_margin must be below 1")
    if config.wise_ft:
        raise UserError(
            "config.method.wise_ft chooses by top-1 accuracy, which images with several labels don't have; leave it out"
        )
    _check_below_one(config)
    return loss
