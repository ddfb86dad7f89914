"""ServedModel, one version of a model: its runtime, its classes, and a lane of the batcher for each graph."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from clip_har_jax.bundle import Actions, Sigmoid
from clip_har_jax.errors import UserError
from clip_har_jax.inference.backends import ClassScores, mean_by_class, score_views
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.runtimes import ORIGIN, exported_folder
from serving.batcher import Batcher, Costs, Lane
from serving.classes import Prompts, TextClasses, check_labels, checked_prompts
from serving.clip_lanes import ClipLanes
from serving.problems import Problem
from serving.schemas import ModelRef, ModelVersion, Origin

CACHED_TEXTS = 8192
TEXTS_AT_ONCE = 8  # of a request, before other requests have their turn


def open_exported(path: Path, threads: int) -> ExportedBackend:
    """Open an exported folder, or one format in it, with a number of compute threads.

    Raises:
      UserError: another kind of folder, a changed file, or no format that runs here.
    """
    if found := exported_folder(path.expanduser()):
        return ExportedBackend(*found, threads=threads, multi_label=True)
    raise UserError(f"{path}: not an exported folder; write one by `python -m export --model=... --output=...`")


def read_origin(folder: Path) -> Origin | None:
    """Return the facts on the model's training in an export; None if there are none or they can't be read."""
    try:
        return Origin.model_validate_json((folder / ORIGIN).read_bytes())
    except (OSError, ValidationError):
        return None


def finite(run: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Return `run` with a check of its output.

    Raises:
      UserError: raised by the returned function if its output isn't finite.
    """

    def checked(batch: Any) -> np.ndarray:
        output = run(batch)
        if not np.isfinite(output).all():
            raise UserError("not finite")
        return output

    return checked


@dataclass
class LoadedExport:
    """An export that has passed all checks.

    Attributes:
      backend: runs it.
      source: the path of the folder.
      costs: of batches of images.
      text_costs: of batches of texts.
      single_threaded: the same model in one thread, for parallel batches; None: not available.
      origin: its training data and accuracy.
      clips: the lanes of clips; None: an export of an earlier version, which takes only images.
      texts: text -> embedding, shared by all versions that differ only in their classes.
    """

    backend: ExportedBackend
    source: Path
    costs: Costs
    text_costs: Costs
    single_threaded: ExportedBackend | None = None
    origin: Origin | None = None
    clips: ClipLanes | None = None
    texts: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)


class ServedModel:
    """One version: an export, its lanes in the batcher, and changed classes if there are any.

    Args:
      loaded: the export.
      name: in addresses.
      version: distinguishes it from others of the same name.
      classes: None: the export's own.
    """

    def __init__(self, loaded: LoadedExport, name: str, version: str, classes: TextClasses | None = None):
        self._loaded, self.backend, single_threaded = loaded, loaded.backend, loaded.single_threaded
        self.source = loaded.source
        self.name, self.version, self.classes = name, version, classes
        backend, costs = loaded.backend, loaded.costs
        self.actions: Actions = backend.actions
        self.labels = classes.labels if classes else backend.labels
        self.ref = ModelRef(name=name, version=version, digest=backend.digest)
        self.costs = costs
        self.classify = Lane("classifier", self._stacked(backend.logits), costs)
        self.embed = Lane("image_encoder", self._stacked(finite(backend.embed)), costs)
        if single_threaded is not None:
            self.classify.run_in_one_thread = self._stacked(single_threaded.logits)
            self.embed.run_in_one_thread = self._stacked(finite(single_threaded.embed))
        self.explain = Lane("explainer", self._explain, costs)
        self.explain_text = Lane("explainer", self._explain_text, costs)
        self.text = Lane("text_encoder", finite(self._embed_texts), loaded.text_costs)
        self.clips = loaded.clips

    @staticmethod
    def _stacked(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[Any]], np.ndarray]:
        return lambda items: run(np.stack(items))

    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        return self.backend.embed_classes([[text] for text in texts])

    def _explain(self, items: list[tuple[np.ndarray, int]]) -> np.ndarray:
        """Return heat maps, [n, g, g], for pairs of an image and the index of one of the model's classes."""
        images, indices = zip(*items, strict=True)
        return finite(lambda batch: self.backend.explain(batch, indices))(np.stack(images))

    def _explain_text(self, items: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return heat maps, [n, g, g], for pairs of an image and a class embedding."""
        images, classes = (np.stack(part) for part in zip(*items, strict=True))
        return finite(lambda batch: self.backend.explain_embeddings(batch, classes))(images)

    @property
    def accepts_classes(self) -> bool:
        """Return whether the head compares with text embeddings."""
        return self.actions.head == "cosine"

    @property
    def abstain_below(self) -> float | None:
        """The score below which an answer abstains."""
        return self.actions.thresholds.get("abstain")

    def describe(self) -> ModelVersion:
        """Return the version for /v1/models."""
        return ModelVersion(
            version=self.version,
            digest=self.backend.digest,
            labels=list(self.labels),
            accepts_classes=self.accepts_classes,
            abstain_below=self.abstain_below,
            image_size_px=self.backend.preprocess.image_size_px,
            format=self.backend.graphs.format,
            origin=self._loaded.origin,
        )

    async def open_vocabulary(self, prompts: Mapping[str, Prompts], batcher: Batcher, deadline: float) -> TextClasses:
        """Return classes in free text; their embeddings are cached.

        Temperature and sigmoid were fitted to the model's own classes, so they aren't used here.
        """
        embeddings = await self._embed_classes(list(prompts.values()), batcher, deadline)
        backend = self.backend
        own = None if backend.logit_bias is None else Sigmoid(1.0, backend.logit_bias)
        return TextClasses(dict(prompts), embeddings, backend.logit_scale, own)

    async def _embed_classes(self, groups: list[Prompts], batcher: Batcher, deadline: float) -> np.ndarray:
        """Return class embeddings, [c, d]. Texts are embedded a few at a time, with other requests in between."""
        known = self._loaded.texts
        texts = list(dict.fromkeys(text for group in groups for text in group))
        found = {text: known[text] for text in texts if text in known}
        missing = [text for text in texts if text not in found]
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            part = missing[start : start + TEXTS_AT_ONCE]
            async with batcher.admit(self.text, len(part)):
                found |= zip(
                    part, await asyncio.gather(*(batcher.run(self.text, text, deadline) for text in part)), strict=True
                )
            known.update((text, found[text]) for text in part)
        for text in texts:
            known[text] = found[text]
            known.move_to_end(text)
        while len(known) > CACHED_TEXTS:
            known.popitem(last=False)
        return mean_by_class(np.stack([found[text] for group in groups for text in group]), list(map(len, groups)))

    @property
    def prompts(self) -> dict[str, Prompts]:
        """The texts of each class."""
        return self.classes.prompts if self.classes is not None else dict(self.actions.prompts)

    async def with_classes(
        self, add: Mapping[str, Sequence[str]], remove: Sequence[str], version: str, batcher: Batcher, deadline: float
    ) -> "ServedModel":
        """Return a version with added or removed classes.

        Raises:
          Problem: the head doesn't allow it, or the classes are invalid.
        """
        if not self.accepts_classes:
            raise self.refusal()
        if unknown := [label for label in remove if label not in self.labels]:
            raise Problem("conflict", f"remove: {unknown[0]!r} is no class; classes: {', '.join(self.labels)}")
        kept = {label: self.prompts[label] for label in self.labels if label not in remove}
        if there := [label for label in add if label in kept]:
            raise Problem("conflict", f"add: {there[0]!r} is a class already; remove it first")
        prompts = kept | (checked_prompts(add) if add else {})
        check_labels(list(prompts), "conflict")
        embeddings = await self._embed_classes(list(prompts.values()), batcher, deadline)
        return self.changed(prompts, embeddings, version)

    def unchanged(self) -> "ServedModel":
        """Return the same model with its own classes."""
        return ServedModel(self._loaded, self.name, self.version.partition("+")[0])

    def changed(self, prompts: Mapping[str, Prompts], embeddings: np.ndarray, version: str) -> "ServedModel":
        """Return the same model with other classes, of embeddings [c, d]; they are scored like its own."""
        scale = self.backend.logit_scale / self.actions.temperature
        classes = TextClasses(dict(prompts), embeddings, scale, self.backend.sigmoid)
        return ServedModel(self._loaded, self.name, version, classes)

    def score(self, classes: TextClasses | None, logits: np.ndarray) -> ClassScores:
        """Return the mean scores over the views of one input, from logits [v, c] of its own classes or others."""
        sigmoid = classes.sigmoid if classes is not None else self.backend.sigmoid
        return score_views(logits, sigmoid, self.actions.multi_label)

    async def clip_logits(
        self, classes: TextClasses | None, frames: np.ndarray, batcher: Batcher, deadline: float
    ) -> np.ndarray:
        """Return the logits of a clip, uint8 [t, h, w, 3], for the model's own classes or others."""
        clips = self.need_clips()
        if classes is None:
            return await batcher.run(clips.whole, frames, deadline)
        return classes.logits(await batcher.run(clips.whole_embeds, frames, deadline))

    async def window_logits(
        self, classes: TextClasses | None, features: np.ndarray, batcher: Batcher, deadline: float
    ) -> np.ndarray:
        """Return the logits of a window, from the features of its frames: embeddings [t, d], or whole frames."""
        clips = self.need_clips()
        if clips.head is None or clips.head_embeds is None:
            return await self.clip_logits(classes, features, batcher, deadline)
        if classes is None:
            return await batcher.run(clips.head, features, deadline)
        return classes.logits(await batcher.run(clips.head_embeds, features, deadline))

    def need_one_label(self) -> None:
        """Refuse streams and videos of a multi-label model: their events follow one action at a time.

        Raises:
          Problem: the model gives an image any number of labels.
        """
        if self.actions.multi_label:
            raise Problem(
                "unsupported_media_type", "this model gives several labels, and events follow one action: send images"
            )

    def need_clips(self) -> ClipLanes:
        """Return the lanes of clips.

        Raises:
          Problem: the export takes only images.
        """
        if self.clips is None:
            raise Problem("unsupported_media_type", "this model takes images alone: export it again to send clips")
        return self.clips

    @property
    def is_of_clips(self) -> bool:
        """Return whether the model was trained on clips; its streams are then predicted by windows."""
        return bool(self.actions.video)

    def refusal(self) -> Problem:
        """Return the error for classes in free text."""
        return Problem(
            "classes_not_supported",
            f"the model's {self.actions.head} head was trained for its own {len(self.labels)} classes; only a cosine "
            "head can take others",
        )
