"""The cost of a training step on a machine: memory, traffic and time, compiled but not run.

The machine doesn't have to be present: libtpu contains an ahead-of-time compiler for TPU slices.
"""

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from clip_har_jax.config import MeshConfig, RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.models.families import family_of
from clip_har_jax.models.flops import matmul_flops
from clip_har_jax.parallel.mesh import AXES, make_mesh
from clip_har_jax.parallel.topology import Chip, find_chip, memory_bytes, tpu_devices
from clip_har_jax.planning.roofline import Times, estimate
from clip_har_jax.planning.traffic import Traffic, read_traffic
from clip_har_jax.training.program import Program
from clip_har_jax.training.step_config import step_config

LOCAL = "local"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (r"\(([\d.]+)([KMGT])\) exceeds available", r"Used ([\d.]+)([KMGT]) of")  # XLA's messages


@dataclass(frozen=True)
class Machine:
    """The devices for which a run is planned."""

    topology: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    memory_bytes: int | None  # available to a program on each device; None: unknown

    @property
    def is_here(self) -> bool:
        return self.topology == LOCAL


def find_machine(topology: str) -> Machine:
    """Return the devices of this machine ('local'), or of a TPU slice ('v5e:4x4').

    Raises:
      UserError: as `tpu_devices`.
    """
    if topology == LOCAL:
        devices = tuple(jax.devices())
        return Machine(LOCAL, devices, find_chip(devices[0]), memory_bytes(devices[0], jax.local_device_count()))
    devices = tuple(tpu_devices(topology))
    chip = find_chip(devices[0])
    return Machine(topology, devices, chip, chip.memory_bytes if chip else None)


@dataclass(frozen=True)
class PlannedStep:
    """The training step that is planned, apart from the settings of a `Variant`."""

    config: RunConfig
    sizes: TwoTowerConfig
    num_classes: int
    num_prompts: int


@dataclass(frozen=True)
class Variant:
    """The settings that change the cost of a step but not its result."""

    mesh: MeshConfig
    accumulation_steps: int
    remat: str

    def apply(self, config: RunConfig) -> RunConfig:
        return dataclasses.replace(
            config,
            mesh=self.mesh,
            train=dataclasses.replace(config.train, accumulation_steps=self.accumulation_steps),
            model=dataclasses.replace(config.model, remat=self.remat),
        )

    @property
    def overrides(self) -> list[str]:
        """The command-line flags that set this variant."""
        sizes = {axis: getattr(self.mesh, axis) for axis in AXES}
        explicit = {f"mesh.{axis}": size for axis, size in sizes.items() if size is not None}
        mesh = explicit or {"mesh.strategy": self.mesh.strategy}
        values = {**mesh, "train.accumulation_steps": self.accumulation_steps, "model.remat": self.remat}
        return [f"--config.{key}={value}" for key, value in values.items()]

    def __str__(self) -> str:
        return f"{mesh_name(self.mesh)}, {self.accumulation_steps} parts, remat {self.remat}"


def mesh_name(mesh: MeshConfig) -> str:
    sizes = [(axis, getattr(mesh, axis)) for axis in AXES]
    return " ".join(f"{axis}={size}" for axis, size in sizes if size) or mesh.strategy


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, from XLA's `memory_analysis`."""

    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int  # outputs that reuse the buffers of donated arguments
    temporaries_bytes: int
    code_bytes: int
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        kept = self.arguments_bytes + self.outputs_bytes - self.aliased_bytes
        return kept + self.temporaries_bytes + self.code_bytes


@dataclass(frozen=True)
class VariantCost:
    """The cost of a variant, as far as it was determined."""

    variant: Variant
    status: str  # fits, too large, slower (not compiled, since another is faster), or refused by the checks or by XLA
    reason: str = ""
    needed_bytes: int | None = None  # on each device; of a program that XLA refuses for its size, from its message
    memory: Memory | None = None
    flops_per_device: int | None = None  # of matrix products, rematerialisation included
    traffic: Traffic | None = None
    times: Times | None = None
    compile_s: float = 0.0

    @property
    def fits(self) -> bool:
        return self.status == "fits"

    @property
    def cost(self) -> tuple[float, float]:
        """The key to compare variants by: estimated time, or the amount of work where the chip's speed is unknown."""
        if self.times is not None:
            return self.times.estimate_s, self.times.bound_s
        return float(self.flops_per_device or 0), float(self.traffic.memory_bytes if self.traffic else 0)


def make_program(planned_step: PlannedStep, machine: Machine, variant: Variant) -> Program:
    """Return the program that the machine would run for a variant.

    Raises:
      UserError: the mesh doesn't divide the batch or a parameter; flash attention where there is no GPU.
    """
    config = variant.apply(planned_step.config)
    if not machine.is_here:  # 'auto' would choose by the devices of this machine
        if config.model.attention == "cudnn":
            raise UserError(f"config.model.attention=cudnn needs an NVIDIA GPU, not {machine.topology}; use auto")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    mesh = make_mesh(config.mesh, None if machine.is_here else machine.devices)
    preprocess = family_of(planned_step.sizes).preprocess(planned_step.sizes.vision.image_size)
    num_steps = config.train.num_steps or 1000
    return Program(step_config(config), planned_step.sizes, preprocess, planned_step.num_classes, num_steps, mesh)


def compile_variant(
    planned_step: PlannedStep, machine: Machine, variant: Variant, give_up_s: float = float("inf")
) -> VariantCost:
    """Compile the training step of a variant for the machine and return its cost.

    Args:
      planned_step: the step.
      machine: the devices.
      variant: the settings.
      give_up_s: seconds a step; a variant that can't be faster isn't compiled.
    """
    try:
        program = make_program(planned_step, machine, variant)
    except UserError as error:
        return VariantCost(variant, "refused", str(error))
    train_step: Any = program.train_step
    traced = train_step.trace(*program.abstract_arguments(planned_step.num_prompts))
    flops = matmul_flops(traced.jaxpr) // len(machine.devices)
    if machine.chip and flops / machine.chip.peak_flops >= give_up_s:
        reason = f"its matrix products alone take {flops / machine.chip.peak_flops:.2f} s"
        return VariantCost(variant, "slower", reason, flops_per_device=flops)
    begin = time.monotonic()
    try:
        with _no_compilation_cache():
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed, reason = refused_bytes(str(error)), str(error).strip().split("\n")[0]
        status = "refused" if needed is None else "too large"
        return VariantCost(variant, status, reason, needed, None, flops, compile_s=time.monotonic() - begin)
    memory = read_memory(compiled)
    traffic = read_traffic(compiled.as_text(), len(machine.devices))
    model_flops = program.flops_per_step(planned_step.num_prompts) / len(machine.devices)
    times = estimate(machine.chip, flops, traffic, model_flops) if machine.chip else None
    compile_s = time.monotonic() - begin
    # Only the compiler for TPUs refuses a program that doesn't fit, and only its peak includes temporaries.
    is_tpu = machine.devices[0].platform == "tpu"
    needed = memory.peak_bytes if is_tpu else memory.total_bytes
    too_large = not is_tpu and machine.memory_bytes is not None and needed > machine.memory_bytes
    status = "too large" if too_large else "fits"
    return VariantCost(variant, status, "", needed, memory, flops, traffic, times, compile_s)


def step_memory(program: Program, num_prompts: int) -> Memory | None:
    """Return the memory of one training step on each device; None for a method that trains nothing.

    For a method that learns from features, the step is the embedding of one batch.
    """
    state, frozen, classes, batch = program.abstract_arguments(num_prompts)
    learns_from = program.method.recipe.learns_from
    if learns_from == "nothing":
        return None
    step: Any = program.train_step
    arguments: tuple[Any, ...] = (state, frozen, classes, batch)
    if learns_from == "features":
        step, arguments = program.feature_step, ({**state.params, **frozen}, batch)
    with _no_compilation_cache():
        return read_memory(step.trace(*arguments).lower().compile())


def refused_bytes(message: str) -> int | None:
    """Return the bytes that a program needs from the message with which XLA refuses its size; None for other errors."""
    for pattern in _REFUSALS:
        if found := re.search(pattern, message):
            return round(float(found[1]) * _UNITS[found[2]])
    return None


@contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Switch the compilation cache off: a program for a machine that isn't present can't be read back from it."""
    folder = jax.config.values["jax_compilation_cache_dir"]

    def use(cache: str | None) -> None:
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()  # the cache reads its settings only once, until it is reset

    use(None)
    try:
        yield
    finally:
        use(folder)


def read_memory(compiled: jax.stages.Compiled) -> Memory:
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments_bytes=stats.argument_size_in_bytes,
        outputs_bytes=stats.output_size_in_bytes,
        aliased_bytes=stats.alias_size_in_bytes,
        temporaries_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        peak_bytes=stats.peak_memory_in_bytes,
    )
