"""A model folder opened for export, the images for comparing its formats, and the files that formats share."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from clip_har_jax import bundle
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object, write_json
from clip_har_jax.inference.exported import ORIGIN, SIGNATURE
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.models.heads import HEADS, init_head, make_head
from clip_har_jax.models.params import make_model
from clip_har_jax.models.pretrained import read_config, read_params
from clip_har_jax.preprocess import PREPROCESS_VERSION, BadImage, decode, evaluation_transform
from clip_har_jax.text import Tokenizer
from export.graphs import Graph, make_graphs


@dataclass(frozen=True)
class OpenedModel:
    """A model folder, opened once for all formats.

    Attributes:
      head: the name of the graphs' head; cosine similarity to class embeddings is a linear head here.
      logit_scale: the factor of cosines before the temperature; new classes need it.
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
        head, config = make_head(self.head, self.head_params), read_config(self.folder)
        params = read_params(self.folder, config)
        # The layers hold nearly all weights. Unstacking a host array makes views instead of copies.
        own = {name: value if ".layers." in name else jax.numpy.asarray(value) for name, value in params.items()}
        return make_graphs(make_model(config, own), self.backend.preprocess, head, self.temperature)

    def release(self) -> None:
        """Free all weights; they are read again when they are needed."""
        self.__dict__.pop("graphs", None)
        self.backend.release()
        jax.clear_caches()  # compiled programs hold weights as constants
        gc.collect()


def open_model(path: str, classes: Sequence[str] = ()) -> OpenedModel:
    """Open and verify a model folder.

    Raises:
      UserError: an incomplete model, a changed file, no classes, or a model that treats the frames of a clip
        differently.
    """
    backend = JaxBackend(path, classes)
    actions = replace(backend.actions, preprocess_version=PREPROCESS_VERSION)
    logit_scale = backend.scale * actions.temperature
    if actions.head in HEADS and HEADS[actions.head][0].of_clips:
        raise UserError(
            f"{path}: its {actions.head!r} head weighs the frames of a clip, and no format expresses that: exported "
            "graphs take single images; export a model with a head of images"
        )
    kind = read_config(backend.path).temporal
    if kind != "mean":
        raise UserError(
            f"{path}: model.temporal is {kind!r}, and no format expresses that: exported graphs take single images; "
            "predict with the model folder, or export a model of images"
        )
    if backend.head_params:
        head, params = actions.head, backend.head_params
    else:
        head, params = "linear", init_head("linear", backend.class_embeddings, logit_scale, seed=0)
    return OpenedModel(backend.path, backend.digest, actions, backend, head, params, logit_scale)


def read_images(
    model: OpenedModel, data: str, count: int
) -> tuple[UInt8[np.ndarray, "n h w 3"], Int32[np.ndarray, " n"]]:
    """Return evenly spaced images of a data set, transformed for the model, and their classes.

    Unreadable images are left out. Images whose label isn't one of the model's classes come last and have no class.

    Raises:
      UserError: a SPEC without images, or without readable ones.
    """
    source = make_source(data, "test")
    if source.clips:
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
    # An image without a class also shows differences between runtimes; only calibration needs the true class.
    order = np.argsort(np.asarray(true) < 0, kind="stable")
    return np.stack(images)[order], np.asarray([true[i] for i in order if true[i] >= 0], np.int32)


def write_contract(model: OpenedModel, folder: Path) -> None:
    """Write the files that all formats share: classes, image settings, tokenizer, signatures of the graphs."""
    bundle.write_actions(folder, model.actions)
    model.backend.preprocess.save(folder)
    Tokenizer.from_folder(model.folder).save(folder)
    graphs = {
        graph.name: {"inputs": graph.inputs, "outputs": graph.outputs, "params": sorted(graph.params)}
        for graph in model.graphs
    }
    write_json(folder / SIGNATURE, {"logit_scale": model.logit_scale, "graphs": json.loads(json.dumps(graphs))})
    write_json(folder / ORIGIN, describe_origin(model.folder))


def describe_origin(folder: Path) -> dict[str, Any]:
    """Return a model's training data and accuracy, for its users elsewhere; unknown facts are None.

    Local folders are removed from the name of a data set.
    """
    record, calibration = (
        read_object(path) if path.is_file() else {} for path in (folder / "run.json", folder / "calibration.json")
    )
    train = record.get("data", {}).get("train", {})
    kind, _, place = str(train.get("spec", "")).partition("?")[0].partition(":")
    named = f"{kind}:{Path(place).name}" if place else kind
    return {
        "trained_on": f"{train['num_examples']:,} examples of {named}" if train.get("num_examples") else None,
        "judged_on": "the validation data of its run",
        "top1": calibration.get("abstention", {}).get("accuracy"),
        "num_examples": calibration.get("num_examples"),
    }
