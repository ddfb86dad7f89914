"""One version of a model: what runs it, what it is compared with, and what each of its graphs does with a batch."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.bundle import Actions
from clip_har_jax.errors import UserError
from clip_har_jax.inference.exported import ExportedBackend, exported_folder
from serving.batcher import Batcher, Costs, Lane
from serving.classes import Classes, Prompts, check_labels, checked_prompts
from serving.problems import Problem
from serving.schemas import ModelRef, Version

CACHED_CLASSES = 4096


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def open_exported(path: Path, threads: int) -> ExportedBackend:
    """Opens an exported folder, or one format in it, to run in so many threads.

    Raises:
      UserError: another kind of folder, a changed file, or nothing in it runs here.
    """
    if found := exported_folder(path.expanduser()):
        return ExportedBackend(*found, threads=threads)
    raise UserError(f"{path}: not an exported folder; write one by `python -m export --model=... --output=...`")


class Model:
    """One version: a backend, its lanes in the batcher, and perhaps classes that were changed by text.

    Args:
      backend: what runs it.
      name: what it is called in addresses.
      version: told apart from others of the name by this.
      costs: of its batches.
      beside: the same in one thread, for batches side by side; None: there is none.
      classes: None: the backend's own.
    """

    def __init__(
        self,
        backend: ExportedBackend,
        name: str,
        version: str,
        costs: Costs,
        beside: ExportedBackend | None = None,
        classes: Classes | None = None,
    ):
        self.backend, self.name, self.version, self.classes = backend, name, version, classes
        self._beside = beside
        self.actions: Actions = backend.actions
        self.labels = classes.labels if classes else backend.labels
        self.ref = ModelRef(name=name, version=version, digest=backend.digest)
        self.costs = costs
        self.classify = Lane("classifier", self._stacked(backend.logits), costs)
        self.embed = Lane("image_encoder", self._stacked(self._finite(backend.embed)), costs)
        if beside is not None:
            self.classify.run_beside = self._stacked(beside.logits)
            self.embed.run_beside = self._stacked(self._finite(beside.embed))
        self.explain = Lane("explainer", self._explain, costs)
        self.explain_text = Lane("explainer", self._explain_text, costs)
        self.text = Lane(
            "text_encoder", lambda items: [backend.embed_classes(item) for item in items], Costs({1: 0.05})
        )
        self._cache: OrderedDict[Prompts, np.ndarray] = OrderedDict()
        self.users = 0

    @staticmethod
    def _stacked(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[Any]], np.ndarray]:
        return lambda items: run(np.stack(items))

    @staticmethod
    def _finite(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        def checked(batch: np.ndarray) -> np.ndarray:
            output = run(batch)
            if not np.isfinite(output).all():
                raise UserError("not finite")
            return output

        return checked

    def _explain(self, items: list[tuple[np.ndarray, int]]) -> np.ndarray:
        """Heat maps of (image, number of one of the model's own classes)."""
        images, indices = zip(*items, strict=True)
        return self._finite(lambda batch: self.backend.explain(batch, indices))(np.stack(images))

    def _explain_text(self, items: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Heat maps of (image, class embedding)."""
        images, classes = (np.stack(part) for part in zip(*items, strict=True))
        return self._finite(lambda batch: self.backend.explain_embeddings(batch, classes))(images)

    @property
    def accepts_classes(self) -> bool:
        """Whether the head compares with text embeddings."""
        return self.actions.head == "cosine"

    @property
    def abstain_below(self) -> float | None:
        """The score under which an answer abstains."""
        return self.actions.thresholds.get("abstain")

    @contextmanager
    def use(self) -> Iterator["Model"]:
        """Counts a request that needs this version."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1

    def describe(self) -> Version:
        """For /v1/models."""
        return Version(
            version=self.version,
            digest=self.backend.digest,
            labels=list(self.labels),
            accepts_classes=self.accepts_classes,
            abstain_below=self.abstain_below,
            image_size_px=self.backend.preprocess.image_size_px,
            format=self.backend.graphs.format,
        )

    async def open_vocabulary(self, prompts: Mapping[str, Prompts], batcher: Batcher, deadline: float) -> Classes:
        """Classes in free text; their embeddings are remembered.

        The temperature was fitted on the model's own classes, so it isn't used here.
        """
        embeddings = await self._embed_classes(list(prompts.values()), batcher, deadline)
        return Classes(dict(prompts), embeddings, self.backend.logit_scale)

    async def _embed_classes(self, groups: list[Prompts], batcher: Batcher, deadline: float) -> np.ndarray:
        if missing := [group for group in dict.fromkeys(groups) if group not in self._cache]:
            async with batcher.admit(self.text):
                new = await batcher.run(self.text, missing, deadline)
            if not np.isfinite(new).all():
                raise Problem("bad_model_output", "the model gives NaN or infinity for these classes")
            self._cache.update(zip(missing, new, strict=True))
        found = []
        for group in groups:
            self._cache.move_to_end(group)
            found.append(self._cache[group])
        while len(self._cache) > CACHED_CLASSES:
            self._cache.popitem(last=False)
        return np.stack(found)

    @property
    def prompts(self) -> dict[str, Prompts]:
        """The texts of each class."""
        return self.classes.prompts if self.classes is not None else dict(self.actions.prompts)

    async def with_classes(
        self, add: Mapping[str, Sequence[str]], remove: Sequence[str], version: str, batcher: Batcher, deadline: float
    ) -> "Model":
        """A version that tells more or fewer classes apart.

        Raises:
          Problem: the head can't, or the classes don't fit.
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

    def unchanged(self) -> "Model":
        """The same model with its own classes."""
        return Model(self.backend, self.name, self.version.partition("+")[0], self.costs, self._beside)

    def changed(self, prompts: Mapping[str, Prompts], embeddings: np.ndarray, version: str) -> "Model":
        """The same model with other classes, whose scores come as those of its own do."""
        classes = Classes(dict(prompts), embeddings, self.backend.logit_scale / self.actions.temperature)
        model = Model(self.backend, self.name, version, self.costs, self._beside, classes)
        model._cache.update(zip(prompts.values(), embeddings, strict=True))
        return model

    def refusal(self) -> Problem:
        """Why classes in free text aren't taken."""
        return Problem(
            "classes_not_supported",
            f"the model's {self.actions.head} head was trained for its own {len(self.labels)} classes; only a cosine "
            "head can take others",
        )
