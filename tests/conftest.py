"""Eight simulated CPU devices, shapes checked at run time, warnings as errors, one compilation cache for all tests."""

import gc
import importlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from tests.support.shapes import modules_with_shapes
from tests.support.xla import cpu_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_flags(devices=8)}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XDG_CACHE_HOME", str(Path(tempfile.gettempdir()) / "clip_har_jax_tests_cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "clip_har_jax_tests_xla"))
# Small programs too: the tests compile them again and again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook

# Imported before the hook: checking each of its small drawing functions takes seven times as long as the drawing.
for module in ("motion", "synthetic"):
    importlib.import_module(f"clip_har_jax.data.{module}")
install_import_hook(modules_with_shapes(), "beartype.beartype").__enter__()

import jax
import pytest
from filelock import FileLock
from hypothesis import settings

from tests.support.order import LONGEST

jax.config.update("jax_numpy_rank_promotion", "raise")
# CI's slow step asks for more examples: HYPOTHESIS_PROFILE=thorough.
settings.register_profile("quick", max_examples=15, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


class Loggers(dict[str, logging.Logger | logging.PlaceHolder]):
    """All loggers by name; pytest goes through them before each test, while threads of a service may make others."""

    def values(self) -> list[logging.Logger | logging.PlaceHolder]:  # type: ignore[override]
        """Return those of now."""
        return list(super().values())


logging.root.manager.loggerDict = Loggers(logging.root.manager.loggerDict)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that was imported, and run less often.

    Tracing makes many objects that live on, which it else looks through again and again: a tenth of the tests' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, and leave the order within a file."""
    rank = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported folder that the tests share, in all processes; its photographs lie beside it.

    Nothing changes it: what needs another folder copies it.
    """
    from tests.support.serving_setup import write_export

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the whole test run
    with FileLock(root / "served.lock"):
        if not (root / "served" / "export" / "manifest.json").is_file():
            shutil.rmtree(root / "served", ignore_errors=True)
            (root / "served").mkdir()
            write_export(root / "served")
    return root / "served" / "export"


@pytest.fixture(scope="session")
def torch_python() -> str:
    """Return the Python of an environment that has torch and transformers."""
    from tests.support.torch_environment import find_python

    return find_python()
