"""What a run takes of its machine."""

import jax
import psutil

_PROCESS = psutil.Process()


def system_metrics() -> dict[str, float | None]:
    """CPU use of this process since the last call (100 a busy core), its memory, and the fullest device's.

    Device memory is None where the platform doesn't say, as on a CPU.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [float(stat["bytes_in_use"]) for stat in stats if "bytes_in_use" in stat]
    return {
        "system/cpu_percent": _PROCESS.cpu_percent(),
        "system/memory_bytes": float(_PROCESS.memory_info().rss),
        "system/device_memory_bytes": max(used) if used else None,
    }
