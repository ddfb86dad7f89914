"""The folders that the tests of exported formats share."""

from pathlib import Path

import pytest

from tests.support.export_folders import LABELS, lively, write_clip_folders, write_heads
from tests.support.model_folders import write_images, write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(write_model(tmp_path_factory.mktemp("export") / "model", LABELS, temperature=1.7))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), LABELS, per_class=4)


@pytest.fixture(scope="session")
def head_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_heads(folder, tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="session")
def clip_folders(
    folder: Path, head_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return write_clip_folders(folder, head_folders, tmp_path_factory.mktemp("clips"))
