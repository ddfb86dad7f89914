"""Fine-tune CLIP for human action recognition on TPUs and GPUs in JAX.

    from clip_har_jax import Predictor, load_config, load_model, train

    result = train(load_config("configs/demo.py"), "runs/demo")
    predictor = Predictor("runs/demo/model")
    print(predictor.predict(["photo.jpg"])[0].label)

Importing the package is light: JAX is imported at the first use of a name that needs it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime reads it when it is imported; else it writes an id of the machine to the disk and sends its usage.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from clip_har_jax.config import RunConfig, load_config, make_config
    from clip_har_jax.errors import UserError
    from clip_har_jax.inference.predictor import Predictor
    from clip_har_jax.models.factory import load as load_model
    from clip_har_jax.trainer.train import train

_HOMES = {
    "Predictor": ("inference.predictor", "Predictor"),
    "RunConfig": ("config", "RunConfig"),
    "UserError": ("errors", "UserError"),
    "load_config": ("config", "load_config"),
    "load_model": ("models.factory", "load"),
    "make_config": ("config", "make_config"),
    "train": ("trainer.train", "train"),
}
__all__ = ["Predictor", "RunConfig", "UserError", "load_config", "load_model", "make_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
