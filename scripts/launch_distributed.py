"""Run a command as several processes on this machine, with simulated CPU devices; for development and tests.

  python scripts/launch_distributed.py --processes=2 --devices_per_process=2 -- \\
      scripts/train.py --config=configs/demo.py --workdir=runs/demo

Each line of output begins with the process's number. SIGTERM and SIGINT are passed to all processes. Exits 0 when all
did; otherwise with the code of the first failure (128 + N if signal N killed it), after which the others have --grace_s
seconds to end. No process remains, however the launcher ends.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from clip_har_jax import cli
from clip_har_jax.errors import UserError

POLL_S = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="number of them, e.g. --processes=2")
    parser.add_argument(
        "--devices_per_process", type=int, default=1, metavar="N", help="of each, e.g. --devices_per_process=2"
    )
    parser.add_argument(
        "--grace_s", type=float, default=10, metavar="S", help="for the others after a failure, e.g. --grace_s=10"
    )
    parser.add_argument("command", nargs="+", help="after --: a Python file and its flags, or any program")
    arguments = parser.parse_args()
    if arguments.processes < 1 or arguments.devices_per_process < 1:
        parser.error("--processes and --devices_per_process: at least 1")
    command = arguments.command
    if command[0].endswith(".py"):
        command = [sys.executable, *command]
    processes: list[subprocess.Popen[str]] = []
    handed_on: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        handed_on.append(number)
        for process in processes:
            process.send_signal(number)

    address = f"127.0.0.1:{free_port()}"
    for index in range(arguments.processes):
        environment = environment_of(index, arguments.processes, arguments.devices_per_process, address)
        processes.append(start(command, environment))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    relays = [relay for index, process in enumerate(processes) for relay in start_relays(index, process)]
    code = wait(processes, arguments.grace_s, handed_on)
    for relay in relays:
        relay.join(timeout=1)  # a grandchild may keep a pipe open for longer
    return code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of(index: int, num_processes: int, num_devices: int, address: str) -> dict[str, str]:
    """Return the variables that `parallel.rendezvous.find_group` reads, and those for simulated CPU devices."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # closed to the network
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={num_devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process in its own group, so that Ctrl-C reaches it once: through the launcher."""
    launcher = os.getpid()

    def die_with_launcher() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
            preexec_fn=die_with_launcher,
        )
    except OSError as error:
        raise UserError(f"{command[0]}: can't be started ({error.strerror})") from error


def start_relays(index: int, process: subprocess.Popen[str]) -> list[threading.Thread]:
    """Start threads that copy a process's output to the launcher's, each line whole, after the process's number."""

    def relay(source: IO[str] | None, target: IO[str]) -> None:
        assert source is not None
        for line in source:
            text = line.rstrip("\n")
            target.write(f"[{index}] {text}\n")
            target.flush()

    streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [threading.Thread(target=relay, args=pair, daemon=True) for pair in streams]
    for thread in threads:
        thread.start()
    return threads


def wait(processes: Sequence[subprocess.Popen[str]], grace_s: float, handed_on: Sequence[int]) -> int:
    """Wait for all; return the first failing exit code, or 0. After a failure, kill the others after `grace_s`."""
    first, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = [index for index, code in enumerate(codes) if code]
        if failed and not first:
            code = processes[failed[0]].returncode
            first = code if code > 0 else 128 - code
            if first - 128 not in handed_on:
                print(f"process {failed[0]} exited with {first}; the rest have {grace_s:g} s", file=sys.stderr)
                deadline = time.monotonic() + grace_s
        if None not in codes:
            return first
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_S)


if __name__ == "__main__":
    cli.run(main)
