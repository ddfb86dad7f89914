"""Eight simulated CPU devices, shapes checked at run time, warnings as errors, one compilation cache for all tests."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the tests' time, and their models are too small for optimised code to win it back.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XDG_CACHE_HOME", str(Path(tempfile.gettempdir()) / "clip_har_jax_tests_cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "clip_har_jax_tests_xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from jaxtyping import install_import_hook

install_import_hook("clip_har_jax", "beartype.beartype").__enter__()

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
# CI's slow step asks for more examples: HYPOTHESIS_PROFILE=thorough.
settings.register_profile("quick", max_examples=15, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported folder that the tests of the service share; its photographs lie beside it."""
    from tests.support.serving_setup import write_export

    return write_export(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def torch_python() -> str:
    """Return the Python of an environment that has torch and transformers."""
    from tests.support.torch_environment import find_python

    return find_python()
