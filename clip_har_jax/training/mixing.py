"""mixup and CutMix on the device: each image is mixed with the next one in the batch, and their labels likewise.

Batches are shuffled, so the next image is a random partner; on a mesh each device sends only one image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "b *t h w 3"]  # all frames of a clip are mixed alike
Target = Float[Array, "b c"]


def mix(
    images: Images, target: Target, mask: Float[Array, " b"], key: jax.Array, mixup: float, cutmix: float
) -> tuple[Images, Target]:
    """Return the mixed images and targets. If both kinds are on, each row gets one of them at random.

    Args:
      images: normalised images [b, h, w, 3] or clips [b, t, h, w, 3].
      target: probability of each class, [b, c].
      mask: [b], 0 for padding, which is mixed with nothing.
      key: random key.
      mixup: the share of an image is drawn from Beta(mixup, mixup) (Zhang et al. 2018); 0: off.
      cutmix: the share of an image's area is drawn likewise (Yun et al. 2019); 0: off.
    """
    partner_images, partner_target = jnp.roll(images, 1, axis=0), jnp.roll(target, 1, axis=0)
    is_mixed = (mask > 0) & (jnp.roll(mask, 1) > 0)
    toss_key, share_key, box_key = jax.random.split(key, 3)
    rows = len(mask)
    cuts = jax.random.bernoulli(toss_key, 0.5 if mixup and cutmix else float(cutmix > 0), (rows,))
    alpha = jnp.where(cuts, cutmix or 1.0, mixup or 1.0)
    share = jnp.where(is_mixed, jax.random.beta(share_key, alpha, alpha, (rows,)), 1.0)
    height, width = images.shape[-3:-1]
    keep = jnp.broadcast_to(share[:, None, None], (rows, height, width))  # of each pixel
    if cutmix:
        box = _boxes(1 - share, box_key, height, width)
        keep = jnp.where(cuts[:, None, None], 1.0 - box, keep)
    share = jnp.mean(keep, axis=(1, 2))  # after cutting the boxes at the borders
    keep = keep.reshape(rows, *[1] * (images.ndim - 4), height, width, 1)
    images = keep * images + (1 - keep) * partner_images
    return images, share[:, None] * target + (1 - share[:, None]) * partner_target


def _boxes(area: Float[Array, " b"], key: jax.Array, height: int, width: int) -> Float[Array, "b h w"]:
    """Return masks that are 1 inside a random box of this area and the image's aspect, cut at the image's borders."""
    centres = jax.random.uniform(key, (2, len(area)))
    inside = [
        jnp.abs((jnp.arange(length)[None] + 0.5) / length - centre[:, None]) < jnp.sqrt(area)[:, None] / 2
        for length, centre in zip((height, width), centres, strict=True)
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :]).astype(jnp.float32)
