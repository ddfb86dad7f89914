"""Writes tests/golden/naflex*: the outputs of Hugging Face's Siglip2Model, for weights and inputs made by a rule.

Run in an environment of transformers 5 with torch and torchvision (versions.json has the versions of the last run):

    PYTHONPATH=. python tests/support/make_naflex_golden.py

Nothing of the package is imported here, so the tests compare with transformers alone.
"""

import json
from typing import Any

import numpy as np

from tests.support.make_golden import GOLDEN, make_images, make_weight, uniform, write
from tests.support.make_siglip_golden import VOCAB_SIZE

NUM_PATCHES = 20  # of the inputs, padding included; more than the 16 position embeddings of the tiny model
GRIDS = ((4, 4), (2, 5), (1, 17))  # rows and columns of the images: as the position embeddings, coarser, finer
PROCESSORS: dict[str, dict[str, Any]] = {"tiny": {"patch_size": 8, "max_num_patches": NUM_PATCHES}, "default": {}}


def _case(width: int, inner: int, heads: int, layers: int, patch: int, num_patches: int) -> dict[str, Any]:
    tower = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }
    return {
        "model_type": "siglip2",
        "text_config": tower | {"vocab_size": VOCAB_SIZE, "projection_size": width, "max_position_embeddings": 16},
        "vision_config": tower | {"patch_size": patch, "num_patches": num_patches},
    }


# A tiny one of several layers, and one layer of each published size of towers.
CASES = {
    "tiny": _case(64, 192, 4, 3, 8, 16),
    "siglip2-base-patch16-naflex": _case(768, 3072, 12, 1, 16, 256),
    "siglip2-so400m-patch16-naflex": _case(1152, 4304, 16, 1, 16, 256),
}


def make_inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return three images of the grids and two texts."""
    dim = 3 * config["vision_config"]["patch_size"] ** 2
    shapes = np.asarray(GRIDS, np.int32)
    mask = (np.arange(NUM_PATCHES) < shapes.prod(axis=1)[:, None]).astype(np.int32)
    ids = np.abs(uniform("input_ids", (2, 16)) * 1e6).astype(np.int32) % VOCAB_SIZE
    pixels = uniform("pixel_values", (len(GRIDS), NUM_PATCHES, dim)) * mask[..., None]
    return {
        "input_ids": ids,
        "pixel_values": pixels.astype(np.float32),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def main() -> None:
    import torch
    from transformers import Siglip2Config, Siglip2Model
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    arrays, shapes = {}, {}
    for name, config in CASES.items():
        model = Siglip2Model(Siglip2Config(**config)).eval()
        weights = {
            key: torch.from_numpy(np.asarray(make_weight(key, value.shape)))
            for key, value in model.state_dict().items()
        }
        model.load_state_dict(weights)
        shapes[name] = {key: list(value.shape) for key, value in weights.items()}
        with torch.no_grad():
            output = model(**{key: torch.from_numpy(value) for key, value in make_inputs(config).items()})
        for key in ("logits_per_image", "text_embeds", "image_embeds"):
            arrays[f"{name}|{key}"] = output[key].numpy()
    for name, settings in PROCESSORS.items():
        processor = Siglip2ImageProcessorPil(**settings)
        folder = GOLDEN / f"naflex_{name}"
        processor.save_pretrained(folder)
        given = processor(make_images(), return_tensors="np")
        pixels = given["pixel_values"].astype(np.float32)
        # Of the large ones the sums of each patch suffice.
        arrays[f"{name}|pixel_values"] = pixels if name == "tiny" else pixels.sum(axis=-1)
        arrays[f"{name}|spatial_shapes"] = np.asarray(given["spatial_shapes"], np.int32)
        arrays[f"{name}|pixel_attention_mask"] = np.asarray(given["pixel_attention_mask"], np.int32)
    (GOLDEN / "naflex_shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    write("naflex", arrays, ("torch", "transformers"))


if __name__ == "__main__":
    main()
