"""The folder of compiled programs: a second start compiles nothing; damage, strangers and size do no harm."""

import json
import os
import subprocess
import sys
import time
import zlib

import jax
import pytest

from clip_har_jax.parallel.compile_cache import clean, keep_compiled

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from clip_har_jax.parallel.compile_cache import keep_compiled
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
folder = keep_compiled()
value = float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.eye(8)))
print(json.dumps([str(folder), value, events.count("cache_hits"), events.count("cache_misses")]), flush=True)
sys.stdin.read()  # so that processes live at the same time
"""
EXPECTED = 8 * 0.8414709848


def start(caches):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    environment |= {"XDG_CACHE_HOME": str(caches), "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


def finish(process):
    out, err = process.communicate("", timeout=120)
    assert process.returncode == 0, err
    folder, value, hits, misses = json.loads(out)
    assert value == pytest.approx(EXPECTED, rel=1e-5)
    return folder, hits, misses


def test_programs_are_kept_shared_and_replaced_when_damaged(tmp_path):
    together = [start(tmp_path), start(tmp_path)]
    folders = {finish(process)[0] for process in together}
    assert folders == {str(tmp_path / "clip_har_jax" / "compiled")}
    folder = tmp_path / "clip_har_jax" / "compiled"
    assert os.stat(folder).st_mode & 0o077 == 0

    _, hits, misses = finish(start(tmp_path))
    assert hits and not misses

    for entry in folder.glob("*-cache"):
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 1
        entry.write_bytes(content)
    _, hits, misses = finish(start(tmp_path))
    assert misses and not hits
    _, hits, misses = finish(start(tmp_path))
    assert hits and not misses


def write_entry(folder, name, content, age_s=0):
    path = folder / f"{name}-cache"
    path.write_bytes(content)
    os.utime(path, (time.time() - age_s,) * 2)


def names(folder):
    return {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}


def test_cleaning_removes_what_is_damaged(tmp_path):
    whole = zlib.compress(os.urandom(1000))
    for name, content in {"whole": whole, "cut": whole[:500], "foreign": b"no program", "empty": b""}.items():
        write_entry(tmp_path, name, content)
    clean(tmp_path)
    assert names(tmp_path) == {"whole"}
    clean(tmp_path)
    assert names(tmp_path) == {"whole"}
    # Whole by its format, but not what was sealed.
    write_entry(tmp_path, "whole", zlib.compress(b"another"))
    clean(tmp_path)
    assert not list(tmp_path.iterdir())


def test_cleaning_bounds_the_size_by_last_use(tmp_path):
    entries = {"old": 300, "middle": 200, "new": 100}
    for name, age_s in entries.items():
        write_entry(tmp_path, name, zlib.compress(os.urandom(1000)), age_s)
    size = (tmp_path / "new-cache").stat().st_size
    clean(tmp_path, max_bytes=2 * size + 10)
    assert names(tmp_path) == {"middle", "new"}
    assert len(list(tmp_path.iterdir())) == 4  # and their seals


@pytest.fixture
def no_cache(monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("kind", ["file", "writable by others"])
def test_a_folder_that_cannot_be_used_is_left_alone(tmp_path, monkeypatch, caplog, no_cache, kind):
    folder = tmp_path / "clip_har_jax" / "compiled"
    folder.parent.mkdir()
    if kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level("INFO"):
        assert keep_compiled() is None
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert len(caplog.records) == 1
    assert str(folder) in caplog.text


def test_a_folder_that_was_given_stays(tmp_path, monkeypatch, no_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert keep_compiled() == tmp_path
    assert not list(tmp_path.iterdir())
