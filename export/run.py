"""The order of events of an export: refuse what can't work, write each format aside, prove it, seal what passed."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from clip_har_jax import bundle
from clip_har_jax.data import synthetic
from clip_har_jax.data.sources import are_clips, make_source
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import write_json
from clip_har_jax.folders import replace_folder
from clip_har_jax.inference import golden
from clip_har_jax.inference.backends import JaxBackend
from clip_har_jax.inference.exported import RUNTIMES, SIGNATURE
from clip_har_jax.models.factory import load
from clip_har_jax.models.heads import HEADS, init_head, make_head
from clip_har_jax.preprocess import PREPROCESS_VERSION, BadImage, decode, evaluation_transform
from clip_har_jax.signing import check_private_key, sign
from clip_har_jax.text import Tokenizer
from export.graphs import Graph, make_graphs
from export.parity import BFLOAT16, FLOAT16, FLOAT32, INT8, NUM_HARD, Arrays, Bounds, compare, make_cases, run_cases
from export.to_onnx import NUM_CALIBRATION, write_fp16, write_int8, write_onnx
from export.to_tensorrt import missing_for_tensorrt, write_tensorrt
from export.to_torch import write_torchscript
from export.to_xla import write_saved_model, write_stablehlo

EXIT_PARITY = 3
NUM_GOLDEN, GOLDEN_PX = 3, 96  # pictures, of another size and shape than models take: resizing and cropping count too
TENSORRT_BOUNDS = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16, "int8": INT8}


@dataclass(frozen=True)
class Model:
    """A model folder, opened once for all formats.

    Attributes:
      head: of the graphs; cosine similarity is a linear head here.
      logit_scale: what cosines are multiplied by, before the temperature; for new classes.
    """

    folder: Path
    digest: str | None
    actions: bundle.Actions
    backend: JaxBackend
    head: str
    head_params: dict[str, Any]
    logit_scale: float

    @property
    def temperature(self) -> float:
        return self.actions.temperature

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        head = make_head(self.head, self.head_params)
        return make_graphs(load(str(self.folder)).model, self.backend.preprocess, head, self.temperature)


def open_model(path: str, classes: Sequence[str] = ()) -> Model:
    """Open and verifies a model folder.

    Raises:
      UserError: not a whole model, a changed file, no classes, or a head of clips.
    """
    backend = JaxBackend(path, classes)
    actions = replace(backend.actions, preprocess_version=PREPROCESS_VERSION)
    logit_scale = backend.scale * actions.temperature
    if actions.head in HEADS and HEADS[actions.head][0].of_clips:
        raise UserError(
            f"{path}: its {actions.head!r} head weighs the frames of a clip, and no format expresses that: exported "
            "graphs take single images; export a model with a head of images"
        )
    if backend.head_params:
        head, params = actions.head, backend.head_params
    else:
        head, params = "linear", init_head("linear", backend.class_embeddings, logit_scale, seed=0)
    return Model(backend.path, backend.digest, actions, backend, head, params, logit_scale)


Write = Callable[[Model, Path, UInt8[np.ndarray, "n h w 3"]], None]


def _from_graphs(write: Callable[..., None]) -> Write:
    return lambda model, folder, images: write(model.graphs, folder, images)


def _torchscript(model: Model, folder: Path, images: np.ndarray) -> None:
    head = model.head, model.head_params, model.temperature
    write_torchscript(model.folder, model.backend.preprocess, *head, folder)


# format -> (how it is written, what it may differ by, the packages that write it)
FORMATS: dict[str, tuple[Write, Bounds, tuple[str, ...]]] = {
    "onnx": (_from_graphs(write_onnx), FLOAT32, ("jax2onnx", "onnx", "onnxscript")),
    "onnx_fp16": (_from_graphs(write_fp16), FLOAT16, ("jax2onnx", "onnx", "onnxscript")),
    "onnx_int8": (_from_graphs(write_int8), INT8, ("jax2onnx", "onnx", "onnxscript")),
    "saved_model": (_from_graphs(write_saved_model), FLOAT32, ("tensorflow",)),
    "stablehlo": (_from_graphs(write_stablehlo), FLOAT32, ()),
    "torchscript": (_torchscript, FLOAT32, ("torch", "transformers")),
    "tensorrt": (_from_graphs(write_tensorrt), FLOAT16, ("jax2onnx", "onnx", "onnxscript")),
}


def check_formats(formats: Sequence[str]) -> None:
    """Refuses formats that can't be written and proven here, before anything is computed.

    Raises:
      UserError: an unknown one, one named twice, or one whose packages or machine are missing.
    """
    if not formats:
        raise UserError(f"--formats: name one or more of {', '.join(FORMATS)}")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats: {name!r} is unknown; {nearest(name, list(FORMATS))}")
        if formats.count(name) > 1:
            raise UserError(f"--formats: {name!r} is named twice")
        if name == "tensorrt" and (lacking := missing_for_tensorrt()):
            raise UserError(f"--formats=tensorrt: {lacking}")
        needed = dict.fromkeys(FORMATS[name][2] + RUNTIMES[name][0])
        if missing := [package for package in needed if find_spec(package) is None]:
            extra = "torch" if name == "torchscript" else "export"
            raise UserError(
                f"--formats={name}: needs {', '.join(missing)}, which isn't installed; pip install -e '.[{extra}]'"
            )


def prove(folder: Path, name: str, cases: Arrays) -> Arrays:
    """Return the outputs of a format on the cases, computed by a fresh process from the files alone.

    Raises:
      RuntimeError: that process failed; holds its last words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "inputs.npz", Path(scratch) / "outputs.npz"
        np.savez(inputs, **cases)  # type: ignore[arg-type]  # its stub takes the arrays for flags
        command = [sys.executable, "-m", "export.check", str(folder), name, str(inputs), str(outputs)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        with np.load(outputs) as given:
            return dict(given)


def reference(model: Model, cases: Arrays) -> Arrays:
    """What the model itself gives on the cases: by the backend that predicts, not by the graphs that are exported."""
    backend, graphs = model.backend, {graph.name: graph for graph in model.graphs}
    explain = jax.jit(graphs["explainer"].function)

    @cache  # classifier and image encoder are asked about the same images
    def outputs(pixels: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        return backend.outputs(np.frombuffer(pixels, np.uint8).reshape(shape))

    def run(name: str, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        if name in ("classifier", "image_encoder"):
            logits, probs, embeddings = outputs(inputs[0].tobytes(), inputs[0].shape)
            return (probs, logits) if name == "classifier" else (embeddings,)
        if name == "text_encoder":
            return (backend.embed_texts(*inputs),)
        return [np.asarray(output) for output in explain(graphs[name].params, *inputs)]

    return run_cases(run, cases)


def read_images(model: Model, data: str, count: int) -> tuple[UInt8[np.ndarray, "n h w 3"], Int32[np.ndarray, " n"]]:
    """Evenly spaced images of a data set as the model takes them, and their classes; unreadable ones are left out.

    Raises:
      UserError: a spec that names no images, a label that is no class, or none that can be read.
    """
    source = make_source(data, "test")
    if are_clips(source):
        raise UserError(f"--data={data}: an exported model takes single images; name a set of images")
    classes = {label: i for i, label in enumerate(model.actions.labels)}
    images, true = [], []
    for i in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        try:
            example = source[int(i)]
            pixels = decode(example.data) if isinstance(example.data, bytes) else example.data
            assert isinstance(pixels, np.ndarray), "clips were refused"
            images.append(evaluation_transform(pixels, model.backend.preprocess))
        except (BadImage, OSError):
            continue
        true.append(classes.get(source.labels[example.label], -1))
    if not images:
        raise UserError(f"--data={data}: none of its images can be read")
    # Without a class of the model an image still compares the two; only calibration needs to know the truth.
    order = np.argsort(np.asarray(true) < 0, kind="stable")
    return np.stack(images)[order], np.asarray([true[i] for i in order if true[i] >= 0], np.int32)


def export_model(
    path: str,
    formats: Sequence[str],
    output: str | Path,
    data: str = "synthetic",
    num_examples: int = 256,
    classes: Sequence[str] = (),
    overwrite: bool = False,
    static_int8: bool = False,
    signing_key: str | None = None,
    precision: str = "fp16",
) -> dict[str, Any]:
    """Write an exported folder of the formats that pass; gives what parity.json says of all.

    Args:
      path: a model folder.
      formats: of `FORMATS`.
      output: the folder to write, which must be empty or not there unless `overwrite`.
      data: SPEC of the images that formats are proven on.
      num_examples: how many of them.
      classes: the actions to tell apart; empty: the folder's own.
      overwrite: put the new folder in the place of an old one, which stays whole until the new one is.
      static_int8: scale int8's activations by the first of the images instead of as they come.
      signing_key: a private key in PEM to sign the folder with.
      precision: what TensorRT's engines compute in, of `TENSORRT_BOUNDS`.

    Raises:
      UserError: a mistake in the arguments or the model, or a disk that is full.
    """
    check_formats(formats)
    output = Path(output).resolve()
    if num_examples < 1:
        raise UserError(f"--num_examples={num_examples}: 1 or more is needed")
    check_output(output, overwrite)
    if signing_key is not None:
        check_private_key(Path(signing_key))
    model = open_model(path, classes)
    source = model.folder.resolve()
    if output == source or output in source.parents or source in output.parents:  # a sealed folder takes no more files
        raise UserError(f"--output={output}: the model lies there; name another folder")
    images, true = read_images(model, data, num_examples)
    prompts = [text for label in model.actions.labels for text in model.actions.prompts[label]]
    ids = model.backend.tokenize(prompts)
    cases = make_cases(images, ids, len(model.actions.labels))
    expected = reference(model, cases)
    parity: dict[str, Any] = {}
    ways = {name: FORMATS[name][:2] for name in formats}
    if static_int8 and "onnx_int8" in ways:
        ways["onnx_int8"] = _from_graphs(partial(write_int8, static=True)), INT8
    if "tensorrt" in ways:
        ways["tensorrt"] = _from_graphs(partial(write_tensorrt, precision=precision)), TENSORRT_BOUNDS[precision]

    def fill(folder: Path) -> None:
        write_contract(model, folder)
        pictures = [synthetic.draw("test", i, GOLDEN_PX)[: 3 * GOLDEN_PX // 4] for i in range(NUM_GOLDEN)]
        golden.write(folder, np.stack(pictures), model.backend)
        for name, way in ways.items():
            parity[name] = _write_and_prove(model, name, way, folder, cases, expected, true)
        if any(entry["passed"] for entry in parity.values()):
            write_json(folder / "parity.json", parity)
            bundle.seal(folder, model.digest)
            if signing_key is not None:
                sign(folder, Path(signing_key))
        else:
            raise _NothingPassed

    try:
        replace_folder(output, fill)
    except _NothingPassed:
        pass
    except Exception as error:
        if (reason := _of_the_disk(error)) is None:
            raise
        raise UserError(f"--output={output}: can't be written ({reason}); nothing was left there") from error
    return parity


def _of_the_disk(error: Exception) -> str | None:
    """What the disk refused, in words; safetensors and TensorFlow tell it in errors of their own."""
    if isinstance(error, OSError):
        return error.strerror
    refusals = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    return next((reason for reason in refusals if reason in str(error)), None)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything; `overwrite` lets an earlier export be replaced, and nothing else.

    Raises:
      UserError: a file, or a folder that isn't empty.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / SIGNATURE).is_file():
            raise UserError(f"--output={output}: not empty, and no export that could be replaced; name another folder")
        if not overwrite:
            raise UserError(f"--output={output}: not empty; name another folder, or replace it with --overwrite")


class _NothingPassed(Exception):  # noqa: N818
    """No format is left to put in the place of what may be there."""


def _write_and_prove(
    model: Model, name: str, way: tuple[Write, Bounds], folder: Path, cases: Arrays, expected: Arrays, true: np.ndarray
) -> dict[str, Any]:
    write, bounds = way
    print(f"{name}: writing", file=sys.stderr, flush=True)
    start = time.perf_counter()
    (folder / name).mkdir()
    try:
        write(model, folder / name, cases["image"][:NUM_CALIBRATION])
    except NotImplementedError as error:
        raise UserError(f"--formats={name}: can't express this model with its {model.head!r} head ({error})") from error
    size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
    print(f"{name}: {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s; proving", file=sys.stderr, flush=True)
    try:
        outputs = prove(folder, name, cases)
        entry = compare(expected, outputs, bounds, model.actions.labels, true)
        if entry["passed"] and (fault := str(outputs["fault"])):
            entry |= {"passed": False, "failures": [fault]}
    except RuntimeError as error:
        entry = {"max_abs_error": None, "top1_agreement": None, "passed": False, "failures": [str(error)]}
    entry = {"num_examples": len(cases["image"]) - NUM_HARD, "num_hard": NUM_HARD, **entry}
    if not entry["passed"]:
        shutil.rmtree(folder / name)
    return entry


def write_contract(model: Model, folder: Path) -> None:
    """What all formats share: classes, image settings, tokenizer, signatures."""
    bundle.write_actions(folder, model.actions)
    model.backend.preprocess.save(folder)
    Tokenizer.from_folder(model.folder).save(folder)
    graphs = {
        graph.name: {"inputs": graph.inputs, "outputs": graph.outputs, "params": sorted(graph.params)}
        for graph in model.graphs
    }
    write_json(folder / SIGNATURE, {"logit_scale": model.logit_scale, "graphs": json.loads(json.dumps(graphs))})
