"""The time of a step by the roofline model (Williams et al. 2009), and an estimate above that bound."""

from dataclasses import dataclass

from clip_har_jax.parallel.topology import Chip
from clip_har_jax.planning.traffic import Traffic


@dataclass(frozen=True)
class Times:
    """The time of a step: its lower bound by the roofline, and an estimate."""

    compute_s: float  # matrix products at the chip's peak
    memory_s: float  # traffic with main memory at its bandwidth
    interconnect_s: float  # sent bytes over the bandwidth of all links of a device
    bound_s: float  # the largest of these: all three overlap perfectly
    bound_by: str
    estimate_s: float
    estimate_by: str  # compiler: its cost model (TPUs only) plus sending; no overlap: the sum of the three
    mfu_bound: float
    mfu_estimate: float


def estimate(chip: Chip, flops: int, traffic: Traffic, model_flops: float) -> Times:
    """Return the roofline bound of a step (Williams et al. 2009), and an estimate of its time.

    Args:
      chip: one device.
      flops: of its matrix products in a step, rematerialisation included.
      traffic: its traffic in a step.
      model_flops: its share of the model FLOPs, by which the MFU is defined.
    """
    parts = {
        "compute": flops / chip.peak_flops,
        "memory": traffic.memory_bytes / chip.memory_bandwidth,
        "interconnect": traffic.sent_bytes / chip.interconnect_bandwidth,
    }
    bound_by = max(parts, key=lambda name: parts[name])
    on_chip_s = parts["compute"] + parts["memory"]
    by_compiler = chip.clock_hz is not None and traffic.cycles > 0
    if by_compiler:
        on_chip_s = max(parts["compute"], parts["memory"], traffic.cycles / (chip.clock_hz or 1))
    estimate_s = on_chip_s + parts["interconnect"]
    ideal_s = model_flops / chip.peak_flops
    return Times(
        compute_s=parts["compute"],
        memory_s=parts["memory"],
        interconnect_s=parts["interconnect"],
        bound_s=parts[bound_by],
        bound_by=bound_by,
        estimate_s=estimate_s,
        estimate_by="compiler" if by_compiler else "no overlap",
        mfu_bound=ideal_s / parts[bound_by],
        mfu_estimate=ideal_s / estimate_s,
    )
