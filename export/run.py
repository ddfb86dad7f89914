"""The steps of an export: check the arguments, write each format aside, compare it, seal the formats that passed."""

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
from jaxtyping import Int32, UInt8

from clip_har_jax import bundle
from clip_har_jax.data import synthetic
from clip_har_jax.errors import UserError
from clip_har_jax.files import lacks_temporary_folder, write_json
from clip_har_jax.folders import replacing, unchanged
from clip_har_jax.inference import golden
from clip_har_jax.inference.runtimes import SIGNATURE
from clip_har_jax.signing import check_private_key, sign
from export.formats import Format, check_torchscript, choose_formats
from export.graphs import NotExpressible
from export.model import OpenedModel, open_model, read_images, write_contract
from export.parity import NUM_HARD, Arrays, check_parity, make_cases, run_cases, run_clips

EXIT_PARITY = 3
NUM_GOLDEN, GOLDEN_PX = 3, 96  # golden pictures; not of a model's size, so that resizing is tested too


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
      data: SPEC of the images or clips for the comparison; None: the embedded images, for a model of clips the embedded
        clips.
      num_examples: number of images, or of frames of clips.
      classes: the actions to recognise; empty: the folder's own.
      overwrite: replace an old export, which stays until the new one is complete.
      static_int8: fix the scales of int8 activations with some of the images, instead of computing them for each input.
      signing_key: a private key in PEM that signs the folder.
      precision: number format of TensorRT's engines, a key of `formats.TENSORRT_BOUNDS`.
      clips: also write the graph of whole clips for a model of images.
    """

    data: str | None = None
    num_examples: int = 256
    classes: Sequence[str] = ()
    overwrite: bool = False
    static_int8: bool = False
    signing_key: str | None = None
    precision: str = "fp16"
    clips: bool = False


@dataclass(frozen=True)
class Proof:
    """The inputs of the comparison, the model's outputs for them, and the true classes."""

    cases: Arrays
    expected: Arrays
    true: np.ndarray  # int32 [n]


def export_model(
    path: str, formats: Sequence[str], output: str | Path, options: ExportOptions = ExportOptions()
) -> dict[str, Any]:
    """Write an exported folder with the formats that pass; return the contents of parity.json.

    >>> parity = export_model("model", ["stablehlo"], "exported", ExportOptions(num_examples=4))
    >>> parity["stablehlo"]["passed"]
    True

    Args:
      path: a model folder.
      formats: keys of `formats.FORMATS`.
      output: the folder to write; it must be empty or missing, unless `options.overwrite`.
      options: see `ExportOptions`.

    Raises:
      UserError: a mistake in the arguments or the model, another process writes to `output`, or the disk is full.
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
            check_output(output, options.overwrite)  # again: another export may have finished in the meantime
            return _fill(folder, path, chosen, output, options)
    except _NothingPassed as nothing:
        return nothing.parity
    except Exception as error:
        if (reason := _of_the_disk(error)) is None or lacks_temporary_folder():
            raise
        raise UserError(f"--output={output}: can't be written ({reason}); nothing was left there") from error


class _NothingPassed(Exception):  # noqa: N818
    """No format passed, so an existing folder isn't replaced."""

    def __init__(self, parity: dict[str, Any]):
        super().__init__()
        self.parity = parity


def _fill(folder: Path, path: str, formats: dict[str, Format], output: Path, options: ExportOptions) -> dict[str, Any]:
    """Write, compare and seal the formats; `output` is the final place of the folder."""
    model = open_model(path, options.classes, options.clips)
    check_torchscript(model.folder, model.is_temporal, formats)
    source = model.folder.resolve()
    if output == source or output in source.parents or source in output.parents:  # a sealed folder takes no files
        raise UserError(f"--output={output}: the model lies there; name another folder")
    data = options.data or ("motion" if model.of_clips else "synthetic")
    with unchanged(source):
        images, true = read_images(model, data, options.num_examples)
        pictures = [synthetic.draw("test", i, GOLDEN_PX)[: 3 * GOLDEN_PX // 4] for i in range(NUM_GOLDEN)]
        golden.write(folder, np.stack(pictures), model.backend, model.clips.num_frames)
        proof = make_proof(model, images, true)
        write_contract(model, folder)
        parity = {name: _write_and_prove(model, name, way, folder, proof) for name, way in formats.items()}
    if not any(entry["passed"] for entry in parity.values()):
        raise _NothingPassed(parity)
    write_json(folder / "parity.json", parity)
    bundle.seal(folder, model.digest)
    if options.signing_key is not None:
        sign(folder, Path(options.signing_key))
    return parity


def make_proof(model: OpenedModel, images: UInt8[np.ndarray, "n h w 3"], true: Int32[np.ndarray, " n"]) -> Proof:
    """Return the inputs and reference outputs of a model's formats, on images with their true classes."""
    prompts = [text for label in model.actions.labels for text in model.actions.prompts[label]]
    ids = model.backend.tokenize(prompts)
    cases = make_cases(images, ids, len(model.actions.labels), model.clips.num_frames)
    return Proof(cases, reference(model, cases), true)


def reference(model: OpenedModel, cases: Arrays) -> Arrays:
    """Return the model's own outputs for the cases, from the backend of predictions, not from exported graphs."""
    backend, graphs = model.backend, {graph.name: graph for graph in model.graphs}
    explain = jax.jit(graphs["explainer"].function)

    @cache  # classifier and image encoder get the same images
    def outputs(pixels: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        return backend.outputs(np.frombuffer(pixels, np.uint8).reshape(shape))

    def run(name: str, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        if name in ("classifier", "image_encoder", "clip_classifier"):
            logits, probs, embeddings = outputs(inputs[0].tobytes(), inputs[0].shape)
            answers = {"classifier": (probs, logits), "image_encoder": (embeddings,)}
            return answers.get(name, (probs, logits, embeddings))
        if name == "text_encoder":
            return (backend.embed_texts(*inputs),)
        backend.release()  # the explainer is last, and its graph has its own weights
        return [np.asarray(output) for output in explain(graphs[name].params, *inputs)]

    of_clips: Arrays = {}
    if "frames" in cases:  # the model predicts a clip in one way; a format may have two
        clips = run_clips(run, cases["frames"])
        of_clips |= clips if "clip_classifier" in graphs else {}
        of_clips |= {f"streamed_{name}": rows for name, rows in clips.items()} if "clip_head" in graphs else {}
    return run_cases(run, cases, ()) | of_clips


def _write_and_prove(model: OpenedModel, name: str, way: Format, folder: Path, proof: Proof) -> dict[str, Any]:
    """Write a format into its own folder and return its entry in parity.json; remove it if it failed."""
    print(f"{name}: writing", file=sys.stderr, flush=True)
    start = time.perf_counter()
    (folder / name).mkdir()
    try:
        way.write(model, folder / name, proof.cases["image"])
    except NotExpressible as error:
        raise UserError(f"--formats={name}: can't express this model with its {model.head!r} head ({error})") from error
    size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
    print(f"{name}: {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s; proving", file=sys.stderr, flush=True)
    model.release()  # otherwise two processes hold the weights
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
    """Return the outputs of a format for the cases, from a new process that has only the exported files.

    Raises:
      RuntimeError: the process failed; contains its last message.
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
    """Refuse a non-empty folder; with `overwrite`, accept an earlier export and nothing else.

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
    """Return the disk's error in words; safetensors and TensorFlow raise their own exceptions for it."""
    if isinstance(error, OSError):
        return error.strerror
    refusals = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    return next((reason for reason in refusals if reason in str(error)), None)
