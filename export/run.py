"""The order of events of an export: refuse what can't work, write each format aside, prove it, seal what passed."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_har_jax import bundle
from clip_har_jax.data import synthetic
from clip_har_jax.errors import UserError
from clip_har_jax.files import write_json
from clip_har_jax.folders import replacing
from clip_har_jax.inference import golden
from clip_har_jax.inference.exported import SIGNATURE
from clip_har_jax.signing import check_private_key, sign
from export.formats import Format, choose_formats
from export.model import OpenedModel, open_model, read_images, write_contract
from export.parity import NUM_HARD, Arrays, check_parity, make_cases, run_cases
from export.to_onnx import NUM_CALIBRATION

EXIT_PARITY = 3
NUM_GOLDEN, GOLDEN_PX = 3, 96  # pictures, of another size and shape than models take: resizing and cropping count too


@dataclass(frozen=True)
class ExportOptions:
    """How an export is proven and written.

    Attributes:
      data: SPEC of the images that formats are proven on.
      num_examples: how many of them.
      classes: the actions to tell apart; empty: the folder's own.
      overwrite: put the new folder in the place of an old one, which stays whole until the new one is.
      static_int8: scale int8's activations by the first of the images instead of as they come.
      signing_key: a private key in PEM to sign the folder with.
      precision: what TensorRT's engines compute in, of `formats.TENSORRT_BOUNDS`.
    """

    data: str = "synthetic"
    num_examples: int = 256
    classes: Sequence[str] = ()
    overwrite: bool = False
    static_int8: bool = False
    signing_key: str | None = None
    precision: str = "fp16"


@dataclass(frozen=True)
class Proof:
    """What each format is compared with: the inputs, the model's outputs on them, and the true classes."""

    cases: Arrays
    expected: Arrays
    true: np.ndarray  # int32 [n]


def export_model(
    path: str, formats: Sequence[str], output: str | Path, options: ExportOptions = ExportOptions()
) -> dict[str, Any]:
    """Write an exported folder of the formats that pass; return what parity.json says of all.

    >>> parity = export_model("model", ["stablehlo"], "exported", ExportOptions(num_examples=4))
    >>> parity["stablehlo"]["passed"]
    True

    Args:
      path: a model folder.
      formats: of `formats.FORMATS`.
      output: the folder to write, which must be empty or not there unless `options.overwrite`.
      options: how it is proven and written.

    Raises:
      UserError: a mistake in the arguments or the model, another process that writes `output`, or a full disk.
    """
    chosen = choose_formats(formats, options.static_int8, options.precision)
    output = Path(output).resolve()
    if options.num_examples < 1:
        raise UserError(f"--num_examples={options.num_examples}: 1 or more is needed")
    check_output(output, options.overwrite)
    if options.signing_key is not None:
        check_private_key(Path(options.signing_key))
    try:
        with replacing(output) as folder:
            check_output(output, options.overwrite)  # again: another export may have ended meanwhile
            return _fill(folder, path, chosen, output, options)
    except _NothingPassed as nothing:
        return nothing.parity
    except Exception as error:
        if (reason := _of_the_disk(error)) is None:
            raise
        raise UserError(f"--output={output}: can't be written ({reason}); nothing was left there") from error


class _NothingPassed(Exception):  # noqa: N818
    """No format is left to put in the place of what may be there."""

    def __init__(self, parity: dict[str, Any]):
        super().__init__()
        self.parity = parity


def _fill(folder: Path, path: str, formats: dict[str, Format], output: Path, options: ExportOptions) -> dict[str, Any]:
    """Write, prove and seal; `output` is where the folder will lie."""
    model = open_model(path, options.classes)
    source = model.folder.resolve()
    if output == source or output in source.parents or source in output.parents:  # a sealed folder takes no more files
        raise UserError(f"--output={output}: the model lies there; name another folder")
    proof = make_proof(model, options.data, options.num_examples)
    write_contract(model, folder)
    pictures = [synthetic.draw("test", i, GOLDEN_PX)[: 3 * GOLDEN_PX // 4] for i in range(NUM_GOLDEN)]
    golden.write(folder, np.stack(pictures), model.backend)
    parity = {name: _write_and_prove(model, name, way, folder, proof) for name, way in formats.items()}
    if not any(entry["passed"] for entry in parity.values()):
        raise _NothingPassed(parity)
    write_json(folder / "parity.json", parity)
    bundle.seal(folder, model.digest)
    if options.signing_key is not None:
        sign(folder, Path(options.signing_key))
    return parity


def make_proof(model: OpenedModel, data: str, num_examples: int) -> Proof:
    """Return what the formats of a model are compared with, on images of a data set.

    Raises:
      UserError: as `model.read_images`.
    """
    images, true = read_images(model, data, num_examples)
    prompts = [text for label in model.actions.labels for text in model.actions.prompts[label]]
    cases = make_cases(images, model.backend.tokenize(prompts), len(model.actions.labels))
    return Proof(cases, reference(model, cases), true)


def reference(model: OpenedModel, cases: Arrays) -> Arrays:
    """Return the model's own outputs on the cases: by the backend that predicts, not by the exported graphs."""
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


def _write_and_prove(model: OpenedModel, name: str, way: Format, folder: Path, proof: Proof) -> dict[str, Any]:
    """Write a format into its own folder and return its entry in parity.json; remove it where it failed."""
    print(f"{name}: writing", file=sys.stderr, flush=True)
    start = time.perf_counter()
    (folder / name).mkdir()
    try:
        way.write(model, folder / name, proof.cases["image"][:NUM_CALIBRATION])
    except NotImplementedError as error:
        raise UserError(f"--formats={name}: can't express this model with its {model.head!r} head ({error})") from error
    size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
    print(f"{name}: {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s; proving", file=sys.stderr, flush=True)
    try:
        outputs = prove(folder, name, proof.cases)
        entry = check_parity(proof.expected, outputs, way.bounds, model.actions.labels, proof.true)
        if entry["passed"] and (fault := str(outputs["fault"])):
            entry |= {"passed": False, "failures": [fault]}
    except RuntimeError as error:
        entry = {"max_abs_error": None, "top1_agreement": None, "passed": False, "failures": [str(error)]}
    entry = {"num_examples": len(proof.cases["image"]) - NUM_HARD, "num_hard": NUM_HARD, **entry}
    if not entry["passed"]:
        shutil.rmtree(folder / name)
    return entry


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


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything; `overwrite` lets an earlier export be replaced, and nothing else.

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


def _of_the_disk(error: Exception) -> str | None:
    """Return what the disk refused, in words; safetensors and TensorFlow raise errors of their own for it."""
    if isinstance(error, OSError):
        return error.strerror
    refusals = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    return next((reason for reason in refusals if reason in str(error)), None)
