"""Cooperation of the processes of a run: join, agree, exchange small values, leave; over `jax.distributed`.

In a single process nothing here waits or initialises a device. Values and barriers go through JAX's coordination
service (`jax_private.py`), which needs no device and so doesn't interfere with a training step.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from clip_har_jax.parallel import jax_private, rendezvous, xla_flags
from clip_har_jax.parallel.jax_private import coordination_client

# Key that JAX's preemption service watches (XLA's preemption_sync_manager.cc), and sets at SIGTERM.
_PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
_LEAVE_TOGETHER_S = 3  # processes that fail for the same reason fail within this time


@dataclass
class _Joined:
    """The state of this process in its group."""

    barrier_timeout_s: float = 600.0
    num_broadcasts: int = 0
    num_gathers: int = 0
    asked_to_stop: bool = False
    last_step: int = 0
    stopped: bool = False


_joined = _Joined()


@contextmanager
def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_timeout_s: int = 300,
    heartbeat_timeout_s: int = 100,
    barrier_timeout_s: int = 600,
) -> Iterator[None]:
    """Make this process part of a run for the duration of a `with` block; no effect for a run of one process.

    Call it before JAX initialises devices: it also sets XLA's flags. The first three arguments are given together, or
    found by `rendezvous.find_group`. In a group, an error in the block is printed as commands print it and ends this
    process at once, since the others may wait for it in a collective. They end when their connection to it breaks, or
    when its heartbeats stop.

    Args:
      coordinator_address: host:port of process 0.
      num_processes: of the run.
      process_id: of this process, from 0.
      join_timeout_s: limit for all processes to join; at least 6.
      heartbeat_timeout_s: a process that is silent for longer counts as dead, and ends the run.
      barrier_timeout_s: limit of `barrier`, `broadcast` and the end of the block.

    Raises:
      UserError: contradictory arguments or environment, or the coordinator can't be reached in time. If other processes
        don't join in time or don't fit together, the line is printed and the process exits with status 2.
    """
    xla_flags.apply()
    group = rendezvous.find_group(coordinator_address, num_processes, process_id, join_timeout_s)
    if group is None:
        yield
        return
    global _joined
    _joined = _Joined(barrier_timeout_s)
    rendezvous.connect(group, join_timeout_s, heartbeat_timeout_s, barrier_timeout_s)
    try:
        _check_count(group)
        yield
        _leave_together("the end", barrier_timeout_s)
    except (Exception, KeyboardInterrupt) as error:
        _leave_at_once(cli.report(error))


def is_main() -> bool:
    """Return whether this is process 0; it alone prints, and writes the files that all share."""
    return jax_private.process_id() == 0


def barrier(name: str, timeout_s: float | None = None) -> None:
    """Wait until all processes call this.

    Raises:
      RuntimeError: some don't within `timeout_s` (default: that of `join`); names them.
    """
    if (client := coordination_client()) is None:
        return
    timeout_s = timeout_s or _joined.barrier_timeout_s
    try:
        client.wait_at_barrier(name, round(1000 * timeout_s))
    except jax.errors.JaxRuntimeError as error:
        late = re.search(r"timed out task names:\s*((?:\d+\s+)+)", str(error))
        who = f"process {', '.join(late[1].split())}" if late else "not every process"
        raise RuntimeError(f"{name}: {who} didn't come within {timeout_s:g} s; see its log") from None


def broadcast(value: Any) -> Any:
    """Return process 0's value on all processes: small JSON data. All processes call it, in the same order.

    Raises:
      RuntimeError: process 0 doesn't call it within the barrier timeout of `join`.
    """
    if (client := coordination_client()) is None:
        return value
    _joined.num_broadcasts += 1
    key = f"clip_har_jax/broadcast/{_joined.num_broadcasts}"
    if is_main():
        client.key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(client.blocking_key_value_get(key, round(1000 * _joined.barrier_timeout_s)))
    except jax.errors.JaxRuntimeError:
        raise RuntimeError(f"process 0 said nothing within {_joined.barrier_timeout_s:g} s; see its log") from None


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in their order, on process 0; on the others, only their own.

    They are small JSON data. All processes call it, in the same order.

    Raises:
      RuntimeError: a process doesn't call it within the barrier timeout of `join`.
    """
    if (client := coordination_client()) is None:
        return [value]
    _joined.num_gathers += 1
    folder = f"clip_har_jax/gather/{_joined.num_gathers}/"
    if not is_main():
        client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(value))
        return [value]
    timeout_ms, values = round(1000 * _joined.barrier_timeout_s), [value]
    for process in range(1, jax.process_count()):
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{folder}{process}", timeout_ms)))
        except jax.errors.JaxRuntimeError:
            raise RuntimeError(f"process {process} said nothing within {timeout_ms / 1000:g} s; see its log") from None
    client.key_value_delete(folder)
    return values


def fetch(tree: Any) -> Any:
    """Return global arrays as NumPy arrays on process 0, and None elsewhere. All processes call it.

    One leaf is fetched after the other, so at most one is replicated on the devices at a time.
    """

    def one(leaf: Any) -> np.ndarray | None:
        value = _to_host(leaf)
        return value if is_main() else None

    return jax.tree.map(one, tree)


def fetch_to_all(tree: Any) -> Any:
    """Return global arrays as NumPy arrays on every process. All processes call it."""
    return jax.tree.map(_to_host, tree)


def _to_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(jax.device_get(leaf))
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def on_main(function: Callable[[], Any]) -> Any:
    """Run `function` on process 0 alone and return its result, which JSON can hold, on all processes.

    Raises:
      UserError: the one that `function` raised, on all processes.
    """
    outcome: dict[str, Any] = {}
    if is_main():
        try:
            outcome = {"value": function()}
        except UserError as error:
            outcome = {"error": str(error)}
    outcome = broadcast(outcome)
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def agree(yes: bool) -> bool:
    """Return whether all processes say yes. All processes call it, in the same order."""
    return yes if coordination_client() is None else bool(multihost_utils.process_allgather(np.asarray(yes)).all())


def share(tree: Any) -> Any:
    """Return process 0's host arrays on all processes; results computed on each may differ in their rounding."""
    if coordination_client() is None:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def agree_to_stop(step: int, requested: bool) -> bool:
    """Return whether the run stops after this step; all processes stop after the same one.

    Every process calls it once a step, with consecutive steps. Processes can be some steps apart between collectives,
    so JAX's preemption service finds a step that none has passed. Nothing is communicated until a stop is requested.

    Args:
      step: number of the step.
      requested: this process was asked to stop, in this step or before.
    """
    if (client := coordination_client()) is None:
        return requested
    if requested and not _joined.asked_to_stop:
        _joined.asked_to_stop = True
        now = datetime.now(UTC).isoformat()
        client.key_value_set(_PREEMPTION_NOTICE, now, allow_overwrite=True)
    _joined.last_step = step
    _joined.stopped = multihost_utils.reached_preemption_sync_point(step)
    return _joined.stopped


def _check_count(group: rendezvous.Group) -> None:
    """Check that all processes were given the same number of processes; JAX doesn't."""
    client, folder = coordination_client(), "clip_har_jax/num_processes/"
    assert client is not None
    client.key_value_set(f"{folder}{group.process_id}", str(group.num_processes))
    barrier("counted")
    counts = {int(count) for _, count in client.key_value_dir_get(folder)}
    if len(counts) > 1:
        raise UserError(
            f"the processes were told different numbers of processes: {', '.join(map(str, sorted(counts)))}"
        )


def _leave_together(where: str, timeout_s: float) -> None:
    """Wait for all processes, then shut JAX's coordination service down.

    Raises:
      RuntimeError: not all processes arrived in time.
    """
    barrier(where, timeout_s)
    _finish_agreement(timeout_s)
    barrier(f"{where}, agreed", timeout_s)
    jax.distributed.shutdown()


def _finish_agreement(timeout_s: float) -> None:
    """Take part in the agreement on a stop that was requested in the last steps, until it ends.

    JAX agrees in a thread of each process, which needs all of them. Its shutdown waits for that thread: a process that
    shut down during the agreement would wait for the others, and they for it.

    Raises:
      RuntimeError: there is no agreement in time.
    """
    client, deadline = coordination_client(), time.monotonic() + timeout_s
    assert client is not None
    try:
        client.key_value_try_get(_PREEMPTION_NOTICE)
    except jax.errors.JaxRuntimeError:  # not found: nobody requested a stop
        return
    while not _joined.stopped:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the processes didn't agree where to stop within {timeout_s:g} s; see their logs")
        time.sleep(0.01)
        agree_to_stop(_joined.last_step + 1, False)


def _leave_at_once(exit_code: int) -> None:
    """End this process after an error, without JAX's exit handler, which would wait for the other processes.

    If all processes fail for the same reason they leave together: if process 0 left first, with the coordination
    service, the others would report its loss instead of their own error.
    """
    with suppress(RuntimeError):
        _leave_together("an error", _LEAVE_TOGETHER_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
