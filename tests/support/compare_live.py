"""Print the largest errors of our models against transformers and open_clip, live and in both directions.

    PYTHONPATH=. python -m tests.support.compare_live --python=ENVIRONMENT/bin/python

ENVIRONMENT has transformers 5, torch, torchvision and open_clip_torch. "read": the other package makes random weights
and saves them, and we open its folder. "written": we make random weights and write the folder that it opens. The models
are tiny ones, one layer of each named size of SigLIP, and one layer of open_clip's sizes (timm's towers are whole).
The vocabulary has 1,000 tokens. The table is in docs/models.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SIDE_FLAG = "--side"  # starts this file as the other package's process
VOCAB_SIZE = 1000
OUTPUTS = ("image_embeds", "text_embeds", "logits_per_image")
OPEN_CLIP_SIZES = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-L-14-CLIPA",
    "ViT-H-14-CLIPA",
    "ViT-B-16-SigLIP",
    "ViT-B-32-SigLIP2-256",
)


def other_side() -> None:
    """Answer each line on standard input, {"do", "package", "folder", "config"}, with a line."""
    for line in sys.stdin:
        task = json.loads(line)
        (in_transformers if task["package"] == "transformers" else in_open_clip)(task)
        print("done", flush=True)


def in_transformers(task: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    folder = Path(task["folder"])
    if task["do"] == "save":
        torch.manual_seed(0)
        config = AutoConfig.for_model(**task["config"])
        model = AutoModel.from_config(config)
        with torch.no_grad():
            model.logit_scale.fill_(2.3)
        model.save_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with np.load(task["inputs"]) as arrays, torch.no_grad():
        output = model(**{name: torch.from_numpy(arrays[name]) for name in arrays.files})
    np.savez(folder / "outputs.npz", **{name: output[name].numpy() for name in OUTPUTS})


def in_open_clip(task: dict[str, Any]) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = Path(task["folder"])
    if task["do"] == "save":
        torch.manual_seed(0)
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": task["config"], "preprocess_cfg": {}}))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with np.load(task["inputs"]) as arrays, torch.no_grad():
        image = model.eval().encode_image(torch.from_numpy(arrays["pixel_values"]), normalize=True)
        text = model.encode_text(torch.from_numpy(arrays["input_ids"]).long(), normalize=True)
        bias = 0 if model.logit_bias is None else model.logit_bias
        logits = model.logit_scale.exp() * image @ text.T + bias
    np.savez(folder / "outputs.npz", image_embeds=image, text_embeds=text, logits_per_image=logits)


def open_clip_config(python: str, name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a size with one layer a tower, if the tower isn't timm's."""
    program = "import json, sys, open_clip; print(json.dumps(open_clip.get_model_config(sys.argv[1])))"
    done = subprocess.run([python, "-c", program, name], check=True, capture_output=True, text=True)
    config = json.loads(done.stdout)
    config["text_cfg"] |= {"layers": 1, "vocab_size": VOCAB_SIZE}
    if "timm_model_name" not in config["vision_cfg"]:
        config["vision_cfg"]["layers"] = 1
    return config


def make_inputs(config: Any) -> dict[str, np.ndarray]:
    """Return two images and three texts; the largest id ends a text of end pooling."""
    rng, text = np.random.default_rng(0), config.text
    ids = rng.integers(3, text.vocab_size - 1, (3, text.context_length), np.int32)
    for row, end in enumerate((text.context_length - 1, text.context_length // 2, 4)):
        ids[row, end], ids[row, end + 1 :] = text.vocab_size - 1, 0
    if config.vision.any_aspect:
        return {"input_ids": ids} | make_patches(config.vision.patch_size, rng)
    return {
        "input_ids": ids,
        "pixel_values": rng.standard_normal((2, 3, config.vision.image_size, config.vision.image_size), np.float32),
    }


def make_patches(patch_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return three images of different aspects, as Siglip2ImageProcessor returns images."""
    shapes = np.asarray([(16, 16), (5, 51), (20, 8)], np.int32)
    mask = (np.arange(256) < shapes.prod(axis=1)[:, None]).astype(np.int32)
    pixels = rng.standard_normal((3, 256, 3 * patch_size**2), np.float32) * mask[..., None].astype(np.float32)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def errors(folder: Path, inputs: dict[str, np.ndarray]) -> list[float]:
    """Return our largest error of each output over the reference's largest value."""
    from clip_har_jax import load_model

    output = load_model(str(folder))(**inputs)
    with np.load(folder / "outputs.npz") as expected:
        pairs = [(np.asarray(getattr(output, name)), expected[name]) for name in OUTPUTS]
    return [float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs]


def cases(python: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the package and its configuration of each model."""
    import dataclasses

    from clip_har_jax.models.families import NAMED_SIZES, config_to_hf
    from clip_har_jax.models.siglip import SiglipConfig
    from tests.support.make_open_clip_golden import CASES

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, size in NAMED_SIZES.items():
        if isinstance(size, SiglipConfig):
            layers: dict[str, Any] = {} if name == "siglip-tiny" else {"num_layers": 1}
            text = dataclasses.replace(size.text, vocab_size=VOCAB_SIZE, eos_token_id=VOCAB_SIZE - 1, **layers)
            small = dataclasses.replace(size, text=text, vision=dataclasses.replace(size.vision, **layers))
            found[name] = "transformers", config_to_hf(small)
    found |= {f"open_clip tiny, {name}": ("open_clip", config) for name, config in CASES.items()}
    return found | {f"open_clip {name}": ("open_clip", open_clip_config(python, name)) for name in OPEN_CLIP_SIZES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with open_clip_torch and transformers")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    arguments = parser.parse_args()
    from clip_har_jax.models.open_clip import write_open_clip
    from clip_har_jax.models.params import init_params
    from clip_har_jax.models.pretrained import read_config, write_params

    command = [arguments.python, __file__, SIDE_FLAG]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(**task: Any) -> None:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write(json.dumps(task) + "\n")
        other.stdin.flush()
        if other.stdout.readline() != "done\n":
            raise RuntimeError(f"the other side ended with exit code {other.wait()}")

    print("| Model | Direction | Image embeddings | Text embeddings | Logits |\n|---|---|---|---|---|")
    for name, (package, config) in cases(arguments.python).items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            read, written, inputs_file = (Path(temporary) / part for part in ("read", "written", "inputs.npz"))
            ours = config_of(package, config, Path(temporary) / "config")
            inputs = make_inputs(ours)
            np.savez(inputs_file, allow_pickle=False, **inputs)
            ask(do="save", package=package, folder=str(read), config=config, inputs=str(inputs_file))
            assert read_config(read) == ours, (read_config(read), ours)
            write = write_params if package == "transformers" else write_open_clip
            write(written, ours, init_params(ours, seed=1))
            ask(do="run", package=package, folder=str(written), config=config, inputs=str(inputs_file))
            for direction, folder in (("read", read), ("written", written)):
                row = " | ".join(f"{error:.1e}" for error in errors(folder, inputs))
                print(f"| {name} | {direction} | {row} |", flush=True)
    other.communicate()


def config_of(package: str, config: dict[str, Any], folder: Path) -> Any:
    """Return our configuration of the other package's."""
    from clip_har_jax.models.pretrained import read_config

    folder.mkdir()
    if package == "open_clip":
        config = {"model_cfg": config}
    name = {"open_clip": "open_clip_config.json"}.get(package, "config.json")
    (folder / name).write_text(json.dumps(config))
    return read_config(folder)


if __name__ == "__main__":
    other_side() if SIDE_FLAG in sys.argv else main()
