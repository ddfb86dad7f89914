"""Model folders in open_clip's layout, with the weights of the golden files."""

import json
from pathlib import Path

import numpy as np

from clip_har_jax.models.params import write_tensors
from tests.support.make_golden import GOLDEN, make_weight
from tests.support.make_open_clip_golden import write_config

WEIGHTS = "open_clip_model.safetensors"


def write_case(folder: Path, name: str) -> Path:
    """Write the folder that open_clip read, its weights by the rule of the golden files."""
    folder.mkdir(exist_ok=True)
    write_config(folder, name)
    shapes = json.loads((GOLDEN / "open_clip_shapes.json").read_text())[name]
    write_tensors(folder / WEIGHTS, {key: np.asarray(make_weight(key, shape)) for key, shape in shapes.items()})
    return folder
