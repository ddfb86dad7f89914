"""The loaded models: named versions, opened and checked while another is active, then switched to."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.inference import golden
from clip_har_jax.inference.exported import ExportedBackend
from serving.batcher import Batcher, Costs
from serving.classes import KeptClasses
from serving.clip_lanes import make_clip_lanes
from serving.models import TEXTS_AT_ONCE, LoadedExport, ServedModel, finite, open_exported, read_origin
from serving.problems import Problem
from serving.schemas import ModelStatus
from serving.telemetry import Metrics, log

FOLDERS = re.compile(r"(?<![\w/.:])/(?:[^/\s'\"]+/)+")  # absolute paths, which only the log may contain

# Digest, format and threads -> seconds of batches of images and of texts by size; measured once per process.
_measured_costs: dict[tuple[str, str, int], tuple[dict[int, float], dict[int, float]]] = {}


@dataclass
class Entry:
    """A model's name, its source folder, and its loaded versions."""

    name: str
    path: Path
    active: ServedModel | None = None
    versions: dict[str, ServedModel] = field(default_factory=dict)
    loading: bool = True
    error: str | None = None
    changes: int = 0  # number of changes of classes and of loads of unsealed folders
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def status(self) -> ModelStatus:
        """Return the entry for /v1/models."""
        state: Literal["ready", "loading", "failed"] = (
            "ready" if self.active else "loading" if self.loading else "failed"
        )
        versions = [model.describe() for model in self.versions.values()]
        active = self.active.version if self.active else None
        return ModelStatus(name=self.name, status=state, error=self.error, active=active, versions=versions)


class LoadedModels:
    """All models by name; they are loaded, switched and changed here.

    Args:
      paths: name -> exported folder; the first name is the default.
      models_dir: folder of models that can be loaded by name; None: none.
      checks: checks of a folder beside its manifest, called before it is opened.
      kept: stored changes of classes.
      threads: compute threads of a model.
      batcher: runs the models.
      metrics: counts loads.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        models_dir: Path | None,
        checks: Callable[[Path], None],
        kept: KeptClasses,
        threads: int,
        batcher: Batcher,
        metrics: Metrics,
    ):
        self.entries = {name: Entry(name, path) for name, path in paths.items()}
        self._models_dir, self._checks, self._kept, self._threads = models_dir, checks, kept, threads
        self._batcher, self._metrics = batcher, metrics

    @property
    def ready(self) -> bool:
        """Return whether every name has an active version."""
        return all(entry.active for entry in self.entries.values())

    def entry(self, name: str | None) -> Entry:
        """Return the entry of a name; None: the default.

        Raises:
          Problem: no such name.
        """
        name = next(iter(self.entries), "har") if name is None else name
        if name not in self.entries:
            raise Problem("unknown_model", f"no model of this name; there are {', '.join(self.entries) or 'none'}")
        return self.entries[name]

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """Return a model that can answer.

        Raises:
          Problem: no such name or version, or it isn't loaded.
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
        """Return the path of a folder in models_dir.

        Raises:
          Problem: no such folder, or no models_dir.
        """
        if self._models_dir is None:
            raise Problem("load_failed", "the service was started without models_dir, so only its own folder is read")
        root = self._models_dir.resolve()
        path = (root / name).resolve()
        if path.parent != root or not path.is_dir():  # names contain no slash, but a link could lead elsewhere
            raise Problem("not_found", f"models_dir holds no folder {name!r}")
        return path

    async def load(self, name: str, path: Path | None = None, activate: bool = True) -> Entry:
        """Load a version and, after it has passed all checks, make it the active one.

        Raises:
          Problem: a check failed; the active version stays.
        """
        entry = self.entry(name)
        async with entry.lock:
            entry.loading = True
            try:
                model = await asyncio.to_thread(self._open, entry, path or entry.path)
            except Exception as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                entry.error = FOLDERS.sub("", reason)
                self._metrics.loads.labels(name, "failed").inc()
                log.error("model not loaded", extra={"fields": {"model": name, "reason": reason}})
                raise Problem("load_failed", entry.error) from error
            finally:
                entry.loading = False
            entry.error = None
            self._metrics.loads.labels(name, "loaded").inc()
            if activate:
                entry.versions[model.version] = model
                self._switch(entry, model)
            else:  # a version exists only once: the active one stays in place
                entry.versions.setdefault(model.version, model)
            return entry

    def _open(self, entry: Entry, path: Path) -> ServedModel:
        """Verify, open, warm up and test a version; runs in its own thread."""
        self._checks(path)
        backend = open_exported(path, self._threads)
        entry.changes += backend.digest is None
        version = backend.digest[:12] if backend.digest else f"unsealed{entry.changes}"
        if not golden.check(backend):
            log.warning(
                "no golden outputs: its graphs were only compared with one another; export it again to have them",
                extra={"fields": {"model": entry.name, "path": str(path)}},
            )
        loaded = self._measured(backend, path)
        best = loaded.costs.best
        log.info(
            "model loaded",
            extra={"fields": {"model": entry.name, "version": version, "best_batch": best, "path": str(path)}},
        )
        return self._as_changed(entry, ServedModel(loaded, entry.name, version))

    def _measured(self, backend: ExportedBackend, source: Path) -> LoadedExport:
        """Warm up a backend and measure the costs of its batches; once per export and process.

        Another export can be larger or smaller, so it is measured even while one serves. `Costs.observe` corrects the
        influence of the load on the measured times.
        """
        size = backend.preprocess.image_size_px
        example = np.zeros((size, size, 3), np.uint8)
        known = _measured_costs.get((backend.digest or "", backend.graphs.format, self._threads))
        if known is not None:
            backend.logits(example[None])
            image_costs, text_costs = Costs(known[0]), Costs(known[1])
        else:
            image_costs = Costs.measure(backend.logits, example)
            text_costs = Costs.of_two(lambda count: backend.embed_classes([["a photo"]] * count), TEXTS_AT_ONCE)
        if backend.digest is not None:
            key = (backend.digest, backend.graphs.format, self._threads)
            _measured_costs[key] = image_costs.measured, text_costs.measured
        single_threaded = backend.in_one_thread() if self._threads > 1 else None
        if single_threaded is not None:
            single_threaded.logits(example[None])
            single_threaded.embed(example[None])
        origin = read_origin(backend.path)
        clips = make_clip_lanes(backend, image_costs, finite)
        return LoadedExport(backend, source, image_costs, text_costs, single_threaded, origin, clips)

    def _as_changed(self, entry: Entry, model: ServedModel) -> ServedModel:
        """Return the model with its stored changes of classes, if there are any."""
        found = self._kept.read(entry.name, model.backend.digest)
        if found is None:
            return model
        prompts, changes = found
        if not model.accepts_classes:
            raise UserError(f"{model.backend.path}: classes were kept for it, but its head takes no others")
        entry.changes = max(entry.changes, changes)
        return model.changed(prompts, model.backend.embed_classes(list(prompts.values())), changed(model, changes))

    def _switch(self, entry: Entry, model: ServedModel) -> None:
        """Make `model` the active one for new requests; the previous one is freed after its last request."""
        before = entry.active
        entry.active, entry.path = model, model.source  # a later load reads it again
        if before is not None and before is not model:
            self._metrics.forget_model(entry.name, before.version, before.backend.digest or "")
            if entry.versions.get(before.version) is before:
                del entry.versions[before.version]
            log.info(
                "model switched", extra={"fields": {"model": entry.name, "from": before.version, "to": model.version}}
            )
        self._metrics.model_info.labels(entry.name, model.version, model.backend.digest or "").set(1)

    async def activate(self, name: str, version: str) -> Entry:
        """Make a loaded version the active one.

        Raises:
          Problem: it isn't loaded.
        """
        entry = self.entry(name)
        async with entry.lock:
            self._switch(entry, self.get(name, version))
        return entry

    async def unload(self, name: str, version: str) -> None:
        """Drop an inactive version.

        Raises:
          Problem: it isn't loaded, or it is active.
        """
        entry = self.entry(name)
        async with entry.lock:
            if self.get(name, version) is entry.active:
                raise Problem("conflict", "this version is active; activate another one first")
            del entry.versions[version]

    async def change_classes(
        self, name: str, add: Mapping[str, Sequence[str]], remove: Sequence[str], reset: bool, deadline: float
    ) -> Entry:
        """Make and activate a version of the active model with other classes, and store the change.

        Args:
          name: of the model.
          add, remove: the changes.
          reset: start from the model's own classes instead of the current ones.
          deadline: of the answer.

        Raises:
          Problem: the model's head doesn't allow it, the classes are invalid, or the change can't be stored.
        """
        entry = self.entry(name)
        async with entry.lock:
            model = self.get(name)
            if reset:
                model = model.unchanged()
            if add or remove:
                changes = entry.changes + 1
                model = await model.with_classes(add, remove, changed(model, changes), self._batcher, deadline)
                assert model.classes is not None
                await asyncio.to_thread(self._kept.write, name, model.backend.digest, model.classes, changes)
                entry.changes = changes
            elif reset:
                await asyncio.to_thread(self._kept.forget, name, model.backend.digest)
            entry.versions[model.version] = model
            self._switch(entry, model)
        return entry


def changed(model: ServedModel, changes: int) -> str:
    """Return the version name of a model with changed classes."""
    return f"{model.version.partition('+')[0]}+c{changes}"
