"""A service that many tests of this folder share, and a photograph for it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.service import Service
from tests.support.serving_setup import running


@pytest.fixture(scope="session")
def folder(served_folder: Path) -> Path:
    return served_folder


@pytest.fixture(scope="session")
def good(served_folder: Path) -> bytes:
    """Return a photograph that the model knows."""
    return sorted((served_folder.parent / "photos").rglob("*.png"))[0].read_bytes()


@pytest.fixture(scope="session")
def served(served_folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    """Return a service that no test changes, and a client of it."""
    with running(served_folder, max_body_bytes=300_000) as both:
        yield both


@pytest.fixture
def client(served: tuple[httpx.Client, Service]) -> httpx.Client:
    return served[0]
