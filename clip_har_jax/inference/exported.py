"""Exported models, each format opened in its own runtime; JAX is imported only for StableHLO.

An exported folder holds one folder per format and, for all of them, `signature.json` (the inputs and outputs of its
graphs), `actions.json`, the tokenizer and the image settings.

This file is over 300 lines: the table of formats, their functions to open a graph, and the backend belong together.
"""

import copy
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from clip_har_jax import bundle
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import read_object
from clip_har_jax.inference.backends import Backend, check_finite, check_indices, choose_actions, mean_by_class, pad
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.preprocess import PREPROCESS_VERSION, Preprocess
from clip_har_jax.text import Tokenizer

SIGNATURE = "signature.json"
ORIGIN = "origin.json"  # the model's training data and scores
GRAPHS = ("image_encoder", "text_encoder", "classifier", "explainer")
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider")

# Runs a graph on its inputs and returns its outputs, both in the order of the signature.
Run = Callable[..., Sequence[np.ndarray]]


def _providers() -> list[str]:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name in PROVIDERS if name in available]


def _open_onnx(folder: Path, graph: str, signature: dict[str, Any], threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # An idle thread would spin, on a core that another thread of the service needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = folder / f"{graph}.onnx"
    # Folding constants would make float32 copies of a large float16 model's weights, three times its size at the peak.
    separate = {"disabled_optimizers": ["ConstantFolding"]} if path.with_name(f"{path.name}.data").exists() else {}
    session = onnxruntime.InferenceSession(path, options, providers=_providers(), **separate)
    return lambda *inputs: session.run(signature["outputs"], dict(zip(signature["inputs"], inputs, strict=True)))


def _open_stablehlo(folder: Path, graph: str, signature: dict[str, Any], threads: int | None) -> Run:
    import jax
    from jax import export
    from safetensors.numpy import load_file

    weights = load_file(folder / "weights.safetensors")
    params = jax.device_put({name: weights[name] for name in signature["params"]})
    run = jax.jit(export.deserialize(bytearray((folder / f"{graph}.jax_export").read_bytes())).call)
    return lambda *inputs: [np.asarray(output) for output in run(params, *inputs)]


def _open_saved_model(folder: Path, graph: str, signature: dict[str, Any], threads: int | None) -> Run:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    function = loaded.signatures["serving_default" if graph == "classifier" else graph]

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        outputs = function(**{name: tf.constant(x) for name, x in zip(signature["inputs"], inputs, strict=True)})
        return [outputs[name].numpy() for name in signature["outputs"]]

    run.keep = loaded  # type: ignore[attr-defined]  # the signature alone doesn't keep its variables alive
    return run


def _open_torchscript(folder: Path, graph: str, signature: dict[str, Any], threads: int | None) -> Run:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    module = torch.jit.load(folder / f"{graph}.pt")

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.numpy() for output in module(*map(torch.from_numpy, inputs))]

    return run


def _open_tensorrt(folder: Path, graph: str, signature: dict[str, Any], threads: int | None) -> Run:
    from clip_har_jax.inference.tensorrt import open_engine

    return open_engine(folder / f"{graph}.engine", signature)


# format -> (its packages, the function that opens a graph, whether a new batch size needs a compilation). In a folder
# with several formats, the first whose packages are installed is used.
RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[Path, str, dict[str, Any], int | None], Run], bool]] = {
    "onnx": (("onnxruntime",), _open_onnx, False),
    "onnx_int8": (("onnxruntime",), _open_onnx, False),
    "onnx_fp16": (("onnxruntime",), _open_onnx, False),
    "tensorrt": (("tensorrt", "cuda"), _open_tensorrt, False),
    "stablehlo": (("jax", "safetensors"), _open_stablehlo, True),
    "saved_model": (("tensorflow",), _open_saved_model, True),
    "torchscript": (("torch",), _open_torchscript, False),
}


class Graphs:
    """The graphs of one format of an exported folder, each opened at its first run.

    Args:
      folder: the exported folder.
      format: one of `RUNTIMES`.
      threads: of ONNX Runtime and PyTorch, without spinning; None: all cores, for this process alone.

    Attributes:
      one_at_a_time: close an open graph before another one is opened, so that memory holds only one.

    Raises:
      UserError: the folder lacks the format, or its packages aren't installed.
    """

    def __init__(self, folder: Path, format: str, threads: int | None = None):
        if format not in RUNTIMES:
            raise UserError(f"{format!r} is no format; {nearest(format, list(RUNTIMES))}")
        if not (folder / format).is_dir():
            raise UserError(f"{folder}: holds no {format}; it has {', '.join(formats_in(folder)) or 'no format'}")
        packages, self._open, self.compiles = RUNTIMES[format]
        if missing := [name for name in packages if find_spec(name) is None]:
            raise UserError(f"{folder / format}: needs {', '.join(missing)}, which isn't installed here")
        self.folder, self.format, self._threads = folder / format, format, threads
        self.signatures = read_signature(folder)["graphs"]
        self.one_at_a_time = False
        self._opened: dict[str, Run] = {}

    def run(self, graph: str, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        """Return the outputs of a graph, in the order of its signature.

        Raises:
          UserError: the runtime can't open the file.
        """
        if graph not in self._opened:
            if self.one_at_a_time:
                self._opened.clear()
            try:
                self._opened[graph] = self._open(self.folder, graph, self.signatures[graph], self._threads)
            except Exception as error:  # each runtime has its own exceptions
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"{self.folder}: {graph} can't be opened ({reason})") from error
        return self._opened[graph](*inputs)


def read_signature(folder: Path) -> dict[str, Any]:
    """Read signature.json.

    Raises:
      UserError: it has another version's form.
    """
    signature = read_object(folder / SIGNATURE)
    graphs = signature.get("graphs")
    there = isinstance(graphs, dict) and all({"inputs", "outputs"} <= set(graphs.get(name, ())) for name in GRAPHS)
    if not there or not isinstance(signature.get("logit_scale"), float):
        raise UserError(
            f"{folder / SIGNATURE}: written by another version of clip_har_jax, or damaged; export the model again"
        )
    return signature


def formats_in(folder: Path) -> list[str]:
    """Return the formats in an exported folder, the preferred ones first."""
    return [name for name in RUNTIMES if (folder / name).is_dir()] if (folder / SIGNATURE).is_file() else []


class ExportedBackend:
    """One format of an exported folder.

    Args:
      folder: the exported folder.
      format: one of `RUNTIMES`; None: the first one in the folder whose runtime is installed.
      classes: the actions to recognise, with the text encoder; empty: the folder's own.
      batch_size: images in one forward pass.
      threads: as for `Graphs`.

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
    ):
        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size}; 1 or more is needed")
        self.path, self.batch_size = folder, batch_size
        self.digest = bundle.verify(folder)
        self.model_digest = read_object(folder / bundle.MANIFEST).get("source") if self.digest else None
        actions = choose_actions(folder, classes)
        version = bundle.read_actions(folder).preprocess_version
        if version not in (None, PREPROCESS_VERSION):
            raise UserError(
                f"{folder}: needs image preprocessing of version {version}, this program has {PREPROCESS_VERSION}; "
                "install the version of clip_har_jax that exported it, or export again"
            )
        self.graphs = Graphs(folder, format or _first_that_runs(folder), threads)
        self.actions, self.labels = actions, actions.labels
        signature = read_signature(folder)
        self.preprocess = Preprocess.from_folder(folder, signature["graphs"]["classifier"]["inputs"]["image"][1][1])
        self.logit_scale = signature["logit_scale"]
        self._context_length = signature["graphs"]["text_encoder"]["inputs"]["input_ids"][1][1]
        self._tokenizer = Tokenizer.from_folder(folder)
        self._classes: np.ndarray | None = None
        if classes:
            self._classes = self.embed_classes([actions.prompts[label] for label in actions.labels])
            self._scale = self.logit_scale / actions.temperature

    def in_one_thread(self) -> "ExportedBackend | None":
        """Return the same model with runs in the caller's thread only; None: its runtime has no such mode."""
        if not self.graphs.format.startswith("onnx") or len(_providers()) > 1:
            return None
        other = copy.copy(self)
        other.graphs = Graphs(self.path, self.graphs.format, threads=1)
        return other

    def embed_classes(self, prompts: Sequence[Sequence[str]]) -> Float32[np.ndarray, "c d"]:
        """Return class embeddings of the texts of each class, from the text encoder."""
        ids, _ = self._tokenizer([text for group in prompts for text in group], self._context_length)
        return mean_by_class(self.run_graph("text_encoder", ids)[0], [len(group) for group in prompts])

    def run_graph(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return a graph's outputs, computed `batch_size` rows at a time; padded if a new size needs a compilation."""
        parts, length = [], len(inputs[0])
        for start in range(0, length, self.batch_size):
            part = [rows[start : start + self.batch_size] for rows in inputs]
            count = len(part[0])
            size = self.batch_size if self.graphs.compiles and length > 1 else count
            outputs = self.graphs.run(graph, *(pad(rows, size) for rows in part))
            parts.append([output[:count] for output in outputs])
        return [np.concatenate(output) for output in zip(*parts, strict=True)]

    def logits(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits, divided by the temperature."""
        if self._classes is None:
            logits = self.run_graph("classifier", images)[1]
        else:
            logits = self._scale * self.embed(images) @ self._classes.T
        check_finite(logits, self.path)
        return logits

    def predict(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class probabilities."""
        logits = self.logits(images)
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def embed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
        """Return L2-normalised image embeddings."""
        return self.run_graph("image_encoder", images)[0]

    def explain(
        self, images: UInt8[np.ndarray, "b h w 3"], class_indices: Sequence[int]
    ) -> Float32[np.ndarray, "b g g"]:
        """Return a heat map of a class for each image; for new classes, from the patches' part in the embedding."""
        indices = check_indices(class_indices, len(images), len(self.labels))
        if self._classes is None:
            return self.run_graph("explainer", images, np.eye(len(self.labels), dtype=np.float32)[indices])[0]
        return self.explain_embeddings(images, self._classes[indices])

    def explain_embeddings(
        self, images: UInt8[np.ndarray, "b h w 3"], classes: Float32[np.ndarray, "b d"]
    ) -> Float32[np.ndarray, "b g g"]:
        """Return heat maps like `explain`, for the embedding of any class, one per image."""
        own = self.graphs.signatures["explainer"]["inputs"]["class_weights"][1][1]
        patches = self.run_graph("explainer", images, np.zeros((len(images), own), np.float32))[1]
        relevance = np.maximum(np.einsum("bnd,bd->bn", patches, classes), 0)
        heat = relevance / np.maximum(relevance.max(axis=1, keepdims=True), 1e-12)
        grid = round(heat.shape[1] ** 0.5)
        return heat.reshape(len(heat), grid, grid)


def _first_that_runs(folder: Path) -> str:
    found = formats_in(folder)
    for name in found:
        if all(find_spec(package) for package in RUNTIMES[name][0]):
            return name
    needed = "; ".join(f"{name} needs {', '.join(RUNTIMES[name][0])}" for name in found)
    raise UserError(f"{folder}: nothing in it runs here ({needed or 'no format'})")


def exported_folder(path: Path) -> tuple[Path, str | None] | None:
    """Return the exported folder of `path`, and the format if `path` is one in it; None: another kind of path."""
    if (path / SIGNATURE).is_file():  # first, since an exported folder may be called "onnx"
        return path, None
    if path.name in RUNTIMES and (path.parent / SIGNATURE).is_file():
        return path.parent, path.name
    return None


def open_backend(path: str | os.PathLike[str], classes: Sequence[str] = (), batch_size: int = 32) -> Backend:
    """Return the backend of `path`: for an exported folder or one of its formats, else JAX for a model folder or Hub
    name.

    Raises:
      UserError: no usable model there, or no classes.
    """
    if found := exported_folder(Path(path).expanduser()):
        return ExportedBackend(*found, classes, batch_size)
    return JaxBackend(path, classes, batch_size=batch_size)
