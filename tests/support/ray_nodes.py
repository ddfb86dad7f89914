"""A Ray cluster of several nodes on this machine, in a process of its own that ends with the test.

  python -m tests.support.ray_nodes NUM_CPUS_OF_NODE ...

Prints a line of JSON, {"address": HOST:PORT, "raylets": [process id of each node, the head first]}, once and again for
each line of standard input, for which it adds a node of one CPU. It ends with standard input.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


def main() -> None:
    first, *others = [int(text) for text in sys.argv[1:]]
    fast = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": first, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": fast}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short path
        os.environ["RAY_TMPDIR"] = folder  # the address is written to its folder `ray`, which must exist
        Path(folder, "ray").mkdir()
        serve(Cluster(initialize_head=True, head_node_args={**head, "temp_dir": folder}), others)


def serve(cluster: Cluster, others: list[int]) -> None:
    """Add the other nodes, and further ones as they are asked for."""
    try:
        raylets = [_raylet(cluster.head_node)]
        raylets += [_add_node(cluster, count) for count in others]
        while True:
            print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
            if not sys.stdin.readline():
                break
            raylets.append(_add_node(cluster, 1))
    finally:
        cluster.shutdown()


def _add_node(cluster: Cluster, num_cpus: int) -> int:
    """Start a node and return its process id. It isn't waited for: the cluster takes it in when it is there."""
    return _raylet(cluster.add_node(wait=False, num_cpus=num_cpus, object_store_memory=STORE_BYTES))


def _raylet(node: object) -> int:
    (process,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return process.process.pid


if __name__ == "__main__":
    main()
