"""LitServe with an exported model, for `benchmarks.serving`: python litserve_server.py EXPORT PORT MAX_BATCH."""

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from clip_har_jax.cores import usable_cores
from clip_har_jax.image_files import decode
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.preprocess import evaluation_transform


class Actions(litserve.LitAPI):
    """The same decoder, model and answer as ours, in LitServe's own form: decode, batch, predict, encode."""

    def setup(self, device: str) -> None:
        self.backend = ExportedBackend(Path(sys.argv[1]), threads=usable_cores())

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        return evaluation_transform(decode(base64.b64decode(request["image"])), self.backend.preprocess)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.backend.predict(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        order = np.argsort(-output)[:5]
        return {"top": [{"label": self.backend.labels[i], "score": float(output[i])} for i in order]}


if __name__ == "__main__":
    # LitServe's recommendation for CPU: one process of the model that also decodes; a batch waits 10 ms to fill.
    api = Actions(max_batch_size=int(sys.argv[3]), batch_timeout=0.01)
    litserve.LitServer(api, accelerator="cpu").run(port=int(sys.argv[2]), generate_client_file=False, log_level="error")
