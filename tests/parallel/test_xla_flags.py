"""XLA's flags by platform: none on CPUs, never over the user's, and none that the compiler doesn't know."""

import os
import subprocess
import sys

import pytest

from clip_har_jax.parallel import xla_flags


@pytest.fixture
def environment(monkeypatch):
    """Return os.environ without flags, restored afterwards."""
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "HAR_XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_cpu_run_gets_none(environment):
    environment.setenv("JAX_PLATFORMS", "cpu")
    assert xla_flags.apply() == "cpu"
    assert "XLA_FLAGS" not in os.environ
    assert "LIBTPU_INIT_ARGS" not in os.environ


@pytest.mark.parametrize(("wanted", "platform"), [("cuda", "gpu"), ("tpu,cpu", "tpu"), ("cpu", "cpu")])
def test_the_platform_is_that_of_jax_platforms(environment, wanted, platform):
    environment.setenv("JAX_PLATFORMS", wanted)
    assert xla_flags.find_platform() == platform


def test_a_gpu_gets_those_that_this_jaxlib_knows(environment):
    environment.setenv("JAX_PLATFORMS", "cuda")
    flags = {**xla_flags.FLAGS["gpu"].flags, "xla_gpu_no_such_flag": "true"}
    environment.setitem(xla_flags.FLAGS, "gpu", xla_flags.PlatformFlags("XLA_FLAGS", ("jaxlib",), flags))
    xla_flags.apply()
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in os.environ["XLA_FLAGS"].split()
    assert "no_such_flag" not in os.environ["XLA_FLAGS"]


def test_the_users_flags_have_precedence_and_the_switch_turns_all_off(environment):
    environment.setenv("JAX_PLATFORMS", "cuda")
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/dump"
    environment.setenv("XLA_FLAGS", mine)
    environment.setenv("HAR_XLA_FLAGS", "0")
    xla_flags.apply()
    assert os.environ["XLA_FLAGS"] == mine
    environment.delenv("HAR_XLA_FLAGS")
    xla_flags.apply()
    words = os.environ["XLA_FLAGS"].split()
    assert words[:2] == mine.split()
    assert sum("latency_hiding" in word for word in words) == 1
    xla_flags.apply()
    assert os.environ["XLA_FLAGS"].split() == words, "a second call changes nothing"


def test_xla_accepts_every_flag_that_is_set(environment):
    """The flags of a GPU, parsed by the XLA that is installed, which ends a process at one that it doesn't know."""
    environment.setenv("JAX_PLATFORMS", "cuda")
    xla_flags.apply()
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    unknown = environment | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_gpu_no_such_flag=true"}
    done = subprocess.run([sys.executable, "-c", code], env=unknown, capture_output=True, text=True)
    assert done.returncode != 0
