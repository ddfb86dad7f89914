"""The torch side of `benchmarks.input_pipeline`: DataLoader, with the PIL transforms that torchvision would run."""

import csv
import json
import math
import random
import sys
import time

import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


class Photos(torch.utils.data.Dataset):
    """RandomResizedCrop (bicubic), RandomHorizontalFlip, ToTensor, Normalize."""

    def __init__(self, files: str, size_px: int, scale_min: float):
        with open(files, newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.ids = {label: i for i, label in enumerate(sorted({row["label"] for row in self.rows}))}
        self.size_px, self.scale_min = size_px, scale_min

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row = self.rows[i]
        with open(row["filename"], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = image.crop(self._box(*image.size)).resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return tensor.sub_(MEAN).div_(STD), self.ids[row["label"]]

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(self.scale_min, 1)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side


def main(files: str, workers: int, size_px: int, scale_min: float, batch_size: int) -> None:
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Photos(files, size_px, scale_min),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )
    print(json.dumps({"versions": {"torch": torch.__version__}}), flush=True)
    for line in sys.stdin:
        left = json.loads(line)["batches"]
        begin = time.perf_counter()
        while left:
            for _ in loader:
                left -= 1
                if not left:
                    break
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
