"""Faults, for real: processes killed at any moment, machines that change, disks that fill up, numbers that overflow."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.support.model_folders import write_images, write_model
from tests.support.runs import LABELS, ROOT, TRAIN, environment, finish, params_of, start_run, write_config

INSTRUMENTED = ROOT / "tests" / "support" / "instrumented_train.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a folder of weights and one of images."""
    root = tmp_path_factory.mktemp("start")
    return write_model(root / "model"), write_images(root / "images", LABELS, per_class=8)


def steps_on_disk(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def logged_steps(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}\n")]


def wait_until(condition, process, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def saving(workdir):
    """Return the folders of saves that are in progress, or that a kill ended: (name, inode)."""
    folder, found = workdir / "checkpoints", set()
    for path in folder.glob("*.orbax-checkpoint-tmp*") if folder.exists() else []:
        with contextlib.suppress(FileNotFoundError):  # the save ended meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def error_lines(stderr):
    """What a person sees, less what XLA says of its cache."""
    return [
        line for line in stderr.splitlines() if line.strip() and not line.startswith(("E1", "W1", "I1", "E0", "W0"))
    ]


@pytest.mark.slow
def test_twenty_kills_lose_nothing_but_the_steps_since_the_last_save(start, tmp_path):
    """SIGKILL at random moments, and in the middle of saves; at the end the weights are those of an unbroken run."""
    num_kills, rng, during_save = 20, random.Random(0), 0
    config, workdir = write_config(tmp_path, start, num_steps=400), tmp_path / "killed"
    for number in range(num_kills):
        before, left = steps_on_disk(workdir), saving(workdir)  # by the kill before
        process = start_run(config, workdir)
        if number % 2:
            wait_until(lambda left=left: saving(workdir) - left, process)
        else:
            time.sleep(rng.uniform(1.0, 10.0))
        process.kill()
        _, stdout, _ = finish(process)
        during_save += bool(saving(workdir) - left)
        after = steps_on_disk(workdir)
        assert max(after, default=0) >= max(before, default=0)
        if "run " in stdout:
            assert (f"continuing at step {before[-1]}" in stdout) if before else ("continuing" not in stdout)
        assert max(after, default=0) < 400, "the run ended before all kills; raise num_steps"
    assert during_save >= 5
    rarely = "--config.checkpoint.every_steps=100000"
    code, stdout, stderr = finish(start_run(config, workdir, rarely))
    assert code == 0, stderr
    assert "damaged" not in stdout
    assert not saving(workdir)
    whole = tmp_path / "whole"
    assert finish(start_run(config, whole, rarely))[0] == 0
    ours, theirs = params_of(workdir / "model"), params_of(whole / "model")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert losses(workdir) == losses(whole)
    record = json.loads((workdir / "run.json").read_text())
    assert record["starts"] >= num_kills / 2
    print(f"{num_kills} kills, {during_save} in the middle of a save")


@pytest.mark.slow
def test_one_life_on_four_machines(start, tmp_path):
    """8 devices, then 4, then 1, then 2 processes with 2 each: the batches and the losses of an unbroken run.

    The rate is small, since Adam makes steps of full size out of gradients that are nothing but rounding.
    """
    num_steps = 120
    config = write_config(tmp_path, start, num_steps, save_every=1000, learning_rate=1e-4)
    for name in ("notes", "whole_notes"):
        (tmp_path / name).mkdir()
    workdir, whole = tmp_path / "moved", tmp_path / "whole"
    env = environment(8, NOTES=tmp_path / "whole_notes")
    assert finish(start_run(config, whole, script=INSTRUMENTED, env=env))[0] == 0
    ends: list[Any] = []
    for devices, strategy in ((8, "dp"), (4, "fsdp"), (1, "dp")):
        env = environment(devices, NOTES=tmp_path / "notes")
        more = f"--config.mesh.strategy={strategy}"
        process = start_run(config, workdir, more, script=INSTRUMENTED, env=env)
        last = ends[-1] if ends else 0
        wait_until(lambda last=last: max(logged_steps(workdir), default=0) > last + 3, process)
        process.send_signal(signal.SIGTERM)
        code, _, stderr = finish(process)
        assert code == 128 + signal.SIGTERM, stderr
        ends.append(steps_on_disk(workdir)[-1])
        assert last < ends[-1] < num_steps, "the machine must change in the middle of the run"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch_distributed.py"),
        "--processes=2",
        "--devices_per_process=2",
    ]
    command += ["--", str(INSTRUMENTED), f"--config={config}", f"--workdir={workdir}", "--config.mesh.strategy=fsdp"]
    command += [f"--profile_steps={ends[-1] + 2}:{ends[-1] + 3}"]
    done = subprocess.run(
        command, env=environment(NOTES=tmp_path / "notes"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert f"continuing at step {ends[-1]}" in done.stdout
    record = json.loads((workdir / "run.json").read_text())
    assert record["num_processes"] == 2
    assert record["mesh"]["fsdp"] == 4
    assert record["starts"] == 4
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1  # the processes don't write over one another
    wanted = rows_by_step(tmp_path / "whole_notes")
    assert rows_by_step(tmp_path / "notes", ends[-1]).keys() == wanted.keys()
    for step, rows in rows_by_step(tmp_path / "notes", ends[-1]).items():
        assert rows == wanted[step], f"the batch of step {step} differs"
    ours, theirs = losses(workdir), losses(whole)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[step] for step in theirs], list(theirs.values()), rtol=1e-5, atol=1e-5)


def rows_by_step(notes, two_processes_from=None):
    """Return the checksums of each step's rows, of both processes where there were two."""
    rows: dict[Any, Any] = {}
    first = [json.loads(line) for line in (notes / "batches.0.jsonl").read_text().splitlines()]
    second = notes / "batches.1.jsonl"
    others = [json.loads(line) for line in second.read_text().splitlines()] if second.exists() else []
    later = {line["step"]: line["rows"] for line in others}
    for line in first:
        of_step = line["rows"] if len(line["rows"]) == 8 else line["rows"] + later[line["step"]]
        assert rows.setdefault(line["step"], of_step) == of_step  # read ahead by one start, read again by the next
    return {step: of_step for step, of_step in rows.items() if step <= 120}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_at_one_step(start, tmp_path, number):
    config, workdir = write_config(tmp_path, start, num_steps=5000, save_every=100_000), tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch_distributed.py"),
        "--processes=2",
        "--devices_per_process=2",
    ]
    command += ["--", str(TRAIN), f"--config={config}", f"--workdir={workdir}"]
    launcher = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: max(logged_steps(workdir), default=0) > 5, launcher)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(max(children)), number)
    code, stdout, stderr = finish(launcher)
    assert code in {128 + number, 128 + signal.SIGTERM}, (stdout, stderr)  # of the one that ended first
    (step,) = steps_on_disk(workdir)
    assert f"at step {step}, saved" in stdout


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint(start, tmp_path):
    """A limit on the size of files, in the middle of a run: one line, exit 2, and the run continues when it's gone."""
    config, workdir = write_config(tmp_path, start, num_steps=30, save_every=5), tmp_path / "run"
    process = start_run(config, workdir, "--config.checkpoint.every_steps=5")
    wait_until(lambda: steps_on_disk(workdir), process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    kept = steps_on_disk(workdir)
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash"]  # in kB
    code, stdout, stderr = finish(start_run(config, workdir, before=limited))
    assert code == 2, stderr
    assert len(error_lines(stderr)) == 1, stderr
    assert "can't be saved" in stderr
    assert steps_on_disk(workdir)[-1] == kept[-1]
    code, stdout, _ = finish(start_run(config, workdir))
    assert code == 0
    assert f"continuing at step {kept[-1]}" in stdout


@pytest.mark.slow
def test_a_second_run_in_the_folder_stops_and_the_first_goes_on(start, tmp_path):
    config, workdir = write_config(tmp_path, start, num_steps=200), tmp_path / "run"
    first = start_run(config, workdir)
    wait_until(lambda: logged_steps(workdir), first)
    code, _, stderr = finish(start_run(config, workdir))
    assert code == 2
    assert len(error_lines(stderr)) == 1
    assert f"process {first.pid}" in stderr
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    code, stdout, _ = finish(first)
    assert code == 128 + signal.SIGINT
    assert "the same command continues" in stdout


@pytest.mark.slow
def test_a_restart_compiles_nothing(start, tmp_path):
    config, workdir = write_config(tmp_path, start, num_steps=6, save_every=3), tmp_path / "run"
    env = environment(NOTES=tmp_path, XDG_CACHE_HOME=tmp_path / "cache")
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        env.pop(name, None)
    counts = []
    for number in range(2):
        # Fits a head before the steps, so that its programs are counted too.
        run = start_run(config, workdir / str(number), "--config.method.name=lp_ft", script=INSTRUMENTED, env=env)
        assert finish(run)[0] == 0
        counts.append(json.loads((tmp_path / "compiled.0.json").read_text()))
    assert counts[0] > 10
    assert counts[1] == 0
