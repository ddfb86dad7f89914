"""The torch side of benchmarks.evaluate: a plain loop over files with transformers' CLIPModel and image processor."""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from PIL import Image


def main() -> None:
    folder, photos, batch_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    files = sorted(photos.rglob("*.jpg"))
    print(json.dumps({"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}), flush=True)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for start in range(0, len(files), batch_size):
                images = [Image.open(path).convert("RGB") for path in files[start : start + batch_size]]
                outputs = model.get_image_features(**processor(images=images, return_tensors="pt"))
                features = outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output
                features = features / features.norm(dim=-1, keepdim=True)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        norm = float(features.norm())
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "norm": norm}), flush=True)


if __name__ == "__main__":
    main()
