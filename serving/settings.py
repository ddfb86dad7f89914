"""All settings with their defaults, from HAR_ environment variables or flags."""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from clip_har_jax.cores import usable_cores

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # of a model: no dots or slashes, so it can't be a path
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def cores_of_worker(given: dict[str, Any]) -> int:
    """Return the number of cores per worker, among those that the container and the affinity allow."""
    return max(1, usable_cores() // given.get("workers", 1))


class Settings(BaseSettings):
    """The service's settings."""

    model_config = SettingsConfigDict(env_prefix="HAR_", frozen=True, extra="forbid")

    model: Path | None = Field(None, description="an exported folder, or one format in it")
    name: str = Field("har", pattern=NAME, description="the model's name in addresses")
    models: dict[str, Path] = Field({}, description='further models, as {"NAME": "PATH"}')
    models_dir: Path | None = Field(None, description="the folder of models that can be loaded by name at run time")
    state_dir: Path | None = Field(
        None, description="folder for changes of classes, which then outlast loads and restarts; left out: not stored"
    )
    require_manifest: bool = Field(True, description="refuse a folder that isn't sealed")
    signing_key: Path | None = Field(
        None,
        description="a public key (PEM): refuse folders not signed by `export --sign` with its other half",
    )

    host: str = Field("127.0.0.1", description="the address to listen on; any but loopback needs API keys")
    port: int = Field(8000, ge=0, le=65535, description="0: any free one")
    workers: Count = Field(1, description="serving processes; each holds the models")
    decode_processes: Count = Field(
        default_factory=lambda given: min(4, cores_of_worker(given)),
        description="processes that decode images, per worker; left out: one per core, at most 4",
    )
    compute_threads: Count = Field(
        default_factory=cores_of_worker,
        description="threads that run a model, per worker; left out: its share of the cores",
    )

    api_keys: SecretStr = Field(
        SecretStr(""), description="NAME:SCOPES:SHA256 of each key, separated by spaces (see --new_key)"
    )
    allowed_origins: tuple[str, ...] = Field((), description="origins of web pages that may call from a browser")
    allowed_hosts: tuple[str, ...] = Field((), description="accepted Host headers; empty: any, on loopback its names")
    rate_limit_per_s: float = Field(100.0, ge=0, description="images per second and key or address; 0: no limit")
    rate_burst: Count = Field(200, description="images that may arrive at once")

    max_connections: Count = Field(
        1000,
        description="open connections per worker; a further one replaces one that waits for its client",
    )
    max_connections_per_address: Count = Field(250, description="the same per address (IPv6: per /64 network)")
    max_header_bytes: Count = Field(65_536, description="of a request's URL and headers together")
    header_timeout_s: Seconds = Field(10.0, description="for a request's headers to arrive")
    keep_alive_s: Seconds = Field(30.0, description="idle time after which a connection is closed")
    send_timeout_s: Seconds = Field(30.0, description="for a client to read the sent data")
    max_body_bytes: Count = Field(10_000_000, description="of a request")
    max_video_bytes: Count = Field(100_000_000, description="of an uploaded video")
    max_video_frames: Count = Field(600, description="analysed frames of an uploaded video")
    max_videos: Count = Field(2, description="uploaded videos at the same time")
    video_timeout_s: Seconds = Field(60.0, description="for a video to arrive, and again for its answer")
    max_megapixels: float = Field(25.0, gt=0, description="of an image; checked in its header, before decoding")
    max_batch_images: Count = Field(64, description="images in one batch request")
    max_classes: Count = Field(200, description="classes in free text")
    body_timeout_s: Seconds = Field(10.0, description="for a request's body to arrive")
    request_timeout_s: Seconds = Field(10.0, description="for an answer; a request may ask for less")
    max_wait_s: Seconds = Field(1.0, description="estimated wait above which a request is refused at once")
    drain_timeout_s: Seconds = Field(20.0, description="for requests in flight to end after SIGTERM")

    max_stream_sessions: Count = Field(16, description="WebSockets at the same time")
    max_sessions_per_client: Count = Field(8, description="WebSockets at the same time per key or address")
    max_stream_fps: float = Field(30.0, gt=0, description="analysed frames per second and session")
    stream_budget_s: Seconds = Field(0.5, description="older frames aren't analysed")
    stream_idle_s: Seconds = Field(60.0, description="time without a frame after which a WebSocket is closed")
    max_session_s: Seconds = Field(3600.0, description="time after which a WebSocket is closed")

    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR")

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, Path]) -> dict[str, Path]:
        import re

        for name in models:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name!r}: a model's name is letters, digits, _ and -")
        return models

    @field_validator("state_dir")
    @classmethod
    def _writable(cls, state_dir: Path | None) -> Path | None:
        if state_dir is not None and not (state_dir.is_dir() and os.access(state_dir, os.W_OK)):
            raise ValueError(f"{state_dir}: no folder that can be written; make it, or leave it out")
        return state_dir

    @model_validator(mode="after")
    def _closed_by_default(self) -> "Settings":
        if not self.is_loopback and not self.api_keys.get_secret_value().strip():
            raise ValueError(
                f"host {self.host}: others could reach it, so API keys are needed; make one with --new_key=NAME and "
                "set HAR_API_KEYS, or listen on 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine can connect."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> tuple[str, ...]:
        """Accepted Host headers; empty: any. On loopback, others would come from a web page that rebinds a DNS name."""
        return self.allowed_hosts or (("localhost", "127.0.0.1", "[::1]", self.host) if self.is_loopback else ())

    @property
    def all_models(self) -> dict[str, Path]:
        """Name -> path, with the default model first."""
        return ({self.name: self.model} if self.model else {}) | self.models

    def shown(self) -> dict[str, Any]:
        """Return the settings with secrets masked."""
        return self.model_dump(mode="json")
