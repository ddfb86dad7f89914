"""Writes tests/golden/open_clip*: the outputs of open_clip's models, for weights and inputs made by a rule.

Run in an environment of open_clip_torch with its torch, torchvision and timm, and transformers 5 (versions.json has the
versions of the last run):

    PYTHONPATH=. python tests/support/make_open_clip_golden.py

Nothing of the package is imported here, so the tests compare with open_clip alone.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.make_golden import GOLDEN, make_images, make_vocabulary, make_weight, uniform, write, write_tokenizer

PROMPTS = ("a person riding a bike.", "Riding & BIKES, now", "person", "riding &amp; person")
FOLDERS = {"gelu": "open_clip_clip", "clipa": "open_clip_clipa", "siglip": "open_clip_siglip"}
SIZE = 32
_VISION = {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
_TEXT = {"context_length": 16, "vocab_size": len(make_vocabulary()[0]), "width": 32, "heads": 4, "layers": 2}
_PLAIN = {"embed_dim": 24, "vision_cfg": _VISION, "text_cfg": _TEXT | {"hf_tokenizer_name": "local"}}
_CLIPA = {
    "embed_dim": 24,
    "vision_cfg": _VISION | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": _TEXT
    | {"vocab_size": 40, "pool_type": "last", "no_causal_mask": True, "hf_tokenizer_name": "local"}
    | {"tokenizer_kwargs": {"strip_sep_token": True}},
}
_SIGLIP = {
    "embed_dim": 768,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 256,
        "timm_model_name": "vit_base_patch32_siglip_256",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": _TEXT
    | {"vocab_size": 400, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    | {"act_kwargs": {"approximate": "tanh"}, "hf_tokenizer_name": "local"}
    | {"tokenizer_kwargs": {"clean": "canonicalize"}},
}
CASES: dict[str, dict[str, Any]] = {
    "gelu": _PLAIN,
    "quick_gelu": _PLAIN | {"quick_gelu": True},
    "custom_text": _PLAIN | {"custom_text": True},
    "clipa": _CLIPA,
    "siglip": _SIGLIP,
}
PREPROCESS = {
    "gelu": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"},
    "clipa": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    "siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}


def make_inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return two images and three texts; the largest id of each ends it, at another position."""
    text, size = config["text_cfg"], config["vision_cfg"]["image_size"]
    length, vocab_size = text["context_length"], text["vocab_size"]
    ids = np.abs(uniform("input_ids", (3, length)) * 1e6).astype(np.int32) % (vocab_size - 2)
    for row, end in enumerate((length - 1, length // 2, 2)):
        ids[row, end], ids[row, end + 1 :] = vocab_size - 1, 0
    return {"input_ids": ids, "pixel_values": uniform("pixel_values", (2, 3, size, size))}


def write_config(folder: Path, name: str) -> None:
    preprocess = PREPROCESS.get(name, PREPROCESS["gelu"])
    values = {"model_cfg": CASES[name], "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(values, indent=1) + "\n")


def write_folder_tokenizer(folder: Path, name: str) -> None:
    if name == "siglip":
        for file in (GOLDEN / "siglip2_tokenizer").glob("tokenizer*.json"):
            shutil.copy(file, folder)
    elif name == "clipa":
        from transformers import BertTokenizer

        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "a",
            "person",
            "riding",
            "bike",
            "##s",
            "&",
            ".",
            ",",
            "now",
        ]
        BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder)
    else:
        write_tokenizer(folder)
        settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def run(folder: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Return what open_clip gives for a case, and the shapes of its weights."""
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    write_config(folder, name)
    write_folder_tokenizer(folder, name)
    with torch.no_grad():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        weights = {key: torch.from_numpy(np.asarray(make_weight(key, shape))) for key, shape in shapes.items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        inputs = {key: torch.from_numpy(value) for key, value in make_inputs(CASES[name]).items()}
        image = model.eval().encode_image(inputs["pixel_values"], normalize=True)
        text = model.encode_text(inputs["input_ids"].long(), normalize=True)
        bias = 0 if model.logit_bias is None else model.logit_bias
        arrays = {
            "image_embeds": image,
            "text_embeds": text,
            "logits_per_image": model.logit_scale.exp() * image @ text.T + bias,
        }
        if name in FOLDERS:
            arrays["tokens"] = open_clip.get_tokenizer(f"local-dir:{folder}")(list(PROMPTS)).int()
            if name != "siglip":  # whose images are large
                arrays["pixels"] = torch.stack([preprocess(Image.fromarray(image)) for image in make_images()])
    return {f"{name}|{key}": value.numpy() for key, value in arrays.items()}, shapes


if __name__ == "__main__":
    arrays: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            outputs, shapes[name] = run(Path(temporary), name)
            arrays |= outputs
            if name in FOLDERS:
                shutil.copytree(temporary, GOLDEN / FOLDERS[name], dirs_exist_ok=True)
                (GOLDEN / FOLDERS[name] / "open_clip_model.safetensors").unlink()
    (GOLDEN / "open_clip_shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    write("open_clip", arrays, ("open_clip_torch", "timm", "torch", "torchvision", "transformers"))
