"""Private names of JAX: they exist, one file imports them, and a public replacement doesn't go unnoticed."""

import re
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.extend import backend as extend_backend

from clip_har_jax.parallel import jax_private

ROOT = Path(__file__).parents[2]


def test_one_file_imports_private_names():
    files = [*ROOT.glob("clip_har_jax/**/*.py"), *ROOT.glob("[bes]*/**/*.py"), *ROOT.glob("tests/support/*.py")]
    found = {path.name for path in files if re.search(r"^\s*(from|import) jax\._src", path.read_text(), re.M)}
    assert found == {"jax_private.py"}


def test_a_single_process_has_no_client():
    assert jax_private.coordination_client() is None
    assert jax_private.process_id() == 0


def test_jax_has_no_public_replacement_yet():
    """When this fails, use the public name in place of the function of `parallel/jax_private.py`, and remove that."""
    public = {
        name
        for module in (jax.distributed, multihost_utils, extend_backend)
        for name in dir(module)
        if not name.startswith("_")
    }
    wanted = r"client|barrier|key_value|coordination|^process_id$|cluster|detect|cloud_tpu|initialized"
    assert {name for name in public if re.search(wanted, name)} == {"is_initialized", "xla_client"} & public
