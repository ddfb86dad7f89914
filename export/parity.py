"""The comparison of an exported format with the model, on real and on extreme images."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, UInt8

BATCH_SIZE = 32
SINGLES, ODD = 4, 3  # images also computed one by one, and in one batch of an odd size
EXPLAINED = 8
NUM_HARD = 4  # black, white, and two of noise, after the examples
NUM_HARD_CLIPS = 2  # after the clips
MIN_CLIPS, CLIP_BATCH = 8, 4
MIN_PREDICTED = 0.5  # share of the classes; if fewer are ever predicted, agreement says little

CLIP_OUTPUTS = ("clip_probs", "clip_logits", "clip_embeds", "single_clip_logits")

Arrays = dict[str, np.ndarray]
RunGraph = Callable[..., Sequence[np.ndarray]]


@dataclass(frozen=True)
class Bounds:
    """How much a format may differ from the model.

    Attributes:
      error: largest absolute error of probabilities, embeddings and heat maps; None: no bound.
      agreement: least share of images with the same top class, if the model predicts at least half of its classes.
      logits: largest error of a logit, relative to the largest logit; finds a wrong head, which embeddings don't show.
      cosine: least cosine of an embedding to the model's. For images only if the model predicts fewer than half of its
        classes, for texts and hard images always.
      explainer: least cosine of the patches' contributions, from which heat maps are computed.
    """

    error: float | None
    logits: float
    agreement: float
    cosine: float
    explainer: float


FLOAT32 = Bounds(1e-4, 1e-4, 1.0, 0.999999, 0.9999)
FLOAT16 = Bounds(None, 0.01, 0.995, 0.999, 0.99)
BFLOAT16 = Bounds(None, 0.05, 0.99, 0.999, 0.99)  # bfloat16 has 8 significant bits, float16 has 11
INT8 = Bounds(None, 0.1, 0.99, 0.99, 0.95)


def hard_images(size_px: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Return an all black image, an all white one, and noise."""
    noise = np.random.default_rng(0).integers(0, 256, (2, size_px, size_px, 3), dtype=np.uint8)
    flat = [np.full((size_px, size_px, 3), value, np.uint8) for value in (0, 255)]
    return np.stack([*flat, *noise])


def make_cases(
    images: UInt8[np.ndarray, "n h w 3"], ids: Int32[np.ndarray, "p t"], num_classes: int, num_frames: int = 0
) -> Arrays:
    """Return the inputs for each format: the images followed by the hard ones, prompts, and classes to explain.

    With `num_frames` also clips: consecutive images, followed by two hard clips, one that flashes from black to white
    and one of noise.
    """
    hard = hard_images(images.shape[1])
    explained = np.arange(min(EXPLAINED, len(images) + NUM_HARD)) % num_classes
    cases = {
        "image": np.concatenate([images, hard]),
        "input_ids": ids[:64],
        "class_weights": np.eye(num_classes, dtype=np.float32)[explained],
    }
    if num_frames:
        count = max(MIN_CLIPS, len(images) // num_frames)
        numbers = np.arange(count * num_frames).reshape(count, num_frames) % len(images)
        flashing = np.arange(num_frames) % 2
        cases["frames"] = np.concatenate([images[numbers], hard[[flashing, 2 + flashing]]])
    return cases


def run_cases(run: RunGraph, cases: Arrays, graphs: Collection[str]) -> Arrays:
    """Return all outputs for all cases: images in full batches, the first also one by one and in an odd batch.

    Args:
      run: runs a graph.
      cases: from `make_cases`.
      graphs: names of the graphs of clips to run; other names are ignored.
    """
    images, weights = cases["image"], cases["class_weights"]
    probs, logits = _batches(run, "classifier", images, BATCH_SIZE)
    outputs = {
        "probs": probs,
        "logits": logits,
        "single_logits": _batches(run, "classifier", images[:SINGLES], 1)[1],
        "odd_logits": _batches(run, "classifier", images[:ODD], ODD)[1],
        "image_embeds": _batches(run, "image_encoder", images, BATCH_SIZE)[0],
        "text_embeds": _batches(run, "text_encoder", cases["input_ids"], BATCH_SIZE)[0],
        **dict(zip(("heat_map", "patch_embeds"), run("explainer", images[: len(weights)], weights), strict=True)),
    }
    if "frames" in cases:
        if "clip_classifier" in graphs:
            outputs |= run_clips(run, cases["frames"])
        if "clip_head" in graphs:
            encoder = "frame_encoder" if "frame_encoder" in graphs else "image_encoder"
            outputs |= {f"streamed_{name}": rows for name, rows in _run_apart(run, cases["frames"], encoder).items()}
    return outputs


def run_clips(run: RunGraph, frames: UInt8[np.ndarray, "n t h w 3"]) -> Arrays:
    """Return the outputs for clips: in batches, and the first clips also one by one."""
    outputs = _batches(run, "clip_classifier", frames, CLIP_BATCH)
    singles = _batches(run, "clip_classifier", frames[:ODD], 1)[1]
    return dict(zip(CLIP_OUTPUTS, (*outputs, singles), strict=True))


def _run_apart(run: RunGraph, frames: UInt8[np.ndarray, "n t h w 3"], encoder: str) -> Arrays:
    """Return the outputs as `run_clips` does, but encode each frame separately."""
    (embeds,) = _batches(run, encoder, frames.reshape(-1, *frames.shape[2:]), BATCH_SIZE)
    embeds = embeds.reshape(*frames.shape[:2], -1)
    outputs = _batches(run, "clip_head", embeds, CLIP_BATCH)
    singles = _batches(run, "clip_head", embeds[:ODD], 1)[1]
    return dict(zip(CLIP_OUTPUTS, (*outputs, singles), strict=True))


def _batches(run: RunGraph, graph: str, rows: np.ndarray, size: int) -> list[np.ndarray]:
    parts = [run(graph, rows[start : start + size]) for start in range(0, len(rows), size)]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def check_parity(
    ours: Arrays, theirs: Arrays, bounds: Bounds, labels: Sequence[str], true: Int32[np.ndarray, " n"]
) -> dict[str, Any]:
    """Return the entry of a format in parity.json.

    Args:
      ours, theirs: outputs of the model and of the format, from `run_cases`.
      bounds: how much they may differ.
      labels: the classes.
      true: the classes of the first images; further images have none.
    """
    broken = [name for name in ours if ours[name].shape != theirs[name].shape or not np.isfinite(theirs[name]).all()]
    if broken:
        failures = [f"{broken[0]} isn't finite, or of a shape that isn't {list(ours[broken[0]].shape)}"]
        return {"max_abs_error": None, "top1_agreement": None, "passed": False, "failures": failures}
    result = _differences(ours, theirs, len(labels), true)
    failures = _over_bounds(ours, theirs, result, bounds)
    for key, prefix in (("clips", ""), ("clips_by_frame", "streamed_")):
        if f"{prefix}clip_logits" in ours:
            result[key] = _clip_differences(_of_clips(ours, prefix), _of_clips(theirs, prefix), len(labels))
            failures += _clips_over_bounds(key, result[key], bounds)
    if failures:
        result["failures"] = failures
        worst = int(np.abs(ours["probs"] - theirs["probs"]).max(-1).argmax())
        result["worst_example"] = {"number": worst} | {
            who: {"label": labels[of["logits"][worst].argmax()], "score": float(of["probs"][worst].max())}
            for who, of in (("model", ours), ("exported", theirs))
        }
    return {**result, "passed": not failures}


def _differences(ours: Arrays, theirs: Arrays, num_classes: int, true: Int32[np.ndarray, " n"]) -> dict[str, Any]:
    """Return the figures of parity.json: the differences between the outputs."""
    predicted, exported = (outputs["logits"].argmax(-1) for outputs in (ours, theirs))
    examples = slice(0, len(predicted) - NUM_HARD)  # on hard images, the top class is arbitrary
    coverage = len(set(predicted[examples].tolist())) / num_classes
    logits, embeddings = ("logits", "single_logits", "odd_logits"), ("image_embeds", "text_embeds", "patch_embeds")
    patches = [of["patch_embeds"].reshape(len(of["heat_map"]), -1) for of in (ours, theirs)]
    return {
        "max_abs_error": _error(ours, theirs, "probs"),
        "max_logit_error": max(_error(ours, theirs, name) for name in logits),
        "max_embedding_error": max(_error(ours, theirs, name) for name in embeddings),
        "max_heat_map_error": _error(ours, theirs, "heat_map"),
        "min_cosine": min(_cosine(ours[name], theirs[name]) for name in ("image_embeds", "text_embeds")),
        "min_explainer_cosine": _cosine(*patches),
        "top1_agreement": float((predicted == exported)[examples].mean()),
        "ece_drift": abs(_ece(theirs["probs"], true) - _ece(ours["probs"], true)),
        "classes_predicted": coverage,
        "weak": coverage < MIN_PREDICTED,
    }


def _over_bounds(ours: Arrays, theirs: Arrays, result: dict[str, Any], bounds: Bounds) -> list[str]:
    """Return a sentence for each figure outside of its bound, NaN included."""
    failures = []
    scale = max(1.0, float(np.abs(ours["logits"]).max()))
    if not (error := result["max_logit_error"] / scale) <= bounds.logits:
        failures.append(f"logits, over the largest: error {error:.2g} above {bounds.logits:g}")
    if bounds.error is not None:
        errors = {
            "probabilities": result["max_abs_error"],
            "embeddings": result["max_embedding_error"],
            "heat maps": result["max_heat_map_error"],
        }
        failures += [
            f"{name}: error {value:.2g} above {bounds.error:g}"
            for name, value in errors.items()
            if not value <= bounds.error
        ]
    weak = result["weak"]
    if not weak and result["top1_agreement"] < bounds.agreement and (bounds.error is None or failures):
        failures.append(f"top-1 agreement {result['top1_agreement']:.4f} below {bounds.agreement:g}")
    # For a model that separates its classes, agreement is a stricter test of its images than a cosine. Texts and hard
    # images have no agreement.
    hard = _cosine(ours["image_embeds"][-NUM_HARD:], theirs["image_embeds"][-NUM_HARD:])
    texts = _cosine(ours["text_embeds"], theirs["text_embeds"])
    cosine = result["min_cosine"] if weak or bounds.error is not None else min(hard, texts)
    if cosine < bounds.cosine:
        failures.append(f"cosine of an embedding {cosine:.6f} below {bounds.cosine:g}")
    if not result["min_explainer_cosine"] >= bounds.explainer:
        failures.append(f"cosine of the explainer {result['min_explainer_cosine']:.6f} below {bounds.explainer:g}")
    return failures


def _of_clips(outputs: Arrays, prefix: str) -> Arrays:
    return {name: outputs[f"{prefix}{name}"] for name in CLIP_OUTPUTS}


def _clip_differences(ours: Arrays, theirs: Arrays, num_classes: int) -> dict[str, Any]:
    """Return the figures of clips in parity.json; errors of logits are relative to the largest logit."""
    predicted, exported = (outputs["clip_logits"][:-NUM_HARD_CLIPS].argmax(-1) for outputs in (ours, theirs))
    scale = max(1.0, float(np.abs(ours["clip_logits"]).max()))
    return {
        "num_clips": len(predicted),
        "max_abs_error": _error(ours, theirs, "clip_probs"),
        "max_logit_error": max(_error(ours, theirs, name) for name in ("clip_logits", "single_clip_logits")) / scale,
        "min_cosine": _cosine(ours["clip_embeds"], theirs["clip_embeds"]),
        "num_changed": int((predicted != exported).sum()),
        "weak": len(set(predicted.tolist())) / min(num_classes, len(predicted)) < MIN_PREDICTED,
    }


def _clips_over_bounds(what: str, result: dict[str, Any], bounds: Bounds) -> list[str]:
    """Return a sentence for each figure of clips that is outside of its bound."""
    failures = []
    if not (error := result["max_logit_error"]) <= bounds.logits:
        failures.append(f"{what}: logits, over the largest: error {error:.2g} above {bounds.logits:g}")
    if bounds.error is not None and not (error := result["max_abs_error"]) <= bounds.error:
        failures.append(f"{what}: probabilities: error {error:.2g} above {bounds.error:g}")
    if not (cosine := result["min_cosine"]) >= bounds.cosine:
        failures.append(f"{what}: cosine of an embedding {cosine:.6f} below {bounds.cosine:g}")
    # There are few clips, so one more may change than the share allows.
    allowed = (1 - bounds.agreement) * result["num_clips"] + (bounds.error is None)
    if not result["weak"] and result["num_changed"] > allowed:
        failures.append(f"{what}: {result['num_changed']} of {result['num_clips']} have another first class")
    return failures


def _error(ours: Arrays, theirs: Arrays, name: str) -> float:
    return float(np.abs(ours[name] - theirs[name]).max())


def _cosine(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(norms, 1e-30)).min())  # 0 without rows, which fails every bound


def _ece(probs: Float[np.ndarray, "n c"], true: Int32[np.ndarray, " n"]) -> float:
    """Return the expected calibration error of the first `len(true)` rows, by the evaluation's own metric."""
    from clip_har_jax.evaluation.metrics import ClassificationState

    logits = np.log(np.maximum(probs[: len(true)], 1e-30))
    state = ClassificationState.empty(probs.shape[1]).update(logits, true, np.ones(len(true), np.float32))
    return float(state.compute([str(i) for i in range(probs.shape[1])])["ece"]) if len(true) else 0.0
