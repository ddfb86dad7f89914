"""Pickled weights, read by torch without running their code; the only import of torch in the package."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from clip_har_jax.errors import UserError


def has_torch() -> bool:
    """Return whether torch is installed; pickled weights need it."""
    return find_spec("torch") is not None


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file of `torch.save`, in float32 and their shapes; torch refuses what isn't a tensor."""
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        values = values.get("state_dict", values)  # in a checkpoint of open_clip's training
        return {name.removeprefix("module."): value.float().numpy() for name, value in values.items()}
    except Exception as error:  # torch raises many kinds of exceptions for a damaged or unsafe file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: can't be read as weights alone ({reason}); save it as safetensors") from error
