"""Writes tests/golden: what Hugging Face's own CLIPs compute, for weights and inputs that a rule repeats anywhere.

Run in an environment of transformers 5 with torch, then in one of transformers 4.57 with Flax (versions.json has the
versions of the last run):

    python tests/support/make_golden.py torch
    python tests/support/make_golden.py flax

Nothing of this project is imported here, so that what the tests compare with is transformers' alone.
"""

import json
import platform
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = ("a person riding a bike.", "Riding", "naïve 😀 bikes, 2 of them")


def _case(text: Mapping[str, int | str], vision: Mapping[str, int | str], projection_dim: int) -> dict[str, Any]:
    return {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": projection_dim}


def _text(width: int, heads: int, **more: int) -> dict[str, int]:
    layer = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return layer | {"num_hidden_layers": 1} | more


def _vision(width: int, heads: int, patch: int, image: int = 224, layers: int = 1) -> dict[str, int]:
    return _text(width, heads) | {"patch_size": patch, "image_size": image, "num_hidden_layers": layers}


# A tiny one of several layers, and the published sizes with one layer a tower.
CASES = {
    "tiny": _case(_text(64, 2, num_hidden_layers=2, max_position_embeddings=24), _vision(128, 4, 8, 64, layers=4), 64),
    "ViT-B/32": _case(_text(512, 8), _vision(768, 12, 32), 512),
    "ViT-B/16": _case(_text(512, 8), _vision(768, 12, 16), 512),
    "ViT-L/14": _case(_text(768, 12), _vision(1024, 16, 14), 768),
    "ViT-L/14@336": _case(_text(768, 12), _vision(1024, 16, 14, 336), 768),
}


def uniform(name: str, shape: Iterable[int]) -> np.ndarray:
    """float32 of mean 0 and deviation 1, from `name` alone; numpy promises this generator's stream for good."""
    shape = tuple(shape)
    count = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count // 2 + 1).view(np.uint32)[:count]
    return ((bits >> 8).astype(np.float32) * np.float32(12**0.5 / 2**24) - np.float32(3**0.5)).reshape(shape)


def make_weight(name: str, shape: Iterable[int]) -> np.ndarray:
    """Return the weight of this PyTorch name: scaled so that activations neither vanish nor grow."""
    shape = tuple(shape)
    noise = uniform(name, shape)
    if "norm" in name and name.endswith("weight"):
        return 1 + np.float32(0.1) * noise
    if len(shape) >= 2:
        return noise * np.float32(np.prod(shape[1:]) ** -0.5)
    return np.full(shape, 2.6592, np.float32) if name == "logit_scale" else np.float32(0.1) * noise


def make_inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Two images and three texts, of all, half and three tokens."""
    text, vision = config["text_config"], config["vision_config"]
    length, vocab_size = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    ids = np.abs(uniform("input_ids", (3, length)) * 1e6).astype(np.int32) % (vocab_size - 2)
    mask = np.zeros_like(ids)
    ids[:, 0] = vocab_size - 2
    for row, end in enumerate((length - 1, length // 2, 2)):
        ids[row, end], ids[row, end + 1 :] = vocab_size - 1, text.get("pad_token_id", 1)
        mask[row, : end + 1] = 1
    size = vision["image_size"]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": uniform("pixel_values", (2, 3, size, size))}


def make_images() -> list[np.ndarray]:
    """Two uint8 images, lying and standing."""
    return [(uniform(f"image {shape}", shape) * 70 + 128).astype(np.uint8) for shape in ((20, 31, 3), (37, 24, 3))]


def make_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a CLIP vocabulary of every byte and a few words: token -> id, and the merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's order of bytes
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = []
    for word in ("person", "riding", "bike"):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
    tokens = dict.fromkeys([*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)])
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def small(hidden_act: str = "quick_gelu", **text: int) -> dict[str, Any]:
    """Return the configuration of the quirk folders, a few KB of weights."""
    ids = {"vocab_size": 40, "bos_token_id": 38, "eos_token_id": 39, "max_position_embeddings": 24}
    text_config: dict[str, int | str] = {**_text(8, 2), "num_hidden_layers": 2, "hidden_act": hidden_act, **ids, **text}
    return _case(text_config, {**_vision(8, 2, 8, 16, layers=2), "hidden_act": hidden_act}, 8)


def small_with_vocabulary() -> dict[str, Any]:
    vocab_size = len(make_vocabulary()[0])
    return small(vocab_size=vocab_size, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)


def outputs(model: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is kept of a model's output; of hidden values the last patch's."""
    output = model(**inputs)
    kept = {name: output[name] for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")}
    kept["image_tokens"] = output["vision_model_output"]["last_hidden_state"][:, -1]
    return {name: np.asarray(value, np.float32) for name, value in kept.items()}


def write_tokenizer(folder: Path) -> None:
    vocabulary, merges = make_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")


def write(kind: str, arrays: dict[str, np.ndarray], packages: Iterable[str]) -> None:
    np.savez_compressed(GOLDEN / f"{kind}.npz", allow_pickle=False, **arrays)
    path = GOLDEN / "versions.json"
    versions = json.loads(path.read_text()) if path.is_file() else {}
    versions[kind] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    path.write_text(json.dumps(versions, indent=2, sort_keys=True) + "\n")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def run_processed(
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], tokenizer: Any, image_processor: Any
) -> dict[str, np.ndarray]:
    """From texts and images to logits; the processed inputs are kept as well."""
    texts = tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=24, return_tensors="np")
    images = image_processor(make_images(), return_tensors="np")
    inputs = {name: np.asarray(texts[name], np.int32) for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = np.asarray(images["pixel_values"], np.float32)
    return inputs | run(inputs)


def main_torch() -> None:
    """Return the cases and most quirk folders, by transformers 5 and torch."""
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.set_grad_enabled(False)

    def make(config: dict[str, Any]) -> CLIPModel:
        model = CLIPModel(CLIPConfig(**config)).eval()
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(make_weight(name, value.shape))))
        return model

    def run(model: CLIPModel, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return outputs(model, {name: torch.from_numpy(value) for name, value in inputs.items()})

    arrays: dict[str, np.ndarray] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, config in CASES.items():
        model = make(config)
        shapes[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
        arrays |= prefixed(name, run(model, make_inputs(config)))
    vocabulary = make(small_with_vocabulary())
    shapes["vocabulary_size_int"] = {key: list(value.shape) for key, value in vocabulary.state_dict().items()}
    (GOLDEN / "shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")
    for name in write_torch_folders(make):
        model = CLIPModel.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
        arrays |= prefixed(name, run(model, make_inputs(model.config.to_dict())))
    folder = GOLDEN / "shortest_edge"
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, image_processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    arrays |= prefixed("shortest_edge", run_processed(lambda inputs: run(model, inputs), tokenizer, image_processor))
    write("torch", arrays, ("torch", "transformers", "numpy", "safetensors", "tokenizers", "pillow"))


def write_torch_folders(make: Callable[[dict[str, Any]], Any]) -> list[str]:
    """One folder for each quirk of published checkpoints, saved by transformers 5; returns their names."""
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    folders = {
        "quick_gelu": make(small()),
        "gelu": make(small(hidden_act="gelu")),
        "eos_token_id_2": make(small(eos_token_id=2)),
        "position_ids": make(small()),
        "float16": make(small()).half(),
        "bfloat16": make(small()).bfloat16(),
        "missing_keys": make(small()),
        "config_dict": make(small()),
        "shortest_edge": make(small_with_vocabulary()),
    }
    for tower in (folders["position_ids"].text_model, folders["position_ids"].vision_model):
        ids = tower.embeddings.position_ids
        tower.embeddings.register_buffer("position_ids", ids.clone(), persistent=True)  # as transformers before 4.31
    for name, model in folders.items():
        model.save_pretrained(GOLDEN / name)
    make(small()).save_pretrained(GOLDEN / "sharded", max_shard_size="8KB")
    edit_json(GOLDEN / "missing_keys" / "config.json", drop_defaults)
    edit_json(GOLDEN / "config_dict" / "config.json", move_to_config_dict)
    with tempfile.TemporaryDirectory() as vocabulary:
        write_tokenizer(Path(vocabulary))
        CLIPTokenizer.from_pretrained(vocabulary).save_pretrained(GOLDEN / "shortest_edge")
    CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=16).save_pretrained(GOLDEN / "shortest_edge")
    return [*folders, "sharded"]


def drop_defaults(config: dict[str, Any]) -> None:
    """Leaves out what has its default value, as older transformers did."""
    for key in ("logit_scale_init_value", "initializer_factor", "architectures"):
        del config[key]
    for tower in (config["text_config"], config["vision_config"]):
        for key in ("hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor"):
            del tower[key]


def move_to_config_dict(config: dict[str, Any]) -> None:
    """Return the towers' sizes under the names of transformers 4.20, beside other values that no longer count."""
    for name in ("text_config", "vision_config"):
        config[f"{name}_dict"] = config[name]
        config[name] = config[name] | {"hidden_act": "gelu", "num_hidden_layers": 3, "eos_token_id": 7}
    del config["text_config_dict"]["hidden_act"]


def main_flax() -> None:
    """Return the cases, and a folder like those of 2021, by transformers 4.57 and Flax."""
    from safetensors.numpy import save_file
    from transformers import (  # type: ignore[attr-defined]  # of version 4
        CLIPConfig,
        CLIPImageProcessor,
        CLIPTokenizer,
        FlaxCLIPModel,
    )

    def make(config: dict[str, Any], shapes: dict[str, list[int]]) -> FlaxCLIPModel:
        with tempfile.TemporaryDirectory() as folder:
            weights = {name: np.asarray(make_weight(name, shape)) for name, shape in shapes.items()}
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            CLIPConfig(**config).save_pretrained(folder)
            return FlaxCLIPModel.from_pretrained(folder)

    all_shapes = json.loads((GOLDEN / "shapes.json").read_text())
    arrays: dict[str, np.ndarray] = {}
    for name, config in CASES.items():
        arrays |= prefixed(name, outputs(make(config, all_shapes[name]), make_inputs(config)))
    folder = GOLDEN / "vocabulary_size_int"
    config = small_with_vocabulary()
    make(config, all_shapes[folder.name]).save_pretrained(folder)
    write_tokenizer(folder)
    CLIPImageProcessor(size=16, crop_size=16).save_pretrained(folder)
    edit_json(folder / "preprocessor_config.json", lambda values: values.update(size=16, crop_size=16))
    model, tokenizer = FlaxCLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    image_processor = CLIPImageProcessor.from_pretrained(folder)
    arrays |= prefixed(folder.name, run_processed(lambda inputs: outputs(model, inputs), tokenizer, image_processor))
    write("flax", arrays, ("flax", "jax", "transformers", "numpy", "safetensors", "tokenizers", "pillow"))


def prefixed(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}|{key}": value for key, value in arrays.items()}


if __name__ == "__main__":
    {"torch": main_torch, "flax": main_flax}[sys.argv[1]]()
