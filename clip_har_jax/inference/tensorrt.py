"""Running a TensorRT engine. Not tested: no machine with NVIDIA's libraries was available."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def open_engine(path: Path, signature: dict[str, Any]) -> Callable[..., Sequence[np.ndarray]]:
    """Return a function of the engine's inputs, in the order and the shapes of the signature."""
    import tensorrt as trt
    from cuda.bindings import runtime as cudart

    def check(result: Sequence[Any]) -> Any:
        if result[0] != cudart.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA: {result[0]}")
        return result[1] if len(result) > 1 else None

    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeError("built by another version of TensorRT or for another GPU; export again on this machine")
    context, stream = engine.create_execution_context(), check(cudart.cudaStreamCreate())

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        buffers = []
        try:
            for name, array in zip(signature["inputs"], map(np.ascontiguousarray, inputs), strict=True):
                buffers.append(check(cudart.cudaMalloc(array.nbytes)))
                to_device = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
                check(cudart.cudaMemcpy(buffers[-1], array.ctypes.data, array.nbytes, to_device))
                context.set_input_shape(name, array.shape)
                context.set_tensor_address(name, buffers[-1])
            outputs = []
            for name in signature["outputs"]:
                outputs.append(np.empty(tuple(context.get_tensor_shape(name)), np.float32))
                buffers.append(check(cudart.cudaMalloc(outputs[-1].nbytes)))
                context.set_tensor_address(name, buffers[-1])
            if not context.execute_async_v3(stream):
                raise RuntimeError("the engine refused to run")
            check(cudart.cudaStreamSynchronize(stream))
            for array, buffer in zip(outputs, buffers[len(inputs) :], strict=True):
                to_host = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
                check(cudart.cudaMemcpy(array.ctypes.data, buffer, array.nbytes, to_host))
            return outputs
        finally:
            for buffer in buffers:
                check(cudart.cudaFree(buffer))

    return run
