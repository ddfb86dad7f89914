"""How many cores this process may use: fewer than the machine has where it is bound to some, or in a container."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores by affinity and by the control group's quota, rounded down: what is over is throttled with the rest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(CGROUPS, Path("/proc/self/cgroup"))
    return max(1, min(cores, int(quota))) if quota is not None else cores


def cpu_quota(root: Path, membership: Path) -> float | None:
    """Cores' worth of time that the control groups of the process allow, the tightest; None: as much as there is.

    Args:
      root: where the groups are mounted, in version 2 or in version 1 (cpu beneath it).
      membership: the file that names the process's groups.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
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
        # In a container the path may be the host's, of which only the mount itself is seen.
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
