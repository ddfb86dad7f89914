"""Classification heads: modules from image features to class logits, in place of plain prompt embeddings.

A head takes `Features`; its parameters are a flat dict by dotted path, the contents of head.safetensors. Every head has
`classes`, a linear layer from image embeddings to logits. Its kernel is initialised to exp(logit_scale) times the class
embeddings, so an untrained head predicts as CLIP does. Logits are before the calibration temperature.

All heads stand in one file, over 300 lines: each is short, and they are read side by side.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from clip_har_jax.errors import UserError
from clip_har_jax.models.layers import DropPath, Runtime, linear
from clip_har_jax.models.params import axis_names, flat_params, unflatten
from clip_har_jax.models.temporal import positions_like
from clip_har_jax.models.two_towers import TwoTowers, l2_normalize

FLOAT32 = Runtime()  # heads are small, so they compute in float32
MLP_DIM = 256
ADAPTER_REDUCTION = 4  # Gao et al. 2021, section 4.1
LONGEST_POSITION = 10_000.0  # of TemporalHead's waves over 2 pi; Vaswani et al. 2017
ADAPTER_RATIO = 0.2  # share of the new features; the rest is CLIP's


class Features(NamedTuple):
    """The inputs of heads, for images or clips."""

    image: Float[Array, "b d"]  # L2-normalised embeddings; of a clip that of the mean over its frames
    patches: Any = None  # [b, n, d]: patch tokens in the same space, L2-normalised; None if not needed
    frames: Any = None  # [b, t, d]: the embeddings of a clip's frames, L2-normalised; None: images


@dataclass(frozen=True)
class HeadSize:
    """The sizes of a head; `hidden` is the width of its MLP, bottleneck or cache, 0 the default."""

    dim: int
    num_classes: int
    hidden: int = 0


class Head(nnx.Module):
    """Class logits from features; the base of all heads."""

    needs_patches = False
    of_clips = False  # whether it uses the frames of a clip one by one

    def __init__(self, size: HeadSize, rngs: nnx.Rngs, use_bias: bool = False):
        self.classes = linear(
            size.dim, size.num_classes, ("embed", None), rngs, FLOAT32, std=size.dim**-0.5, use_bias=use_bias
        )

    @property
    def class_embeddings(self) -> Float[Array, "c d"]:
        """Class embeddings that the head implies, L2-normalised."""
        return l2_normalize(self.classes.kernel[...].T)


class LinearHead(Head):
    """One linear layer, as in a linear probe; learned prompts are saved as one too."""

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs, use_bias=True)

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        return self.classes(features.image)


class MLPHead(Head):
    """CLIP's logits plus the output of a two-layer MLP for each pair of image and class embedding."""

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        hidden = size.hidden or MLP_DIM
        self.fc1 = linear(2 * size.dim, hidden, ("embed", "mlp"), rngs, FLOAT32, std=(2 * size.dim) ** -0.5)
        self.fc2 = linear(hidden, 1, ("mlp", None), rngs, FLOAT32, std=0.0)

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        image, classes = features.image, self.class_embeddings
        pair_shape = (image.shape[0], *classes.shape)  # works for a symbolic batch size too
        image_part, class_part = (jnp.broadcast_to(x, pair_shape) for x in (image[:, None], classes[None]))
        pairs = jnp.concatenate([image_part, class_part], axis=-1)
        return self.classes(image) + self.fc2(jax.nn.gelu(self.fc1(pairs), approximate=False))[..., 0]


class CrossAttentionHead(Head):
    """CLIP's logits plus the similarity of each class to the patches that it attends to.

    One attention head (Vaswani et al. 2017, equation 1) with the class embeddings as queries.
    """

    needs_patches = True

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        dim, std = size.dim, size.dim**-0.5
        self.query = linear(dim, dim, ("embed", "heads"), rngs, FLOAT32, std=std)
        self.key = linear(dim, dim, ("embed", "heads"), rngs, FLOAT32, std=std)
        self.value = linear(dim, dim, ("embed", "heads"), rngs, FLOAT32, std=std)
        self.out = linear(dim, dim, ("heads", "embed"), rngs, FLOAT32, std=0.0)

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        patches, classes = features.patches, self.class_embeddings
        query, key, value = self.query(classes), self.key(patches), self.value(patches)
        scores = jnp.matmul(query[None], key.transpose(0, 2, 1)) * query.shape[-1] ** -0.5
        found = self.out(jnp.matmul(jax.nn.softmax(scores), value))
        scale = jnp.linalg.norm(self.classes.kernel[...], axis=0)
        return self.classes(features.image) + scale[None] * jnp.sum(found * classes[None], axis=-1)


class AdapterHead(Head):
    """CLIP-Adapter (Gao et al. 2021, equation 4): the output of a bottleneck is mixed into the image embedding.

    Its layers have no biases, so normalising the embedding before them changes only a scale.
    """

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        hidden = size.hidden or max(1, size.dim // ADAPTER_REDUCTION)
        self.down = linear(size.dim, hidden, ("embed", None), rngs, FLOAT32, std=size.dim**-0.5, use_bias=False)
        self.up = linear(hidden, size.dim, (None, "embed"), rngs, FLOAT32, std=hidden**-0.5, use_bias=False)
        self.ratio = nnx.Param(jnp.asarray(ADAPTER_RATIO, jnp.float32))

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        ratio = self.ratio[...]
        new = jax.nn.relu(self.up(jax.nn.relu(self.down(features.image))))
        return self.classes(l2_normalize(ratio * new + (1 - ratio) * features.image))


class CacheHead(Head):
    """Tip-Adapter (Zhang et al. 2022, equations 5 and 6): cached training images vote by their similarity."""

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        self.keys = linear(size.dim, size.hidden, ("embed", None), rngs, FLOAT32, std=1.0, use_bias=False)
        self.values = linear(size.hidden, size.num_classes, (None, None), rngs, FLOAT32, std=1.0, use_bias=False)
        self.alpha = nnx.Param(jnp.asarray(1.0, jnp.float32))  # weight of the cache
        self.beta = nnx.Param(jnp.asarray(5.5, jnp.float32))  # sharpness of the similarity

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        affinity = jnp.exp(-self.beta[...] * (1 - self.keys(features.image)))
        return self.classes(features.image) + self.alpha[...] * self.values(affinity)


class FrameAttentionHead(Head):
    """Attention pooling of a clip's frames by one learned query; untrained, the mean of the frames."""

    of_clips = True

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        self.score = linear(size.dim, 1, ("embed", None), rngs, FLOAT32, std=0.0)

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        frames = frames_of(features)
        weights = jax.nn.softmax(self.score(frames), axis=1)
        pooled = jnp.matmul(weights.swapaxes(1, 2), frames)
        return self.classes(l2_normalize(jnp.squeeze(pooled, axis=1)))


class TemporalHead(Head):
    """A transformer layer over a clip's frames, then their mean; untrained, the mean of the frames.

    A pre-norm layer without norms, since embeddings have unit length. It has one attention head and sinusoidal
    positions of unit length (Vaswani et al. 2017, equation 1 and section 3.5), so clips can have any length.
    """

    of_clips = True

    def __init__(self, size: HeadSize, rngs: nnx.Rngs):
        super().__init__(size, rngs)
        dim, std, hidden = size.dim, size.dim**-0.5, size.hidden or MLP_DIM
        self.query = linear(dim, dim, ("embed", "heads"), rngs, FLOAT32, std=std)
        self.key = linear(dim, dim, ("embed", "heads"), rngs, FLOAT32, std=std)
        self.value = linear(dim, dim, ("embed", "heads"), rngs, FLOAT32, std=std)
        self.out = linear(dim, dim, ("heads", "embed"), rngs, FLOAT32, std=0.0)
        self.fc1 = linear(dim, hidden, ("embed", "mlp"), rngs, FLOAT32, std=std)
        self.fc2 = linear(hidden, dim, ("mlp", "embed"), rngs, FLOAT32, std=0.0)

    def __call__(self, features: Features) -> Float[Array, "b c"]:
        frames = frames_of(features)
        timed = frames + positions_like(frames, LONGEST_POSITION) * math.ceil(frames.shape[2] / 2) ** -0.5
        query, key, value = self.query(timed), self.key(timed), self.value(timed)
        scores = jnp.matmul(query, key.swapaxes(1, 2)) * query.shape[-1] ** -0.5
        frames = frames + self.out(jnp.matmul(jax.nn.softmax(scores), value))
        frames = frames + self.fc2(jax.nn.gelu(self.fc1(frames), approximate=False))
        return self.classes(l2_normalize(frames.mean(axis=1)))


def frames_of(features: Features) -> Float[Array, "b t d"]:
    """Return the embeddings of a clip's frames; an image counts as a clip of one frame."""
    return features.image[:, None] if features.frames is None else features.frames


# name in actions.json -> (class, the parameter whose last dim is `HeadSize.hidden`)
HEADS: dict[str, tuple[type[Head], str | None]] = {
    "linear": (LinearHead, None),
    "mlp": (MLPHead, "fc1.kernel"),
    "cross_attention": (CrossAttentionHead, None),
    "adapter": (AdapterHead, "down.kernel"),
    "tip_adapter": (CacheHead, "keys.kernel"),
    "frame_attention": (FrameAttentionHead, None),
    "temporal": (TemporalHead, "fc1.kernel"),
}


def abstract_head(name: str, size: HeadSize) -> Any:
    """Return a head with shapes and axis names in place of weights."""
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: HEADS[name][0](size, nnx.Rngs(0)))


def head_shapes(name: str, size: HeadSize) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str | None, ...]]]:
    """Return the shapes and the logical axis names of the parameters."""
    head = abstract_head(name, size)
    return {key: value.shape for key, value in flat_params(head).items()}, axis_names(head)


def init_head(
    name: str, classes: Float32[np.ndarray, "c d"], logit_scale: float, seed: int, hidden: int = 0
) -> dict[str, np.ndarray]:
    """Return the initial parameters of a head, with which it predicts as CLIP does with these class embeddings.

    The bottleneck of an adapter is an exception: it is random, as in the paper.

    Args:
      name: of the head.
      classes: L2-normalised class embeddings, [c, d].
      logit_scale: factor of the cosines, exp() of CLIP's parameter of that name.
      seed: of the random layers.
      hidden: see `HeadSize`.
    """
    num_classes, dim = classes.shape
    with nnx.use_eager_sharding(False):
        head = HEADS[name][0](HeadSize(dim, num_classes, hidden), nnx.Rngs(seed))
    params = {key: np.asarray(value) for key, value in flat_params(head).items()}
    return params | {"classes.kernel": np.asarray(logit_scale * classes.T, np.float32)}


def make_head(name: str, params: Mapping[str, Any]) -> Any:
    """Return the head with `params`, from which its sizes are inferred.

    Raises:
      UserError: the parameters aren't those of such a head; names them.
    """
    sized_by = HEADS[name][1]
    problem = f"parameters of a {name!r} head don't fit"
    if "classes.kernel" not in params or (sized_by and sized_by not in params):
        raise UserError(f"{problem}: missing {sized_by if 'classes.kernel' in params else 'classes.kernel'}")
    dim, num_classes = params["classes.kernel"].shape
    head = abstract_head(name, HeadSize(dim, num_classes, params[sized_by].shape[-1] if sized_by else 0))
    wanted = {key: value.shape for key, value in flat_params(head).items()}
    given = {key: tuple(value.shape) for key, value in params.items()}
    if wrong := sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key)):
        raise UserError(f"{problem}: {wrong[0]} is {given.get(wrong[0])}, not {wanted.get(wrong[0])}")
    return nnx.merge(nnx.graphdef(head), unflatten({key: jnp.asarray(value) for key, value in params.items()}))


def head_logits(name: str, params: Mapping[str, Any], features: Features) -> Float[Array, "b c"]:
    """Return class logits, before the calibration temperature."""
    return make_head(name, params)(features)


def image_features(
    model: TwoTowers, images: Float[Array, "b *t h w 3"], with_patches: bool, drop: DropPath | None = None
) -> Features:
    """Return the inputs of heads for normalised images or clips."""
    if images.ndim == 5:
        return _clip_features(model, images, with_patches, drop)
    if not with_patches:
        return Features(model.encode_image(images, drop))
    return Features(*model.encode_tokens(images, drop))


def _clip_features(
    model: TwoTowers, clips: Float[Array, "b t h w 3"], with_patches: bool, drop: DropPath | None
) -> Features:
    """Return the inputs of heads for clips; the patches of all frames follow one another."""
    count, length = clips.shape[:2]
    if not with_patches:
        frames = model.encode_frames(clips, drop)
        return Features(model.pool_frames(frames), None, frames)
    frames, patches = model.encode_tokens(clips.reshape(-1, *clips.shape[2:]), drop, model.frames_in_blocks(clips))
    frames, dim = frames.reshape(count, length, -1), frames.shape[-1]
    return Features(model.pool_frames(frames), patches.reshape(count, -1, dim), frames)
