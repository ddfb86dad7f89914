"""The pure, jitted steps: train_step(state, frozen, classes, batch) -> (state, metrics), and the evaluation steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clip_har_jax.batch import Batch, PairBatch
from clip_har_jax.models.params import Params
from clip_har_jax.models.two_towers import mean_class_embeddings, normalize_images
from clip_har_jax.parallel.sharding import batch_sharding, replicated
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.losses import is_right, masked_mean
from clip_har_jax.training.methods import ClassInputs, Method
from clip_har_jax.training.optim import evaluated_weights
from clip_har_jax.training.recipes import PAIR_LOSSES
from clip_har_jax.training.state import TrainState
from clip_har_jax.training.step_config import StepConfig


def _per_example(name: str) -> Callable[..., dict[str, jax.Array]]:
    """Return a reader of the output `name` for an average in which rows of mask 0 don't count."""
    return lambda *, example_mask, **outputs: {"values": outputs[name], "mask": example_mask}


@struct.dataclass
class PairMetrics(clu_metrics.Collection):
    """Metrics of one step on image-text pairs; merging averages them over pairs (loss) or steps (the rest)."""

    loss: clu_metrics.Average.from_fun(_per_example("loss"))  # type: ignore[valid-type]
    grad_norm: clu_metrics.Average.from_fun(_per_example("grad_norm"))  # type: ignore[valid-type]
    learning_rate: clu_metrics.LastValue.from_output("learning_rate")  # type: ignore[valid-type]
    skipped_steps: clu_metrics.LastValue.from_output("skipped_steps")  # type: ignore[valid-type]


@struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Metrics of one step; merging several averages them over examples (loss, top1) or steps (the rest)."""

    loss: clu_metrics.Average.from_fun(_per_example("loss"))  # type: ignore[valid-type]
    top1: clu_metrics.Average.from_fun(_per_example("top1"))  # type: ignore[valid-type]
    grad_norm: clu_metrics.Average.from_fun(_per_example("grad_norm"))  # type: ignore[valid-type]
    learning_rate: clu_metrics.LastValue.from_output("learning_rate")  # type: ignore[valid-type]
    skipped_steps: clu_metrics.LastValue.from_output("skipped_steps")  # type: ignore[valid-type]


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    preprocess: Preprocess,
    shardings: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, Params, ClassInputs, Any], tuple[TrainState, TrainMetrics | PairMetrics, Int[Array, ""]]]:
    """Return the jitted training step; it donates the state, so the caller must use the returned one.

    An update that isn't finite is skipped and counted, so the state always stays finite. The third output is the number
    of consecutive skipped updates; unlike the state's own count, the next step doesn't donate it.

    Args:
      schedule: the learning rate by step, the same as the optimiser's; logged as a metric.
      config: with `of_pairs`, the batches are `PairBatch`es, and the classes aren't used.
      shardings: of the state.
    """
    if config.of_pairs:
        gradients: Callable[..., tuple[Params, jax.Array, jax.Array]] = make_pair_gradients(method, preprocess)
    else:
        gradients = make_gradients(method, config, preprocess, shardings.params, mesh)
    of_step = PairMetrics if config.of_pairs else TrainMetrics
    evaluated = evaluated_weights(config.optim)

    def train_step(
        state: TrainState, frozen: Params, classes: ClassInputs, batch: Any
    ) -> tuple[TrainState, TrainMetrics | PairMetrics, jax.Array]:
        key = jax.random.fold_in(state.key, state.step)
        grads, losses, correct = gradients(state.params, frozen, classes, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if "logit_scale" in params:
            params["logit_scale"] = jnp.minimum(params["logit_scale"], method.sizes.max_logit_scale)
        grad_norm = optax.tree.norm(grads)
        # The updates aren't checked: they are finite if gradients and state are. Their norm would take one more pass
        # over the optimiser's memory.
        is_finite = jnp.isfinite(masked_mean(losses, batch.mask) + grad_norm)
        params, opt_state = optax.tree.where(is_finite, (params, opt_state), (state.params, state.opt_state))
        skipped_total = state.skipped_total + ~is_finite
        metrics = of_step.single_from_model_output(
            loss=losses,
            top1=correct.astype(jnp.float32),
            example_mask=batch.mask.astype(bool) & is_finite,
            grad_norm=jnp.broadcast_to(grad_norm, losses.shape),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            skipped_steps=skipped_total,
        )
        if evaluated is None:
            ema = _moving_average(state, params, config.optim.ema_decay)
        else:
            ema = evaluated(opt_state, params)
        skipped = jnp.where(is_finite, 0, state.skipped + 1)
        state = TrainState(state.step + 1, params, ema, opt_state, state.key, skipped, skipped_total)
        return state, metrics, skipped

    whole = replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, whole, whole))


def _moving_average(state: TrainState, params: Params, decay: float) -> Params:
    """Return the moving average after this step; the first steps weigh more, so that the start fades quickly."""
    step = state.step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return {name: average + rate * (params[name] - average) for name, average in state.ema.items()}


def make_gradients(
    method: Method,
    config: StepConfig,
    preprocess: Preprocess,
    shardings: Mapping[str, NamedSharding],
    mesh: Mesh,
) -> Callable[[Params, Params, ClassInputs, Batch, jax.Array], tuple[Params, Float[Array, " b"], Bool[Array, " b"]]]:
    """Return a function that gives the gradients of a batch's mean loss, each row's loss, and whether it was right.

    With `config.accumulation_steps`, the parts of a batch pass the image tower one after the other. The class
    embeddings are computed once for all parts and differentiated once, with the sum of the parts' gradients.
    """
    parts = config.accumulation_steps

    def loss_fn(
        weights: tuple[Params, jax.Array],
        frozen: Params,
        classes: ClassInputs,
        batch: Batch,
        count: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        params, embeddings = weights
        images = normalize_images(batch.image, preprocess.mean, preprocess.std)
        losses, logits = method.losses(params | frozen, images, embeddings, classes, batch, key)
        return jnp.sum(losses * batch.mask) / count, (losses, is_right(logits, batch.label))

    def gradients(
        params: Params, frozen: Params, classes: ClassInputs, batch: Batch, key: jax.Array
    ) -> tuple[Params, Any, Any]:
        def class_embeddings(params: Params) -> jax.Array:
            return method.class_embeddings(params | frozen, classes)

        embeddings, pull_back = jax.vjp(class_embeddings, params)
        count = jnp.maximum(jnp.sum(batch.mask), 1.0)
        grad_fn = jax.grad(loss_fn, has_aux=True)

        def add_part(total: tuple[Params, jax.Array], part: tuple[Batch, Any]) -> tuple[tuple[Params, jax.Array], Any]:
            grads, rows = grad_fn((params, embeddings), frozen, classes, part[0], count, part[1])
            grads, of_embeddings = jax.tree.map(jnp.add, total, grads)
            # The sum is sharded like the parameters, since it takes as much memory.
            return (jax.lax.with_sharding_constraint(grads, dict(shardings)), of_embeddings), rows

        if parts == 1:
            (grads, of_embeddings), rows = grad_fn((params, embeddings), frozen, classes, batch, count, key)
        else:
            zeros = jax.tree.map(jnp.zeros_like, (params, embeddings))
            (grads, of_embeddings), rows = jax.lax.scan(
                add_part, zeros, (split_batch(batch, parts, mesh), jax.random.split(key, parts))
            )
            rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), rows)
        return jax.tree.map(jnp.add, grads, pull_back(of_embeddings)[0]), *rows

    return gradients


def make_pair_gradients(
    method: Method, preprocess: Preprocess
) -> Callable[
    [Params, Params, ClassInputs, PairBatch, jax.Array], tuple[Params, Float[Array, " b"], Bool[Array, " b"]]
]:
    """Return the same as `make_gradients` for batches of image-text pairs.

    No pair counts as right: that would take the whole similarity matrix, which no device holds.
    """

    def loss_fn(params: Params, frozen: Params, batch: PairBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = normalize_images(batch.image, preprocess.mean, preprocess.std)
        losses = method.pair_losses(params | frozen, images, batch.input_ids, batch.mask, key)
        return masked_mean(losses, batch.mask), losses

    def gradients(
        params: Params, frozen: Params, classes: ClassInputs, batch: PairBatch, key: jax.Array
    ) -> tuple[Params, Any, Any]:
        grads, losses = jax.grad(loss_fn, has_aux=True)(params, frozen, batch, key)
        return grads, losses, jnp.zeros(losses.shape, bool)

    return gradients


def split_batch(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Return a batch as [parts, rows / parts, ...]; every device keeps its rows, so there is no communication."""
    rows = NamedSharding(mesh, P(None, *batch_sharding(mesh).spec))

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, rows)

    return jax.tree.map(one, batch)


def make_eval_step(
    method: Method, preprocess: Preprocess, mesh: Mesh
) -> Callable[[Params, Params, ClassInputs, Batch], tuple[Float[Array, "b c"], Batch]]:
    """Return a jitted function from a batch to its class logits, and its labels, mask and index.

    Every process receives all rows.
    """

    def eval_step(params: Params, frozen: Params, classes: ClassInputs, batch: Batch) -> tuple[jax.Array, Batch]:
        images = normalize_images(batch.image, preprocess.mean, preprocess.std)
        return method.logits(params | frozen, images, classes.embeddings), batch._replace(image=None)

    return jax.jit(eval_step, out_shardings=replicated(mesh))


def make_feature_step(
    method: Method, preprocess: Preprocess, mesh: Mesh
) -> Callable[[Params, Any], tuple[Float[Array, "b d"], Any]]:
    """Return the same as `make_eval_step`, but with L2-normalised image embeddings instead of logits; for a
    `PairBatch` too.
    """

    def feature_step(params: Params, batch: Any) -> tuple[jax.Array, Any]:
        images = normalize_images(batch.image, preprocess.mean, preprocess.std)
        return method.model(params).encode_image(images), batch._replace(image=None)

    return jax.jit(feature_step, out_shardings=replicated(mesh))


def make_class_step(method: Method, mesh: Mesh) -> Callable[[Params, ClassInputs], Float[Array, "c d"]]:
    """Return a jitted function that gives the embeddings of the run's classes.

    It runs once if they never change, otherwise before each evaluation.
    """

    def class_step(params: Params, classes: ClassInputs) -> jax.Array:
        embeddings = method.class_embeddings(params, classes)
        if method.loss in PAIR_LOSSES:
            return mean_class_embeddings(embeddings, classes.class_of_prompt, method.num_classes)
        return embeddings

    return jax.jit(class_step, out_shardings=replicated(mesh))


def make_text_step(
    method: Method, num_classes: int, mesh: Mesh
) -> Callable[[Params, Int[Array, "p t"], Int[Array, " p"]], Float[Array, "c d"]]:
    """Return a jitted function from the prompts of any classes to their embeddings, for zero-shot classification."""

    def text_step(params: Params, input_ids: jax.Array, class_of_prompt: jax.Array) -> jax.Array:
        return method.model(params).encode_classes(input_ids, class_of_prompt, num_classes)

    return jax.jit(text_step, out_shardings=replicated(mesh))


def make_caption_step(method: Method, mesh: Mesh) -> Callable[[Params, Int[Array, "b t"]], Float[Array, "b d"]]:
    """Return a jitted function from the tokens of captions to their L2-normalised embeddings."""

    def caption_step(params: Params, input_ids: jax.Array) -> jax.Array:
        return method.model(params).encode_text(input_ids)

    return jax.jit(caption_step, out_shardings=replicated(mesh))
