"""The pure, jitted steps: train_step(state, frozen, classes, batch) -> (state, metrics), and eval logits."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_har_jax.batch import Batch
from clip_har_jax.models.clip import FlaxCLIPModel, normalize_images
from clip_har_jax.models.params import Params, unflatten
from clip_har_jax.parallel.sharding import replicated
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.losses import cross_entropy, masked_mean
from clip_har_jax.training.methods import Classes, Full
from clip_har_jax.training.state import TrainState

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5


def _per_example(name: str) -> Callable[..., dict[str, jax.Array]]:
    """Reads the output `name`, whose rows of mask 0 don't count."""
    return lambda *, example_mask, **outputs: {"values": outputs[name], "mask": example_mask}


@struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """One step's metrics; merging several gives their average over examples (loss, top1) and steps (the rest)."""

    loss: clu_metrics.Average.from_fun(_per_example("loss"))  # type: ignore[valid-type]
    top1: clu_metrics.Average.from_fun(_per_example("top1"))  # type: ignore[valid-type]
    grad_norm: clu_metrics.Average.from_output("grad_norm")  # type: ignore[valid-type]
    learning_rate: clu_metrics.LastValue.from_output("learning_rate")  # type: ignore[valid-type]


def merge_model(graphdef: nnx.GraphDef[FlaxCLIPModel], *params: Params) -> FlaxCLIPModel:
    """The model that computes with the given parameters, which together are all of its own."""
    return nnx.merge(graphdef, unflatten({name: value for part in params for name, value in part.items()}))


def make_train_step(
    graphdef: nnx.GraphDef[FlaxCLIPModel],
    method: Full,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    preprocess: Preprocess,
    label_smoothing: float,
    shardings: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, Params, Classes, Batch], tuple[TrainState, TrainMetrics]]:
    """The training step, jitted; it donates the state, so the caller keeps only what it returns."""

    def loss_fn(params: Params, frozen: Params, classes: Classes, batch: Batch) -> tuple[jax.Array, Any]:
        model = merge_model(graphdef, params, frozen)
        images = normalize_images(batch.image, preprocess.mean, preprocess.std)
        logits = method.logits(model, images, classes)
        losses = cross_entropy(logits, batch.label, label_smoothing)
        return masked_mean(losses, batch.mask), (losses, jnp.argmax(logits, -1) == batch.label)

    def train_step(
        state: TrainState, frozen: Params, classes: Classes, batch: Batch
    ) -> tuple[TrainState, TrainMetrics]:
        (_, (losses, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, classes, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if "logit_scale" in params:
            params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        metrics = TrainMetrics.single_from_model_output(
            loss=losses,
            top1=correct.astype(jnp.float32),
            example_mask=batch.mask.astype(bool),
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
        )
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_eval_step(
    graphdef: nnx.GraphDef[FlaxCLIPModel], method: Full, preprocess: Preprocess, mesh: Mesh
) -> Callable[[Params, Params, Classes, Batch], tuple[Float[Array, "b c"], Batch]]:
    """The class logits of a batch, jitted, and its labels, mask and index; every process gets those of all rows."""

    def eval_step(params: Params, frozen: Params, classes: Classes, batch: Batch) -> tuple[jax.Array, Batch]:
        images = normalize_images(batch.image, preprocess.mean, preprocess.std)
        return method.logits(merge_model(graphdef, params, frozen), images, classes), batch._replace(image=None)

    return jax.jit(eval_step, out_shardings=replicated(mesh))


def make_class_step(
    graphdef: nnx.GraphDef[FlaxCLIPModel], num_classes: int, mesh: Mesh
) -> Callable[[Params, Int[Array, "p t"], Int[Array, " p"]], Float[Array, "c d"]]:
    """The class embeddings of all prompts, jitted: run once where the text tower is frozen, before each evaluation
    where it isn't."""

    def class_step(params: Params, input_ids: jax.Array, class_of_prompt: jax.Array) -> jax.Array:
        return merge_model(graphdef, params).encode_classes(input_ids, class_of_prompt, num_classes)

    return jax.jit(class_step, out_shardings=replicated(mesh))
