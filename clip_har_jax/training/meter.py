"""Metrics of training steps, read one step late, with throughput and use of the machine."""

import time
from dataclasses import dataclass, field
from functools import reduce

import jax
import numpy as np
import psutil

from clip_har_jax.training.sinks import Metrics, to_jsonable
from clip_har_jax.training.steps import PairMetrics, TrainMetrics

_PROCESS = psutil.Process()


@dataclass
class Meter:
    """The device metrics of the steps since the last log, and the time that they waited for data.

    Reading a metric waits for its step; `read` is therefore called one step late, when the device has the next one.
    """

    flops_per_step: int
    peak_flops: float | None  # of all devices together
    global_batch_size: int
    metrics: list[TrainMetrics | PairMetrics] = field(default_factory=list)
    data_wait_s: float = 0.0
    begin: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Start an interval now."""
        self.metrics, self.data_wait_s, self.begin = [], 0.0, time.monotonic()

    def read(self) -> Metrics:
        """Return the averages of the interval and start the next one."""
        total = reduce(lambda a, b: a.merge(b), jax.device_get(self.metrics))
        elapsed, steps, waited = time.monotonic() - self.begin, len(self.metrics), self.data_wait_s
        self.restart()
        with np.errstate(invalid="ignore"):  # a mean over no examples, if all updates were skipped
            computed = total.compute()
        values: dict[str, float | None] = {f"train/{name}": to_jsonable(value) for name, value in computed.items()}
        values["train/images_per_s"] = steps * self.global_batch_size / elapsed
        values["train/data_wait_fraction"] = waited / elapsed
        peak = self.peak_flops
        values["train/mfu"] = None if peak is None else steps * self.flops_per_step / elapsed / peak
        return values | system_metrics()


def system_metrics() -> dict[str, float | None]:
    """Return CPU use since the last call (100 per busy core), memory use, and the memory of the fullest device.

    Device memory is None if the platform doesn't report it, as on CPUs.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [float(stat["bytes_in_use"]) for stat in stats if "bytes_in_use" in stat]
    return {
        "system/cpu_percent": _PROCESS.cpu_percent(),
        "system/memory_bytes": float(_PROCESS.memory_info().rss),
        "system/device_memory_bytes": max(used) if used else None,
    }
