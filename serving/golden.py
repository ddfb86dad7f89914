"""The last check before a version answers: does what was loaded compute what it should?"""

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.inference.exported import ExportedBackend

IMAGES = 4
# Largest difference of probabilities: between batches, and between the classifier and encoders with class texts.
TOLERANCES = {"onnx_int8": 0.25, "onnx_fp16": 0.03, "tensorrt": 0.03}
TOLERANCE = 2e-3


def check(backend: ExportedBackend) -> None:
    """Runs every graph once and compares them with one another.

    Raises:
      UserError: not finite, another answer in a batch than alone, or the classifier and the encoders disagree.
    """
    size = backend.preprocess.image_size_px
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    tolerance = TOLERANCES.get(backend.graphs.format, TOLERANCE)
    probs, embeddings = backend.predict(images), backend.embed(images)
    heat = backend.explain(images[:1], [0])
    if not (np.isfinite(probs).all() and np.isfinite(embeddings).all() and np.isfinite(heat).all()):
        raise UserError(f"{backend.path}: the model gives NaN or infinity; export it again")
    _compare(
        probs,
        np.concatenate([backend.predict(images[i : i + 1]) for i in range(IMAGES)]),
        tolerance,
        backend,
        "an image alone and in a batch",
    )
    if backend.actions.head == "cosine":
        actions = backend.actions
        classes = backend.embed_classes([actions.prompts[label] for label in actions.labels])
        backend.explain_embeddings(images[:1], classes[:1])
        logits = backend.logit_scale / actions.temperature * embeddings @ classes.T
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        _compare(
            probs, powers / powers.sum(axis=-1, keepdims=True), tolerance, backend, "the classifier and the encoders"
        )


def _compare(one: np.ndarray, other: np.ndarray, tolerance: float, backend: ExportedBackend, what: str) -> None:
    error = float(np.abs(one - other).max())
    if not error <= tolerance:
        raise UserError(
            f"{backend.path}: {what} differ by {error:.3g} in probability, over {tolerance:g}; export it again"
        )
