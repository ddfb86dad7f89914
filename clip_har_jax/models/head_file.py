"""head.safetensors of a model folder: the parameters of its head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.models.heads import make_head
from clip_har_jax.models.params import Params, write_tensors

HEAD_FILE = "head.safetensors"


def write_head(folder: str | Path, params: Mapping[str, Any]) -> None:
    """Write head.safetensors."""
    tensors = {name: np.array(value, np.float32, order="C") for name, value in params.items()}
    write_tensors(Path(folder) / HEAD_FILE, tensors)


def read_head(folder: str | Path, name: str, dim: int, num_classes: int) -> Params:
    """Read head.safetensors.

    Args:
      name: the head that actions.json names.
      dim: width of the model's embeddings.
      num_classes: number of classes in actions.json.

    Raises:
      UserError: missing or damaged, or for another head, model or number of classes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        raise UserError(f"{folder}: actions.json names the head {name!r}, but {HEAD_FILE} is missing; copy it again")
    try:
        params: Params = load_file(str(path))
        make_head(name, params)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if params["classes.kernel"].shape != (dim, num_classes):
        raise UserError(
            f"{path}: is for {params['classes.kernel'].shape[1]} classes of {params['classes.kernel'].shape[0]} dims, "
            f"the model has {num_classes} of {dim}"
        )
    return params
