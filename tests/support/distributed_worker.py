"""One process of the runs in test_distributed.py: joins the others, does as its mode says, prints JSON."""

import json
import os
import time

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from clip_har_jax.parallel import distributed, jax_private
from clip_har_jax.training.guards import StopSignal


def alone():
    """Return a single process: nothing to join, and no device was asked for."""
    distributed.barrier("alone", 1)
    seen = {"value": distributed.broadcast([1]), "stop": [distributed.agree_to_stop(i, bool(i)) for i in range(2)]}
    return seen | {"is_main": distributed.is_main(), "touched_devices": jax_private.devices_are_initialized()}


def talk():
    """What process 0 says, what the devices hold together, and who is late."""
    import jax

    rows = sharded_rows()
    fetched = distributed.fetch({"rows": rows, "sum": jax.jit(lambda x: x.sum())(rows)})
    seen = {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "is_main": distributed.is_main(),
        "value": [distributed.broadcast({"from": jax.process_index(), "call": call}) for call in range(2)],
        "gathered": [distributed.gather({"from": jax.process_index(), "call": call}) for call in range(2)],
        "fetched": {name: None if leaf is None else leaf.tolist() for name, leaf in fetched.items()},
    }
    distributed.barrier("all here", 10)
    if distributed.is_main():
        try:
            distributed.barrier("too early", 0.5)
        except RuntimeError as error:
            seen["late"] = str(error)
    # Asked to stop at the very end, when the others are about to go.
    distributed.barrier("last steps", 10)
    for step in range(1, 4):
        distributed.agree_to_stop(step, step == 3 and not distributed.is_main())
    return seen


def stop():
    """Steps until any process is told to stop; the sum over all devices keeps the processes together."""
    import jax

    rows = sharded_rows()
    step_function = jax.jit(lambda x: x + x.sum() * 1e-9)
    with StopSignal() as signals:
        for step in range(1, 100_000):
            rows = step_function(rows)
            if step % 10 == 0:
                rows.block_until_ready()
            if step == 20:
                print(json.dumps({"pid": os.getpid()}), flush=True)
            time.sleep(0.002)
            if distributed.agree_to_stop(step, signals.received is not None):
                return {"stopped": step, "signalled": signals.received is not None}
    raise AssertionError("never stopped")


def mistake():
    """Return the same mistake on all processes."""
    raise UserError("a mistake that all make")


def crash():
    """Return a bug on one process, while the other waits for it in a collective."""
    rows = sharded_rows()
    if distributed.is_main():
        return float(rows.sum())
    raise ZeroDivisionError("a bug on one host")


def sharded_rows():
    import jax
    import numpy as np

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return jax.make_array_from_callback((8,), sharding, lambda index: np.arange(8.0, dtype=np.float32)[index])


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("mode")
    cli.add_process_flags(parser)
    arguments = parser.parse_args()
    with distributed.join(**cli.process_flags(arguments)):
        print(json.dumps(globals()[arguments.mode]()), flush=True)


if __name__ == "__main__":
    cli.run(main)
