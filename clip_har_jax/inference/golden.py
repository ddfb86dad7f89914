"""Golden outputs: drawn pictures with the model's outputs for them, stored in the exported folder.

They are compared at every load. A difference means other weights, or a runtime, image library or tokenizer that
computes differently than at the export, which a manifest can't detect.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from clip_har_jax.errors import UserError
from clip_har_jax.inference.backends import Backend, softmax
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.preprocess import evaluation_transform

FILE = "golden.npz"
TEXTS = 8  # most of the classes' prompts
SEVERAL = 4  # images in a batch if there are no golden ones


@dataclass(frozen=True)
class Tolerance:
    """Accepted differences by rounding; wider than an export's own bounds, since other processors round differently.

    Attributes:
      logits: largest error of a logit, relative to the largest logit.
      cosine: smallest cosine of an embedding to the golden one.
      heat: smallest cosine of a heat map to the golden one.
      probs: largest difference of probabilities between two ways to compute them.
    """

    logits: float
    cosine: float
    heat: float
    probs: float


FULL = Tolerance(2e-3, 0.9999, 0.999, 2e-3)
TOLERANCES = {
    "onnx_fp16": Tolerance(0.02, 0.998, 0.97, 0.03),
    "tensorrt": Tolerance(0.02, 0.998, 0.97, 0.03),
    "onnx_int8": Tolerance(0.2, 0.97, 0.7, 0.25),
}


def write(folder: Path, pictures: UInt8[np.ndarray, "n h w 3"], model: JaxBackend, num_frames: int) -> None:
    """Write the pictures and the outputs of `model` for them into the folder, before it is sealed.

    Args:
      folder: the exported folder.
      pictures: of any size and shape.
      model: the model that computes the outputs.
      num_frames: frames of the clips that are made of the pictures.
    """
    images = np.stack([evaluation_transform(picture, model.preprocess) for picture in pictures])
    texts = [text for label in model.labels for text in model.actions.prompts[label]][:TEXTS]
    logits, _, image_embeds = model.outputs(images)
    explained = logits.argmax(axis=1).tolist()
    # Each picture is repeated for some frames, so that the clip moves and differs from its reverse.
    forwards = np.arange(num_frames) * len(images) // num_frames
    clips = np.stack([forwards, forwards[::-1]])
    np.savez_compressed(
        folder / FILE,
        pictures=pictures,
        logits=logits,
        image_embeds=image_embeds,
        texts=np.asarray(texts, np.str_),
        text_embeds=model.embed_texts(model.tokenize(texts)),
        heat_maps=model.explain(images, explained),
        explained=explained,
        clips=clips,
        clip_logits=model.logits(images[clips]),
    )


def _explained(golden: dict[str, np.ndarray], num_classes: int) -> list[int]:
    """Return the class to explain for each picture: the predicted one, whose heat map isn't empty.

    Exports of earlier versions don't name it, and explain one class after the other.
    """
    if "explained" in golden:
        return golden["explained"].tolist()
    return [i % num_classes for i in range(len(golden["pictures"]))]


def check(backend: ExportedBackend) -> bool:
    """Run every graph and compare with the golden outputs; return whether there are any.

    Without them, as in older exports, the graphs are compared with each other.

    Raises:
      UserError: not finite, different from the golden output, different in a batch than alone, or a damaged file.
    """
    path = backend.path / FILE
    there = path.is_file()
    if there:
        _compare_with(path, backend)
    else:
        _compare_graphs(backend)
    return there


def _compare_with(path: Path, backend: ExportedBackend) -> None:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            golden = dict(file)
        pictures, texts = golden["pictures"], golden["texts"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); export it again") from error
    images = np.stack([evaluation_transform(picture, backend.preprocess) for picture in pictures])
    limit = TOLERANCES.get(backend.graphs.format, FULL)
    heat = backend.explain(images, _explained(golden, len(backend.actions.labels)))
    if not np.isfinite(heat).all():
        raise UserError(f"{backend.path}: the model gives NaN or infinity; export it again")
    if "heat_maps" in golden:  # missing in exports of earlier versions
        _compare_heat(backend, heat, golden["heat_maps"], limit.heat)
    _compare_logits(backend, backend.logits(images), golden["logits"], limit.logits, "images in a batch")
    _compare_logits(backend, backend.logits(images[:1]), golden["logits"][:1], limit.logits, "an image alone")
    _compare_cosines(backend, backend.embed(images), golden["image_embeds"], limit.cosine, "images")
    text_embeds = backend.embed_classes([[text] for text in texts])
    _compare_cosines(backend, text_embeds, golden["text_embeds"], limit.cosine, "texts")
    # Last, since clips need the image encoder too: an error in it is reported as one of images.
    if "clips" in golden:  # exports of earlier versions have no clips
        _compare_clips(backend, images[golden["clips"]], golden["clip_logits"], limit.logits)


def _compare_clips(
    backend: ExportedBackend, clips: UInt8[np.ndarray, "n t h w 3"], golden: Float32[np.ndarray, "n c"], limit: float
) -> None:
    if backend.takes_clips:
        _compare_logits(backend, backend.logits(clips), golden, limit, "clips")
    if backend.takes_frames:
        embeds = backend.embed_frames(clips.reshape(-1, *clips.shape[2:])).reshape(*clips.shape[:2], -1)
        _compare_logits(backend, backend.frame_logits(embeds), golden, limit, "clips, frame by frame,")


def _compare_logits(backend: Backend, ours: np.ndarray, golden: np.ndarray, limit: float, what: str) -> None:
    error = np.inf
    if ours.shape == golden.shape:
        error = float(np.abs(ours - golden).max() / max(1.0, np.abs(golden).max()))
    if not error <= limit:
        raise UserError(
            f"{backend.path}: logits of {what} aren't those of the exported model (off by {error:.2g} of the "
            f"largest, over {limit:g}); export it again, or use the versions that it was exported with"
        )


def _compare_cosines(
    backend: Backend, ours: Float32[np.ndarray, "n d"], golden: Float32[np.ndarray, "n d"], limit: float, what: str
) -> None:
    cosine = np.inf
    if ours.shape == golden.shape:  # both have length 1; another length counts as a difference too
        cosines = (ours * golden).sum(axis=-1)
        cosine = float(cosines[np.abs(1 - cosines).argmax()])
    if not abs(1 - cosine) <= 1 - limit:
        raise UserError(
            f"{backend.path}: embeddings of {what} aren't those of the exported model (cosine {cosine:.4f}, not "
            f"1 within {1 - limit:g}); export it again, or use the versions that it was exported with"
        )


def _compare_heat(
    backend: Backend, ours: Float32[np.ndarray, "n g g"], golden: Float32[np.ndarray, "n g g"], limit: float
) -> None:
    cosine = 0.0
    if ours.shape == golden.shape:
        a, b = (maps.reshape(len(maps), -1) for maps in (ours, golden))
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        empty = (a == 0).all(axis=-1) & (b == 0).all(axis=-1)  # no patch contributes to the class
        cosine = float(np.where(empty, 1.0, (a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)).min())
    if not cosine >= limit:
        raise UserError(
            f"{backend.path}: heat maps aren't those of the exported model (cosine {cosine:.4f}, under {limit:g}); "
            "export it again, or use the versions that it was exported with"
        )


def _compare_graphs(backend: ExportedBackend) -> None:
    size = backend.preprocess.image_size_px
    images = np.random.default_rng(0).integers(0, 256, (SEVERAL, size, size, 3), dtype=np.uint8)
    limit = TOLERANCES.get(backend.graphs.format, FULL).probs
    probs, embeddings = backend.predict(images), backend.embed(images)
    heat = backend.explain(images[:1], [0])
    if not (np.isfinite(embeddings).all() and np.isfinite(heat).all()):
        raise UserError(f"{backend.path}: the model gives NaN or infinity; export it again")
    alone = np.concatenate([backend.predict(images[i : i + 1]) for i in range(SEVERAL)])
    _compare_probs(backend, probs, alone, limit, "an image alone and in a batch")
    if backend.actions.head == "cosine":
        actions = backend.actions
        classes = backend.embed_classes([actions.prompts[label] for label in actions.labels])
        backend.explain_embeddings(images[:1], classes[:1])
        logits = backend.logit_scale / actions.temperature * embeddings @ classes.T
        _compare_probs(backend, probs, softmax(logits), limit, "the classifier and the encoders")


def _compare_probs(backend: Backend, one: np.ndarray, other: np.ndarray, limit: float, what: str) -> None:
    error = float(np.abs(one - other).max())
    if not error <= limit:
        raise UserError(f"{backend.path}: {what} differ by {error:.3g} in probability, over {limit:g}; export it again")
