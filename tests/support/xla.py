"""XLA's flags in tests: compiling is most of the tests' time, and their models are too small to profit from fast code.

Without LLVM's optimisations and with the older code generator for fused operations, a training step compiles in less
than half the processor time.
"""

FAST_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def cpu_flags(devices: int) -> str:
    """Return XLA_FLAGS for a number of simulated devices on the CPU."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILES}"
