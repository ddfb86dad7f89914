"""Print how many texts have the same tokens here as in open_clip, live, and the largest difference between pixels.

    PYTHONPATH=. python -m tests.support.compare_live_inputs --python=ENVIRONMENT/bin/python

ENVIRONMENT has open_clip_torch, whose package holds CLIP's vocabulary; it is written as the files of a model folder,
which we open. The images have many sizes and aspects. The result is in docs/models.md.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SIDE_FLAG = "--side"  # starts this file as the other package's process
MODELS = ("ViT-B-32", "ViT-L-14-336-quickgelu")
TRANSFORMS: dict[str, dict[str, Any]] = {
    "shortest": {"interpolation": "bicubic", "resize_mode": "shortest"},
    "squash": {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
}
TEXTS = (
    *("a photo of a person riding a bike.", "Riding a BIKE, at 3:45pm -- now!", "  two   spaces\tand\nlines ", ""),
    *("naïve café façade", "ein Mädchen fährt Fahrrad", "İstanbul straße", "日本語のテキスト", "किसी व्यक्ति"),
    *("😀 smile 👩\u200d🚀", "it's they're I'll don't", "100,000.50 $5 x2 3d mp3", "_under_score_ #hash @at A.B.C."),
    *("a" * 200, "word " * 120, "\u200bzero width", "Ω≈ç√", "rock &amp; roll", "&lt;tag&gt;"),
    *("“quotes” — dash…", "ſtrange ﬁ ligature"),  # ftfy changes these
)
SIZES = ((224, 224), (300, 200), (200, 300), (37, 500), (1000, 768), (225, 224), (64, 64), (480, 641))


def make_pictures() -> list[np.ndarray]:
    """Return pictures of coloured blocks, uint8 [h, w, 3] each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, (max(2, h // 20), max(2, w // 20), 3), dtype=np.uint8) for h, w in SIZES]
    return [
        np.asarray(Image.fromarray(block).resize((w, h), Image.Resampling.BICUBIC))
        for block, (h, w) in zip(blocks, SIZES, strict=True)
    ]


def other_side(root: Path) -> None:
    """Write a folder for each model, with its tokenizer's files, and open_clip's tokens and pixels."""
    import open_clip
    import torch
    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from PIL import Image

    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    for name in MODELS:
        folder, config = root / name, open_clip.get_model_config(name)
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (folder / "model_cfg.json").write_text(json.dumps(config))
        arrays = {"tokens": open_clip.get_tokenizer(name)(list(TEXTS)).numpy()}
        for kind, settings in TRANSFORMS.items():
            transform = open_clip.image_transform(config["vision_cfg"]["image_size"], is_train=False, **settings)
            arrays[kind] = torch.stack([transform(Image.fromarray(picture)) for picture in make_pictures()]).numpy()
        np.savez(folder / "theirs.npz", allow_pickle=False, **arrays)


def compare(folder: Path) -> None:
    """Print the differences of one model."""
    from clip_har_jax.models.open_clip import read_open_clip_tokenizer
    from clip_har_jax.models.pretrained import read_config, read_preprocess
    from clip_har_jax.preprocess import evaluation_transform
    from tests.support.normalization import normalize

    model = json.loads((folder / "model_cfg.json").read_text())
    with np.load(folder / "theirs.npz") as arrays:
        theirs = dict(arrays)
    for kind, settings in TRANSFORMS.items():
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": settings}))
        config = read_config(folder)
        preprocess = read_preprocess(folder, config.vision.image_size)
        images = np.stack([evaluation_transform(picture, preprocess) for picture in make_pictures()])
        pixels = normalize(images, preprocess.mean, preprocess.std).transpose(0, 3, 1, 2)
        print(f"{folder.name}, {kind}: largest difference of pixels {np.abs(pixels - theirs[kind]).max():.1e}")
    ids, _ = read_open_clip_tokenizer(folder)(TEXTS, config.text.context_length)
    differing = [text for text, row, other in zip(TEXTS, ids, theirs["tokens"], strict=True) if (row != other).any()]
    print(f"{folder.name}: {len(TEXTS) - len(differing)} of {len(TEXTS)} texts have equal tokens; others: {differing}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with open_clip_torch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([arguments.python, __file__, SIDE_FLAG, temporary], check=True)
        for name in MODELS:
            compare(Path(temporary) / name)


if __name__ == "__main__":
    other_side(Path(sys.argv[-1])) if SIDE_FLAG in sys.argv else main()
