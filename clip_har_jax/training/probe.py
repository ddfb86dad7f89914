"""Heads fitted to features that are computed once: a linear probe (L-BFGS or AdamW) and a Tip-Adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Float32, Int32

from clip_har_jax.evaluation.metrics import log_softmax
from clip_har_jax.training.losses import cross_entropy

PENALTIES = (
    1.0,
    1e-1,
    1e-2,
    1e-3,
    1e-4,
)  # on the distance from the initial head
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0)  # of a Tip-Adapter; 0: zero-shot
BETAS = (1.0, 3.0, 5.5, 10.0, 20.0)
MAX_ITERATIONS, TOLERANCE = 300, 1e-4  # of L-BFGS; it stops at this norm of the gradient
ADAMW_STEPS, ADAMW_RATE = 1000, 3e-2


class LabeledFeatures(NamedTuple):
    """The features of labelled images."""

    embeddings: Float32[np.ndarray, "n d"]  # L2-normalised
    label: Int32[np.ndarray, " n"]


@dataclass(frozen=True)
class FittedHead:
    """A fitted head, with the chosen hyperparameters and its validation scores."""

    params: dict[str, np.ndarray]
    about: dict[str, float]


def fit_linear_probe(
    train: LabeledFeatures,
    val: LabeledFeatures,
    classes: Float32[np.ndarray, "c d"],
    scale: float,
    solver: str,
    class_weights: Float[np.ndarray, " c"] | None = None,
    label_smoothing: float = 0.0,
    penalties: Sequence[float] = PENALTIES,
) -> FittedHead:
    """Fit a linear head by cross-entropy and a penalty on the squared distance from CLIP's class embeddings.

    Radford et al. 2021 (appendix A.3) fit with L-BFGS from 0 and choose the penalty on validation data. Starting from
    CLIP's own classifier is better with few images per class; without images, it remains the zero-shot classifier.

    Args:
      train: features to fit.
      val: features to choose the penalty by.
      classes: class embeddings of the base model.
      scale: exp(logit_scale).
      solver: 'lbfgs' or 'adamw'.
      class_weights: weight of each class in the loss; None: equal.
      label_smoothing: as in `cross_entropy`.
      penalties: to choose from.
    """
    x, target = jnp.asarray(scale * train.embeddings), jax.nn.one_hot(train.label, len(classes))
    # The parameters are in units of class embeddings, so that one range of penalties fits every scale.
    start = {"kernel": jnp.asarray(classes.T), "bias": jnp.zeros(len(classes))}
    weights = None if class_weights is None else jnp.asarray(class_weights)

    def loss_fn(params: Any, penalty: jax.Array) -> jax.Array:
        logits = x @ params["kernel"] + params["bias"][None]
        losses = cross_entropy(logits, target, label_smoothing=label_smoothing, class_weights=weights)
        moved = jax.tree.map(jnp.subtract, params, start)
        return jnp.mean(losses) + penalty / 2 * optax.tree.norm(moved, squared=True)

    solve = jax.jit(_lbfgs(loss_fn) if solver == "lbfgs" else _adamw(loss_fn))
    best: tuple[tuple[float, float], float, Any] | None = None
    params = start
    for penalty in sorted(penalties, reverse=True):  # warm start: the solutions of neighbouring penalties are close
        params = jax.device_get(solve(params, jnp.float32(penalty)))
        score = _score(scale * val.embeddings @ params["kernel"] + params["bias"], val.label)
        if best is None or score > best[0]:
            best = (score, penalty, params)
    assert best is not None
    (top1, nll), penalty, params = best
    head = {"classes.kernel": np.asarray(scale * params["kernel"]), "classes.bias": np.asarray(params["bias"])}
    return FittedHead(head, {"penalty": penalty, "val_top1": top1, "val_nll": -nll})


def _lbfgs(loss_fn: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    optimizer = optax.lbfgs()

    def solve(start: Any, penalty: jax.Array) -> Any:
        def value_fn(params: Any) -> jax.Array:
            return loss_fn(params, penalty)

        value_and_grad = optax.value_and_grad_from_state(value_fn)

        def step(carry: Any) -> Any:
            params, state, count, _ = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            return optax.apply_updates(params, updates), state, count + 1, optax.tree.norm(grad)

        def goes_on(carry: Any) -> jax.Array:
            return (carry[2] < MAX_ITERATIONS) & (carry[3] > TOLERANCE)

        return jax.lax.while_loop(goes_on, step, (start, optimizer.init(start), 0, jnp.float32(jnp.inf)))[0]

    return solve


def _adamw(loss_fn: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    optimizer = optax.adamw(optax.cosine_decay_schedule(ADAMW_RATE, ADAMW_STEPS), weight_decay=0.0)

    def solve(start: Any, penalty: jax.Array) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, penalty), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, optimizer.init(start)), length=ADAMW_STEPS)[0][0]

    return solve


def choose_cache(label: Int32[np.ndarray, " n"], per_class: int, seed: int) -> np.ndarray:
    """Return the indices of a Tip-Adapter's cache in order, [k]: at most `per_class` random images of each class."""
    order = np.random.default_rng(seed).permutation(len(label))
    chosen = [order[label[order] == each][:per_class] for each in np.unique(label)]
    return np.sort(np.concatenate(chosen))


def make_tip_adapter(
    cache: LabeledFeatures, val: LabeledFeatures, classes: Float32[np.ndarray, "c d"], scale: float
) -> FittedHead:
    """Make a Tip-Adapter (Zhang et al. 2022) without training; alpha and beta are searched on validation data."""
    keys, values = cache.embeddings.T, np.eye(len(classes), dtype=np.float32)[cache.label]
    zero_shot, affinity = scale * val.embeddings @ classes.T, val.embeddings @ keys
    votes = {beta: np.exp(-beta * (1 - affinity)) @ values for beta in BETAS}
    scores = {(a, b): _score(zero_shot + a * votes[b], val.label) for a, b in product(ALPHAS, BETAS)}
    alpha, beta = max(scores, key=lambda pair: (scores[pair], -pair[0]))
    head = {
        "classes.kernel": np.asarray(scale * classes.T, np.float32),
        "keys.kernel": keys,
        "values.kernel": values,
        "alpha": np.float32(alpha),
        "beta": np.float32(beta),
    }
    top1, nll = scores[alpha, beta]
    return FittedHead(head, {"alpha": alpha, "beta": beta, "val_top1": top1, "val_nll": -nll})


def _score(logits: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Return the key to choose by on validation data: top-1 accuracy, then mean log-likelihood."""
    log_probs = log_softmax(np.asarray(logits))
    return float((logits.argmax(-1) == label).mean()), float(log_probs[np.arange(len(label)), label].mean())
