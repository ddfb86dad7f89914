"""What a run computes of its start before the first step: class embeddings, and heads fitted to features."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32

from clip_har_jax.batch import Batch
from clip_har_jax.data.pipeline import BadInputs
from clip_har_jax.data.sources import Source
from clip_har_jax.models.adapters import init_lora
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.trainer.features import cached_features, image_tower_digest
from clip_har_jax.training.methods import HEAD, ClassInputs
from clip_har_jax.training.probe import FittedHead, LabeledFeatures, choose_cache, fit_probe, make_tip_adapter
from clip_har_jax.training.recipes import CONTEXT

if TYPE_CHECKING:
    from clip_har_jax.trainer.run import Run


def place_clip(run: "Run", clip: Mapping[str, Any]) -> Params:
    """Return the start's parameters on the mesh, LoRA's updates, still 0, among them."""
    program = run.program
    params = {**clip, **init_lora(program.shapes, 0)}
    names = [name for name in program.shapes if not name.startswith((HEAD, CONTEXT))]
    return sharding.put_global(
        {name: params[name] for name in names}, {name: program.param_shardings[name] for name in names}
    )


def start_embeddings(run: "Run", clip: Mapping[str, Any]) -> Float32[np.ndarray, "c d"]:
    """Return the class embeddings of the start."""
    return np.asarray(run.program.class_step(place_clip(run, clip), ClassInputs(*run.prompts, None)))


def embed(run: "Run", params: Params, source: Source, bad_inputs: BadInputs) -> LabeledFeatures:
    """Return the image embeddings of a source, each image read once; those that can't be read are left out."""

    def step(batch: Batch) -> tuple[jax.Array, Batch]:
        return run.program.feature_step(params, batch)

    parts = [(b.image[b.mask > 0], b.label[b.mask > 0]) for b in run.computed(step, source, bad_inputs)]
    embeddings, label = (np.concatenate(part) for part in zip(*parts, strict=True))
    return LabeledFeatures(embeddings.astype(np.float32), label.astype(np.int32))


def fit_to_features(run: "Run", clip: Mapping[str, Any], embeddings: Float32[np.ndarray, "c d"]) -> FittedHead:
    """Return the head of a linear probe or a Tip-Adapter, chosen on the validation images."""
    program, config = run.program, run.config
    params, tower = place_clip(run, clip), image_tower_digest(clip)

    def features(name: str, source: Source) -> LabeledFeatures:
        def compute() -> LabeledFeatures:
            return embed(run, params, source, run.bad_inputs[name])

        way = {
            "preprocess": asdict(run.start.preprocess),
            "frames": asdict(config.data.video) if source.clips else None,
            "tower": asdict(run.start.config.vision),  # weights alone don't tell e.g. the activation
            "dtype": config.model.compute_dtype,
        }
        return cached_features(source, tower, way, compute)

    train, val = features("train", run.data.train), features("val", run.data.val)
    scale = float(np.exp(clip["logit_scale"]))
    if program.method.head == "tip_adapter":
        chosen = choose_cache(train.label, config.method.cache_per_class, config.seed)
        fit = make_tip_adapter(LabeledFeatures(*(part[chosen] for part in train)), val, embeddings, scale)
    else:
        solver, smoothing = config.method.solver, config.method.label_smoothing
        fit = fit_probe(train, val, embeddings, scale, solver, program.method.class_weights, smoothing)
    return FittedHead(distributed.share(fit.params), distributed.broadcast(fit.about))


def describe_method(run: "Run") -> str:
    """One line: the method, what it saves, what it learns from, and how a head was fitted."""
    method, config = run.program.method, run.config.method
    fitted = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in run.fit_report.items())
    what = {"steps": f"loss {method.loss}", "features": "features computed once", "nothing": "no training"}
    head = "linear (class embeddings of the learned prompts)" if method.context_length else method.head
    return f"{config.name}, head {head}, {what[method.recipe.learns_from]}" + (f"; fitted: {fitted}" if fitted else "")
