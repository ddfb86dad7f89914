"""Which settings of a run fit a machine and are the fastest there, found by compiling few of them."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from clip_har_jax.config import REMAT, MeshConfig, RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.models.factory import known_config
from clip_har_jax.parallel.mesh import AXES, mesh_shape
from clip_har_jax.parallel.topology import GIB
from clip_har_jax.planning.cost import (
    Job,
    Machine,
    Variant,
    VariantCost,
    compile_variant,
    find_machine,
    make_program,
    mesh_name,
)

DEFAULT_NUM_CLASSES = 15  # of the Human Action Recognition set
STRATEGIES = ("fsdp", "dp", "fsdp_tp", "tp")


@dataclass(frozen=True)
class Plan:
    """What fits a machine, and what doesn't."""

    job: Job
    machine: Machine
    model_flops: int  # of a step over all devices, without what rematerialisation repeats
    configured: Variant
    outcomes: tuple[VariantCost, ...]
    seconds: float

    @property
    def recommended(self) -> VariantCost | None:
        """The fastest that fits."""
        return min((each for each in self.outcomes if each.fits), key=lambda each: each.cost, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of the JSON file."""
        config, best = self.job.config, self.recommended
        return {
            "topology": self.machine.topology,
            "num_devices": len(self.machine.devices),
            "device_kind": self.machine.devices[0].device_kind,
            "chip": self.machine.chip and dataclasses.asdict(self.machine.chip),
            "memory_bytes": self.machine.memory_bytes,
            "model": config.model.name,
            "global_batch_size": config.train.global_batch_size,
            "num_classes": self.job.num_classes,
            "num_prompts": self.job.num_prompts,
            "model_flops": self.model_flops,
            "configured": self.configured.overrides,
            "recommended": best and best.variant.overrides,
            "variants": [_to_dict(each, len(self.machine.devices)) for each in self.outcomes],
            "seconds": round(self.seconds, 1),
        }


def _to_dict(outcome: VariantCost, num_devices: int) -> dict[str, Any]:
    variant, values = outcome.variant, dataclasses.asdict(outcome)
    del values["variant"]
    mesh = dict(zip(AXES, mesh_shape(variant.mesh, num_devices), strict=True))
    settings = {"mesh": mesh, "accumulation_steps": variant.accumulation_steps, "remat": variant.remat}
    if outcome.memory is not None:
        values["memory"]["total_bytes"] = outcome.memory.total_bytes
    return {**settings, "overrides": variant.overrides, **values}


def plan(
    config: RunConfig,
    topology: str,
    *,
    num_classes: int | None = None,
    num_prompts: int | None = None,
    search: bool = True,
    max_minutes: float = 15.0,
    say: Callable[[str], object] = lambda line: None,
) -> Plan:
    """Compiles a run's training step for a machine, as configured and with other settings.

    Neither data nor weights are read.

    Args:
      config: the run.
      topology: 'local', or a TPU slice such as 'v5e:4x4'.
      num_classes: actions; None: those of `config.data.labels`, or 15.
      num_prompts: None: as many as the config's templates and descriptions make.
      search: try other settings than the config's.
      max_minutes: no compilation is begun that probably would end later.
      say: told of each step.

    Raises:
      UserError: an unknown topology or model, a batch or parameter that the mesh doesn't divide.
    """
    begin = time.monotonic()
    machine = find_machine(topology)
    num_classes = num_classes or len(config.data.labels) or DEFAULT_NUM_CLASSES
    described = sum(map(len, config.text.descriptions.values()))
    num_prompts = num_prompts or num_classes * len(config.text.templates) + described
    job = Job(config, known_config(config.model.name, config.model.image_size_px), num_classes, num_prompts)
    configured = Variant(config.mesh, config.train.accumulation_steps, config.model.remat)
    try:
        model_flops = make_program(job, machine, configured).flops_per_step(num_prompts)
    except UserError as error:
        raise UserError(f"--topology={topology}: {error}") from error
    tried = Search(job, machine, begin + 60 * max_minutes, say).run(configured, search)
    return Plan(job, machine, model_flops, configured, tuple(tried), time.monotonic() - begin)


class Search:
    """Tries variants, one setting after the other, each beginning with the best so far.

    Fewer parts mean fewer passes over the weights, so of each mesh and rematerialisation the fewest parts that fit are
    looked for; what is refused for its size is refused within seconds, and says how many parts needn't be tried.
    """

    def __init__(self, job: Job, machine: Machine, deadline: float, say: Callable[[str], object]):
        self.job, self.machine, self.deadline, self.say = job, machine, deadline, say
        self.outcomes: dict[Variant, VariantCost] = {}
        self.workers = min(4, os.cpu_count() or 1)  # a compilation keeps about one core busy

    def run(self, configured: Variant, search: bool) -> list[VariantCost]:
        """Return the outcomes of all that was tried, the config's own settings first."""
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = [pool.submit(self._begin, configured, search)]
            if search:
                others = self._meshes(configured.remat)[1:]
                waiting += [pool.submit(self._fit, mesh, configured.remat) for mesh in others]
            for future in waiting:
                future.result()
            if search:
                self._refine(pool)
        return sorted(self.outcomes.values(), key=lambda each: each.variant != configured)

    def _begin(self, configured: Variant, search: bool) -> None:
        self._try(configured)
        if search:
            self._fit(configured.mesh, configured.remat)

    def _refine(self, pool: ThreadPoolExecutor) -> None:
        """Change the rematerialisation of the best mesh, then the parts of the best settings."""
        if (best := self._best()) is None:
            return
        others = [remat for remat in REMAT if remat != best.variant.remat]
        list(pool.map(lambda remat: self._climb(best.variant.mesh, remat), others))
        while more_parts := self._with_more_parts():
            if None in pool.map(self._try, more_parts):
                break

    def _best(self) -> VariantCost | None:
        fitting = [each for each in list(self.outcomes.values()) if each.fits]
        return min(fitting, key=lambda each: each.cost, default=None)

    def _meshes(self, remat: str) -> list[MeshConfig]:
        """Return the config's own mesh, then those of the strategies that differ from it and from one another."""
        heads = {tower.num_heads for tower in (self.job.clip.vision, self.job.clip.text)}
        own, count = self.job.config.mesh, len(self.machine.devices)
        found = {mesh_shape(own, count): own}
        for strategy in STRATEGIES:
            mesh = MeshConfig(strategy)
            shape = mesh_shape(mesh, count)
            if mesh_name(own) != own.strategy:  # sizes that are set explicitly are only overridden by others
                mesh = MeshConfig(own.strategy, *shape)
            if whole := [count for count in heads if count % shape[2]]:
                reason = f"{shape[2]} devices on the tensor axis don't divide {min(whole)} heads"
                variant = Variant(mesh, 1, remat)
                self.outcomes.setdefault(variant, VariantCost(variant, "refused", reason))
            else:
                found.setdefault(shape, mesh)
        return list(found.values())

    def _parts(self, mesh: MeshConfig) -> Sequence[int]:
        """Return the powers of two into which each device's share of the batch divides."""
        data, fsdp, _ = mesh_shape(mesh, len(self.machine.devices))
        rows, rest = divmod(self.job.config.train.global_batch_size, data * fsdp)
        return () if rest else [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]

    def _fit(self, mesh: MeshConfig, remat: str) -> None:
        """Look for the fewest parts that fit; where none do, with all activations rematerialised."""
        outcome = self._climb(mesh, remat)
        if outcome is not None and outcome.status == "too large" and remat != "full":
            self._climb(mesh, "full")

    def _climb(self, mesh: MeshConfig, remat: str) -> VariantCost | None:
        """Return the outcome of the fewest parts that fit, or of the last tried; None: no time."""
        outcome, least = None, 1.0
        for parts in self._parts(mesh):
            if parts < least:
                continue
            outcome = self._try(Variant(mesh, parts, remat))
            if outcome is None or outcome.status != "too large":
                return outcome
            if outcome.needed_bytes and self.machine.memory_bytes:
                # Twice the parts need half the memory at best: the activations shrink with them, the weights don't.
                least = parts * outcome.needed_bytes / self.machine.memory_bytes
        return outcome

    def _with_more_parts(self) -> list[Variant]:
        """Twice the parts, of those best settings that more parts haven't made slower yet."""
        chains: dict[tuple[MeshConfig, str], list[VariantCost]] = {}
        for each in self.outcomes.values():
            if each.fits:
                chains.setdefault((each.variant.mesh, each.variant.remat), []).append(each)
        best = sorted((min(chain, key=lambda each: each.cost) for chain in chains.values()), key=lambda each: each.cost)
        doubled = [
            dataclasses.replace(each.variant, accumulation_steps=2 * each.variant.accumulation_steps)
            for each in best[: self.workers]
        ]
        return [
            each for each in doubled if each not in self.outcomes and each.accumulation_steps in self._parts(each.mesh)
        ]

    def _try(self, variant: Variant) -> VariantCost | None:
        """Weighs a variant, once; None: no time."""
        if variant in self.outcomes:
            return self.outcomes[variant]
        outcomes = list(self.outcomes.values())
        longest_s = max((each.compile_s for each in outcomes), default=0.0)
        if outcomes and time.monotonic() + longest_s > self.deadline:
            self.say(f"{variant}: not tried, the time is up")
            return None
        best = self._best()
        give_up_s = best.times.estimate_s if best and best.times else float("inf")
        outcome = self.outcomes[variant] = compile_variant(self.job, self.machine, variant, give_up_s)
        left = f"at most {max(0.0, self.deadline - time.monotonic()):.0f} s left"
        self.say(f"{variant}: {verdict(outcome, self.machine)} ({outcome.compile_s:.0f} s; {left})")
        return outcome


def verdict(outcome: VariantCost, machine: Machine) -> str:
    """One line on a variant: whether it fits, and by how much it doesn't."""
    if outcome.status in ("refused", "slower"):
        return f"{outcome.status}: {outcome.reason}"
    if outcome.needed_bytes is None or machine.memory_bytes is None:
        return outcome.status
    sizes = f"{outcome.needed_bytes / GIB:.2f} of {machine.memory_bytes / GIB:.2f} GiB"
    if outcome.fits:
        return f"fits, {sizes}" + (f", about {outcome.times.estimate_s:.3g} s a step" if outcome.times else "")
    return f"too large by {(outcome.needed_bytes - machine.memory_bytes) / GIB:.2f} GiB, {sizes}"


_SECONDS = ("compute s", "memory s", "links s", "at least s", "about s")


def print_plan(result: Plan) -> None:
    """Return the outcomes as a table, fastest first, and what is recommended."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    job, machine, count = result.job, result.machine, len(result.machine.devices)
    print(
        f"{job.config.model.name}, batches of {job.config.train.global_batch_size:,} images and {job.num_prompts} "
        f"prompts on {machine.topology}: {count} x {machine.devices[0].device_kind}, "
        f"{result.model_flops / count / 1e12:,.1f} TFLOP each a step"
    )
    table = Table()
    memory = f"GiB of {machine.memory_bytes / GIB:.2f}" if machine.memory_bytes else "GiB"
    for name in ("mesh", "remat", "parts", memory, *_SECONDS, "MFU <=", "MFU ~", "verdict"):
        table.add_column(name, justify="left" if name in ("mesh", "remat", "verdict") else "right")
    for each in sorted(result.outcomes, key=lambda each: (not each.fits, each.cost)):
        table.add_row(*_row(each, machine))
    console.print(table)
    if (best := result.recommended) is None:
        print(f"Nothing fits. As configured: {verdict(result.outcomes[0], machine)}")
        return
    assert best.memory is not None and best.traffic is not None
    parts = (f"{value / GIB:.2f} {name.removesuffix('_bytes')}" for name, value in vars(best.memory).items())
    print(f"Memory of the recommended, GiB: {', '.join(parts)}")
    sent = (f"{each.count:,} {kind} {each.bytes / 1e9:.2f} GB" for kind, each in best.traffic.collectives.items())
    print(f"Sent by each device in a step: {', '.join(sent) or 'nothing'}")
    if machine.chip is None:
        print("This chip's speed isn't known here: the least work counts as the fastest")
    print(f"As configured ({result.configured}): {verdict(result.outcomes[0], machine)}")
    print(f"Recommended: {' '.join(best.variant.overrides)}")


def _row(outcome: VariantCost, machine: Machine) -> list[str]:
    variant, times = outcome.variant, outcome.times
    row = [mesh_name(variant.mesh), variant.remat, str(variant.accumulation_steps)]
    row.append("" if outcome.needed_bytes is None else f"{outcome.needed_bytes / GIB:.2f}")
    short = verdict(outcome, machine)
    short = short.split(",")[0] if outcome.needed_bytes else short  # the sizes stand in the columns
    if times is None:
        return [*row, *[""] * 7, short]
    seconds = (times.compute_s, times.memory_s, times.interconnect_s, times.bound_s, times.estimate_s)
    shares = (times.mfu_bound, times.mfu_estimate)
    limit = f"{short}; limited by {times.bound_by}"
    return [*row, *(f"{value:.3g}" for value in seconds), *(f"{value:.0%}" for value in shares), limit]
