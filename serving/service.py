"""The parts of the running service, and the order of start and end."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np

from clip_har_jax.bundle import MANIFEST
from clip_har_jax.errors import UserError
from clip_har_jax.inference.runtimes import exported_folder
from clip_har_jax.signing import verify_signature
from serving.batcher import Batcher
from serving.classes import KeptClasses
from serving.images import Decoder
from serving.loaded_models import LoadedModels
from serving.models import ServedModel
from serving.problems import Problem
from serving.requests import ModelChoice
from serving.security import Limiter
from serving.settings import Settings
from serving.telemetry import Metrics, log


class Service:
    """The parts shared by requests. Created before the event loop runs; usable between `start` and `close`."""

    batcher: Batcher
    decoder: Decoder
    video_decoder: Decoder
    models: LoadedModels

    def __init__(self, settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.limiter = Limiter(settings.rate_limit_per_s, settings.rate_burst)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sessions: Counter[str] = Counter()  # number of WebSockets per client
        self._videos = 0
        self._decoding = False

    def start(self) -> None:
        """Start the parts and begin to load the models; a model that isn't loaded answers "not ready"."""
        settings = self.settings
        self.decoder = Decoder(settings.decode_processes, settings.max_megapixels, self.metrics)
        # A separate decoder, so that images don't wait for videos; its processes start with the first video.
        self.video_decoder = Decoder(settings.max_videos, settings.max_megapixels, self.metrics)
        self.batcher = Batcher(
            settings.max_wait_s, settings.compute_threads, self.metrics, lambda: self.decoder.estimated_wait_s
        )
        self.models = LoadedModels(
            settings.all_models,
            settings.models_dir,
            self._check_folder,
            KeptClasses(settings.state_dir),
            settings.compute_threads,
            self.batcher,
            self.metrics,
        )
        self._spawn(self._warm_decoder())
        for name in settings.all_models:
            self._spawn(self._load(name))

    @property
    def ready(self) -> bool:
        """Return whether requests are answered."""
        return self._decoding and self.models.ready

    def reload(self) -> None:
        """Read every model's folder again, for SIGHUP."""
        for name in self.models.entries:
            self._spawn(self._load(name))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, name: str) -> None:
        with suppress(Problem):  # logged and shown in /v1/models; a later load may succeed
            await self.models.load(name)
        self.metrics.ready.set(self.ready)

    async def _warm_decoder(self) -> None:
        await self.decoder.warm()
        self._decoding = True
        self.metrics.ready.set(self.ready)

    def _check_folder(self, path: Path) -> None:
        found = exported_folder(path.expanduser())
        folder = found[0] if found else path
        if self.settings.require_manifest and folder.is_dir() and not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: not sealed (no {MANIFEST}); export it again, or set HAR_REQUIRE_MANIFEST=false")
        if self.settings.signing_key is not None:
            verify_signature(folder, self.settings.signing_key)

    def begin(self, client: str, choice: ModelChoice) -> ServedModel:
        """Return a request's model; check everything that can refuse the request before its body is read.

        Raises:
          Problem: no such model, not ready, rate limit exceeded, or overloaded.
        """
        self.limiter.take(client)
        model = self.models.get(choice.model, choice.version)
        self.batcher.check()
        return model

    @asynccontextmanager
    async def one_session(self, client: str) -> AsyncIterator[None]:
        """Reserve a WebSocket session.

        Raises:
          Problem: too many sessions, in total or of this client.
        """
        most = self.settings.max_sessions_per_client
        if self._sessions[client] >= most:
            raise Problem("too_many_requests", f"{most} streams are open", retry_after_s=10)
        if self._sessions.total() >= self.settings.max_stream_sessions:
            raise Problem("overloaded", "as many streams are open as the service takes", retry_after_s=10)
        self._sessions[client] += 1
        self.metrics.stream_sessions.inc()
        try:
            yield
        finally:
            self.metrics.stream_sessions.dec()
            self._sessions[client] -= 1
            if not self._sessions[client]:
                del self._sessions[client]

    @asynccontextmanager
    async def one_video(self) -> AsyncIterator[None]:
        """Reserve the place of an uploaded video: they are large.

        Raises:
          Problem: too many videos at the same time.
        """
        if self._videos >= self.settings.max_videos:
            self.metrics.refused.labels("videos").inc()
            raise Problem("overloaded", "as many videos are being read as the service takes", retry_after_s=5)
        self._videos += 1
        try:
            yield
        finally:
            self._videos -= 1

    async def decode(self, data: bytes, model: ServedModel, deadline: float) -> np.ndarray:
        """Return an image as the model takes it: uint8 [h, w, 3]."""
        return await self.decoder.decode(data, model.backend.preprocess, deadline)

    async def close(self) -> None:
        """Stop the parts; requests in flight have ended before."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.batcher.close()
        for decoder in (self.decoder, self.video_decoder):
            await asyncio.to_thread(decoder.close)
        log.info("ended")
