"""Models in and out: named versions, loaded and proven aside, switched in one assignment, dropped when unused."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_har_jax.bundle import Actions
from clip_har_jax.errors import UserError
from clip_har_jax.inference import golden
from clip_har_jax.inference.exported import ExportedBackend, exported_folder
from clip_har_jax.text import make_prompts, phrase
from serving.batcher import Batcher, Costs, Lane
from serving.problems import Problem
from serving.schemas import ModelRef, ModelStatus, Version
from serving.telemetry import Metrics, log

CACHED_CLASSES = 4096
Prompts = tuple[str, ...]


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


@dataclass(frozen=True)
class Classes:
    """What logits are over, where they don't come from the classifier's own classes."""

    labels: tuple[str, ...]
    embeddings: np.ndarray  # [c, d], of length 1
    scale: float

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """Of one image's embedding, or of several."""
        return self.scale * embeddings @ self.embeddings.T


class Model:
    """One version: a backend, its lanes in the batcher, and perhaps classes that were changed by text.

    Args:
      backend: what runs it.
      name: what it is called in addresses.
      version: told apart from others of the name by this.
      costs: of its batches.
      classes: None: the backend's own.
    """

    def __init__(self, backend: ExportedBackend, name: str, version: str, costs: Costs, classes: Classes | None = None):
        self.backend, self.name, self.version, self.classes = backend, name, version, classes
        self.actions: Actions = backend.actions
        self.labels = classes.labels if classes else backend.labels
        self.ref = ModelRef(name=name, version=version, digest=backend.digest)
        self.costs = costs
        self.classify = Lane("classifier", self._stacked(backend.logits), costs)
        self.embed = Lane("image_encoder", self._stacked(self._finite(backend.embed)), costs)
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
        return Classes(tuple(prompts), embeddings, self.backend.logit_scale)

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

    async def with_classes(
        self, add: Mapping[str, Sequence[str]], remove: Sequence[str], version: str, batcher: Batcher, deadline: float
    ) -> "Model":
        """A version that tells more or fewer classes apart.

        Raises:
          Problem: the head can't, or the classes don't fit.
        """
        prompts = dict(self.actions.prompts) if self.classes is None else dict.fromkeys(self.labels, ())
        if unknown := [label for label in remove if label not in prompts]:
            raise Problem("conflict", f"remove: {unknown[0]!r} is no class; classes: {', '.join(prompts)}")
        if there := [label for label in add if label in prompts]:
            raise Problem("conflict", f"add: {there[0]!r} is a class already; remove it first")
        kept = [label for label in self.labels if label not in remove]
        new = checked_prompts(add) if add else {}
        labels = (*kept, *new)
        check_labels(labels, "conflict")
        own = await self._own_embeddings(batcher, deadline)
        parts = [own[[self.labels.index(label) for label in kept]]]
        if new:
            parts.append(await self._embed_classes(list(new.values()), batcher, deadline))
        scale = self.classes.scale if self.classes else self.backend.logit_scale / self.actions.temperature
        classes = Classes(labels, np.concatenate(parts), scale)
        return Model(self.backend, self.name, version, self.costs, classes)

    async def _own_embeddings(self, batcher: Batcher, deadline: float) -> np.ndarray:
        if not self.accepts_classes:
            raise self.refusal()
        if self.classes is not None:
            return self.classes.embeddings
        return await self._embed_classes([self.actions.prompts[label] for label in self.labels], batcher, deadline)

    def refusal(self) -> Problem:
        """Why classes in free text aren't taken."""
        return Problem(
            "classes_not_supported",
            f"the model's {self.actions.head} head was trained for its own {len(self.labels)} classes; only a cosine "
            "head can take others",
        )


def check_labels(labels: Sequence[str], code: str = "invalid_request") -> None:
    """Refuses classes that no model could tell apart.

    Raises:
      Problem: fewer than two, or two that are said alike.
    """
    if len(labels) < 2:
        raise Problem(code, f"classes: two or more are needed, not {len(labels)}")
    said = [phrase(label) for label in labels]
    if twice := [label for label in labels if said.count(phrase(label)) > 1]:
        raise Problem(code, f"classes: {' and '.join(map(repr, twice[:2]))} mean the same; leave one out")


def checked_prompts(given: Mapping[str, Sequence[str]]) -> dict[str, Prompts]:
    """Label -> its texts: those given, else the usual ones.

    Raises:
      Problem: a label without words.
    """
    if empty := [label for label in given if not phrase(label).strip()]:
        raise Problem("invalid_request", f"classes: {empty[0]!r} has no words")
    usual = make_prompts(list(given))
    return {label: tuple(texts) or usual[label] for label, texts in given.items()}


@dataclass
class Entry:
    """A name: where its model comes from, and the versions that are loaded."""

    name: str
    path: Path
    active: Model | None = None
    versions: dict[str, Model] = field(default_factory=dict)
    loading: bool = True
    error: str | None = None
    changes: int = 0  # how often classes were changed, and unsealed folders loaded
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def status(self) -> ModelStatus:
        """For /v1/models."""
        state: Literal["ready", "loading", "failed"] = (
            "ready" if self.active else "loading" if self.loading else "failed"
        )
        versions = [model.describe() for model in self.versions.values()]
        active = self.active.version if self.active else None
        return ModelStatus(name=self.name, status=state, error=self.error, active=active, versions=versions)


class Registry:
    """All names; what changes them.

    Args:
      paths: name -> exported folder; the first name is the default.
      models_dir: whose folders may be loaded by name; None: none.
      checks: what a folder must pass beside its manifest, called before it is opened.
      threads: that run a model.
      batcher: what runs the models.
      metrics: where loads are counted.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        models_dir: Path | None,
        checks: Callable[[Path], None],
        threads: int,
        batcher: Batcher,
        metrics: Metrics,
    ):
        self.entries = {name: Entry(name, path) for name, path in paths.items()}
        self._models_dir, self._checks, self._threads = models_dir, checks, threads
        self._batcher, self._metrics = batcher, metrics

    @property
    def ready(self) -> bool:
        """Whether every name has an active version."""
        return all(entry.active for entry in self.entries.values())

    def entry(self, name: str | None) -> Entry:
        """The entry of a name; None: the default.

        Raises:
          Problem: no such name.
        """
        name = next(iter(self.entries), "har") if name is None else name
        if name not in self.entries:
            raise Problem("unknown_model", f"no model of this name; there are {', '.join(self.entries) or 'none'}")
        return self.entries[name]

    def get(self, name: str | None = None, version: str | None = None) -> Model:
        """A model to answer with.

        Raises:
          Problem: no such name or version, or not loaded.
        """
        entry = self.entry(name)
        if version is not None:
            if version not in entry.versions:
                raise Problem("unknown_model", f"{entry.name} has no such version; see /v1/models")
            return entry.versions[version]
        if entry.active is None:
            reason = f"could not be loaded: {entry.error}" if entry.error else "is being loaded"
            raise Problem("not_ready", f"model {entry.name} {reason}", retry_after_s=5)
        return entry.active

    def folder(self, name: str) -> Path:
        """The path of a folder in models_dir.

        Raises:
          Problem: not there, or no models_dir.
        """
        if self._models_dir is None:
            raise Problem("load_failed", "the service was started without models_dir, so only its own folder is read")
        root = self._models_dir.resolve()
        path = (root / name).resolve()
        if path.parent != root or not path.is_dir():  # names hold no slash; a link could still lead elsewhere
            raise Problem("not_found", f"models_dir holds no folder {name!r}")
        return path

    async def load(self, name: str, path: Path | None = None, activate: bool = True) -> Entry:
        """Loads a version aside and, once it has passed, makes it the active one.

        Raises:
          Problem: it didn't pass; what was active stays so.
        """
        entry = self.entry(name)
        async with entry.lock:
            entry.loading = True
            try:
                model = await asyncio.to_thread(self._open, entry, path or entry.path)
            except Exception as error:
                entry.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._metrics.loads.labels(name, "failed").inc()
                log.error("model not loaded", extra={"fields": {"model": name, "reason": entry.error}})
                raise Problem("load_failed", entry.error) from error
            finally:
                entry.loading = False
            entry.error = None
            entry.path = path or entry.path
            self._metrics.loads.labels(name, "loaded").inc()
            entry.versions[model.version] = model
            if activate:
                self._switch(entry, model)
            return entry

    def _open(self, entry: Entry, path: Path) -> Model:
        """Verify, open, warm, prove: in a thread of its own."""
        self._checks(path)
        backend = open_exported(path, self._threads)
        entry.changes += backend.digest is None
        version = backend.digest[:12] if backend.digest else f"unsealed{entry.changes}"
        if not golden.check(backend):
            log.warning(
                "no golden outputs: its graphs were only compared with one another; export it again to have them",
                extra={"fields": {"model": entry.name, "path": str(path)}},
            )
        size = backend.preprocess.image_size_px
        # While another version serves, times would be of a busy machine: what that one measured is a better start.
        costs = Costs(entry.active.costs.measured) if entry.active else None
        costs = costs or Costs.measure(backend.logits, np.zeros((size, size, 3), np.uint8))
        log.info(
            "model loaded",
            extra={"fields": {"model": entry.name, "version": version, "best_batch": costs.best, "path": str(path)}},
        )
        return Model(backend, entry.name, version, costs)

    def _switch(self, entry: Entry, model: Model) -> None:
        """From the next request on `model` answers; the one before goes when its last request has."""
        before = entry.active
        entry.active = model
        if before is not None and before is not model:
            self._metrics.forget_model(entry.name, before.version, before.backend.digest or "")
            if entry.versions.get(before.version) is before:
                del entry.versions[before.version]
            log.info(
                "model switched", extra={"fields": {"model": entry.name, "from": before.version, "to": model.version}}
            )
        self._metrics.model_info.labels(entry.name, model.version, model.backend.digest or "").set(1)

    async def activate(self, name: str, version: str) -> Entry:
        """Makes a loaded version the active one.

        Raises:
          Problem: it isn't loaded.
        """
        entry = self.entry(name)
        async with entry.lock:
            self._switch(entry, self.get(name, version))
        return entry

    async def unload(self, name: str, version: str) -> None:
        """Drops a version that isn't active.

        Raises:
          Problem: it isn't loaded, or active.
        """
        entry = self.entry(name)
        async with entry.lock:
            if self.get(name, version) is entry.active:
                raise Problem("conflict", "this version is active; activate another one first")
            del entry.versions[version]

    async def change_classes(
        self, name: str, add: Mapping[str, Sequence[str]], remove: Sequence[str], deadline: float
    ) -> Entry:
        """Makes and activates a version of the active model with other classes.

        Raises:
          Problem: the model's head can't, or the classes don't fit.
        """
        entry = self.entry(name)
        async with entry.lock:
            base = self.get(name)
            entry.changes += 1
            version = f"{base.version.partition('+')[0]}+c{entry.changes}"
            model = await base.with_classes(add, remove, version, self._batcher, deadline)
            entry.versions[version] = model
            self._switch(entry, model)
        return entry
