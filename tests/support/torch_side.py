"""Run by test_torch.py in an environment of torch and transformers alone.

    python torch_side.py save FOLDER SIZE      a randomly initialised CLIPModel or SiglipModel, as transformers saves it
    python torch_side.py run FOLDER                     inputs.npz of the folder -> outputs.npz

Where the folder has a tokenizer and an image processor, `run` also opens these and keeps what they give.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

TINY: dict[str, Any] = {
    "text_config": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 40,
        "patch_size": 8,
    },
    "projection_dim": 24,
}


def save(folder: Path, size: str) -> None:
    torch.manual_seed(0)
    sizes = TINY if "tiny" in size else {}
    if size.startswith("siglip"):
        sizes = {key: dict(value) for key, value in sizes.items() if key.endswith("_config")}
        sizes.get("text_config", {})["projection_size"] = sizes.get("vision_config", {}).get("hidden_size")
        SiglipModel(SiglipConfig(**sizes)).save_pretrained(folder)
    else:
        CLIPModel(CLIPConfig(**sizes)).save_pretrained(folder)


def run(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder).eval()
    with np.load(folder / "inputs.npz") as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    texts, images = inputs.pop("texts", None), inputs.pop("images", None)
    with torch.no_grad():
        output = model(**inputs)
    kept = {name: output[name].numpy() for name in ("logits_per_image", "text_embeds", "image_embeds")}
    if images is not None:
        tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
        typed = [bytes(row).rstrip(b"\0").decode() for row in texts.numpy()]
        kept["input_ids"] = tokenizer(
            typed, padding="max_length", truncation=True, max_length=inputs["input_ids"].shape[1], return_tensors="np"
        )["input_ids"]
        kept["pixel_values"] = processor(list(images.numpy()), return_tensors="np")["pixel_values"]
    np.savez(folder / "outputs.npz", **kept)


if __name__ == "__main__":
    save(Path(sys.argv[2]), sys.argv[3]) if sys.argv[1] == "save" else run(Path(sys.argv[2]))
