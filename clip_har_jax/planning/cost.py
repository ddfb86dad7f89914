"""What a training step needs of a machine: compiled for it, and weighed, never run.

So the machine needn't be here: for a TPU slice, libtpu holds an ahead-of-time compiler.
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
from clip_har_jax.models.configuration import CLIPConfig
from clip_har_jax.models.flops import matmul_flops
from clip_har_jax.parallel.mesh import AXES, make_mesh
from clip_har_jax.parallel.topology import Chip, find_chip, memory_bytes, tpu_devices
from clip_har_jax.planning.hlo import Traffic, read_traffic
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.program import Program

LOCAL = "local"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (r"\(([\d.]+)([KMGT])\) exceeds available", r"Used ([\d.]+)([KMGT]) of")  # XLA's words


@dataclass(frozen=True)
class Machine:
    """The devices that a plan is for."""

    topology: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    memory_bytes: int | None  # that a program may use of each device; None: not known

    @property
    def is_here(self) -> bool:
        return self.topology == LOCAL


def find_machine(topology: str) -> Machine:
    """This machine's devices ('local'), or those of a TPU slice ('v5e:4x4').

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
class Job:
    """What is to be computed, whatever the settings."""

    config: RunConfig
    clip: CLIPConfig
    num_classes: int
    num_prompts: int


@dataclass(frozen=True)
class Variant:
    """The settings that change a step's cost and nothing of what it learns."""

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
        """The flags that set it."""
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
    """Bytes on each device, as XLA's `memory_analysis` says."""

    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int  # outputs that take the place of arguments
    temporaries_bytes: int
    code_bytes: int
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        kept = self.arguments_bytes + self.outputs_bytes - self.aliased_bytes
        return kept + self.temporaries_bytes + self.code_bytes


@dataclass(frozen=True)
class Times:
    """How long a step takes. No step is faster than its bound; the estimate is where a run may be expected."""

    compute_s: float  # matrix products at the chip's peak
    memory_s: float  # traffic with the main memory at its bandwidth
    interconnect_s: float  # what a device sends, over all its links
    bound_s: float  # the longest of these: they overlap perfectly
    bound_by: str
    estimate_s: float
    estimate_by: str  # compiler: its cost model, which TPUs' have, and then the sending; or the three one by one
    mfu_bound: float
    mfu_estimate: float


@dataclass(frozen=True)
class VariantCost:
    """What is known of a variant."""

    variant: Variant
    status: str  # fits, too large, slower (not compiled: another is certainly faster), or refused by us or XLA
    reason: str = ""
    needed_bytes: int | None = None  # on each device; of a program refused for its size, as XLA says
    memory: Memory | None = None
    flops_per_device: int | None = None  # of matrix products, with those that rematerialisation repeats
    traffic: Traffic | None = None
    times: Times | None = None
    compile_s: float = 0.0

    @property
    def fits(self) -> bool:
        return self.status == "fits"

    @property
    def cost(self) -> tuple[float, float]:
        """What to compare variants by: expected time, or where the chip's speed isn't known, work."""
        if self.times is not None:
            return self.times.estimate_s, self.times.bound_s
        return float(self.flops_per_device or 0), float(self.traffic.memory_bytes if self.traffic else 0)


def make_program(job: Job, machine: Machine, variant: Variant) -> Program:
    """Return the program of a variant, as that machine would run it.

    Raises:
      UserError: the mesh doesn't divide the batch or a parameter; flash attention where there is no GPU.
    """
    config = variant.apply(job.config)
    if not machine.is_here:  # what is chosen by the machine at hand would be wrong for another one
        if config.model.attention == "cudnn":
            raise UserError(f"config.model.attention=cudnn needs an NVIDIA GPU, not {machine.topology}; use auto")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    mesh = make_mesh(config.mesh, None if machine.is_here else machine.devices)
    preprocess = Preprocess(image_size_px=job.clip.vision.image_size)
    return Program(config, job.clip, preprocess, job.num_classes, config.train.num_steps or 1000, mesh)


def compile_variant(job: Job, machine: Machine, variant: Variant, give_up_s: float = float("inf")) -> VariantCost:
    """Compiles a variant's training step for the machine.

    Args:
      give_up_s: don't compile what can't be faster than this.
    """
    try:
        program = make_program(job, machine, variant)
    except UserError as error:
        return VariantCost(variant, "refused", str(error))
    train_step: Any = program.train_step
    traced = train_step.trace(*program.abstract_arguments(job.num_prompts))
    flops = matmul_flops(traced.jaxpr) // len(machine.devices)
    if machine.chip and flops / machine.chip.peak_flops >= give_up_s:
        reason = f"its matrix products alone take {flops / machine.chip.peak_flops:.2f} s"
        return VariantCost(variant, "slower", reason, flops_per_device=flops)
    begin = time.monotonic()
    try:
        with _nothing_kept():
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed, reason = refused_bytes(str(error)), str(error).strip().split("\n")[0]
        status = "refused" if needed is None else "too large"
        return VariantCost(variant, status, reason, needed, None, flops, compile_s=time.monotonic() - begin)
    memory = read_memory(compiled)
    traffic = read_traffic(compiled.as_text(), len(machine.devices))
    model_flops = program.flops_per_step(job.num_prompts) / len(machine.devices)
    times = estimate(machine.chip, flops, traffic, model_flops) if machine.chip else None
    compile_s = time.monotonic() - begin
    # A TPU's compiler refuses what doesn't fit, others don't; its peak is exact, theirs leaves temporaries out.
    is_tpu = machine.devices[0].platform == "tpu"
    needed = memory.peak_bytes if is_tpu else memory.total_bytes
    too_large = not is_tpu and machine.memory_bytes is not None and needed > machine.memory_bytes
    status = "too large" if too_large else "fits"
    return VariantCost(variant, status, "", needed, memory, flops, traffic, times, compile_s)


def step_memory(program: Program, num_prompts: int) -> Memory | None:
    """What one step of a program needs of each device; where features are computed once, embedding as large a batch.

    None where nothing is trained.
    """
    state, frozen, classes, batch = program.abstract_arguments(num_prompts)
    learns_from = program.method.recipe.learns_from
    if learns_from == "nothing":
        return None
    step: Any = program.train_step
    arguments: tuple[Any, ...] = (state, frozen, classes, batch)
    if learns_from == "features":
        step, arguments = program.feature_step, ({**state.params, **frozen}, batch)
    with _nothing_kept():
        return read_memory(step.trace(*arguments).lower().compile())


def refused_bytes(message: str) -> int | None:
    """Return the bytes that a program needs, as XLA says in refusing it for its size; None from another refusal."""
    for pattern in _REFUSALS:
        if found := re.search(pattern, message):
            return round(float(found[1]) * _UNITS[found[2]])
    return None


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """Compiles past the compilation cache: a program for a machine that isn't here is kept, but can't be read back."""
    folder = jax.config.values["jax_compilation_cache_dir"]

    def keep_in(place: str | None) -> None:
        jax.config.update("jax_compilation_cache_dir", place)
        compilation_cache.reset_cache()  # what it has decided at its first use holds until then

    keep_in(None)
    try:
        yield
    finally:
        keep_in(folder)


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


def estimate(chip: Chip, flops: int, traffic: Traffic, model_flops: float) -> Times:
    """Return the roofline of a step (Williams et al. 2009), and what may be expected.

    Args:
      flops: of one device's matrix products in a step, repeated ones too.
      traffic: of one device in a step.
      model_flops: those that count for the MFU.
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
