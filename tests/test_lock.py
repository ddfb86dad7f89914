"""The lock of a folder: one writer at a time, dead ones noticed, on one host and over several."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from clip_har_jax.errors import UserError
from clip_har_jax.lock import FolderLock

HOLD = """
import sys, time
from etils import epath
from clip_har_jax.lock import FolderLock
with FolderLock(epath.Path(sys.argv[1]), renew_s=0.2):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def lock_on(tmp_path, **kwargs):
    return FolderLock(epath.Path(tmp_path), **kwargs)


def test_a_second_run_is_stopped_by_name(holder, tmp_path):
    with pytest.raises(UserError) as error, lock_on(tmp_path):
        pass
    named = json.loads((tmp_path / "lock.json").read_text())
    assert named["process"] == holder.pid
    for part in (named["host"], str(holder.pid), named["started"], "--workdir"):
        assert part in str(error.value)


@pytest.mark.timeout(60)
def test_a_killed_run_leaves_the_folder_free_at_once(holder, tmp_path):
    """Nobody watches for `patience_s`, which only silent writers on other hosts need."""
    holder.send_signal(signal.SIGKILL)  # and it isn't waited for: what is left is a zombie of the same number
    time.sleep(0.3)
    with lock_on(tmp_path, patience_s=3600.0):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_a_live_run_on_another_host_is_seen_by_its_renewals(tmp_path):
    """Its process number says nothing here."""
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "t", "renewed": 1}))
    renew = "import json, sys, time\nfor n in range(2, 40):\n    time.sleep(0.2)\n"
    renew += "    open(sys.argv[1], 'w').write(json.dumps({'host': 'elsewhere', 'token': 't', 'renewed': n}))\n"
    other = subprocess.Popen([sys.executable, "-c", renew, str(tmp_path / "lock.json")])
    try:
        with pytest.raises(UserError, match="host elsewhere"), lock_on(tmp_path, patience_s=8.0):
            pass
    finally:
        other.kill()
        other.wait()


def test_a_dead_run_on_another_host_is_waited_for_and_replaced(tmp_path):
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "t", "renewed": 1}))
    with lock_on(tmp_path, patience_s=1.0) as lock:
        lock.check()


def test_a_run_that_lost_its_folder_stops(tmp_path):
    with lock_on(tmp_path, renew_s=0.1) as lock:
        (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "process": 7, "token": "t"}))
        time.sleep(0.5)
        with pytest.raises(UserError, match="taken over by process 7 on host elsewhere"):
            lock.check()
    assert (tmp_path / "lock.json").exists()  # it is the other's


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"host": "HOST", "process": "x", "token": "t"}'])
def test_a_damaged_lock_is_nobodys(tmp_path, text):
    (tmp_path / "lock.json").write_text(text.replace("HOST", socket.gethostname()))
    with lock_on(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_a_dead_holder_without_a_start_time_holds_nothing(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "lock.json").write_text(json.dumps({"host": socket.gethostname(), "process": ended.pid, "token": "t"}))
    with lock_on(tmp_path, patience_s=0.1):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


CLAIM = """
import sys, time
from pathlib import Path
from clip_har_jax.errors import UserError
from clip_har_jax.lock import FolderLock
while time.time() < float(sys.argv[2]):
    pass
try:
    with FolderLock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(3)
except UserError as error:
    print(error)
"""


def test_of_many_that_start_together_one_writes(tmp_path):
    """Two that both find no lock must not both go on."""
    go = str(time.time() + 2)
    claims = [
        subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path), go], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [process.communicate()[0] for process in claims]
    assert sum(line == "held\n" for line in said) == 1
    assert sum("is writing here" in line for line in said) == 5


def test_the_same_number_in_another_container_is_another_process(tmp_path):
    """Containers of one host name number their processes alike."""
    holder = {"host": socket.gethostname(), "pid_namespace": "pid:[1]", "process": os.getpid(), "token": "t"}
    (tmp_path / "lock.json").write_text(json.dumps(holder))
    begin = time.monotonic()
    with lock_on(tmp_path, patience_s=1.0):
        assert time.monotonic() - begin >= 1.0  # its renewals were waited for
