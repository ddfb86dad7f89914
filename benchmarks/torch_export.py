"""The torch side of `benchmarks.export`, in an environment with torch: eager, torch's ONNX export, and TorchScript.

    python torch_export.py torch_eager|torch_onnx|torchscript FOLDER

Runs a batch of the size on each line of standard input, and answers with a JSON line.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def main(kind: str, folder: str) -> None:
    import numpy as np
    import torch

    start = time.perf_counter()
    rng = np.random.default_rng(0)
    if kind == "torchscript":
        module = torch.jit.load(os.path.join(folder, "image_encoder.pt"))
        with open(os.path.join(os.path.dirname(folder), "signature.json")) as file:
            size = json.load(file)["graphs"]["image_encoder"]["inputs"]["image"][1][1]
        megabytes = os.path.getsize(os.path.join(folder, "image_encoder.pt")) / 1e6

        def run(batch_size: int) -> float:
            return timed(module, torch.from_numpy(rng.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)))

    else:
        import onnxruntime
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
        size = model.config.image_size
        megabytes = sum(value.numel() * value.element_size() for value in model.parameters()) / 1e6

        def pixels(batch_size: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal((batch_size, 3, size, size), np.float32))

        if kind == "torch_onnx":
            with tempfile.TemporaryDirectory() as scratch:
                path, megabytes = export(model, pixels(2), scratch)
                start = time.perf_counter()  # loading is timed, exporting isn't
                session = onnxruntime.InferenceSession(path)

            def run(batch_size: int) -> float:
                return timed(lambda x: session.run(None, {"pixel_values": x}), pixels(batch_size).numpy())

        else:

            def run(batch_size: int) -> float:
                return timed(lambda x: model(pixel_values=x), pixels(batch_size))

    run(1)
    print(json.dumps({"load_s": time.perf_counter() - start, "mb": megabytes, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": run(int(line))}), flush=True)


def export(model: Any, example: Any, folder: str) -> tuple[str, float]:
    """Return the file of torch's export, and its MB."""
    import torch

    class Embeddings(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values=pixel_values).image_embeds

    path = os.path.join(folder, "image_encoder.onnx")
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with contextlib.redirect_stdout(sys.stderr):
        program = torch.onnx.export(
            Embeddings(), (example,), dynamo=True, dynamic_shapes=shapes, input_names=["pixel_values"]
        )
        program.save(path, external_data=False)
    return path, os.path.getsize(path) / 1e6


def timed(function: Callable[[Any], Any], argument: Any) -> float:
    import torch

    with torch.inference_mode():
        start = time.perf_counter()
        function(argument)
        return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
