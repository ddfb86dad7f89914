"""A model folder opened for export, the images for comparing its formats, and the files that formats share."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from clip_har_jax import bundle
from clip_har_jax.data.examples import ClipData, ClipViews, Source
from clip_har_jax.data.multi_label import MULTI_LABEL_KINDS, make_multi_label_source
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object, write_json
from clip_har_jax.image_files import MAX_MEGAPIXELS, BadImage, decode
from clip_har_jax.inference.backends import clip_sampling
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.inference.runtimes import ORIGIN, SIGNATURE
from clip_har_jax.models.heads import HEADS, init_head, make_head
from clip_har_jax.models.params import make_model
from clip_har_jax.models.pretrained import read_config, read_folder_tokenizer, read_params
from clip_har_jax.preprocess import PREPROCESS_VERSION, evaluation_transform
from clip_har_jax.specs import parse_spec
from clip_har_jax.video.sampling import FrameSampling
from export.graphs import ClipShape, Graph, make_graphs


@dataclass(frozen=True)
class OpenedModel:
    """A model folder, opened once for all formats.

    Attributes:
      head: the name of the graphs' head; cosine similarity to class embeddings is a linear head here.
      logit_scale: the factor of cosines before the temperature; new classes need it.
      sampling: how the frames of a clip are sampled.
      is_temporal: the order of a clip's frames counts, in the tower or the head.
      of_clips: `is_temporal`, or trained on clips.
      clips: the graphs of clips to write.
    """

    folder: Path
    digest: str | None
    actions: bundle.Actions
    backend: JaxBackend
    head: str
    head_params: dict[str, Any]
    logit_scale: float
    sampling: FrameSampling
    is_temporal: bool
    of_clips: bool
    clips: ClipShape

    @property
    def temperature(self) -> float:
        return self.actions.temperature

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        head, config = make_head(self.head, self.head_params), read_config(self.folder)
        params = read_params(self.folder, config)
        # The layers hold nearly all weights. Unstacking a host array makes views instead of copies.
        own = {name: value if ".layers." in name else jax.numpy.asarray(value) for name, value in params.items()}
        model, preprocess = make_model(config, own), self.backend.preprocess
        return make_graphs(model, preprocess, head, self.temperature, self.clips, self.actions.multi_label)

    def release(self) -> None:
        """Free all weights; they are read again when they are needed."""
        self.__dict__.pop("graphs", None)
        self.backend.release()
        jax.clear_caches()  # compiled programs hold weights as constants
        gc.collect()


def open_model(path: str, classes: Sequence[str] = (), clips: bool = False) -> OpenedModel:
    """Open and verify a model folder.

    Args:
      path: the folder.
      classes: the actions to recognise; empty: the folder's own.
      clips: also write the graph of whole clips for a model of images.

    Raises:
      UserError: an incomplete model, a changed file, or no classes.
    """
    backend = JaxBackend(path, classes, multi_label=True)
    config = read_config(backend.path)
    if config.no_export:
        raise UserError(f"{path}: {config.no_export}")
    actions = replace(backend.actions, preprocess_version=PREPROCESS_VERSION)
    logit_scale = backend.scale * actions.temperature
    if backend.head_params:
        head, params = actions.head, backend.head_params
    else:
        head, params = "linear", init_head("linear", backend.class_embeddings, logit_scale, seed=0)
    sampling = clip_sampling(actions)
    is_temporal = HEADS[head][0].of_clips or config.temporal != "mean"
    of_clips = is_temporal or bool(actions.video)
    shape = ClipShape(sampling.num_frames, of_clips or clips)
    return OpenedModel(
        backend.path,
        backend.digest,
        actions,
        backend,
        head,
        params,
        logit_scale,
        sampling,
        is_temporal,
        of_clips,
        shape,
    )


def read_images(
    model: OpenedModel, data: str, count: int
) -> tuple[UInt8[np.ndarray, "n h w 3"], Int32[np.ndarray, " n"]]:
    """Return evenly spaced images of a data set, or all frames of clips, transformed for the model, and their classes.

    Unreadable examples are left out. Images whose label isn't one of the model's classes come last and have no class,
    as do all images of a multi-label model.

    Raises:
      UserError: a SPEC without images, or without readable ones.
    """
    several = model.actions.multi_label and parse_spec(data).kind in MULTI_LABEL_KINDS
    source = (make_multi_label_source if several else make_source)(data, "test")
    classes = {label: i for i, label in enumerate(model.actions.labels)}
    images: list[np.ndarray] = []
    true: list[int] = []
    if source.clips:
        count = -(-count // model.sampling.num_frames)
    for i in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        try:
            frames = _read_frames(model, source, int(i))
        except (BadImage, OSError):
            continue
        images += frames
        own = -1 if model.actions.multi_label else classes.get(source.names_of(int(i))[0], -1)
        true += [own] * len(frames)
    if not images:
        raise UserError(f"--data={data}: none of its {'clips' if source.clips else 'images'} can be read")
    # An image without a class also shows differences between runtimes; only calibration needs the true class.
    order = np.argsort(np.asarray(true) < 0, kind="stable")
    return np.stack(images)[order], np.asarray([true[i] for i in order if true[i] >= 0], np.int32)


def _read_frames(model: OpenedModel, source: Source, i: int) -> list[np.ndarray]:
    """Return an example as input of the model: one image, or the frames of a clip."""
    data, preprocess = source[i].data, model.backend.preprocess
    if isinstance(data, ClipData):
        each = partial(evaluation_transform, preprocess=preprocess)
        return list(data.read(ClipViews(model.sampling, [0], None, each, MAX_MEGAPIXELS))[0].frames)
    return [evaluation_transform(decode(data) if isinstance(data, bytes) else data, preprocess)]


def write_contract(model: OpenedModel, folder: Path) -> None:
    """Write the files that all formats share: classes, image settings, tokenizer, signatures of the graphs."""
    bundle.write_actions(folder, model.actions)
    model.backend.preprocess.save(folder)
    read_folder_tokenizer(model.folder).save(folder)
    graphs = {
        graph.name: {"inputs": graph.inputs, "outputs": graph.outputs, "params": sorted(graph.params)}
        for graph in model.graphs
    }
    scaling = {"logit_scale": model.logit_scale, "logit_bias": model.backend.logit_bias}
    write_json(folder / SIGNATURE, scaling | {"graphs": json.loads(json.dumps(graphs))})
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
