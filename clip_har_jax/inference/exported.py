"""Exported models: one format of an exported folder as a backend; `inference.runtimes` opens it."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object
from clip_har_jax.inference.backends import (
    Backend,
    check_finite,
    check_indices,
    choose_actions,
    choose_sigmoid,
    mean_by_class,
    pad,
    probabilities,
    rows_at_once,
)
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.runtimes import Graphs, exported_folder, first_that_runs, providers, read_signature
from clip_har_jax.preprocess import PREPROCESS_VERSION, Preprocess
from clip_har_jax.tokenization import read_tokenizer


class ExportedBackend:
    """One format of an exported folder.

    Args:
      folder: the exported folder.
      format: one of `RUNTIMES`; None: the first one in the folder whose runtime is installed.
      classes: the actions to recognise, with the text encoder; empty: the folder's own.
      batch_size: images in one forward pass.
      threads: as for `Graphs`.
      multi_label: accept multi-label models too, whose probabilities don't sum to 1.

    Raises:
      UserError: a changed file, another version of the image preprocessing, or no format that runs here.
    """

    def __init__(
        self,
        folder: Path,
        format: str | None = None,
        classes: Sequence[str] = (),
        batch_size: int = 32,
        threads: int | None = None,
        multi_label: bool = False,
    ):
        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size}; 1 or more is needed")
        self.path, self.batch_size = folder, batch_size
        self.digest = bundle.verify(folder)
        self.model_digest = read_object(folder / bundle.MANIFEST).get("source") if self.digest else None
        actions = choose_actions(folder, classes, multi_label=multi_label)
        version = bundle.read_actions(folder).preprocess_version
        if version not in (None, PREPROCESS_VERSION):
            raise UserError(
                f"{folder}: needs image preprocessing of version {version}, this program has {PREPROCESS_VERSION}; "
                "install the version of clip_har_jax that exported it, or export again"
            )
        self.graphs = Graphs(folder, format or first_that_runs(folder), threads)
        self.actions, self.labels = actions, actions.labels
        signature = read_signature(folder)
        self.preprocess = Preprocess.from_folder(folder, signature["graphs"]["classifier"]["inputs"]["image"][1][1])
        self.logit_scale, self.logit_bias = signature["logit_scale"], signature.get("logit_bias")
        self.sigmoid = choose_sigmoid(actions, self.logit_bias)
        self._context_length = signature["graphs"]["text_encoder"]["inputs"]["input_ids"][1][1]
        self._tokenizer = read_tokenizer(folder)
        self._classes: np.ndarray | None = None
        if classes:
            self._classes = self.embed_classes([actions.prompts[label] for label in actions.labels])
            self._scale = self.logit_scale / actions.temperature

    def in_one_thread(self) -> "ExportedBackend | None":
        """Return the same model, computing each run in one thread; None: the runtime doesn't support it."""
        if not self.graphs.format.startswith("onnx") or len(providers()) > 1:
            return None
        other = copy.copy(self)
        other.graphs = Graphs(self.path, self.graphs.format, threads=1)
        return other

    @property
    def takes_clips(self) -> bool:
        """Return whether there are graphs of clips; exports of earlier versions have none."""
        return not {"clip_classifier", "clip_head"}.isdisjoint(self.graphs.signatures)

    @property
    def takes_frames(self) -> bool:
        """Return whether the frames of a clip can be encoded one by one."""
        return "clip_head" in self.graphs.signatures

    @property
    def num_frames(self) -> int | None:
        """Return the number of frames that a clip must have; None: any."""
        if "clip_classifier" not in self.graphs.signatures:
            return None
        length = self.graphs.signatures["clip_classifier"]["inputs"]["frames"][1][1]
        return length if isinstance(length, int) else None

    def embed_classes(self, prompts: Sequence[Sequence[str]]) -> Float32[np.ndarray, "c d"]:
        """Return class embeddings of the texts of each class, from the text encoder."""
        ids, _ = self._tokenizer([text for group in prompts for text in group], self._context_length)
        return mean_by_class(self.run_graph("text_encoder", ids)[0], [len(group) for group in prompts])

    def run_graph(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return a graph's outputs, about `batch_size` images at a time; padded if a new size needs a compilation.

        Inputs and outputs have the rows, [b, ...], as their first axis; the graph's signature has the others.
        """
        parts, length, most = [], len(inputs[0]), rows_at_once(inputs[0], self.batch_size)
        for start in range(0, length, most):
            part = [rows[start : start + most] for rows in inputs]
            count = len(part[0])
            size = most if self.graphs.compiles and length > 1 else count
            outputs = self.graphs.run(graph, *(pad(rows, size) for rows in part))
            parts.append([output[:count] for output in outputs])
        return [np.concatenate(output) for output in zip(*parts, strict=True)]

    def logits(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits of images or clips, divided by the temperature.

        Raises:
          UserError: clips of another length than the model's, or an export that takes only images.
        """
        if images.ndim == 5:
            return self._answer(*self._of_clips(images))
        if self._classes is None:
            return self._answer(self.run_graph("classifier", images)[1])
        return self._answer(None, self.embed(images))

    def _answer(self, own: np.ndarray | None, embeddings: np.ndarray | None = None) -> Float32[np.ndarray, "b c"]:
        """Return the logits of the folder's `own` classes, or those of the cosines with `embeddings`."""
        logits = own if self._classes is None else self._scale * embeddings @ self._classes.T
        assert logits is not None
        check_finite(logits, self.path)
        return logits

    def predict(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class probabilities of images or clips."""
        return probabilities(self.logits(images), self.actions.multi_label)

    def embed(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b d"]:
        """Return L2-normalised embeddings of images or clips."""
        return self._of_clips(images)[1] if images.ndim == 5 else self.run_graph("image_encoder", images)[0]

    def _of_clips(
        self, frames: UInt8[np.ndarray, "b t h w 3"]
    ) -> tuple[Float32[np.ndarray, "b c"], Float32[np.ndarray, "b d"]]:
        """Return logits of the folder's own classes, and embeddings."""
        if not self.takes_clips:
            raise UserError(f"{self.path}: an earlier version exported it, for images only; export the model again")
        if "clip_classifier" not in self.graphs.signatures:
            embeds = self.embed_frames(frames.reshape(-1, *frames.shape[2:]))
            return self._pool(embeds.reshape(*frames.shape[:2], -1))
        if self.num_frames not in (None, frames.shape[1]):
            if frames.shape[1] == 1:  # a photograph is a clip of one frame
                return self.run_graph("classifier", frames[:, 0])[1], self.embed(frames[:, 0])
            raise UserError(f"{self.path}: takes clips of {self.num_frames} frames, not {frames.shape[1]}")
        _, logits, embeddings = self.run_graph("clip_classifier", frames)
        return logits, embeddings

    def embed_frames(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n d"]:
        """Return the features of single frames, the input of `frame_logits`; requires `takes_frames`."""
        own = "frame_encoder" in self.graphs.signatures
        return self.run_graph("frame_encoder" if own else "image_encoder", images)[0]

    def frame_logits(self, embeds: Float32[np.ndarray, "b t d"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits of clips from the features of their frames; equal to `logits` of the clips."""
        return self._answer(*self._pool(embeds))

    def pool_frames(self, embeds: Float32[np.ndarray, "b t d"]) -> Float32[np.ndarray, "b d"]:
        """Return L2-normalised embeddings of clips from the features of their frames."""
        return self._pool(embeds)[1]

    def _pool(
        self, embeds: Float32[np.ndarray, "b t d"]
    ) -> tuple[Float32[np.ndarray, "b c"], Float32[np.ndarray, "b d"]]:
        _, logits, embeddings = self.run_graph("clip_head", embeds)
        return logits, embeddings

    def explain(
        self, images: UInt8[np.ndarray, "b h w 3"], class_indices: Sequence[int]
    ) -> Float32[np.ndarray, "b g g"]:
        """Return a heat map of a class for each image; for new classes, from the patches' embeddings."""
        indices = check_indices(class_indices, len(images), len(self.labels))
        if self._classes is None:
            return self.run_graph("explainer", images, np.eye(len(self.labels), dtype=np.float32)[indices])[0]
        return self.explain_embeddings(images, self._classes[indices])

    def explain_embeddings(
        self, images: UInt8[np.ndarray, "b h w 3"], classes: Float32[np.ndarray, "b d"]
    ) -> Float32[np.ndarray, "b g g"]:
        """Return heat maps [b, g, g] like `explain`, for the embedding of any class, one per image."""
        own = self.graphs.signatures["explainer"]["inputs"]["class_weights"][1][1]
        patches = self.run_graph("explainer", images, np.zeros((len(images), own), np.float32))[1]
        relevance = np.maximum(np.einsum("bnd,bd->bn", patches, classes), 0)
        heat = relevance / np.maximum(relevance.max(axis=1, keepdims=True), 1e-12)
        grid = round(heat.shape[1] ** 0.5)
        return heat.reshape(len(heat), grid, grid)


def open_backend(
    path: str | os.PathLike[str], classes: Sequence[str] = (), batch_size: int = 32, multi_label: bool = False
) -> Backend:
    """Return the backend of `path`: an exported folder or one of its formats; else JAX, for a model folder or Hub name.

    Multi-label models are refused unless `multi_label`.

    Raises:
      UserError: no usable model there, or no classes.
    """
    if found := exported_folder(Path(path).expanduser()):
        return ExportedBackend(*found, classes, batch_size, multi_label=multi_label)
    return JaxBackend(path, classes, batch_size=batch_size, multi_label=multi_label)
