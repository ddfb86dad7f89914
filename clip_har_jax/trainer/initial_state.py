"""The state before the first step: restored from a checkpoint, or made from the base model with fitted heads."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int64

from clip_har_jax.batch import Batch
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.sources import Source
from clip_har_jax.models.adapters import A as LORA_A
from clip_har_jax.models.adapters import B as LORA_B
from clip_har_jax.models.adapters import init_lora
from clip_har_jax.models.factory import base_params
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed
from clip_har_jax.trainer.features import cached_features, image_tower_digest
from clip_har_jax.trainer.run import Run
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.methods import HEAD
from clip_har_jax.training.probe import FittedHead, LabeledFeatures, choose_cache, fit_linear_probe, make_tip_adapter
from clip_har_jax.training.recipes import CONTEXT
from clip_har_jax.training.state import TrainState


class Initial(NamedTuple):
    """The state at the first step of a start, on the mesh."""

    state: TrainState  # the first step donates it
    frozen: Params  # parameters that no step updates
    probe: dict[str, float]  # scores of fitting the head to features; empty if none was fitted


def initial_state(run: Run, checkpointer: Checkpointer) -> Initial:
    """Return the state of the checkpoint to resume from, or else the state before the first step.

    A checkpoint is restored into shapes: besides it, only the parameters that it doesn't contain are placed on the
    devices.

    Raises:
      UserError: the checkpoint is from another model, or images for fitting a head can't be read.
    """
    program = run.program
    if not run.first_step:
        params, probe = initial_params(run)
        return Initial(*program.place(params, run.config.seed), probe)
    state = checkpointer.restore(program.abstract_state(), run.first_step)
    if any(map(_is_added, program.frozen)):
        params, probe = initial_params(run)
    else:
        params, probe = _from_base(run, program.frozen), {}
    return Initial(state, program.place_params({name: params[name] for name in program.frozen}), probe)


def initial_params(run: Run) -> tuple[Params, dict[str, float]]:
    """Return all initial parameters of a run, and the scores of a head that was fitted to features.

    Parameters of a model folder are host arrays; random ones are on the mesh.
    """
    program, method, head = run.program, run.program.method, run.base.head
    base = _from_base(run, [name for name in program.shapes if not _is_added(name)])
    if method.has_head and head is not None and (head.name, head.labels) == (method.head, run.data.labels):
        lora = init_lora(program.shapes, run.config.seed)
        return base | lora | {HEAD + name: value for name, value in head.params.items()}, {}
    embeddings = _class_embeddings(run, base) if method.has_head else None
    read = ["logit_scale", *(["text.token_embedding"] if method.context_length else [])]
    on_host = distributed.fetch_to_all({name: base[name] for name in read})
    added = method.init_extra(on_host, program.shapes, embeddings, run.context_ids(), run.config.seed)
    if run.config.data.multi_label:
        added |= start_multi_label(added, run.data.classified.class_counts, len(run.data.classified))
    if method.recipe.learns_from != "features" and not method.recipe.probes_first:
        return base | added, {}
    assert embeddings is not None
    fit = fit_head(run, base, embeddings)
    return base | added | {HEAD + name: value for name, value in fit.params.items()}, fit.about


def start_multi_label(
    params: Mapping[str, Any], class_counts: Int64[np.ndarray, " c"], num_examples: int
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return a linear head's parameters from which labels with sigmoid probabilities can be learned.

    CLIP's logits are all far above 0, so every label would seem present. The mean of the class embeddings is
    subtracted, which changes no difference between two logits, and the bias is the log-odds of each label's share of
    the images, as in Lin et al. 2017, section 4.1.

    Args:
      params: with the head's kernel.
      class_counts: training images of each label.
      num_examples: training images.
    """
    kernel = np.asarray(params[HEAD + "classes.kernel"])
    share = (class_counts + 1) / (num_examples + 2)  # never 0 or 1
    bias = np.log(share / (1 - share)).astype(np.float32)
    return {HEAD + "classes.kernel": kernel - kernel.mean(axis=1, keepdims=True), HEAD + "classes.bias": bias}


def _is_added(name: str) -> bool:
    """Return whether a method adds this parameter to the base model's."""
    return name.startswith((HEAD, CONTEXT)) or name.endswith((LORA_A, LORA_B))


def _from_base(run: Run, names: list[str]) -> Params:
    return base_params(run.base, run.config.seed, {name: run.program.param_shardings[name] for name in names})


def _place_base(run: Run, base: Mapping[str, Any]) -> Params:
    """Return the base model's parameters on the mesh, with LoRA's updates initialised to 0."""
    lora = {
        name: np.zeros(shape, np.float32)
        for name, shape in run.program.shapes.items()
        if name.endswith((LORA_A, LORA_B))
    }
    return run.program.place_params({**base, **lora})


def place_start(run: Run) -> Params:
    """Return all parameters of the base model on the mesh, as before training."""
    return _place_base(run, _from_base(run, [name for name in run.program.shapes if not _is_added(name)]))


def _class_embeddings(run: Run, base: Mapping[str, Any]) -> Float32[np.ndarray, "c d"]:
    """Return the class embeddings of the base model."""
    return np.asarray(run.program.class_step(_place_base(run, base), run.place_prompts()))


def embed(run: Run, params: Params, source: Source, bad_inputs: BadInputs) -> LabeledFeatures:
    """Return the image embeddings of a source; each image is read once, unreadable ones are left out."""

    def step(batch: Batch) -> tuple[jax.Array, Batch]:
        return run.program.feature_step(params, batch)

    parts = [(b.image[b.mask > 0], b.label[b.mask > 0]) for b in run.map_batches(step, source, bad_inputs)]
    embeddings, label = (np.concatenate(part) for part in zip(*parts, strict=True))
    return LabeledFeatures(embeddings.astype(np.float32), label.astype(np.int32))


def fit_head(run: Run, base: Mapping[str, Any], embeddings: Float32[np.ndarray, "c d"]) -> FittedHead:
    """Return the head of a linear probe or a Tip-Adapter, with hyperparameters chosen on the validation images.

    Args:
      base: the base model's parameters.
      embeddings: its class embeddings.
    """
    method, config = run.program.method, run.config
    params, tower = _place_base(run, base), image_tower_digest(base)

    def features(name: str, source: Source) -> LabeledFeatures:
        depends_on = {
            "preprocess": asdict(run.base.preprocess),
            "frames": asdict(config.data.video) if source.clips else None,
            "tower": asdict(run.base.config.vision),  # the weights don't show e.g. the activation function
            "dtype": config.model.compute_dtype,
        }
        return cached_features(source, tower, depends_on, lambda: embed(run, params, source, run.bad_inputs[name]))

    train, val = features("train", run.data.classified), features("val", run.data.val)
    scale = float(np.exp(jax.device_get(base["logit_scale"])))
    if method.head == "tip_adapter":
        chosen = choose_cache(train.label, config.method.cache_per_class, config.seed)
        fit = make_tip_adapter(LabeledFeatures(*(part[chosen] for part in train)), val, embeddings, scale)
    else:
        solver, smoothing = config.method.solver, config.method.label_smoothing
        fit = fit_linear_probe(train, val, embeddings, scale, solver, method.class_weights, smoothing)
    return FittedHead(distributed.share(fit.params), distributed.broadcast(fit.about))
