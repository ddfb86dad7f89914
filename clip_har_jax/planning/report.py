"""A plan as text: a table of the variants, and the recommendation."""

import sys

from rich.console import Console
from rich.table import Table

from clip_har_jax.parallel.topology import GIB
from clip_har_jax.planning.cost import VariantCost, mesh_name
from clip_har_jax.planning.plan import Plan, describe_variant

_SECONDS = ("compute s", "memory s", "links s", "at least s", "about s")


def print_plan(result: Plan) -> None:
    """Print the variants as a table, the fastest first, and the recommendation."""
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    planned_step, machine, count = result.planned_step, result.machine, len(result.machine.devices)
    config = planned_step.config
    print(
        f"{config.model.name}, batches of {config.train.global_batch_size:,} images and {planned_step.num_prompts} "
        f"prompts on {machine.topology}: {count} x {machine.devices[0].device_kind}, "
        f"{result.model_flops / count / 1e12:,.1f} TFLOP each a step"
    )
    table = Table()
    memory = f"GiB of {machine.memory_bytes / GIB:.2f}" if machine.memory_bytes else "GiB"
    cost = [*(["chip-hours"] if result.num_steps else []), *(["price"] if _has_price(result) else [])]
    for name in ("mesh", "remat", "parts", memory, *_SECONDS, "MFU <=", "MFU ~", *cost, "verdict"):
        table.add_column(name, justify="left" if name in ("mesh", "remat", "verdict") else "right")
    for each in sorted(result.candidates, key=lambda each: (not each.fits, each.cost)):
        table.add_row(*_row(each, result))
    console.print(table)
    if (best := result.recommended) is None:
        print(f"Nothing fits. As configured: {describe_variant(result.candidates[0], machine)}")
        return
    _print_best(result, best)
    print(f"As configured ({result.configured}): {describe_variant(result.candidates[0], machine)}")
    print(f"Recommended: {' '.join(best.variant.overrides)}")


def _print_best(result: Plan, best: VariantCost) -> None:
    """Print memory, traffic and price of the recommended variant."""
    assert best.memory is not None and best.traffic is not None
    parts = (f"{value / GIB:.2f} {name.removesuffix('_bytes')}" for name, value in vars(best.memory).items())
    print(f"Memory of the recommended, GiB: {', '.join(parts)}")
    sent = (f"{each.count:,} {kind} {each.bytes / 1e9:.2f} GB" for kind, each in best.traffic.collectives.items())
    print(f"Sent by each device in a step: {', '.join(sent) or 'nothing'}")
    if result.machine.chip is None:
        print("The speed of this chip isn't known here: the least work counts as the fastest")
        return
    chip, moved = result.machine.chip, best.traffic.memory_bytes
    print(
        f"Roofline: {best.flops_per_device or 0:,} FLOPs and {moved:,} bytes of memory traffic a step and device, "
        f"{(best.flops_per_device or 0) / max(moved, 1):.0f} FLOPs a byte (memory limits below "
        f"{chip.peak_flops / chip.memory_bandwidth:.0f})"
    )
    print("Largest operations that memory limits:")
    for each in result.memory_bound(best):
        print(
            f"  {each.name}: {each.memory_bytes / 1e9:.2f} GB, {each.memory_bytes / max(moved, 1):.0%} of the traffic, "
            f"{each.times:,} times a step; {each.source or 'made by the compiler'}"
        )
    if result.num_steps is None:
        print("Length of the run unknown: --num_examples=N or --config.train.num_steps=N gives the chip-hours")
    elif (hours := result.chip_hours(best)) is not None:
        price = "" if (cost := result.price(best)) is None else f", price {cost:,.2f}"
        print(f"Training of {result.num_steps:,} steps: {hours:,.1f} chip-hours on {result.num_chips} chips{price}")


def _has_price(result: Plan) -> bool:
    return result.num_steps is not None and result.price_per_chip_hour is not None


def _row(candidate: VariantCost, result: Plan) -> list[str]:
    variant, times, machine = candidate.variant, candidate.times, result.machine
    row = [mesh_name(variant.mesh), variant.remat, str(variant.accumulation_steps)]
    row.append("" if candidate.needed_bytes is None else f"{candidate.needed_bytes / GIB:.2f}")
    short = describe_variant(candidate, machine)
    short = short.split(",")[0] if candidate.needed_bytes else short  # the sizes have columns of their own
    hours, price = result.chip_hours(candidate), result.price(candidate)
    cost = ["" if hours is None else f"{hours:,.1f}"] if result.num_steps else []
    cost += ["" if price is None else f"{price:,.2f}"] if _has_price(result) else []
    if times is None:
        return [*row, *[""] * 7, *cost, short]
    seconds = (times.compute_s, times.memory_s, times.interconnect_s, times.bound_s, times.estimate_s)
    shares = (times.mfu_bound, times.mfu_estimate)
    limit = f"{short}; limited by {times.bound_by}"
    return [*row, *(f"{value:.3g}" for value in seconds), *(f"{value:.0%}" for value in shares), *cost, limit]
