"""The number of CPU cores that this process may use: its affinity and its container can allow fewer than there are."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return the cores allowed by affinity and by the cgroup's quota, rounded down: more threads would be throttled."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(CGROUPS, Path("/proc/self/cgroup"))
    return max(1, min(cores, int(quota))) if quota is not None else cores


def cpu_quota(root: Path, membership: Path) -> float | None:
    """Return the CPU quota of the process's cgroups in cores, the smallest one; None: no limit.

    Args:
      root: the folder where cgroups are mounted, version 2 or version 1 (with the cpu controller in it).
      membership: the file that lists the process's cgroups.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path can be the host's; only the mounted root is visible then.
        for folder in (group, *group.parents):
            quotas += _quota_of(folder)
            if folder == base:
                break
    return min(quotas, default=None)


def _quota_of(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError):
        return []
