"""The search for the fastest settings with which a run fits a machine, with few compilations.

The search and the plans that it compares stand in one file, over 300 lines, because each rule of the search is about a
field of a plan.
"""

import dataclasses
import math
import os
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
    Machine,
    PlannedStep,
    Variant,
    VariantCost,
    compile_variant,
    find_machine,
    make_program,
    mesh_name,
)
from clip_har_jax.planning.traffic import Operation

DEFAULT_NUM_CLASSES = 15  # of the Human Action Recognition set
STRATEGIES = ("fsdp", "dp", "fsdp_tp", "tp")


@dataclass(frozen=True)
class Plan:
    """The costs of the tried variants on a machine."""

    planned_step: PlannedStep
    machine: Machine
    model_flops: int  # of a step over all devices
    configured: Variant
    candidates: tuple[VariantCost, ...]
    seconds: float
    num_steps: int | None = None  # of the whole run; None: unknown
    price_per_chip_hour: float | None = None

    def for_run(self, num_examples: int | None, price_per_chip_hour: float | None) -> "Plan":
        """Return the plan with the length and the price of the whole run.

        Args:
          num_examples: training images; gives the length unless `train.num_steps` is set.
          price_per_chip_hour: in any currency.
        """
        num_steps, settings = self.num_steps, self.planned_step.config.train
        if num_steps is None and num_examples is not None:
            num_steps = max(1, math.ceil(settings.num_epochs * num_examples / settings.global_batch_size))
        return dataclasses.replace(self, num_steps=num_steps, price_per_chip_hour=price_per_chip_hour)

    @property
    def num_chips(self) -> int:
        chip = self.machine.chip
        return len(self.machine.devices) // (chip.devices_per_chip if chip else 1)

    def chip_hours(self, candidate: VariantCost) -> float | None:
        """Return the chip-hours of all training steps of the run; None if the chip or the length is unknown."""
        if candidate.times is None or self.num_steps is None:
            return None
        return self.num_chips * self.num_steps * candidate.times.estimate_s / 3600

    def price(self, candidate: VariantCost) -> float | None:
        """Return the price of all training steps, in the currency of `price_per_chip_hour`."""
        hours = self.chip_hours(candidate)
        return None if hours is None or self.price_per_chip_hour is None else hours * self.price_per_chip_hour

    @property
    def recommended(self) -> VariantCost | None:
        """The fastest that fits."""
        return min((each for each in self.candidates if each.fits), key=lambda each: each.cost, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of the JSON file."""
        config, best = self.planned_step.config, self.recommended
        return {
            "topology": self.machine.topology,
            "num_devices": len(self.machine.devices),
            "device_kind": self.machine.devices[0].device_kind,
            "chip": self.machine.chip and dataclasses.asdict(self.machine.chip),
            "memory_bytes": self.machine.memory_bytes,
            "model": config.model.name,
            "global_batch_size": config.train.global_batch_size,
            "num_classes": self.planned_step.num_classes,
            "num_prompts": self.planned_step.num_prompts,
            "model_flops": self.model_flops,
            "num_chips": self.num_chips,
            "num_steps": self.num_steps,
            "price_per_chip_hour": self.price_per_chip_hour,
            "configured": self.configured.overrides,
            "recommended": best and best.variant.overrides,
            "variants": [self._variant_to_dict(each) for each in self.candidates],
            "seconds": round(self.seconds, 1),
        }

    def memory_bound(self, candidate: VariantCost) -> list[Operation]:
        """Return the three operations that move the most bytes among those that memory limits."""
        chip = self.machine.chip
        if candidate.traffic is None or chip is None:
            return []
        return candidate.traffic.memory_bound(chip.peak_flops / chip.memory_bandwidth)[:3]

    def _variant_to_dict(self, candidate: VariantCost) -> dict[str, Any]:
        variant, values = candidate.variant, dataclasses.asdict(candidate)
        del values["variant"]
        mesh = dict(zip(AXES, mesh_shape(variant.mesh, len(self.machine.devices)), strict=True))
        settings = {"mesh": mesh, "accumulation_steps": variant.accumulation_steps, "remat": variant.remat}
        if candidate.memory is not None:
            values["memory"]["total_bytes"] = candidate.memory.total_bytes
        if candidate.traffic is not None:
            del values["traffic"]["operations"]
            values["memory_bound"] = [dataclasses.asdict(each) for each in self.memory_bound(candidate)]
        values |= {"chip_hours": self.chip_hours(candidate), "price": self.price(candidate)}
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
    """Compile the training step of a run for a machine, as configured and with other settings.

    Neither data nor weights are read.

    Args:
      config: the run.
      topology: 'local', or a TPU slice such as 'v5e:4x4'.
      num_classes: actions; None: those of `config.data.labels`, or 15.
      num_prompts: None: the number that the config's templates and descriptions make.
      search: try other settings than the config's.
      max_minutes: compilations that would probably end later aren't started.
      say: called with a line of text after each variant.

    Raises:
      UserError: an unknown topology or model, a batch or parameter that the mesh doesn't divide.
    """
    begin = time.monotonic()
    machine = find_machine(topology)
    num_classes = num_classes or len(config.data.labels) or DEFAULT_NUM_CLASSES
    described = sum(map(len, config.text.descriptions.values()))
    num_prompts = num_prompts or num_classes * len(config.text.templates) + described
    planned_step = PlannedStep(
        config,
        known_config(config.model.name, config.model.image_size_px, config.model.temporal),
        num_classes,
        num_prompts,
    )
    configured = Variant(config.mesh, config.train.accumulation_steps, config.model.remat)
    try:
        model_flops = make_program(planned_step, machine, configured).flops_per_step(num_prompts)
    except UserError as error:
        raise UserError(f"--topology={topology}: {error}") from error
    tried = Search(planned_step, machine, begin + 60 * max_minutes, say).run(configured, search)
    seconds = time.monotonic() - begin
    return Plan(planned_step, machine, model_flops, configured, tuple(tried), seconds, config.train.num_steps)


class Search:
    """Try variants, one setting after the other, each time from the best variant so far.

    Fewer parts of a batch mean fewer passes over the weights, so the search looks for the fewest parts that fit, for
    each mesh and rematerialisation. A program that is too large is refused within seconds, and its size excludes
    further numbers of parts.

    Args:
      planned_step: the step whose variants are tried.
      machine: where it would run.
      deadline: a compilation that would probably end later, by `time.monotonic`, isn't started.
      say: called with a line of text after each variant.
      cost_of: returns a variant's cost, as `compile_variant` does.
    """

    def __init__(
        self,
        planned_step: PlannedStep,
        machine: Machine,
        deadline: float,
        say: Callable[[str], object],
        cost_of: Callable[[PlannedStep, Machine, Variant, float], VariantCost] = compile_variant,
    ):
        self.planned_step, self.machine, self.deadline, self.say = planned_step, machine, deadline, say
        self.cost_of = cost_of
        self.candidates: dict[Variant, VariantCost] = {}
        self.workers = min(4, os.cpu_count() or 1)  # a compilation keeps about one core busy

    def run(self, configured: Variant, search: bool) -> list[VariantCost]:
        """Return the costs of all variants that were tried, the configured one first."""
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = [pool.submit(self._begin, configured, search)]
            if search:
                others = self._meshes(configured.remat)[1:]
                waiting += [pool.submit(self._fit, mesh, configured.remat) for mesh in others]
            for future in waiting:
                future.result()
            if search:
                self._refine(pool)
        return sorted(self.candidates.values(), key=lambda each: each.variant != configured)

    def _begin(self, configured: Variant, search: bool) -> None:
        self._try(configured)
        if search:
            self._fit(configured.mesh, configured.remat)

    def _refine(self, pool: ThreadPoolExecutor) -> None:
        """Try other rematerialisation on the best mesh, then more parts for the best settings."""
        if (best := self._best()) is None:
            return
        others = [remat for remat in REMAT if remat != best.variant.remat]
        list(pool.map(lambda remat: self._climb(best.variant.mesh, remat), others))
        while more_parts := self._with_more_parts():
            if None in pool.map(self._try, more_parts):
                break

    def _best(self) -> VariantCost | None:
        fitting = [each for each in list(self.candidates.values()) if each.fits]
        return min(fitting, key=lambda each: each.cost, default=None)

    def _meshes(self, remat: str) -> list[MeshConfig]:
        """Return the configured mesh, then the different ones of the strategies."""
        heads = {tower.num_heads for tower in (self.planned_step.sizes.vision, self.planned_step.sizes.text)}
        own, count = self.planned_step.config.mesh, len(self.machine.devices)
        found = {mesh_shape(own, count): own}
        for strategy in STRATEGIES:
            mesh = MeshConfig(strategy)
            shape = mesh_shape(mesh, count)
            if mesh_name(own) != own.strategy:  # only explicit sizes override explicit sizes
                mesh = MeshConfig(own.strategy, *shape)
            if whole := [count for count in heads if count % shape[2]]:
                reason = f"{shape[2]} devices on the tensor axis don't divide {min(whole)} heads"
                variant = Variant(mesh, 1, remat)
                self.candidates.setdefault(variant, VariantCost(variant, "refused", reason))
            else:
                found.setdefault(shape, mesh)
        return list(found.values())

    def _parts(self, mesh: MeshConfig) -> Sequence[int]:
        """Return the powers of two that divide the rows of each device."""
        data, fsdp, _ = mesh_shape(mesh, len(self.machine.devices))
        rows, rest = divmod(self.planned_step.config.train.global_batch_size, data * fsdp)
        return () if rest else [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]

    def _fit(self, mesh: MeshConfig, remat: str) -> None:
        """Look for the fewest parts that fit; if none do, again with full rematerialisation."""
        candidate = self._climb(mesh, remat)
        if candidate is not None and candidate.status == "too large" and remat != "full":
            self._climb(mesh, "full")

    def _climb(self, mesh: MeshConfig, remat: str) -> VariantCost | None:
        """Return the cost with the fewest parts that fit, or of the last variant tried; None: out of time."""
        candidate, least = None, 1.0
        for parts in self._parts(mesh):
            if parts < least:
                continue
            candidate = self._try(Variant(mesh, parts, remat))
            if candidate is None or candidate.status != "too large":
                return candidate
            if candidate.needed_bytes and self.machine.memory_bytes:
                # Twice the parts need at least half the memory: activations shrink, weights don't.
                least = parts * candidate.needed_bytes / self.machine.memory_bytes
        return candidate

    def _with_more_parts(self) -> list[Variant]:
        """Return the best settings with twice the parts, unless that has been tried."""
        chains: dict[tuple[MeshConfig, str], list[VariantCost]] = {}
        for each in self.candidates.values():
            if each.fits:
                chains.setdefault((each.variant.mesh, each.variant.remat), []).append(each)
        best = sorted((min(chain, key=lambda each: each.cost) for chain in chains.values()), key=lambda each: each.cost)
        doubled = [
            dataclasses.replace(each.variant, accumulation_steps=2 * each.variant.accumulation_steps)
            for each in best[: self.workers]
        ]
        return [
            each
            for each in doubled
            if each not in self.candidates and each.accumulation_steps in self._parts(each.mesh)
        ]

    def _try(self, variant: Variant) -> VariantCost | None:
        """Return the cost of a variant, computed once; None: out of time."""
        if variant in self.candidates:
            return self.candidates[variant]
        candidates = list(self.candidates.values())
        longest_s = max((each.compile_s for each in candidates), default=0.0)
        if candidates and time.monotonic() + longest_s > self.deadline:
            self.say(f"{variant}: not tried, the time is up")
            return None
        best = self._best()
        give_up_s = best.times.estimate_s if best and best.times else float("inf")
        candidate = self.candidates[variant] = self.cost_of(self.planned_step, self.machine, variant, give_up_s)
        left = f"at most {max(0.0, self.deadline - time.monotonic()):.0f} s left"
        self.say(f"{variant}: {describe_variant(candidate, self.machine)} ({candidate.compile_s:.0f} s; {left})")
        return candidate


def describe_variant(candidate: VariantCost, machine: Machine) -> str:
    """Return one line on a variant: its memory, and how much is missing."""
    if candidate.status in ("refused", "slower"):
        return f"{candidate.status}: {candidate.reason}"
    if candidate.needed_bytes is None or machine.memory_bytes is None:
        return candidate.status
    sizes = f"{candidate.needed_bytes / GIB:.2f} of {machine.memory_bytes / GIB:.2f} GiB"
    if candidate.fits:
        return f"fits, {sizes}" + (f", about {candidate.times.estimate_s:.3g} s a step" if candidate.times else "")
    return f"too large by {(candidate.needed_bytes - machine.memory_bytes) / GIB:.2f} GiB, {sizes}"
