"""Several processes, for real: joining, agreeing, failing; the launcher; the recipes for clusters."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from clip_har_jax.parallel import rendezvous
from clip_har_jax.parallel.rendezvous import Group, find_group

ROOT = Path(__file__).parents[2]
WORKER = str(ROOT / "tests" / "support" / "distributed_worker.py")
LAUNCHER = (sys.executable, str(ROOT / "scripts" / "launch_distributed.py"))
CLUSTER_VARIABLES = re.compile(r"(JAX_(COORD|NUM_P|PROC|LOCAL)|SLURM_|OMPI_|KUBERNETES_|JOB_COMPLETION).*")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Whatever runs these tests, they see no cluster."""
    for name in filter(CLUSTER_VARIABLES.match, list(os.environ)):
        monkeypatch.delenv(name)


def start(*command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_launcher(*command, flags=("--processes=2", "--devices_per_process=2")):
    return start(*LAUNCHER, *flags, "--", *command)


def finish(process, timeout_s=60):
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes
            raise
    return process.returncode, stdout, stderr


def spoken(stdout):
    """Return the JSON that each process of a launcher printed, by process."""
    lines = re.findall(r"^\[(\d+)\] (\{.*)$", stdout, re.MULTILINE)
    return {number: [json.loads(text) for other, text in lines if other == number] for number, _ in lines}


def errors(stderr):
    return [line for line in stderr.splitlines() if line]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# Joining and talking


def test_processes_join_talk_and_leave():
    code, stdout, stderr = finish(start_launcher(WORKER, "talk"))
    assert code == 0, stderr
    common = {"processes": 2, "devices": 4, "value": [{"from": 0, "call": 0}, {"from": 0, "call": 1}]}
    first, second = ([{"from": i, "call": call} for call in range(2)] for i in range(2))
    assert spoken(stdout)["0"] == [
        common
        | {
            "is_main": True,
            "gathered": [list(both) for both in zip(first, second, strict=True)],
            "fetched": {"rows": [0, 1, 2, 3, 4, 5, 6, 7], "sum": 28},
            "late": "too early: process 1 didn't come within 0.5 s; see its log",
        }
    ]
    assert spoken(stdout)["1"] == [
        common | {"is_main": False, "gathered": [[value] for value in second], "fetched": {"rows": None, "sum": None}}
    ]


def test_a_single_process_joins_nothing_and_touches_no_device():
    code, stdout, stderr = finish(start(sys.executable, WORKER, "alone"))
    assert code == 0, stderr
    assert json.loads(stdout) == {"value": [1], "stop": [False, True], "is_main": True, "touched_devices": False}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number):
    launcher = start_launcher(WORKER, "stop")
    pids: dict[str, int] = {}
    said: list[str] = []
    for line in launcher.stdout:
        said.append(line)
        pids |= {process: lines[0]["pid"] for process, lines in spoken("".join(said)).items()}
        if len(pids) == 2:
            break
    os.kill(pids["1"], number)
    code, stdout, stderr = finish(launcher)
    assert code == 0, stderr
    stopped = {process: lines[-1] for process, lines in spoken("".join(said) + stdout).items()}
    assert stopped["0"]["stopped"] == stopped["1"]["stopped"] >= 20
    assert [stopped[process]["signalled"] for process in "01"] == [False, True]


# Not joining


@pytest.fixture(scope="module")
def failures():
    """Run that can't begin or that fail, all at once, since each waits rather than works: name -> what came of it."""
    ports = [rendezvous_port() for _ in range(4)]

    def one(port, num_processes, process_id, *flags):
        return start(
            *(sys.executable, WORKER, "talk", f"--coordinator_address=127.0.0.1:{port}", "--join_timeout_s=1"),
            *(f"--num_processes={num_processes}", f"--process_id={process_id}", *flags),
        )

    processes = {
        "unreachable": one(ports[0], 2, 1),
        "never joins": one(ports[1], 2, 0),
        "too many": one(ports[2], 2, 0),
        "unexpected": one(ports[2], 3, 2, "--join_timeout_s=20"),
        "told two": one(ports[3], 2, 0, "--join_timeout_s=20"),
        "told three": one(ports[3], 3, 1, "--join_timeout_s=20"),
        "mistake": start_launcher(WORKER, "mistake"),
    }
    return {name: finish(process) for name, process in processes.items()}


def rendezvous_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unreachable", r"process 1 can't reach the coordinator 127.0.0.1:\d+ within 1 s \(Connection refused\); .*"),
        ("never joins", r"process 0 can't join .*: not all 2 processes came within 1 s; see the others' logs"),
        ("too many", r"process 0 can't join .*: not all 2 processes came within 1 s; see the others' logs"),
        ("unexpected", r"process 2 can't join .*: process 0 was told of fewer than 3 processes"),
        ("told two", r"the processes were told different numbers of processes: 2, 3"),
        ("told three", r"the processes were told different numbers of processes: 2, 3"),
    ],
)
def test_who_cannot_join_says_why_in_one_line(failures, name, expected):
    code, stdout, stderr = failures[name]
    assert code == cli.EXIT_MISTAKE
    assert stdout == ""
    assert len(errors(stderr)) == 1 and re.fullmatch(f"error: {expected}", errors(stderr)[0]), stderr


def test_a_mistake_that_all_make_is_one_line_each(failures):
    code, _, stderr = failures["mistake"]
    assert code == cli.EXIT_MISTAKE
    lines = errors(stderr)
    assert sorted(line for line in lines if line.startswith("[")) == [
        f"[{index}] error: a mistake that all make" for index in range(2)
    ]


@pytest.mark.slow
def test_a_bug_on_one_host_ends_the_others_within_the_heartbeat_timeout():
    flags = ("--processes=2", "--grace_s=600")  # the launcher would wait longer than `finish` does
    code, _, stderr = finish(start_launcher(WORKER, "crash", "--heartbeat_timeout_s=5", flags=flags))
    assert code == 1
    assert "[1] ZeroDivisionError: a bug on one host" in stderr
    assert "another task died" in stderr


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 can't listen on port {port} .*; choose another port"):
            rendezvous.connect(Group(f"127.0.0.1:{port}", 2, 0), 1, 1, 1)


# Finding the others: (environment, the group)

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "head:8476"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (ADDRESS, None),
        (ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}, Group("head:8476", 4, 2)),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM, Group("node07:61441", 16, 9, (1,))),
        (SLURM | ADDRESS, Group("head:8476", 16, 9, (1,))),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Group("node07:61441", 16, 9)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI | OPEN_MPI_4, Group("10.96.0.1:62624", 4, 3, (1,))),
        (OPEN_MPI | ADDRESS, Group("head:8476", 4, 3, (1,))),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (KUBERNETES, None),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, None),
        (
            KUBERNETES | ADDRESS | {"JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2"},
            Group("head:8476", 2, 1),
        ),
    ],
)
def test_the_environment_says_who_the_others_are(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_group(None, None, None, 1) == expected


@pytest.mark.parametrize("several", [True, False])
def test_a_tpu_slice_is_found_by_jax(monkeypatch, several):
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    for module in ("cluster", "cloud_tpu_cluster"):
        monkeypatch.setattr(f"jax._src.clusters.{module}.running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other" if several else "localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "1" if several else "0")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "")
    assert find_group(None, None, None, 1) == (Group("localhost:8482", 2, 1) if several else None)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID: not given; .*"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' isn't a number"),
        (OPEN_MPI, "JAX_COORDINATOR_ADDRESS: not given; .*"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "1"}, "one pod of several .*"),
        (SLURM | {"SLURM_PROCID": "16"}, "JAX_PROCESS_ID=16: should be 0 to JAX_NUM_PROCESSES - 1, which is 15"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;"}, "JAX's cluster detection: Could not parse coordinator .*"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_group(None, None, None, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("head:8476", 2, None), "--process_id: not given; a run of several processes needs --coordinator_address, .*"),
        ((None, None, 0), "--coordinator_address, --num_processes: not given; .*"),
        (("head", 2, 1), "--coordinator_address=head: should be HOST:PORT, e.g. .*"),
        (("head:8476", 2, 2), "--process_id=2: should be 0 to --num_processes - 1, which is 1"),
        (("head:8476", 0, 0), "--num_processes=0: should be at least 1"),
    ],
)
def test_flags_that_are_incomplete_or_wrong_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        find_group(flags[0], flags[1], flags[2], 1)


def test_flags_come_before_the_environment(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_group("head:8476", 2, 1, 1) == Group("head:8476", 2, 1)
    assert find_group(None, 1, None, 1) is None


# The launcher, with processes that know nothing of JAX

PROGRAM = """
import os, signal, sys, time
index = int(os.environ["JAX_PROCESS_ID"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(40 + index))
print("pid", os.getpid(), flush=True)
print("to stderr", file=sys.stderr, flush=True)
if sys.argv[1] == "fail" and index == 1:
    sys.exit(3)
if sys.argv[1] != "end":
    time.sleep(600)  # longer than `finish` waits
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def read_pids(launcher):
    return [int(re.findall(r"^\[\d\] pid (\d+)\n$", launcher.stdout.readline())[0]) for _ in range(2)]


def test_the_launcher_prefixes_both_streams(program):
    code, stdout, stderr = finish(start_launcher(program, "end"))
    assert code == 0
    assert sorted(line[:8] for line in stdout.splitlines()) == ["[0] pid ", "[1] pid "]
    assert sorted(stderr.splitlines()) == ["[0] to stderr", "[1] to stderr"]


def test_the_launcher_gives_the_first_failing_code_and_ends_the_rest(program):
    launcher = start_launcher(program, "fail", flags=("--processes=2", "--grace_s=0.5"))
    pids = read_pids(launcher)
    code, _, stderr = finish(launcher)
    assert code == 3
    assert "process 1 exited with 3; the rest have 0.5 s" in stderr
    assert not any(map(is_running, pids))


def test_the_launcher_hands_signals_on(program):
    launcher = start_launcher(program, "wait")
    pids = read_pids(launcher)
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher)[0] in (40, 41)
    assert not any(map(is_running, pids))


def test_a_killed_launcher_leaves_no_process(program):
    launcher = start_launcher(program, "wait")
    pids = read_pids(launcher)
    launcher.kill()
    finish(launcher)
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_the_launcher_refuses_what_cannot_run():
    code, _, stderr = finish(start_launcher("no_such_program"))
    assert (code, stderr) == (2, "error: no_such_program: can't be started (No such file or directory)\n")


# Recipes


def train_flags():
    text = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"--[a-z_]+", text))


def check_command(words):
    """Every flag exists, and so does the config."""
    known = train_flags()
    for word in words:
        flag, _, value = word.partition("=")
        assert flag in known or flag.startswith("--config."), word
        if flag == "--config":
            assert (ROOT / value).is_file(), word


def manifest(folder):
    """Return the JobSet of an overlay, with its patches applied as kustomize does for those it uses."""
    overlay = yaml.safe_load((ROOT / "kubernetes" / "train" / folder / "kustomization.yaml").read_text())
    assert overlay["resources"] == ["../base"]
    jobset = yaml.safe_load((ROOT / "kubernetes" / "train" / "base" / "jobset.yaml").read_text())
    for operation in yaml.safe_load(overlay["patches"][0]["patch"]):
        *parents, last = operation["path"].strip("/").split("/")
        node = jobset
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        if isinstance(node, list):
            assert (operation["op"], last) == ("add", "-"), operation
            node.append(operation["value"])
            continue
        assert (last in node) == (operation["op"] == "replace"), operation
        node[last] = operation["value"]
    return jobset


@pytest.mark.parametrize(("folder", "resource"), [("tpu", "google.com/tpu"), ("gpu", "nvidia.com/gpu")])
def test_the_jobsets_run_commands_that_exist(folder, resource):
    jobset = manifest(folder)
    name = jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    program, *flags = container["args"]
    assert program == "scripts/train.py"
    check_command(flags)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] > 1
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert container["resources"]["limits"][resource] > 0
    environment = {item["name"]: item["value"] for item in container.get("env", ())}
    if folder == "gpu":
        assert environment["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{replicated['name']}-0-0.{name}:")
        assert environment["JAX_NUM_PROCESSES"] == str(job["completions"])


def test_the_slurm_script_runs_commands_that_exist():
    path = ROOT / "scripts" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    script = path.read_text()
    (example,) = re.findall(r"^#   sbatch scripts/slurm/train.sbatch (.*)$", script, re.MULTILINE)
    (command,) = re.findall(r"^srun .* python scripts/train.py (.*?)\"\$@\"", script, re.MULTILINE)
    check_command(shlex.split(command) + shlex.split(example))
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script, re.MULTILINE))
    assert options["signal"].startswith("TERM@") and "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives each task of Slurm one GPU
