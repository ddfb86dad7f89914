"""The runtimes of exported graphs, one for each format; JAX is imported only for StableHLO.

An exported folder holds one folder per format and, for all of them, `signature.json` (the inputs and outputs of its
graphs), `actions.json`, the tokenizer and the image settings.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import read_object

SIGNATURE = "signature.json"
ORIGIN = "origin.json"  # the model's training data and scores
GRAPHS = ("image_encoder", "text_encoder", "classifier", "explainer")
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider")

# Runs a graph on its inputs and returns its outputs, both in the order of the signature.
Run = Callable[..., Sequence[np.ndarray]]


def providers() -> list[str]:
    """Return the installed execution providers of ONNX Runtime, preferred ones first."""
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
    session = onnxruntime.InferenceSession(path, options, providers=providers(), **separate)
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
        """Return the outputs of a graph, in the order and the shapes of its signature.

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


def first_that_runs(folder: Path) -> str:
    """Return the first format of a folder whose packages are installed.

    Raises:
      UserError: there is none.
    """
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
