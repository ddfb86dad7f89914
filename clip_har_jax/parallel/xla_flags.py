"""XLA's performance flags for GPUs and TPUs, set before JAX starts its backend.

They let collectives overlap with computation. Sources, read in November 2026:
- GPU: NVIDIA JAX-Toolbox, rosetta/docs/GPU_performance.md ("Enable Latency Hiding Scheduler", "Enable Optimizations for
  FSDP communication"); its JAX image sets the first of them for every program.
- TPU: MaxText, end_to_end/tpu/test_host_offload.sh and benchmarks/xla_flags_library.py.

A flag that the user sets in XLA_FLAGS or LIBTPU_INIT_ARGS has precedence. HAR_XLA_FLAGS=0 sets none. XLA ends the
process at a flag that it doesn't know, and flags come and go with its versions, so a flag is set only where the
installed library contains its name. None of this has been measured on an accelerator yet.
"""

import importlib.util
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SWITCH = "HAR_XLA_FLAGS"
_CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


@dataclass(frozen=True)
class PlatformFlags:
    """The flags of one platform."""

    variable: str  # environment variable from which the platform's compiler reads flags
    libraries: tuple[str, ...]  # packages whose XLA reads this variable, where they are installed
    flags: dict[str, str]


FLAGS = {
    "gpu": PlatformFlags(
        "XLA_FLAGS",
        ("jaxlib", *_CUDA_PLUGINS),
        {
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            # Of FSDP: fetch the weights of the next layer while this one computes.
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
            "xla_gpu_enable_while_loop_double_buffering": "true",
        },
    ),
    "tpu": PlatformFlags(
        "LIBTPU_INIT_ARGS",
        ("libtpu",),
        {
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            "xla_tpu_overlap_compute_collective_tc": "true",
            "xla_enable_async_all_gather": "true",
        },
    ),
}


def apply() -> str:
    """Set the flags of this machine's platform in the environment; call it before JAX starts its backend.

    Returns:
      The platform: gpu, tpu or cpu.
    """
    platform = find_platform()
    if platform in FLAGS and os.environ.get(SWITCH, "1") != "0":
        chosen = FLAGS[platform]
        os.environ[chosen.variable] = merge_flags(
            os.environ.get(chosen.variable, ""), chosen.flags, lambda name: _is_known(name, chosen.libraries)
        )
    return platform


def merge_flags(given: str, flags: dict[str, str], is_known: Callable[[str], bool]) -> str:
    """Return the user's flags followed by those of `flags` that the user doesn't set and the compiler knows."""
    set_by_user = {word.lstrip("-").split("=")[0] for word in given.split()}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in set_by_user and is_known(name)]
    return " ".join([*given.split(), *added])


def find_platform() -> str:
    """Return the platform that JAX will choose, without starting it: gpu, tpu or cpu."""
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted:
        return {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted)
    has_tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if has_tpu and _folders("libtpu"):
        return "tpu"
    has_gpu = Path("/dev/nvidiactl").exists()
    return "gpu" if has_gpu and any(_folders(plugin) for plugin in _CUDA_PLUGINS) else "cpu"


def _folders(package: str) -> list[str]:
    """Return the folders of a package, without importing it; none where it isn't installed."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the package above it isn't installed
        return []
    return list(spec.submodule_search_locations or ()) if spec else []


@cache
def _is_known(name: str, packages: tuple[str, ...]) -> bool:
    """Return whether each of the packages that are installed has a library that contains the flag's name."""
    installed = [folders for package in packages if (folders := _folders(package))]
    return bool(installed) and all(
        any(_contains(path, name.encode()) for folder in folders for path in Path(folder).glob("*.so"))
        for folders in installed
    )


def _contains(path: Path, text: bytes) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0
