"""A small head over frame features that finds the starts and ends of actions.

Two convolutions over time give, for each time, the probabilities that an action starts, ends and is going on (Lin et
al. 2018, BSN's temporal evaluation module, over the features of a frozen model). Segments are proposed from each likely
start to each later likely end; the score of a class is the proposal's score times the mean of the class's probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.localization import Localiser, Track
from clip_har_jax.video.segments import BACKGROUND, Segment, suppress_overlaps

WIDTH, TAPS = 64, 5  # channels, and receptive field in times
STEPS, BATCH, RATE, DECAY = 600, 16, 3e-3, 1e-2  # of AdamW; videos per step
NEAR_S = 0.3  # times this close to a boundary count as it
PEAK = 0.5  # share of a video's highest score below which a local maximum is ignored
MIN_CLASS = 0.05  # mean probability below which a class isn't proposed
MAX_IOU = 0.4  # of two segments of one class

Params = dict[str, Any]


@dataclass(frozen=True)
class BoundaryHead:
    """The fitted head.

    Attributes:
      params: of the convolutions.
      longest_s: maximum length of a segment.
    """

    params: dict[str, np.ndarray]
    longest_s: float

    def __call__(self, track: Track) -> Float32[np.ndarray, "n 3"]:
        """Return the probabilities of a start, an end and an action at each time of a video."""
        return np.asarray(jax.nn.sigmoid(_apply(self.params, jnp.asarray(features(track))[None])[0]))


def features(track: Track) -> Float32[np.ndarray, "n f"]:
    """Return the head's input for each time: the embedding and the classes' probabilities."""
    return np.concatenate([track.embeddings * track.embeddings.shape[1] ** 0.5, track.probs], axis=1).astype(np.float32)


def targets(track: Track) -> Float32[np.ndarray, "n 3"]:
    """Return 1 where a segment starts, ends and is going on."""
    marks = np.zeros((len(track.times_s), 3), np.float32)
    for segment in track.segments:
        marks[np.abs(track.times_s - segment.start_s) <= NEAR_S, 0] = 1
        marks[np.abs(track.times_s - segment.end_s) <= NEAR_S, 1] = 1
        marks[(track.times_s >= segment.start_s) & (track.times_s < segment.end_s), 2] = 1
    return marks


def _apply(params: Params, x: Float[Array, "b n f"]) -> Float[Array, "b n 3"]:
    for i, name in enumerate(("first", "second")):
        # One matrix product over shifted copies: XLA's convolution over time is many times slower on CPUs.
        n, around = x.shape[1], jnp.pad(x, ((0, 0), (TAPS // 2, TAPS // 2), (0, 0)))
        taps = jnp.concatenate([around[:, tap : tap + n] for tap in range(TAPS)], axis=2)
        kernel = params[f"{name}.kernel"]
        x = taps @ kernel.reshape(-1, kernel.shape[2]) + params[f"{name}.bias"][None, None]
        x = jax.nn.gelu(x) if i == 0 else x
    return x


def fit_boundaries(tracks: Sequence[Track], seed: int = 0, steps: int = STEPS) -> BoundaryHead:
    """Return the head with the least cross-entropy on these videos; starts and ends have larger weights, as they are
    rare.

    Args:
      tracks: of the model's training videos.
      seed: of the initial weights, and of the videos of each step.
      steps: of the optimiser.

    Raises:
      UserError: the videos have no segments.
    """
    if not any(track.segments for track in tracks):
        raise UserError("the training videos hold no segment; the boundaries can't be learned from them")
    length = max(len(track.times_s) for track in tracks)
    x, y, mask = (np.stack([_pad(rows(track), length) for track in tracks]) for rows in (features, targets, _ones))
    positive = (y * mask).sum(axis=(0, 1)) / mask.sum()
    weight = np.clip((1 - positive) / np.maximum(positive, 1e-6), 1, 20)
    rng = np.random.default_rng(seed)
    shapes = {"first": (TAPS, x.shape[2], WIDTH), "second": (TAPS, WIDTH, 3)}
    params: Params = {}
    for name, shape in shapes.items():
        kernel = rng.normal(0, (shape[0] * shape[1]) ** -0.5, shape)
        params |= {f"{name}.kernel": jnp.asarray(kernel, jnp.float32), f"{name}.bias": jnp.zeros(shape[2])}
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=DECAY)

    def loss_fn(params: Params, x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
        logits = _apply(params, x)
        losses = optax.sigmoid_binary_cross_entropy(logits, y) * jnp.where(y > 0, jnp.asarray(weight)[None, None], 1.0)
        return jnp.sum(losses * mask) / jnp.sum(mask)

    @jax.jit
    def run(params: Params, chosen: jax.Array, *data: jax.Array) -> Params:
        def step(carry: tuple[Params, Any], rows: jax.Array) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, *(of[rows] for of in data)), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), chosen)[0][0]

    chosen = np.stack([rng.permutation(len(tracks))[:BATCH] for _ in range(steps)])
    fitted = jax.device_get(run(params, *map(jnp.asarray, (chosen, x, y, mask))))
    longest_s = 1.2 * max(segment.end_s - segment.start_s for track in tracks for segment in track.segments)
    return BoundaryHead({name: np.asarray(value) for name, value in fitted.items()}, float(longest_s))


def _ones(track: Track) -> np.ndarray:
    return np.ones((len(track.times_s), 1), np.float32)


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((length - len(rows), rows.shape[1]), np.float32)])


def by_boundaries(labels: Sequence[str], head: BoundaryHead) -> Localiser:
    """Return the localiser that proposes segments from starts to ends."""
    return lambda track: propose(track, head(track), labels, head.longest_s)


def propose(track: Track, marks: Float[np.ndarray, "n 3"], labels: Sequence[str], longest_s: float) -> list[Segment]:
    """Return the segments from each likely start to each later likely end, without near duplicates.

    Args:
      track: of the video.
      marks: probabilities of a start, an end and an action at each of its times.
      labels: of the classes.
      longest_s: maximum length of a segment.
    """
    found: list[Segment] = []
    ends = _peaks(marks[:, 1])
    for start in _peaks(marks[:, 0]):
        for end in ends:
            start_s, end_s = float(track.times_s[start]), float(track.times_s[end])
            if not start_s < end_s <= start_s + longest_s:
                continue
            inside = slice(start, end + 1)
            quality = float((marks[start, 0] * marks[end, 1]) ** 0.5 * marks[inside, 2].mean())
            means = track.probs[inside].mean(axis=0)
            found += [
                Segment(start_s, end_s, label, quality * float(mean))
                for label, mean in zip(labels, means, strict=True)
                if label != BACKGROUND and mean >= MIN_CLASS
            ]
    return suppress_overlaps(found, MAX_IOU)


def _peaks(scores: Float[np.ndarray, " n"]) -> np.ndarray:
    """Return the local maxima that are at least `PEAK` of the highest."""
    if not len(scores):
        return np.zeros(0, np.int64)
    padded = np.concatenate([[-np.inf], scores, [-np.inf]])
    is_peak = (scores >= padded[:-2]) & (scores > padded[2:])
    return np.flatnonzero(is_peak & (scores >= PEAK * scores.max()))
