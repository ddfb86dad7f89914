"""Drawn images with several labels, in a CSV: each label is a coloured square at a place of its own."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"run": (255, 0, 0), "sit": (0, 255, 0), "wave": (0, 0, 255)}


def write_multi_label_images(folder: Path, count: int, seed: int = 0) -> str:
    """Write images of 32 px and a CSV of their labels; return its SPEC. About one in eight has no label."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["filename,label"]
    for i in range(count):
        image = rng.integers(90, 130, (32, 32, 3), dtype=np.uint8)
        own = [label for label in COLOURS if rng.random() < 0.5]
        for k, (label, colour) in enumerate(COLOURS.items()):
            if label in own:
                image[4:16, 1 + 10 * k : 10 + 10 * k] = colour
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'|'.join(own)}")
    (folder / "data.csv").write_text("\n".join(rows) + "\n")
    return f"csv:{folder}/data.csv"
